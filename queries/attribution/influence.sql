-- Who influenced one image, and how much: all candidates with influence above zero. An estimate, not a causal share.
-- A candidate at or below the cut-off, best similarity + tau * ln(lambda), has influence exactly 0 and no row. Without candidates there is none.
-- source Wang et al. 2023, Eq. 6 (with ReLU)
-- grain  one row per candidate with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $encoder_id  VARCHAR whose features are compared; the database's first encoder when left out
-- param  $tau         DOUBLE = 0.05 temperature, > 0
-- param  $lam         DOUBLE = 0.05 lambda, >= 0 and < 1
-- reads  features, images
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column creator      VARCHAR
-- column license      VARCHAR
-- column similarity   DOUBLE  cosine in [-1, 1]
-- column influence    DOUBLE  above 0; the rows sum to 1
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
excesses AS (
    SELECT image_id, similarity, exp((similarity - max(similarity) OVER ()) / $tau) - $lam AS excess
    FROM similarities
),
influences AS (
    SELECT image_id, similarity, excess / sum(excess) OVER () AS influence
    FROM excesses
    WHERE excess > 0
)
SELECT
    row_number() OVER (ORDER BY influences.similarity DESC, influences.image_id) AS rank,
    influences.image_id,
    images.role,
    images.model_id,
    images.creator,
    images.license,
    influences.similarity,
    influences.influence
FROM influences
JOIN images ON images.image_id = influences.image_id
ORDER BY rank
