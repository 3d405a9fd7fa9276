-- Images with an unknown role, or with a role that does not match their model: exemplars and samples belong to a model, others to none.
-- No row means no problem.
-- source attrdb
-- grain  one row per image
-- reads  images
-- column image_id  VARCHAR
-- column role      VARCHAR
-- column model_id  VARCHAR
SELECT image_id, role, model_id
FROM images
WHERE
    role NOT IN ('exemplar', 'sample', 'pretraining', 'key', 'answer')
    OR (role IN ('exemplar', 'sample')) <> (model_id IS NOT NULL)
ORDER BY image_id
