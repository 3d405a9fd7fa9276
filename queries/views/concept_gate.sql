-- Whether a model has learned each of its concepts: whether samples that name the concept alone lose far more without it than chance
-- explains. noise is the standard deviation of the increase over samples that do not name the concept. Fixed draws have no noise of
-- seeds, by which a gate is usually measured; the spread over unrelated samples stands in for it. noise and is_learned are null
-- where the samples are too few.
-- grain  one row per kind of draws, model and concept
SELECT
    removals.truth AS draws,
    removals.model_id,
    removals.concept_id,
    avg(removals.increase) FILTER (prompts.share = 1) AS own_increase,
    stddev_samp(removals.increase) FILTER (prompts.share = 0) AS noise,
    count_if(prompts.share = 1)::BIGINT AS n_own,
    count_if(prompts.share = 0)::BIGINT AS n_other,
    own_increase > 3 * noise AS is_learned
FROM concept_truth AS removals
JOIN concept_truth AS prompts USING (sample_id, concept_id)
WHERE
    removals.truth <> 'prompt'
    AND prompts.truth = 'prompt'
GROUP BY removals.truth, removals.model_id, removals.concept_id
