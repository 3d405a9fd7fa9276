-- Mappers and calibrations that were fitted before images were taken out. Fit them again where that matters.
-- No row if nothing was taken out, or if all were fitted afterwards.
-- source attrdb
-- grain  one row per mapper or calibration
-- reads  calibrations, mappers, removals
-- column kind            VARCHAR  mapper or calibration
-- column id              VARCHAR  mapper_id or method_id
-- column images_version  BIGINT   version of images that it was fitted on
-- column n_removals      BIGINT   removals since
-- column n_images        BIGINT   images that they took out
WITH fitted AS (
    SELECT 'mapper' AS kind, mapper_id AS id, images_version FROM mappers
    UNION ALL
    SELECT DISTINCT 'calibration' AS kind, method_id AS id, images_version FROM calibrations
)
SELECT fitted.kind, fitted.id, fitted.images_version, count(*) AS n_removals, sum(removals.n_images)::BIGINT AS n_images
FROM fitted
JOIN removals ON removals.images_version > fitted.images_version AND removals.n_images > 0
GROUP BY fitted.kind, fitted.id, fitted.images_version
ORDER BY fitted.kind, fitted.id
