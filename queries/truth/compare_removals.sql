-- What a method gains over every other one in foretelling what models owe to their exemplars. The bootstrap is paired: it draws
-- models and takes both values of each. An interval that excludes 0 is evidence for that one comparison; among many comparisons
-- some exclude 0 by chance.
-- source the linear datamodelling score of Park et al. 2023 (TRAK), section 4, for halves; the intervals are ours
-- grain  one row per kind of draws, what was left out and other method, greatest gain first
-- param  $method        VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_draws, truth_scores
-- column draws      VARCHAR fixed or redrawn
-- column leave      VARCHAR what was left out
-- column other      VARCHAR the method that it is compared with
-- column n_models   BIGINT  models with samples of both
-- column gain       DOUBLE  mean difference of the correlations
-- column gain_low   DOUBLE  lower end of the middle 95 % of the replicates
-- column gain_high  DOUBLE
-- column detectable DOUBLE  smallest gain that as many models would tell from 0 in 8 of 10 studies; null for one model
WITH paired AS (
    SELECT
        own.draws,
        own.leave,
        others.method_id AS other,
        own.model_id,
        avg(own.correlation - others.correlation) AS gain
    FROM truth_scores AS own
    JOIN truth_scores AS others USING (draws, leave, sample_id)
    WHERE
        own.method_id = $method
        AND others.method_id <> own.method_id
    GROUP BY own.draws, own.leave, others.method_id, own.model_id
),
numbered AS (
    SELECT
        *,
        count(*) OVER one_method AS n_models,
        row_number() OVER (one_method ORDER BY model_id) - 1 AS number
    FROM paired
    WINDOW one_method AS (PARTITION BY draws, leave, other)
),
drawn AS (
    SELECT sizes.n_models, places.replicate, places.hash % sizes.n_models AS number
    FROM (SELECT DISTINCT n_models FROM numbered) AS sizes
    JOIN bootstrap_draws((SELECT max(n_models) FROM numbered), $n_replicates, $seed) AS places
        ON places.place < sizes.n_models
),
replicates AS (
    SELECT numbered.draws, numbered.leave, numbered.other, drawn.replicate, avg(numbered.gain) AS gain
    FROM numbered
    JOIN drawn USING (n_models, number)
    GROUP BY ALL
),
intervals AS (
    SELECT
        draws,
        leave,
        other,
        quantile_cont(gain, 0.025) AS gain_low,
        quantile_cont(gain, 0.975) AS gain_high
    FROM replicates
    GROUP BY draws, leave, other
)
SELECT
    numbered.draws,
    numbered.leave,
    numbered.other,
    count(*) AS n_models,
    avg(numbered.gain) AS gain,
    any_value(intervals.gain_low) AS gain_low,
    any_value(intervals.gain_high) AS gain_high,
    2.8 * stddev_samp(numbered.gain) / sqrt(count(*)) AS detectable
FROM numbered
JOIN intervals USING (draws, leave, other)
GROUP BY numbered.draws, numbered.leave, numbered.other
ORDER BY numbered.draws, numbered.leave, gain DESC, numbered.other
