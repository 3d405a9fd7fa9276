-- Share of a model's exemplars among the first k candidates of its samples, beside chance and the best possible value.
-- Averaged over the samples of a test case (encoder, gallery, kind, split and prompt scheme). A pair that was never ranked counts
-- as not found and is counted in n_unranked; fill the ranks with: attrdb evaluate. Without ranks there is no row.
-- source Wang et al. 2023, section 5
-- grain  one row per encoder, mapper, gallery, kind, split and prompt scheme
-- param  $k             INTEGER = 10 cut-off, >= 1
-- reads  exemplar_ranks, exemplars, models, samples
-- column encoder_id     VARCHAR
-- column mapper_id      VARCHAR empty: features without a mapper
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object or style
-- column split          VARCHAR of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column n_samples      BIGINT
-- column recall_at_k    DOUBLE  in [0, 1]; found / all exemplars
-- column capped_recall_at_k  DOUBLE  in [0, 1]; found / min(k, all exemplars)
-- column chance         DOUBLE  recall_at_k expected of a random order
-- column ceiling        DOUBLE  best possible, below 1 where a model has more than k exemplars
-- column n_unranked     BIGINT  pairs of sample and exemplar without a rank
WITH evaluations AS (
    SELECT encoder_id, mapper_id, gallery, max(gallery_size) AS gallery_size
    FROM exemplar_ranks
    GROUP BY encoder_id, mapper_id, gallery
),
truth AS (
    SELECT
        evaluations.encoder_id,
        evaluations.mapper_id,
        evaluations.gallery,
        evaluations.gallery_size,
        models.kind,
        models.split,
        models.model_id,
        samples.prompt_scheme,
        samples.image_id AS sample_id,
        exemplars.image_id AS exemplar_id
    FROM evaluations
    CROSS JOIN models
    JOIN samples ON samples.model_id = models.model_id
    JOIN exemplars ON exemplars.model_id = models.model_id
),
per_sample AS (
    SELECT
        truth.encoder_id,
        truth.mapper_id,
        truth.gallery,
        truth.kind,
        truth.split,
        truth.prompt_scheme,
        truth.model_id,
        truth.sample_id,
        avg(CASE WHEN ranks.rank <= $k THEN 1.0 ELSE 0.0 END) AS recall,
        count(CASE WHEN ranks.rank <= $k THEN 1 END) / least($k, count(*)) AS capped_recall,
        least(1.0, $k / max(coalesce(ranks.gallery_size, truth.gallery_size))) AS chance,
        least(1.0, $k / count(*)) AS ceiling,
        count(*) - count(ranks.rank) AS n_unranked
    FROM truth
    LEFT JOIN exemplar_ranks AS ranks
        ON ranks.encoder_id = truth.encoder_id
        AND ranks.mapper_id = truth.mapper_id
        AND ranks.gallery = truth.gallery
        AND ranks.sample_id = truth.sample_id
        AND ranks.exemplar_id = truth.exemplar_id
    GROUP BY ALL
)
SELECT
    encoder_id,
    mapper_id,
    gallery,
    kind,
    split,
    prompt_scheme,
    count(DISTINCT model_id) AS n_models,
    count(*) AS n_samples,
    avg(recall) AS recall_at_k,
    avg(capped_recall) AS capped_recall_at_k,
    avg(chance) AS chance,
    avg(ceiling) AS ceiling,
    sum(n_unranked)::BIGINT AS n_unranked
FROM per_sample
GROUP BY encoder_id, mapper_id, gallery, kind, split, prompt_scheme
ORDER BY kind, split, prompt_scheme, gallery, encoder_id, mapper_id
