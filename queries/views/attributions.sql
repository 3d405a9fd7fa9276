-- Stored attributions, with encoder and mapper if the method is similarity.
-- grain  one row per stored pair of sample and candidate; similarity is the score if the method is similarity, else null
SELECT
    stored.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    stored.* EXCLUDE (method_id),
    CASE WHEN methods.kind = 'similarity' THEN stored.score END AS similarity
FROM _attributions AS stored
LEFT JOIN methods ON methods.method_id = stored.method_id
