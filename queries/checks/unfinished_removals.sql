-- Removals that are running or were interrupted. Rerun the command, or run any other attrdb remove, to finish one.
-- No row means no problem.
-- source attrdb
-- grain  one row per removal
-- reads  removals
-- column removal_id  VARCHAR
-- column state       VARCHAR
-- column started_at  TIMESTAMP WITH TIME ZONE
SELECT removal_id, state, started_at
FROM removals
WHERE state <> 'done'
ORDER BY removal_id
