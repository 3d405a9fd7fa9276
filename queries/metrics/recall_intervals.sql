-- Recall and average precision of each test case with intervals. The bootstrap draws models, because samples of one model are not
-- independent. An interval is the middle 95 % of the replicates' means; for a case with one model its width is 0.
-- Without ranks there is no row.
-- source Wang et al. 2023, section 5; the intervals are ours
-- grain  one row per method, gallery, kind, split and prompt scheme
-- param  $k             INTEGER = 10 cut-off, >= 1
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  bootstrap_draws, sample_scores
-- column method_id      VARCHAR
-- column encoder_id     VARCHAR of the method; null unless it is similarity
-- column mapper_id      VARCHAR of the method; empty without a mapper
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object, style, concepts or mixed
-- column split          VARCHAR split of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column recall_at_k    DOUBLE  in [0, 1]; found / all exemplars
-- column recall_low     DOUBLE
-- column recall_high    DOUBLE
-- column mean_average_precision  DOUBLE  in [0, 1]
-- column precision_low  DOUBLE
-- column precision_high DOUBLE
WITH per_model AS (
    SELECT
        method_id,
        encoder_id,
        mapper_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        sum(recall) AS recall,
        sum(average_precision) AS average_precision,
        count(*) AS n_samples,
        count(*) OVER case_of AS n_models,
        row_number() OVER (case_of ORDER BY model_id) - 1 AS number
    FROM sample_scores($k)
    GROUP BY method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme, model_id
    WINDOW case_of AS (PARTITION BY method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme)
),
draws AS (
    SELECT sizes.n_models, drawn.replicate, drawn.hash % sizes.n_models AS number
    FROM (SELECT DISTINCT n_models FROM per_model) AS sizes
    JOIN bootstrap_draws((SELECT max(n_models) FROM per_model), $n_replicates, $seed) AS drawn
        ON drawn.place < sizes.n_models
),
replicate_means AS (
    SELECT
        per_model.method_id,
        per_model.encoder_id,
        per_model.mapper_id,
        per_model.gallery,
        per_model.kind,
        per_model.split,
        per_model.prompt_scheme,
        draws.replicate,
        sum(per_model.recall) / sum(per_model.n_samples) AS recall,
        sum(per_model.average_precision) / sum(per_model.n_samples) AS average_precision
    FROM per_model
    JOIN draws ON draws.n_models = per_model.n_models AND draws.number = per_model.number
    GROUP BY ALL
),
intervals AS (
    SELECT
        method_id,
        encoder_id,
        mapper_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        quantile_cont(recall, 0.025) AS recall_low,
        quantile_cont(recall, 0.975) AS recall_high,
        quantile_cont(average_precision, 0.025) AS precision_low,
        quantile_cont(average_precision, 0.975) AS precision_high
    FROM replicate_means
    GROUP BY ALL
),
means AS (
    SELECT
        method_id,
        encoder_id,
        mapper_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        count(*) AS n_models,
        sum(recall) / sum(n_samples) AS recall_at_k,
        sum(average_precision) / sum(n_samples) AS mean_average_precision
    FROM per_model
    GROUP BY ALL
)
SELECT
    means.method_id,
    means.encoder_id,
    means.mapper_id,
    means.gallery,
    means.kind,
    means.split,
    means.prompt_scheme,
    means.n_models,
    means.recall_at_k,
    intervals.recall_low,
    intervals.recall_high,
    means.mean_average_precision,
    intervals.precision_low,
    intervals.precision_high
FROM means
JOIN intervals
    ON intervals.method_id = means.method_id
    AND intervals.gallery = means.gallery
    AND intervals.kind IS NOT DISTINCT FROM means.kind
    AND intervals.split IS NOT DISTINCT FROM means.split
    AND intervals.prompt_scheme IS NOT DISTINCT FROM means.prompt_scheme
ORDER BY means.kind, means.split, means.prompt_scheme, means.gallery, means.encoder_id, means.mapper_id, means.method_id
