-- Number of images of each role that each encoder has encoded.
-- An encoder without any encoded image of a role has a row with 0. Without encoders or images there is no row.
-- source attrdb
-- grain  one row per encoder and role
-- reads  encoders, features, images
-- column encoder_id  VARCHAR
-- column role        VARCHAR
-- column n_images    BIGINT
-- column n_encoded   BIGINT
-- column share       DOUBLE  n_encoded / n_images, in [0, 1]
WITH roles AS (
    SELECT role, count(*) AS n_images FROM images GROUP BY role
),
encoded AS (
    SELECT encoder_id, role, count(*) AS n_encoded FROM features GROUP BY encoder_id, role
)
SELECT
    encoders.encoder_id,
    roles.role,
    roles.n_images,
    coalesce(encoded.n_encoded, 0) AS n_encoded,
    coalesce(encoded.n_encoded, 0) / roles.n_images AS share
FROM encoders
CROSS JOIN roles
LEFT JOIN encoded ON encoded.encoder_id = encoders.encoder_id AND encoded.role = roles.role
ORDER BY encoders.encoder_id, roles.role
