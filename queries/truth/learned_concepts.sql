-- Which concepts each model has learned: without the concept, the samples that name it alone must lose more than 3 times the spread
-- of samples that do not name it. What a sample owes to a concept that was not learned is noise.
-- source the gate is ours
-- grain  one row per kind of draws, model and concept
-- reads  concept_gate, concepts
-- column draws        VARCHAR fixed or redrawn
-- column model_id     VARCHAR
-- column concept_id   VARCHAR
-- column token        VARCHAR the modifier token that names the concept
-- column category     VARCHAR what its exemplars show, or the style's name
-- column own_increase DOUBLE  mean increase in loss of the samples that name it alone; null without such
-- column noise        DOUBLE  standard deviation of the increase of samples that do not name it; null for fewer than two
-- column n_own        BIGINT  samples that name it alone
-- column n_other      BIGINT  samples that do not name it
-- column is_learned   BOOLEAN own_increase > 3 * noise; null where one of them is
SELECT
    gate.draws,
    gate.model_id,
    gate.concept_id,
    concepts.token,
    concepts.category,
    gate.own_increase,
    gate.noise,
    gate.n_own,
    gate.n_other,
    gate.is_learned
FROM concept_gate AS gate
JOIN concepts USING (concept_id)
ORDER BY gate.draws, gate.model_id, gate.concept_id
