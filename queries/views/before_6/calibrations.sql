-- calibrations before schema 6, with today's columns.
-- grain  one row per row of the older table
SELECT
    CASE WHEN mapper_id = '' THEN encoder_id ELSE encoder_id || '/' || mapper_id END AS method_id,
    method_id AS calibration_id,
    * EXCLUDE (calibration_id, encoder_id, mapper_id),
    NULL::VARCHAR AS kind,
    NULL::DOUBLE AS unattributed
FROM _calibrations_5
