-- How well each method foretells what models owe to their exemplars, over all models, with intervals. The bootstrap draws models;
-- an interval is the middle 95 % of the replicates' means, and its width is 0 for one model. Random scores have mean 0.
-- source the linear datamodelling score of Park et al. 2023 (TRAK), section 4, for halves; the intervals are ours
-- grain  one row per kind of draws, what was left out and method, best correlation first
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_interval, truth_scores
-- column draws            VARCHAR fixed or redrawn
-- column leave            VARCHAR what was left out
-- column method_id        VARCHAR
-- column n_models         BIGINT
-- column correlation      DOUBLE  in [-1, 1]; mean over models of the mean over their samples
-- column correlation_low  DOUBLE  lower end of the middle 95 % of the replicates
-- column correlation_high DOUBLE
-- column top_1            DOUBLE  in [0, 1]
-- column top_1_low        DOUBLE
-- column top_1_high       DOUBLE
-- column chance_sd        DOUBLE  standard deviation of one sample's correlation by random scores: 1 / sqrt(n_retrainings - 1)
-- column detectable       DOUBLE  smallest mean that as many models would tell from 0 in 8 of 10 studies; null for one model
WITH per_model AS (
    SELECT
        draws,
        leave,
        method_id,
        model_id,
        max(n_retrainings) AS n_retrainings,
        avg(correlation) AS correlation,
        avg(top_1) AS top_1
    FROM truth_scores
    GROUP BY draws, leave, method_id, model_id
),
means AS (
    SELECT
        draws,
        leave,
        method_id,
        count(*) AS n_models,
        avg(correlation) AS correlation,
        bootstrap_interval(list(correlation ORDER BY model_id), $n_replicates, $seed) AS correlation_interval,
        avg(top_1) AS top_1,
        bootstrap_interval(list(top_1 ORDER BY model_id), $n_replicates, $seed) AS top_1_interval,
        1 / sqrt(avg(n_retrainings) - 1) AS chance_sd,
        2.8 * stddev_samp(correlation) / sqrt(count(*)) AS detectable
    FROM per_model
    GROUP BY draws, leave, method_id
)
SELECT
    draws,
    leave,
    method_id,
    n_models,
    correlation,
    correlation_interval.low AS correlation_low,
    correlation_interval.high AS correlation_high,
    top_1,
    top_1_interval.low AS top_1_low,
    top_1_interval.high AS top_1_high,
    chance_sd,
    detectable
FROM means
ORDER BY draws, leave, correlation DESC, method_id
