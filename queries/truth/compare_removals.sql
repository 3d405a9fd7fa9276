-- What a method gains over every other one in foretelling what models owe to their exemplars. The bootstrap is paired: it draws
-- models and takes both values of each. An interval that excludes 0 is evidence for that one comparison; among many comparisons
-- some exclude 0 by chance.
-- source the linear datamodelling score of Park et al. 2023 (TRAK), section 4, for halves; the intervals are ours
-- grain  one row per kind of draws, what was left out and other method, greatest gain first
-- param  $method        VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_interval, truth_scores
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
gains AS (
    SELECT
        draws,
        leave,
        other,
        count(*) AS n_models,
        avg(gain) AS gain,
        bootstrap_interval(list(gain ORDER BY model_id), $n_replicates, $seed) AS gain_interval,
        2.8 * stddev_samp(gain) / sqrt(count(*)) AS detectable
    FROM paired
    GROUP BY draws, leave, other
)
SELECT
    draws,
    leave,
    other,
    n_models,
    gain,
    gain_interval.low AS gain_low,
    gain_interval.high AS gain_high,
    detectable
FROM gains
ORDER BY draws, leave, gain DESC, other
