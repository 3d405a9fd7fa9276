-- How well each method foretells what models owe to their exemplars, over all models, with intervals. The bootstrap draws models;
-- an interval is the middle 95 % of the replicates' means, and its width is 0 for one model. Random scores have mean 0.
-- source the linear datamodelling score of Park et al. 2023 (TRAK), section 4, for halves; the intervals are ours
-- grain  one row per kind of draws, what was left out and method, best correlation first
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_draws, truth_scores
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
numbered AS (
    SELECT
        *,
        count(*) OVER one_method AS n_models,
        row_number() OVER (one_method ORDER BY model_id) - 1 AS number
    FROM per_model
    WINDOW one_method AS (PARTITION BY draws, leave, method_id)
),
drawn AS (
    SELECT sizes.n_models, places.replicate, places.hash % sizes.n_models AS number
    FROM (SELECT DISTINCT n_models FROM numbered) AS sizes
    JOIN bootstrap_draws((SELECT max(n_models) FROM numbered), $n_replicates, $seed) AS places
        ON places.place < sizes.n_models
),
replicates AS (
    SELECT
        numbered.draws,
        numbered.leave,
        numbered.method_id,
        drawn.replicate,
        avg(numbered.correlation) AS correlation,
        avg(numbered.top_1) AS top_1
    FROM numbered
    JOIN drawn USING (n_models, number)
    GROUP BY ALL
),
intervals AS (
    SELECT
        draws,
        leave,
        method_id,
        quantile_cont(correlation, 0.025) AS correlation_low,
        quantile_cont(correlation, 0.975) AS correlation_high,
        quantile_cont(top_1, 0.025) AS top_1_low,
        quantile_cont(top_1, 0.975) AS top_1_high
    FROM replicates
    GROUP BY draws, leave, method_id
)
SELECT
    numbered.draws,
    numbered.leave,
    numbered.method_id,
    count(*) AS n_models,
    avg(numbered.correlation) AS correlation,
    any_value(intervals.correlation_low) AS correlation_low,
    any_value(intervals.correlation_high) AS correlation_high,
    avg(numbered.top_1) AS top_1,
    any_value(intervals.top_1_low) AS top_1_low,
    any_value(intervals.top_1_high) AS top_1_high,
    1 / sqrt(avg(numbered.n_retrainings) - 1) AS chance_sd,
    2.8 * stddev_samp(numbered.correlation) / sqrt(count(*)) AS detectable
FROM numbered
JOIN intervals USING (draws, leave, method_id)
GROUP BY numbered.draws, numbered.leave, numbered.method_id
ORDER BY numbered.draws, numbered.leave, correlation DESC, numbered.method_id
