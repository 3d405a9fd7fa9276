-- Influence on one image by model. An estimate, not a causal share.
-- The row with a null model_id has pretraining images, which belong to no model. Without candidates there is no row.
-- source Wang et al. 2023, Eq. 6 (with ReLU), summed
-- grain  one row per model_id with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $method      VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $tau         DOUBLE = NULL temperature, > 0; default: as calibrated
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; default: as calibrated
-- param  $candidates  VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact       BOOLEAN = false compare every candidate, even if there is an index
-- reads  attribute
-- column model_id     VARCHAR customized model of the exemplars
-- column n_candidates BIGINT  candidates with influence
-- column score        DOUBLE  highest score, in the method's unit
-- column similarity   DOUBLE  highest cosine, in [-1, 1]; null unless the method is similarity
-- column influence    DOUBLE  above 0; the rows sum to 1 - missing_influence
-- column complete     BOOLEAN whether every candidate with influence was examined
-- column missing_influence DOUBLE  what cannot be attributed, as calibrated; where not complete, also a bound of what candidates have that were not examined
SELECT
    model_id,
    count(*) AS n_candidates,
    max(score) AS score,
    max(similarity) AS similarity,
    sum(influence) AS influence,
    bool_and(complete) AS complete,
    max(missing_influence) AS missing_influence
FROM attribute(
    $image_id, k := NULL, method := $method, tau := $tau, lam := $lam, candidates := $candidates, exact := $exact
)
GROUP BY model_id
ORDER BY influence DESC, model_id NULLS LAST
