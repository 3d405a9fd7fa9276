-- Keys that two key sets share: the same prompt, or the same picture, byte for byte. A key set that shares keys with one that was shown
-- to somebody is no secret from him.
-- source attrdb
-- grain  one row per pair of key sets with a key in common, most first
-- reads  images, keys
-- column key_set_id     VARCHAR
-- column other_id       VARCHAR
-- column n_keys         BIGINT  of the first
-- column n_prompts      BIGINT  its keys whose prompt the other has, too
-- column n_references   BIGINT  its keys whose picture the other has, too
WITH known AS (
    SELECT keys.key_set_id, keys.key_id, lower(trim(regexp_replace(keys.prompt, '\s+', ' ', 'g'))) AS prompt, images.sha256
    FROM keys
    LEFT JOIN images ON images.image_id = keys.image_id
)
SELECT
    one.key_set_id,
    other.key_set_id AS other_id,
    (SELECT count(*) FROM keys WHERE keys.key_set_id = one.key_set_id) AS n_keys,
    count(DISTINCT one.key_id) FILTER (one.prompt = other.prompt) AS n_prompts,
    count(DISTINCT one.key_id) FILTER (one.sha256 = other.sha256) AS n_references
FROM known AS one
JOIN known AS other
    ON other.key_set_id <> one.key_set_id
    AND (other.prompt = one.prompt OR other.sha256 = one.sha256)
GROUP BY one.key_set_id, other.key_set_id
ORDER BY n_prompts + n_references DESC, one.key_set_id, other.key_set_id
