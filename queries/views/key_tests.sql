-- Tests of all models that have answers to a key set: each beside the innocent models of the source, as many answers of each as the
-- tested model gave to a key, at most those that the key set asks for. A key is near for the nearest tenth of these models, at least
-- one; models that are equally near are counted together. Innocent models with fewer answers than the tested one are left out; then,
-- or without a label, conf is null where no model is left to compare with.
-- A model that is not innocent is compared with one innocent model more than an innocent one is. For conf_among_equals one of them is
-- left out, by a hash of the model's id, so that both can be compared.
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
    JOIN key_sets ON key_sets.key_set_id = keys.key_set_id
    WHERE keys.key_set_id = (
        SELECT CASE
                WHEN key_set IN (SELECT key_set_id FROM key_sets) THEN key_set
                ELSE error('no key set ''' || key_set || '''; list them with: FROM key_sets')
            END
    )
    WINDOW one_key AS (
        PARTITION BY answers.key_id, answers.suspect_id
        ORDER BY answers.image_id
        ROWS UNBOUNDED PRECEDING
    )
    QUALIFY row_number() OVER one_key <= key_sets.n_answers
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
        row_number() OVER (PARTITION BY profile, key_id ORDER BY suspect_id) - 1 AS number,
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
        ranked.n_innocents,
        ranked.distance <= tested.distance AND ranked.suspect_id <> tested.suspect_id AS is_as_near,
        tested.is_innocent OR ranked.number <> md5_number_lower(tested.suspect_id) % ranked.n_innocents AS is_among_equals,
        greatest(1, floor(0.1 * (ranked.n_innocents + (NOT tested.is_innocent)::INT))) AS n_near,
        ranked.n_as_near + (NOT tested.is_innocent AND tested.distance <= ranked.distance)::INT AS n_as_near
    FROM tested
    JOIN ranked ON ranked.profile = tested.profile AND ranked.key_id = tested.key_id
),
own AS (
    SELECT
        suspect_id,
        key_id,
        n_keys,
        max(n_innocents) - is_innocent::INT AS n_compared,
        count_if(is_as_near) < max(n_near) AS is_near,
        count_if(is_as_near AND is_among_equals) < greatest(1, floor(0.1 * max(n_innocents))) AS is_near_among_equals
    FROM pairs
    GROUP BY suspect_id, key_id, n_keys, is_innocent
),
found AS (
    SELECT
        suspect_id,
        suspect_id AS compared_id,
        max(n_keys) AS n_keys,
        CASE WHEN max(n_compared) > 0 THEN avg(is_near::INT) END AS conf,
        CASE WHEN max(n_compared) > 1 THEN avg(is_near_among_equals::INT) END AS conf_among_equals
    FROM own
    GROUP BY suspect_id
    UNION ALL
    SELECT suspect_id, compared_id, max(n_keys), avg((n_as_near <= n_near)::INT), NULL
    FROM pairs
    WHERE compared_id <> suspect_id
    GROUP BY suspect_id, compared_id
)
SELECT
    tested.suspect_id,
    coalesce(found.compared_id, tested.suspect_id) AS compared_id,
    labels.label,
    labels.stratum,
    tested.n_keys,
    tested.n_answers,
    found.conf,
    found.conf_among_equals
FROM (SELECT suspect_id, max(n_keys) AS n_keys, sum(n_answers)::BIGINT AS n_answers FROM tested GROUP BY suspect_id) AS tested
LEFT JOIN found ON found.suspect_id = tested.suspect_id
LEFT JOIN labels ON labels.suspect_id = coalesce(found.compared_id, tested.suspect_id)
