-- Images whose id appears more than once. Delete the extra rows with a Lance client.
-- No row means no problem.
-- source attrdb
-- grain  one row per image_id
-- reads  images
-- column image_id  VARCHAR
-- column n_rows    BIGINT
SELECT image_id, count(*) AS n_rows
FROM images
GROUP BY image_id
HAVING count(*) > 1
ORDER BY image_id
