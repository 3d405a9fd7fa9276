-- What the conf of each model is compared with: the conf of innocent models, per kind of them (stratum). Of a stratum with a single model
-- there is no p, since one model is no distribution.
-- source Zhang et al. 2024 (arXiv 2409.15781) for conf; threshold per key and p-value are ours
-- grain  one row per model and stratum, by model
-- param  $key_set      VARCHAR id of the key set
-- reads  key_tests
-- column suspect_id    VARCHAR the model that is tested
-- column conf          DOUBLE  in [0, 1]; share of the keys that are near
-- column stratum       VARCHAR
-- column n_innocents   BIGINT  innocent models of the stratum, without the tested one
-- column lowest_conf   DOUBLE  of the innocent models
-- column middle_conf   DOUBLE  their median
-- column highest_conf  DOUBLE
-- column p             DOUBLE  share of the innocent models and the tested one itself that have a conf at least as high
WITH tests AS (FROM key_tests($key_set)),
own AS (FROM tests WHERE suspect_id = compared_id)
SELECT
    own.suspect_id,
    own.conf,
    tests.stratum,
    count(*) AS n_innocents,
    min(tests.conf) AS lowest_conf,
    median(tests.conf) AS middle_conf,
    max(tests.conf) AS highest_conf,
    CASE WHEN count(*) > 1 THEN (1 + count_if(tests.conf >= own.conf)) / (1 + count(*)) END AS p
FROM own
JOIN tests ON tests.suspect_id = own.suspect_id AND tests.compared_id <> own.suspect_id
GROUP BY own.suspect_id, own.conf, tests.stratum
ORDER BY own.suspect_id, tests.stratum
