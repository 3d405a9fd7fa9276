-- Models whose number of exemplars or samples differs from their row in models. Not checked while a removal is unfinished.
-- No row means no problem.
-- source attrdb
-- grain  one row per model
-- reads  exemplars, models, removals, samples
-- column model_id         VARCHAR
-- column n_exemplars      INTEGER  in the model's row
-- column found_exemplars  BIGINT
-- column n_samples        INTEGER  in the model's row
-- column found_samples    BIGINT
WITH exemplified AS (
    SELECT model_id, count(*) AS n FROM exemplars GROUP BY model_id
),
sampled AS (
    SELECT model_id, count(*) AS n FROM samples GROUP BY model_id
)
SELECT
    models.model_id,
    models.n_exemplars,
    coalesce(exemplified.n, 0) AS found_exemplars,
    models.n_samples,
    coalesce(sampled.n, 0) AS found_samples
FROM models
LEFT JOIN exemplified ON exemplified.model_id = models.model_id
LEFT JOIN sampled ON sampled.model_id = models.model_id
WHERE (models.n_exemplars IS DISTINCT FROM found_exemplars OR models.n_samples IS DISTINCT FROM found_samples)
  AND NOT EXISTS (SELECT removal_id FROM removals WHERE state IN ('begun', 'deleting'))
ORDER BY models.model_id
