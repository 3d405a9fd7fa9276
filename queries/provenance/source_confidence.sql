-- How often each model's answers come near the source's pictures, and the p-value of that among innocent models.
-- source Zhang et al. 2024 (arXiv 2409.15781) for conf; threshold per key and p-value are ours
-- grain  one row per model with answers to the key set, highest conf first
-- param  $key_set      VARCHAR id of the key set
-- reads  key_tests, suspect_labels, key_sets
-- column suspect_id    VARCHAR
-- column label         VARCHAR innocent or infringing, where it is known
-- column stratum       VARCHAR kind of innocent
-- column rho           DOUBLE  in (0, 1]; share of its training images that the source has made, where known
-- column n_keys        BIGINT  keys that it answered
-- column conf          DOUBLE  in [0, 1]; share of them that are near; null without an innocent model to compare with
-- column n_innocents   BIGINT  innocent models that p rests on
-- column p             DOUBLE  the largest over the strata; null without one of two models, or if a stratum has lost all but one
WITH tests AS (FROM key_tests($key_set)),
own AS (FROM tests WHERE suspect_id = compared_id),
labels AS (
    SELECT suspect_labels.*
    FROM suspect_labels
    JOIN key_sets USING (source)
    WHERE key_sets.key_set_id = $key_set
),
innocents AS ( -- with answers
    SELECT labels.suspect_id, coalesce(labels.stratum, labels.label) AS stratum
    FROM labels
    JOIN own ON own.suspect_id = labels.suspect_id
    WHERE labels.label = 'innocent'
),
strata AS (
    SELECT
        own.suspect_id,
        innocents.stratum,
        count(innocents.suspect_id) AS n_declared,
        count(tests.compared_id) AS n,
        CASE WHEN n > 1 THEN (1 + count_if(tests.conf >= own.conf)) / (1 + n) END AS p
    FROM own
    JOIN innocents ON innocents.suspect_id <> own.suspect_id
    LEFT JOIN tests ON tests.suspect_id = own.suspect_id AND tests.compared_id = innocents.suspect_id
    GROUP BY own.suspect_id, innocents.stratum
),
nulls AS (
    SELECT
        suspect_id,
        coalesce(sum(n) FILTER (n > 1), 0)::BIGINT AS n_innocents,
        CASE WHEN NOT bool_or(n < 2 AND n_declared > 1) THEN max(p) END AS p
    FROM strata
    GROUP BY suspect_id
)
SELECT
    own.suspect_id,
    labels.label,
    labels.stratum,
    labels.rho,
    own.n_keys,
    own.conf,
    coalesce(nulls.n_innocents, 0) AS n_innocents,
    nulls.p
FROM own
LEFT JOIN nulls ON nulls.suspect_id = own.suspect_id
LEFT JOIN labels ON labels.suspect_id = own.suspect_id
ORDER BY own.conf DESC NULLS LAST, own.suspect_id
