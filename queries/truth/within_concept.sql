-- How well each method tells the exemplars of one concept apart: the rank correlation of their scores with what the sample loses
-- without each of them. Only samples whose prompt names one concept alone, and the exemplars of that concept that are scored and
-- that the model was trained again without, three or more. Scores that are all equal have correlation 0; samples that lose the same
-- without every exemplar are left out. Every figure is a mean over models, of the mean over their samples.
-- source the questions are those of Brokman et al. 2024 (MONTRAGE), whose procedure is not public; the measures are ours
-- grain  one row per kind of draws and method, best correlation first
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  average_rank, bootstrap_interval, concept_truth, exemplar_ranks, exemplars, loss_increases
-- column draws            VARCHAR fixed or redrawn
-- column method_id        VARCHAR
-- column n_models         BIGINT
-- column n_samples        BIGINT
-- column correlation      DOUBLE  in [-1, 1]
-- column correlation_low  DOUBLE  lower end of the middle 95 % of the replicates
-- column correlation_high DOUBLE
-- column top_1            DOUBLE  in [0, 1]; whether the best scored exemplar is missed most; 1 / n for n equally good
WITH ranked AS (
    SELECT
        increases.draws,
        ranks.method_id,
        increases.model_id,
        increases.sample_id,
        average_rank(ranks.score, (increases.draws, ranks.method_id, increases.sample_id)) AS score_rank,
        average_rank(increases.increase, (increases.draws, ranks.method_id, increases.sample_id)) AS increase_rank,
        max(ranks.score) OVER one_sample = ranks.score AS is_top_score,
        max(increases.increase) OVER one_sample = increases.increase AS is_top_increase
    FROM loss_increases AS increases
    JOIN exemplars ON exemplars.image_id = increases.name
    JOIN concept_truth AS prompts -- exemplars without a concept_id are those of a model's only concept
        ON prompts.sample_id = increases.sample_id
        AND prompts.concept_id = coalesce(exemplars.concept_id, prompts.concept_id)
    JOIN exemplar_ranks AS ranks
        ON ranks.sample_id = increases.sample_id
        AND ranks.exemplar_id = exemplars.image_id
    WHERE
        increases.leave = 'image'
        AND prompts.truth = 'prompt'
        AND prompts.share = 1
        AND ranks.gallery = 'own'
        AND ranks.score IS NOT NULL
    WINDOW one_sample AS (PARTITION BY increases.draws, ranks.method_id, increases.sample_id)
),
per_sample AS (
    SELECT
        draws,
        method_id,
        model_id,
        CASE WHEN min(score_rank) = max(score_rank) THEN 0.0 ELSE corr(score_rank, increase_rank) END AS correlation,
        count_if(is_top_score AND is_top_increase) / count_if(is_top_score) AS top_1
    FROM ranked
    GROUP BY draws, method_id, model_id, sample_id
    HAVING count(*) >= 3 AND min(increase_rank) < max(increase_rank)
),
per_model AS (
    SELECT
        draws,
        method_id,
        model_id,
        count(*) AS n_samples,
        avg(correlation) AS correlation,
        avg(top_1) AS top_1
    FROM per_sample
    GROUP BY draws, method_id, model_id
),
means AS (
    SELECT
        draws,
        method_id,
        count(*) AS n_models,
        sum(n_samples)::BIGINT AS n_samples,
        avg(correlation) AS correlation,
        bootstrap_interval(list(correlation ORDER BY model_id), $n_replicates, $seed) AS correlation_interval,
        avg(top_1) AS top_1
    FROM per_model
    GROUP BY draws, method_id
)
SELECT
    draws,
    method_id,
    n_models,
    n_samples,
    correlation,
    correlation_interval.low AS correlation_low,
    correlation_interval.high AS correlation_high,
    top_1
FROM means
ORDER BY draws, correlation DESC, method_id
