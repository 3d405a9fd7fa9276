-- The candidates most similar to one image: every stored exemplar and pretraining image is compared, exactly.
-- Without candidates there is no row.
-- source Wang et al. 2023, section 4
-- grain  one row per candidate, best first
-- param  $image_id    VARCHAR the image to attribute
-- param  $encoder_id  VARCHAR whose features are compared; the database's first encoder when left out
-- param  $k           INTEGER = 10 how many candidates, >= 1
-- reads  features, images
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column source       VARCHAR
-- column category     VARCHAR
-- column creator      VARCHAR
-- column license      VARCHAR
-- column similarity   DOUBLE  cosine in [-1, 1]
WITH query AS (
    SELECT feature::DOUBLE[] AS feature FROM features WHERE image_id = $image_id AND encoder_id = $encoder_id
),
similarities AS (
    SELECT features.image_id, round(list_inner_product(features.feature::DOUBLE[], query.feature), 12) AS similarity
    FROM features, query
    WHERE features.encoder_id = $encoder_id
      AND features.role IN ('exemplar', 'pretraining')
      AND features.image_id <> $image_id
),
ranked AS (
    SELECT row_number() OVER (ORDER BY similarity DESC, image_id) AS rank, image_id, similarity
    FROM similarities
)
SELECT
    ranked.rank,
    ranked.image_id,
    images.role,
    images.model_id,
    images.source,
    images.category,
    images.creator,
    images.license,
    ranked.similarity
FROM ranked
JOIN images ON images.image_id = ranked.image_id
WHERE ranked.rank <= $k
ORDER BY ranked.rank
