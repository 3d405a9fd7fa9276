-- Metadata of each data set's images: how many have a caption, a creator, a licence, stored bytes.
-- Samples count under the source `synthesized`. Without images there is no row.
-- source attrdb
-- grain  one row per source and role
-- reads  images
-- column source       VARCHAR
-- column role         VARCHAR
-- column n_images     BIGINT
-- column n_captioned  BIGINT with a caption or prompt
-- column n_creator    BIGINT with a creator
-- column n_license    BIGINT with a licence
-- column n_stored     BIGINT whose encoded bytes are stored
SELECT
    source,
    role,
    count(*) AS n_images,
    count(prompt) AS n_captioned,
    count(creator) AS n_creator,
    count(license) AS n_license,
    count(CASE WHEN image IS NOT NULL THEN 1 END) AS n_stored
FROM images
GROUP BY source, role
ORDER BY source NULLS LAST, role
