-- Calibrations, with the encoder and the mapper of a method that is similarity.
-- grain  one row per method whose influence was calibrated; mapper_id is empty without a mapper
SELECT
    stored.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    stored.* EXCLUDE (method_id)
FROM _calibrations AS stored
LEFT JOIN methods ON methods.method_id = stored.method_id
