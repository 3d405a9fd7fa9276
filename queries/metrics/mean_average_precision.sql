-- Mean over samples of the average precision with which a model's exemplars are retrieved.
-- AP of a sample = mean over its model's exemplars, by rank r_1 < r_2 < ..., of j / r_j; an unranked exemplar adds 0.
-- Chance is the expectation over random orders of a gallery of N with E exemplars, H_N being the N-th harmonic number:
-- (H_N + (E - 1) / (N - 1) * (N - H_N)) / N, with H_N by its expansion, right to 1e-4 from N = 30 on.
-- Without ranks there is no row; fill them with: attrdb evaluate.
-- source Wang et al. 2023, section 5
-- grain  one row per encoder, mapper, gallery, kind, split and prompt scheme
-- reads  exemplar_ranks, exemplars, models, samples
-- column encoder_id              VARCHAR
-- column mapper_id               VARCHAR empty: features without a mapper
-- column gallery                 VARCHAR own or all
-- column kind                    VARCHAR object or style
-- column split                   VARCHAR of the models
-- column prompt_scheme           VARCHAR
-- column n_models                BIGINT
-- column n_samples               BIGINT
-- column mean_average_precision  DOUBLE  in [0, 1]
-- column chance                  DOUBLE  mean_average_precision expected of a random order
-- column n_unranked              BIGINT  pairs of sample and exemplar without a rank
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
        evaluations.gallery_size AS largest_gallery,
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
precisions AS (
    SELECT
        truth.*,
        ranks.rank,
        coalesce(ranks.gallery_size, truth.largest_gallery) AS gallery_size,
        row_number() OVER (
            PARTITION BY truth.encoder_id, truth.mapper_id, truth.gallery, truth.sample_id
            ORDER BY ranks.rank ASC NULLS LAST, truth.exemplar_id
        ) / ranks.rank AS precision_at_rank
    FROM truth
    LEFT JOIN exemplar_ranks AS ranks
        ON ranks.encoder_id = truth.encoder_id
        AND ranks.mapper_id = truth.mapper_id
        AND ranks.gallery = truth.gallery
        AND ranks.sample_id = truth.sample_id
        AND ranks.exemplar_id = truth.exemplar_id
),
per_sample AS (
    SELECT
        encoder_id,
        mapper_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        sample_id,
        avg(coalesce(precision_at_rank, 0.0)) AS average_precision,
        max(gallery_size) AS n,
        ln(n) + 0.5772156649 + 1 / (2 * n) AS harmonic,
        (harmonic + (count(*) - 1) / greatest(n - 1, 1) * (n - harmonic)) / n AS chance,
        count(*) - count(rank) AS n_unranked
    FROM precisions
    GROUP BY encoder_id, mapper_id, gallery, kind, split, prompt_scheme, model_id, sample_id
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
    avg(average_precision) AS mean_average_precision,
    avg(chance) AS chance,
    sum(n_unranked)::BIGINT AS n_unranked
FROM per_sample
GROUP BY encoder_id, mapper_id, gallery, kind, split, prompt_scheme
ORDER BY kind, split, prompt_scheme, gallery, encoder_id, mapper_id
