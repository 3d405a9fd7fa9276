-- Models whose images are stored but that have no row in models: their job is running or was killed. Rerun its ingest command.
-- No row means no problem.
-- source attrdb
-- grain  one row per model
-- reads  unfinished_models
-- column model_id  VARCHAR
SELECT model_id
FROM unfinished_models
ORDER BY model_id
