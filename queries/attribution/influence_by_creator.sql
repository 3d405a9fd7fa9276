-- How the influence on one image is shared out by creator. An estimate, not a causal share.
-- The row with a null creator holds candidates whose creator is not known. Without candidates there is no row.
-- source Wang et al. 2023, Eq. 6 (with ReLU), summed
-- grain  one row per creator with influence, greatest first
-- param  $image_id    VARCHAR the image to attribute
-- param  $method      VARCHAR = NULL a method_id, encoder_id or mapper_id; similarity of the database's first encoder when left out
-- param  $tau         DOUBLE = NULL temperature, > 0; as calibrated when left out
-- param  $lam         DOUBLE = NULL lambda, >= 0 and < 1; as calibrated when left out
-- param  $candidates  VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact       BOOLEAN = false look at every candidate, also where there is an index
-- reads  attribute
-- column creator      VARCHAR creator of the candidates
-- column n_candidates BIGINT  candidates with influence
-- column score        DOUBLE  of the best of them, in the method's unit
-- column similarity   DOUBLE  of the best of them, cosine in [-1, 1]; null by a method that is no similarity
-- column influence    DOUBLE  above 0; the rows sum to 1 where complete, else to 1 - missing_influence
-- column complete     BOOLEAN whether every candidate with influence was looked at
-- column missing_influence DOUBLE  at most this share belongs to candidates that were not looked at
SELECT
    creator,
    count(*) AS n_candidates,
    max(score) AS score,
    max(similarity) AS similarity,
    sum(influence) AS influence,
    bool_and(complete) AS complete,
    max(missing_influence) AS missing_influence
FROM attribute(
    $image_id, k := NULL, method := $method, tau := $tau, lam := $lam, candidates := $candidates, exact := $exact
)
GROUP BY creator
ORDER BY influence DESC, creator NULLS LAST
