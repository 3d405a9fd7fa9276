-- How the influence on one image is shared out by licence. An estimate, not a causal share.
-- The row with a null license holds candidates whose licence is not known. Without candidates there is no row.
-- source Wang et al. 2023, Eq. 6 (with ReLU), summed
-- grain  one row per license with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $encoder_id  VARCHAR whose features are compared; the database's first encoder when left out
-- param  $mapper_id   VARCHAR = NULL that maps the features; none when left out
-- param  $tau         DOUBLE = NULL temperature, > 0; as calibrated when left out
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; as calibrated when left out
-- reads  attribute
-- column license      VARCHAR licence of the candidates
-- column n_candidates BIGINT  candidates with influence
-- column similarity   DOUBLE  of the best of them, cosine in [-1, 1]
-- column influence    DOUBLE  above 0; the rows sum to 1
SELECT license, count(*) AS n_candidates, max(similarity) AS similarity, sum(influence) AS influence
FROM attribute($image_id, k := NULL, encoder_id := $encoder_id, tau := $tau, lam := $lam, mapper_id := $mapper_id)
GROUP BY license
ORDER BY influence DESC, license NULLS LAST
