-- Recall at the size of the set, for models that were customized on sets of unrelated images: the share of a set's images that
-- are among as many first candidates. A pair that was never ranked counts as not found. Without ranks there is no row.
-- source Wang et al. 2023, Fig. 10
-- grain  one row per encoder, mapper, gallery, split and set size
-- reads  models, samples, exemplars, exemplar_ranks
-- column encoder_id     VARCHAR
-- column mapper_id      VARCHAR empty: features without a mapper
-- column gallery        VARCHAR own or all
-- column split          VARCHAR of the models
-- column n_exemplars    BIGINT  size of the set
-- column n_models       BIGINT
-- column n_samples      BIGINT
-- column recall_at_size DOUBLE  in [0, 1]
-- column chance         DOUBLE  expected of a random order
WITH evaluations AS (
    SELECT encoder_id, mapper_id, gallery, max(gallery_size) AS largest_gallery
    FROM exemplar_ranks
    GROUP BY encoder_id, mapper_id, gallery
),
sets AS (
    SELECT models.model_id, models.split, count(*) AS n_exemplars
    FROM models
    JOIN exemplars ON exemplars.model_id = models.model_id
    WHERE models.kind = 'mixed'
    GROUP BY models.model_id, models.split
),
found AS (
    SELECT
        evaluations.encoder_id,
        evaluations.mapper_id,
        evaluations.gallery,
        sets.split,
        sets.model_id,
        sets.n_exemplars,
        samples.image_id AS sample_id,
        avg(CASE WHEN ranks.rank <= sets.n_exemplars THEN 1.0 ELSE 0.0 END) AS recall,
        least(1.0, avg(sets.n_exemplars / coalesce(ranks.gallery_size, evaluations.largest_gallery))) AS chance
    FROM evaluations
    CROSS JOIN sets
    JOIN samples ON samples.model_id = sets.model_id
    JOIN exemplars ON exemplars.model_id = sets.model_id
    LEFT JOIN exemplar_ranks AS ranks
        ON ranks.encoder_id = evaluations.encoder_id
        AND ranks.mapper_id = evaluations.mapper_id
        AND ranks.gallery = evaluations.gallery
        AND ranks.sample_id = samples.image_id
        AND ranks.exemplar_id = exemplars.image_id
    GROUP BY ALL
)
SELECT
    encoder_id,
    mapper_id,
    gallery,
    split,
    n_exemplars,
    count(DISTINCT model_id) AS n_models,
    count(*) AS n_samples,
    avg(recall) AS recall_at_size,
    avg(chance) AS chance
FROM found
GROUP BY encoder_id, mapper_id, gallery, split, n_exemplars
ORDER BY n_exemplars, split, gallery, encoder_id, mapper_id
