-- Who influenced one image, and how much: all candidates with influence above zero. An estimate, not a causal share.
-- A candidate at or below the cut-off, best similarity + tau * ln(lambda), has influence exactly 0 and no row. Without candidates there is no row.
-- source Wang et al. 2023, Eq. 6 (with ReLU)
-- grain  one row per candidate with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $method      VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $tau         DOUBLE = NULL temperature, > 0; default: as calibrated
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; default: as calibrated
-- param  $candidates  VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact       BOOLEAN = false compare every candidate, even if there is an index
-- reads  attribute
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column creator      VARCHAR
-- column license      VARCHAR
-- column score        DOUBLE  in the method's unit
-- column similarity   DOUBLE  cosine in [-1, 1]; null unless the method is similarity
-- column influence    DOUBLE  above 0; the rows sum to 1 - missing_influence
-- column complete     BOOLEAN whether every candidate with influence was examined
-- column missing_influence DOUBLE  what cannot be attributed, as calibrated; where not complete, also a bound of what candidates have that were not examined
SELECT rank, image_id, role, model_id, creator, license, score, similarity, influence, complete, missing_influence
FROM attribute(
    $image_id, k := NULL, method := $method, tau := $tau, lam := $lam, candidates := $candidates, exact := $exact
)
ORDER BY rank
