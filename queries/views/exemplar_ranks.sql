-- Ranks of exemplars, with encoder and mapper if the method is similarity.
-- grain  one row per sample, exemplar of its model, method and gallery; mapper_id is empty without a mapper
SELECT
    ranks.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    ranks.* EXCLUDE (method_id)
FROM _exemplar_ranks AS ranks
LEFT JOIN methods ON methods.method_id = ranks.method_id
