-- How well conf tells infringing models from innocent ones, over the models that are labelled and have all the answers that the key set
-- asks for. An infringing model is compared with as many innocent ones as an innocent model is: one of them is left out, by a hash of its id.
-- The bootstrap draws infringing and innocent models apart, as often as there are; that conf of both depends on the same innocent
-- models is not part of the intervals. Without an infringing model and two innocent ones there is no row.
-- source Zhang et al. 2024 (arXiv 2409.15781), whose figures these are; the intervals are ours
-- grain  one row per stratum of innocent models, and one for all of them (stratum null) first
-- param  $key_set        VARCHAR id of the key set
-- param  $n_replicates   INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed           INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_draws, key_sets, key_tests, keys
-- column stratum         VARCHAR kind of innocent models; null: all of them
-- column n_infringing    BIGINT
-- column n_innocents     BIGINT
-- column auc             DOUBLE  in [0, 1]; share of the pairs of which the infringing model has the higher conf, equal ones count half
-- column auc_low         DOUBLE
-- column auc_high        DOUBLE
-- column accuracy        DOUBLE  in [0, 1]; share of models on the right side of the best threshold, both kinds with the same weight
-- column accuracy_low    DOUBLE
-- column accuracy_high   DOUBLE
-- column tpr_at_10_fpr   DOUBLE  in [0, 1]; share of infringing models above the conf that at most a tenth of the innocent ones exceeds
-- column tpr_low         DOUBLE
-- column tpr_high        DOUBLE
WITH own AS (
    SELECT suspect_id, label, stratum, conf_among_equals AS conf
    FROM key_tests($key_set)
    WHERE
        suspect_id = compared_id
        AND label IS NOT NULL
        AND conf_among_equals IS NOT NULL
        AND n_answers = (SELECT count(*) * max(n_answers) FROM keys JOIN key_sets USING (key_set_id) WHERE key_set_id = $key_set)
),
strata AS (
    SELECT NULL AS stratum
    UNION ALL
    SELECT DISTINCT stratum FROM own WHERE label = 'innocent'
),
sides AS ( -- infringing models are the same in every stratum
    SELECT false AS is_innocent, NULL AS stratum, suspect_id, conf FROM own WHERE label = 'infringing'
    UNION ALL
    SELECT true, strata.stratum, own.suspect_id, own.conf
    FROM strata
    JOIN own ON own.label = 'innocent' AND (strata.stratum IS NULL OR strata.stratum = own.stratum)
),
numbered AS (
    SELECT
        is_innocent,
        stratum,
        conf,
        count(*) OVER one_side AS n,
        row_number() OVER (one_side ORDER BY suspect_id) - 1 AS number
    FROM sides
    WINDOW one_side AS (PARTITION BY is_innocent, stratum)
),
hashes AS ( -- the two sides draw from hashes of their own
    SELECT replicate, place, false AS is_innocent, hash
    FROM bootstrap_draws((SELECT max(n) FROM numbered), $n_replicates, $seed)
    UNION ALL
    SELECT replicate, place, true, hash
    FROM bootstrap_draws((SELECT max(n) FROM numbered WHERE is_innocent), $n_replicates, $seed || ' innocent')
),
draws AS ( -- by conf, how often it is drawn; the replicate -1 takes every model once
    SELECT -1 AS replicate, is_innocent, stratum, conf, count(*) AS n_drawn
    FROM numbered
    GROUP BY is_innocent, stratum, conf
    UNION ALL
    SELECT hashes.replicate, numbered.is_innocent, numbered.stratum, numbered.conf, count(*)
    FROM (SELECT DISTINCT is_innocent, stratum, n FROM numbered) AS sizes
    JOIN hashes ON hashes.is_innocent = sizes.is_innocent AND hashes.place < sizes.n
    JOIN numbered
        ON numbered.is_innocent = sizes.is_innocent
        AND numbered.stratum IS NOT DISTINCT FROM sizes.stratum
        AND numbered.number = hashes.hash % sizes.n
    GROUP BY ALL
),
levels AS (
    SELECT strata.stratum, draws.replicate, draws.conf, draws.n_drawn AS infringing, 0 AS innocent
    FROM strata
    CROSS JOIN draws
    WHERE NOT draws.is_innocent
    UNION ALL
    SELECT stratum, replicate, conf, 0, n_drawn
    FROM draws
    WHERE is_innocent
),
counted AS (
    SELECT stratum, replicate, conf, sum(infringing) AS infringing, sum(innocent) AS innocent
    FROM levels
    GROUP BY stratum, replicate, conf
),
above AS (
    SELECT
        stratum,
        replicate,
        infringing,
        innocent,
        coalesce(sum(infringing) OVER higher, 0) AS infringing_above,
        coalesce(sum(innocent) OVER higher, 0) AS innocent_above,
        sum(infringing) OVER everything AS n_infringing,
        sum(innocent) OVER everything AS n_innocents
    FROM counted
    WINDOW
        higher AS (PARTITION BY stratum, replicate ORDER BY conf DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
        everything AS (PARTITION BY stratum, replicate)
),
figures AS (
    SELECT
        stratum,
        replicate,
        max(n_infringing)::BIGINT AS n_infringing,
        max(n_innocents)::BIGINT AS n_innocents,
        sum(innocent * (infringing_above + infringing / 2)) / (max(n_infringing) * max(n_innocents)) AS auc,
        greatest(
            0.5,
            max(
                (infringing_above + infringing) / n_infringing
                + 1 - (innocent_above + innocent) / n_innocents
            ) / 2
        ) AS accuracy,
        coalesce(
            max(CASE WHEN innocent_above + innocent <= 0.1 * n_innocents THEN infringing_above + infringing END)
            / max(n_infringing),
            0.0
        ) AS tpr
    FROM above
    WHERE n_infringing > 0 AND n_innocents > 0
    GROUP BY stratum, replicate
)
SELECT
    stratum,
    max(CASE WHEN replicate = -1 THEN n_infringing END) AS n_infringing,
    max(CASE WHEN replicate = -1 THEN n_innocents END) AS n_innocents,
    max(CASE WHEN replicate = -1 THEN auc END) AS auc,
    quantile_cont(auc, 0.025) FILTER (replicate >= 0) AS auc_low,
    quantile_cont(auc, 0.975) FILTER (replicate >= 0) AS auc_high,
    max(CASE WHEN replicate = -1 THEN accuracy END) AS accuracy,
    quantile_cont(accuracy, 0.025) FILTER (replicate >= 0) AS accuracy_low,
    quantile_cont(accuracy, 0.975) FILTER (replicate >= 0) AS accuracy_high,
    max(CASE WHEN replicate = -1 THEN tpr END) AS tpr_at_10_fpr,
    quantile_cont(tpr, 0.025) FILTER (replicate >= 0) AS tpr_low,
    quantile_cont(tpr, 0.975) FILTER (replicate >= 0) AS tpr_high
FROM figures
GROUP BY stratum
ORDER BY stratum NULLS FIRST
