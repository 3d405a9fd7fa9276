-- Ranks below 1 or beyond the gallery, and ranks of samples or exemplars that are not stored. Compute them again with: attrdb evaluate.
-- No row means no problem.
-- source attrdb
-- grain  one row per rank
-- reads  exemplar_ranks, exemplars, samples
-- column method_id     VARCHAR
-- column encoder_id    VARCHAR
-- column mapper_id     VARCHAR
-- column gallery       VARCHAR
-- column sample_id     VARCHAR
-- column exemplar_id   VARCHAR
-- column rank          BIGINT
-- column gallery_size  BIGINT
SELECT
    ranks.method_id,
    ranks.encoder_id,
    ranks.mapper_id,
    ranks.gallery,
    ranks.sample_id,
    ranks.exemplar_id,
    ranks.rank,
    ranks.gallery_size
FROM exemplar_ranks AS ranks
LEFT JOIN samples ON samples.image_id = ranks.sample_id
LEFT JOIN exemplars ON exemplars.image_id = ranks.exemplar_id
WHERE ranks.rank NOT BETWEEN 1 AND ranks.gallery_size
   OR samples.image_id IS NULL
   OR exemplars.image_id IS NULL
   OR samples.model_id IS DISTINCT FROM exemplars.model_id
ORDER BY ranks.method_id, ranks.gallery, ranks.sample_id, ranks.exemplar_id
