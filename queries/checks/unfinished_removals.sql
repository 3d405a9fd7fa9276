-- Removals that run, or were interrupted. Finish one by giving its command again, or any other attrdb remove.
-- Without such rows, which is as it should be, there is none.
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
