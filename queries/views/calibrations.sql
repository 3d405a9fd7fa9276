-- Calibrations, with encoder and mapper if the method is similarity.
-- grain  one row per calibrated method, and one per kind of models where there are several; kind is null for all, mapper_id empty without a mapper
SELECT
    stored.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    stored.* EXCLUDE (method_id)
FROM _calibrations AS stored
LEFT JOIN methods ON methods.method_id = stored.method_id
