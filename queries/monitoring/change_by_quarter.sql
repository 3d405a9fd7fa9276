-- What moved a monitored model when: the change of K and V of each concept's prompt, by quarter of the training and cause.
-- source after Brokman et al. 2024, whose procedure is not public, see docs/monitoring.md
-- grain  one row per concept, quarter and cause; over a concept, progress sums to 1 unless exemplars were taken out since
-- param  $model_id   VARCHAR the model
-- reads  monitor_changes
-- column concept_id  VARCHAR the concept; null for mixed models
-- column quarter     INTEGER of the steps, from 1 to 4
-- column cause       VARCHAR weights, token, regularization, decay or rest
-- column n_visits    BIGINT  slots of batches that drew exemplars, in this quarter; null for causes that are no exemplar's
-- column progress    DOUBLE  share of the whole change, along it; may be negative
SELECT concept_id, quarter, cause, sum(n_visits)::BIGINT AS n_visits, sum(progress) AS progress
FROM monitor_changes
WHERE model_id = $model_id
GROUP BY concept_id, quarter, cause
ORDER BY concept_id, quarter, cause
