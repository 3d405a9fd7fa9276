-- calibrations before schema 10, with today's columns.
-- grain  one row per row of the older table
SELECT method_id AS calibration_id, *, NULL::VARCHAR AS kind, NULL::DOUBLE AS unattributed
FROM _calibrations_9
