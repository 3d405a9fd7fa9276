-- Features of the exemplars and samples that occur in pairs with these settings, in no particular order. An image without a feature
-- of the encoder has no row.
-- source Wang et al. 2023, section 4
-- grain  one row per image
-- param  $encoder_id    VARCHAR the encoder of the features
-- param  $kind          VARCHAR = both object, style or both
-- param  $split         VARCHAR = train split of the models
-- param  $prompt_scheme VARCHAR = both prompt scheme of the samples: gpt, procedural or both
-- reads  features, images, models
-- column image_id       VARCHAR
-- column feature        FLOAT[] of unit length
WITH chosen_models AS (
    SELECT model_id
    FROM models
    WHERE split = $split AND ($kind = kind OR ($kind = 'both' AND kind IN ('object', 'style')))
)
SELECT
    features.image_id,
    features.feature
FROM features
JOIN chosen_models ON chosen_models.model_id = features.model_id
JOIN images ON images.image_id = features.image_id
WHERE features.encoder_id = $encoder_id
    AND (features.role = 'exemplar' OR (features.role = 'sample' AND $prompt_scheme IN ('both', images.prompt_scheme)))
