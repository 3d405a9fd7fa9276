-- Features that do not have unit length, or contain NaN or infinity: their similarity is wrong.
-- No row means no problem.
-- source attrdb
-- grain  one row per image and encoder
-- reads  features
-- column image_id        VARCHAR
-- column encoder_id      VARCHAR
-- column squared_length  FLOAT    correct: 1, to 0.005
WITH lengths AS (
    SELECT image_id, encoder_id, list_inner_product(feature, feature) AS squared_length FROM features
)
SELECT image_id, encoder_id, squared_length
FROM lengths
WHERE squared_length IS NULL OR isnan(squared_length) OR abs(squared_length - 1) > 0.005
ORDER BY image_id, encoder_id
