-- Candidates (exemplars and pretraining images) of a stored image by an attribution method, with their influence, an estimate.
-- complete is false where more candidates than could be kept have influence; missing_influence bounds their share.
-- grain     one row per candidate, highest score first, ties by image_id
-- argument  sample              image_id of the image to attribute
-- argument  k = 10              how many, >= 1; NULL: every candidate that has influence
-- argument  encoder_id = NULL   similarity of this encoder, in the place of a method
-- argument  tau = NULL          temperature; as calibrated when left out, else that of the method's row
-- argument  lam = NULL          cut-off; as calibrated when left out, else that of the method's row
-- argument  mapper_id = NULL    similarity with this mapper, in the place of a method
-- argument  candidates = NULL   a predicate on the columns of images that candidates must fulfil
-- argument  exact = false       look at every candidate
-- argument  method = NULL       a method_id, encoder_id or mapper_id; similarity of the database's first encoder when left out
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
