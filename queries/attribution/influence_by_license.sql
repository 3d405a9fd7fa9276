-- Influence on one image by licence. An estimate, not a causal share.
-- The row with a null license has candidates whose licence is unknown. Without candidates there is no row.
-- source Wang et al. 2023, Eq. 6 (with ReLU), summed
-- grain  one row per licence with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $method      VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $tau         DOUBLE = NULL temperature, > 0; default: as calibrated
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; default: as calibrated
-- param  $candidates  VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact       BOOLEAN = false compare every candidate, even if there is an index
-- reads  attribute
-- column license      VARCHAR licence of the candidates
-- column n_candidates BIGINT  candidates with influence
-- column score        DOUBLE  highest score, in the method's unit
-- column similarity   DOUBLE  highest cosine, in [-1, 1]; null unless the method is similarity
-- column influence    DOUBLE  above 0; the rows sum to 1 - missing_influence
-- column complete     BOOLEAN whether every candidate with influence was examined
-- column missing_influence DOUBLE  what cannot be attributed, as calibrated; where not complete, also a bound of what candidates have that were not examined
SELECT
    license,
    count(*) AS n_candidates,
    max(score) AS score,
    max(similarity) AS similarity,
    sum(influence) AS influence,
    bool_and(complete) AS complete,
    max(missing_influence) AS missing_influence
FROM attribute(
    $image_id, k := NULL, method := $method, tau := $tau, lam := $lam, candidates := $candidates, exact := $exact
)
GROUP BY license
ORDER BY influence DESC, license NULLS LAST
