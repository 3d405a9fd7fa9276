-- Features that are not of unit length, or hold NaN or infinity: similarity is wrong for them.
-- Without such rows, which is as it should be, there is none.
-- source attrdb
-- grain  one row per image and encoder
-- reads  features
-- column image_id        VARCHAR
-- column encoder_id      VARCHAR
-- column squared_length  FLOAT    1 is right, to 0.005
WITH lengths AS (
    SELECT image_id, encoder_id, list_inner_product(feature, feature) AS squared_length FROM features
)
SELECT image_id, encoder_id, squared_length
FROM lengths
WHERE squared_length IS NULL OR isnan(squared_length) OR abs(squared_length - 1) > 0.005
ORDER BY image_id, encoder_id
