-- Scores of a stored method for the samples of a split: scores of the exemplars of the sample's model and of pretraining images.
-- source attrdb
-- grain  one row per sample and scored candidate
-- param  $method      VARCHAR = NULL a stored method
-- param  $split       VARCHAR = val split of the models
-- reads  images, models, samples, scores
-- column sample_id    VARCHAR
-- column model_id     VARCHAR of the sample
-- column score        DOUBLE
-- column is_own       BOOLEAN whether the candidate is an exemplar of the sample's model
SELECT
    scores.sample_id,
    samples.model_id,
    scores.score,
    candidates.role = 'exemplar' AS is_own
FROM scores
JOIN samples ON samples.image_id = scores.sample_id
JOIN models ON models.model_id = samples.model_id
JOIN images AS candidates ON candidates.image_id = scores.candidate_id
WHERE scores.method_id = $method
    AND models.split = $split
    AND (candidates.role = 'pretraining' OR candidates.model_id = samples.model_id)
ORDER BY scores.sample_id, scores.score DESC
