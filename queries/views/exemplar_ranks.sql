-- The ranks of exemplars, with the encoder and the mapper of a method that is similarity.
-- grain  one row per sample and exemplar of its model, for a method and gallery; mapper_id is empty without a mapper
SELECT
    ranks.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    ranks.* EXCLUDE (method_id)
FROM _exemplar_ranks AS ranks
LEFT JOIN methods ON methods.method_id = ranks.method_id
