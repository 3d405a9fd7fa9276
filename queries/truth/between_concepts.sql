-- How well each method tells the concepts of a model apart: whether its scores say which concept a sample owes most to. Truth 'prompt'
-- says what the prompt asked for; 'fixed' and 'redrawn' say what the sample loses without the concept. Every figure is a mean over
-- models, so that each model has the same weight. Where the truth is the same for all concepts there is nothing to tell apart, and
-- correlation, top_1 and top_2 leave it out. Scores that are all equal have correlation 0.
-- source the questions are those of Brokman et al. 2024 (MONTRAGE), whose procedure is not public; the measures are ours
-- grain  one row per truth, prompt scheme and method, best correlation first
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- param  $learned       BOOLEAN = false count only concepts that concept_gate finds learned, with fixed draws
-- reads  average_rank, bootstrap_interval, concept_gate, concept_scores, methods, samples
-- column truth                 VARCHAR prompt, fixed or redrawn
-- column prompt_scheme         VARCHAR
-- column method_id             VARCHAR
-- column n_models              BIGINT
-- column n_samples             BIGINT
-- column correlation           DOUBLE  in [-1, 1]; rank correlation of share and truth_share over a model's samples and concepts
-- column correlation_low       DOUBLE  lower end of the middle 95 % of the replicates
-- column correlation_high      DOUBLE
-- column correlation_by_sample DOUBLE  in [-1, 1]; rank correlation of score and truth_share over the concepts of a sample
-- column error                 DOUBLE  in [0, 1]; absolute difference of share and truth_share
-- column shifted_error         DOUBLE  in [0, 1]; the same of (1 + score) / 2, of methods whose scores are cosines; null of others
-- column top_1                 DOUBLE  in [0, 1]; whether the best scored concept has the greatest truth_share; 1 / n for n equally good
-- column top_2                 DOUBLE  in [0, 1]; the same for the best two of samples that owe to two or more concepts
WITH ranked AS (
    SELECT
        scores.*,
        samples.prompt_scheme,
        CASE WHEN methods.unit = 'cosine' THEN (1 + scores.score) / 2 END AS shifted,
        average_rank(scores.share, (scores.method_id, scores.truth, scores.model_id, samples.prompt_scheme)) AS share_rank,
        average_rank(scores.truth_share, (scores.method_id, scores.truth, scores.model_id, samples.prompt_scheme))
            AS truth_share_rank,
        average_rank(scores.score, (scores.method_id, scores.truth, scores.sample_id)) AS score_rank,
        average_rank(scores.truth_share, (scores.method_id, scores.truth, scores.sample_id)) AS truth_rank,
        max(scores.score) OVER one_sample = scores.score AS is_top_score,
        max(scores.truth_share) OVER one_sample = scores.truth_share AS is_top_truth
    FROM concept_scores AS scores
    JOIN samples ON samples.image_id = scores.sample_id
    LEFT JOIN methods USING (method_id)
    WHERE
        NOT $learned
        OR scores.concept_id IN (SELECT concept_id FROM concept_gate WHERE draws = 'fixed' AND is_learned)
    WINDOW one_sample AS (PARTITION BY scores.method_id, scores.truth, scores.sample_id)
),
per_sample AS (
    SELECT
        method_id,
        truth,
        sample_id,
        CASE WHEN min(score_rank) = max(score_rank) THEN 0.0 ELSE corr(score_rank, truth_rank) END AS correlation,
        count_if(is_top_score AND is_top_truth) / count_if(is_top_score) AS top_1
    FROM ranked
    GROUP BY method_id, truth, sample_id
    HAVING min(truth_rank) < max(truth_rank)
),
pairs AS ( -- of two concepts; the best two have the greatest sum of ranks
    SELECT
        one.method_id,
        one.truth,
        one.sample_id,
        one.score_rank + other.score_rank AS score_rank,
        one.truth_rank + other.truth_rank AS truth_rank,
        max(one.score_rank + other.score_rank) OVER one_sample AS top_score_rank,
        max(one.truth_rank + other.truth_rank) OVER one_sample AS top_truth_rank,
        max(least(one.truth_share, other.truth_share)) OVER one_sample > 0 AS owes_to_two
    FROM ranked AS one
    JOIN ranked AS other USING (method_id, truth, sample_id)
    WHERE one.concept_id < other.concept_id
    WINDOW one_sample AS (PARTITION BY one.method_id, one.truth, one.sample_id)
),
best_pairs AS (
    SELECT
        method_id,
        truth,
        sample_id,
        count_if(score_rank = top_score_rank AND truth_rank = top_truth_rank) / count_if(score_rank = top_score_rank) AS top_2
    FROM pairs
    WHERE owes_to_two
    GROUP BY method_id, truth, sample_id
    HAVING min(truth_rank) < max(truth_rank)
),
per_model AS ( -- every sample of a model has the same concepts, so that a mean over rows is one over samples
    SELECT
        ranked.method_id,
        ranked.truth,
        ranked.model_id,
        ranked.prompt_scheme,
        count(DISTINCT ranked.sample_id) AS n_samples,
        CASE
            WHEN min(ranked.truth_share_rank) = max(ranked.truth_share_rank) THEN NULL
            WHEN min(ranked.share_rank) = max(ranked.share_rank) THEN 0.0
            ELSE corr(ranked.share_rank, ranked.truth_share_rank)
        END AS correlation,
        avg(per_sample.correlation) AS correlation_by_sample,
        avg(abs(ranked.share - ranked.truth_share)) AS error,
        avg(abs(ranked.shifted - ranked.truth_share)) AS shifted_error,
        avg(per_sample.top_1) AS top_1,
        avg(best_pairs.top_2) AS top_2
    FROM ranked
    LEFT JOIN per_sample USING (method_id, truth, sample_id)
    LEFT JOIN best_pairs USING (method_id, truth, sample_id)
    GROUP BY ranked.method_id, ranked.truth, ranked.model_id, ranked.prompt_scheme
),
means AS (
    SELECT
        truth,
        prompt_scheme,
        method_id,
        count(*) AS n_models,
        sum(n_samples)::BIGINT AS n_samples,
        avg(correlation) AS correlation,
        bootstrap_interval(
            list(correlation ORDER BY model_id) FILTER (correlation IS NOT NULL), $n_replicates, $seed
        ) AS correlation_interval,
        avg(correlation_by_sample) AS correlation_by_sample,
        avg(error) AS error,
        avg(shifted_error) AS shifted_error,
        avg(top_1) AS top_1,
        avg(top_2) AS top_2
    FROM per_model
    GROUP BY truth, prompt_scheme, method_id
)
SELECT
    truth,
    prompt_scheme,
    method_id,
    n_models,
    n_samples,
    correlation,
    correlation_interval.low AS correlation_low,
    correlation_interval.high AS correlation_high,
    correlation_by_sample,
    error,
    shifted_error,
    top_1,
    top_2
FROM means
ORDER BY truth, prompt_scheme, correlation DESC NULLS LAST, method_id
