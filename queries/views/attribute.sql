-- Candidates (exemplars and pretraining images) of a stored image by an attribution method, with their influence, an estimate.
-- All influence sums to 1 - missing_influence: what the method cannot attribute, as calibrated. complete is false if more candidates have
-- influence than could be kept; then missing_influence has an upper bound of their share too.
-- grain     one row per candidate, highest score first, ties by image_id
-- argument  sample              image_id of the image to attribute
-- argument  k = 10              number of candidates, >= 1; NULL: all candidates with influence
-- argument  encoder_id = NULL   similarity of this encoder, instead of a method
-- argument  tau = NULL          temperature; default: as calibrated, else that of the method's row; where given, nothing is unattributed
-- argument  lam = NULL          lambda, the cut-off; default: as calibrated, else that of the method's row
-- argument  mapper_id = NULL    similarity with this mapper, instead of a method
-- argument  candidates = NULL   a predicate on the columns of images that candidates must fulfil
-- argument  exact = false       compare every candidate
-- argument  method = NULL       a method_id, encoder_id or mapper_id; default: similarity of the first encoder
SELECT
    hits.rank,
    hits.image_id,
    images.role,
    images.model_id,
    images.source,
    images.category,
    images.creator,
    images.license,
    hits.score,
    hits.similarity,
    hits.influence,
    hits.complete,
    hits.missing_influence
FROM (
    SELECT unnest(
        _attribute(
            sample::VARCHAR,
            k::BIGINT,
            method::VARCHAR,
            encoder_id::VARCHAR,
            mapper_id::VARCHAR,
            tau::DOUBLE,
            lam::DOUBLE,
            candidates::VARCHAR,
            exact::BOOLEAN
        ),
        max_depth := 2
    )
) AS hits
JOIN images ON images.image_id = hits.image_id
ORDER BY hits.rank
