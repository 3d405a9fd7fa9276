-- Tests of all models that have answers to a key set: each beside the innocent models of the source, as many answers of each as the
-- tested model gave to a key. A key is near for the nearest tenth of these models, at least one; models that are equally near are
-- counted together. Innocent models with fewer answers than the tested one are left out.
-- grain     one row per tested model and model compared (the tested one itself among them)
-- argument  key_set      id of the key set
WITH placed AS (
    SELECT
        answers.key_id,
        answers.suspect_id,
        row_number() OVER one_key AS n_answers,
        min(answers.distance) OVER one_key AS distance
    FROM answers
    JOIN keys ON keys.key_id = answers.key_id
    WHERE keys.key_set_id = key_set
    WINDOW one_key AS (
        PARTITION BY answers.key_id, answers.suspect_id
        ORDER BY answers.image_id
        ROWS UNBOUNDED PRECEDING
    )
),
labels AS (
    SELECT suspect_labels.suspect_id, label, coalesce(stratum, label) AS stratum
    FROM suspect_labels
    JOIN key_sets ON key_sets.source = suspect_labels.source
    WHERE key_sets.key_set_id = key_set
),
asked AS ( -- the keys of a model, how many answers it gave to each, and the nearest of them
    SELECT suspect_id, key_id, max(n_answers) AS n_answers, min(distance) AS distance
    FROM placed
    GROUP BY suspect_id, key_id
),
profiles AS ( -- models that answered the same keys, as often, are compared with the same innocent models
    SELECT suspect_id, dense_rank() OVER (ORDER BY list(key_id || ' ' || n_answers ORDER BY key_id)) AS profile
    FROM asked
    GROUP BY suspect_id
),
tested AS (
    SELECT
        asked.*,
        profiles.profile,
        count(*) OVER (PARTITION BY asked.suspect_id) AS n_keys,
        coalesce(labels.label = 'innocent', false) AS is_innocent
    FROM asked
    JOIN profiles ON profiles.suspect_id = asked.suspect_id
    LEFT JOIN labels ON labels.suspect_id = asked.suspect_id
),
innocents AS (
    SELECT
        asked.profile,
        asked.key_id,
        asked.n_keys,
        placed.suspect_id,
        placed.distance,
        count(*) OVER (PARTITION BY asked.profile, placed.suspect_id) AS n_answered
    FROM (SELECT DISTINCT profile, key_id, n_answers, n_keys FROM tested) AS asked
    JOIN placed ON placed.key_id = asked.key_id AND placed.n_answers = asked.n_answers
    JOIN labels ON labels.suspect_id = placed.suspect_id AND labels.label = 'innocent'
),
ranked AS (
    SELECT
        *,
        count(*) OVER (PARTITION BY profile, key_id) AS n_innocents,
        count(*) OVER (PARTITION BY profile, key_id ORDER BY distance) AS n_as_near -- itself and equal ones among them
    FROM innocents
    WHERE n_answered = n_keys
),
pairs AS ( -- a tested model that is not innocent is one more among the innocent ones
    SELECT
        tested.suspect_id,
        ranked.suspect_id AS compared_id,
        tested.key_id,
        tested.n_keys,
        tested.is_innocent,
        ranked.distance <= tested.distance AS is_as_near,
        greatest(1, floor(0.1 * (ranked.n_innocents + (NOT tested.is_innocent)::INT))) AS n_near,
        ranked.n_as_near + (NOT tested.is_innocent AND tested.distance <= ranked.distance)::INT AS n_as_near
    FROM tested
    JOIN ranked ON ranked.profile = tested.profile AND ranked.key_id = tested.key_id
),
own AS (
    SELECT
        tested.suspect_id,
        tested.key_id,
        tested.n_keys,
        coalesce(
            count_if(pairs.is_as_near) + (NOT tested.is_innocent)::INT <= max(pairs.n_near),
            true -- without innocent models it is the nearest one
        ) AS is_near
    FROM tested
    LEFT JOIN pairs ON pairs.suspect_id = tested.suspect_id AND pairs.key_id = tested.key_id
    GROUP BY tested.suspect_id, tested.key_id, tested.n_keys, tested.is_innocent
),
found AS (
    SELECT suspect_id, suspect_id AS compared_id, max(n_keys) AS n_keys, avg(is_near::INT) AS conf
    FROM own
    GROUP BY suspect_id
    UNION ALL
    SELECT suspect_id, compared_id, max(n_keys), avg((n_as_near <= n_near)::INT)
    FROM pairs
    WHERE compared_id <> suspect_id
    GROUP BY suspect_id, compared_id
)
SELECT found.suspect_id, found.compared_id, labels.label, labels.stratum, found.n_keys, found.conf
FROM found
LEFT JOIN labels ON labels.suspect_id = found.compared_id
