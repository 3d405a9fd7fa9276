-- Customized models with their numbers of exemplars, samples, prompts and ranked samples.
-- A model without samples has a row with 0. Without models there is no row.
-- source attrdb
-- grain  one row per model
-- reads  exemplar_ranks, exemplars, models, samples
-- column model_id        VARCHAR
-- column kind            VARCHAR object, style, concepts or mixed
-- column split           VARCHAR
-- column n_exemplars     BIGINT
-- column n_samples       BIGINT
-- column n_prompts       BIGINT distinct prompts of the samples
-- column n_ranked        BIGINT samples with at least one rank, see attrdb evaluate
WITH sampled AS (
    SELECT model_id, count(*) AS n_samples, count(DISTINCT prompt) AS n_prompts FROM samples GROUP BY model_id
),
exemplified AS (
    SELECT model_id, count(*) AS n_exemplars FROM exemplars GROUP BY model_id
),
ranked AS (
    SELECT samples.model_id, count(DISTINCT ranks.sample_id) AS n_ranked
    FROM exemplar_ranks AS ranks
    JOIN samples ON samples.image_id = ranks.sample_id
    GROUP BY samples.model_id
)
SELECT
    models.model_id,
    models.kind,
    models.split,
    coalesce(exemplified.n_exemplars, 0) AS n_exemplars,
    coalesce(sampled.n_samples, 0) AS n_samples,
    coalesce(sampled.n_prompts, 0) AS n_prompts,
    coalesce(ranked.n_ranked, 0) AS n_ranked
FROM models
LEFT JOIN exemplified ON exemplified.model_id = models.model_id
LEFT JOIN sampled ON sampled.model_id = models.model_id
LEFT JOIN ranked ON ranked.model_id = models.model_id
ORDER BY models.model_id
