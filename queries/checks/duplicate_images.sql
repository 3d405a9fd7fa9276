-- Images whose id stands more than once; take the extra rows out with a Lance client.
-- Without such rows, which is as it should be, there is none.
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
