-- Calibrations, with encoder and mapper if the method is similarity.
-- grain  one row per calibrated method; mapper_id is empty without a mapper
SELECT
    stored.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    stored.* EXCLUDE (method_id)
FROM _calibrations AS stored
LEFT JOIN methods ON methods.method_id = stored.method_id
