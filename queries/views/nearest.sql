-- Candidates (exemplars and pretraining images) most similar to a feature. The encoder's index is used if there is one, unless exact.
-- grain     one row per candidate, most similar first, ties by image_id
-- argument  feature             a feature of the encoder, such as one of the view features
-- argument  k = 10              number of candidates, >= 1
-- argument  encoder_id = NULL   default: the first encoder
-- argument  candidates = NULL   a predicate on the columns of images that candidates must fulfil
-- argument  exact = false       compare every candidate
SELECT
    hits.rank,
    hits.image_id,
    images.role,
    images.model_id,
    images.source,
    images.category,
    images.creator,
    images.license,
    hits.similarity
FROM (
    SELECT unnest(
        _nearest(feature::FLOAT[], k::BIGINT, encoder_id::VARCHAR, candidates::VARCHAR, exact::BOOLEAN),
        max_depth := 2
    )
) AS hits
JOIN images ON images.image_id = hits.image_id
ORDER BY hits.rank
