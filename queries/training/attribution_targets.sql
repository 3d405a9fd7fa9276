-- What an attribution model learns: the scores that a method gives the exemplars of each sample's own model. Samples without a
-- score for one of these exemplars are left out.
-- source attrdb
-- grain  one row per sample and exemplar of its model
-- param  $method     VARCHAR = NULL a stored method, such as in_run
-- param  $split      VARCHAR = train split of the models
-- reads  exemplars, models, samples, scores
-- column model_id    VARCHAR
-- column sample_id   VARCHAR
-- column exemplar_id VARCHAR
-- column concept_id  VARCHAR the exemplar's, if its model was customized on several
-- column value       DOUBLE  the score
WITH targets AS (
    SELECT
        samples.model_id,
        samples.image_id AS sample_id,
        exemplars.image_id AS exemplar_id,
        exemplars.concept_id,
        scores.score AS value,
        count(*) OVER one_sample AS n_exemplars,
        count(scores.score) OVER one_sample AS n_scored
    FROM samples
    JOIN models ON models.model_id = samples.model_id
    JOIN exemplars ON exemplars.model_id = samples.model_id
    LEFT JOIN scores
        ON scores.sample_id = samples.image_id
        AND scores.candidate_id = exemplars.image_id
        AND scores.method_id = $method
    WHERE models.split = $split
    WINDOW one_sample AS (PARTITION BY samples.image_id)
)
SELECT model_id, sample_id, exemplar_id, concept_id, value
FROM targets
WHERE n_scored = n_exemplars
ORDER BY model_id, sample_id, exemplar_id
