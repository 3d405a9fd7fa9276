-- Failures of jobs, by job and by reason without its names and numbers, most frequent first.
-- Without failures there is no row.
-- source attrdb
-- grain  one row per job and kind of reason
-- reads  failures
-- column job_id    VARCHAR
-- column reason    VARCHAR the reason; # replaces numbers, * replaces quoted or path-like words
-- column n_items   BIGINT
-- column example   VARCHAR the first item, by name
WITH reasons AS (
    SELECT
        job_id,
        item,
        regexp_replace(regexp_replace(reason, '(''[^'']*''|\S*/\S*)', '*', 'g'), '[0-9][0-9,]*', '#', 'g') AS reason
    FROM failures
)
SELECT job_id, reason, count(*) AS n_items, min(item) AS example
FROM reasons
GROUP BY job_id, reason
ORDER BY n_items DESC, job_id, reason
