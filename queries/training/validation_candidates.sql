-- A fixed random subset of the pretraining images, with their features: the gallery of the validation during training.
-- source Wang et al. 2023, section 5 (a fixed random subset of the pretraining images)
-- grain  one row per image
-- param  $encoder_id VARCHAR the encoder of the features
-- param  $n          INTEGER = 10000 number of images, or all if there are fewer, >= 1
-- param  $seed       INTEGER = 0 seed of the choice
-- reads  features
-- column image_id    VARCHAR
-- column feature     FLOAT[] of unit length
SELECT
    image_id,
    feature
FROM features
WHERE encoder_id = $encoder_id AND role = 'pretraining'
ORDER BY md5(image_id || '/' || $seed), image_id
LIMIT $n
