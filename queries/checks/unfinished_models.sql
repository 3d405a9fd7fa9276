-- Models whose images are stored and whose row in models is not: their job runs, or was killed. Give its ingest command again.
-- Without such rows, which is as it should be, there is none.
-- source attrdb
-- grain  one row per model
-- reads  unfinished_models
-- column model_id  VARCHAR
SELECT model_id
FROM unfinished_models
ORDER BY model_id
