-- Who influenced one image, and how much: all candidates with influence above zero. An estimate, not a causal share.
-- A candidate at or below the cut-off, best similarity + tau * ln(lambda), has influence exactly 0 and no row. Without candidates there is none.
-- source Wang et al. 2023, Eq. 6 (with ReLU)
-- grain  one row per candidate with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $encoder_id  VARCHAR whose features are compared; the database's first encoder when left out
-- param  $mapper_id   VARCHAR = NULL that maps the features; none when left out
-- param  $tau         DOUBLE = NULL temperature, > 0; as calibrated when left out
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; as calibrated when left out
-- reads  attribute
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column creator      VARCHAR
-- column license      VARCHAR
-- column similarity   DOUBLE  cosine in [-1, 1]
-- column influence    DOUBLE  above 0; the rows sum to 1
SELECT rank, image_id, role, model_id, creator, license, similarity, influence
FROM attribute($image_id, k := NULL, encoder_id := $encoder_id, tau := $tau, lam := $lam, mapper_id := $mapper_id)
ORDER BY rank
