-- Whose exemplars shaped a monitored model, by concept: shares summed by creator, licence, source, category or concept.
-- An estimate, not a causal share.
-- source after Brokman et al. 2024, whose procedure is not public, see docs/monitoring.md
-- grain  one row per concept of a prompt and name, greatest share first; a null name has exemplars of which it is not known
-- param  $model_id   VARCHAR the model
-- param  $per        VARCHAR = 'creator' creator, license, source, category or concept (of the exemplars)
-- param  $measure    VARCHAR = 'progress' progress, progress per visit or change norm
-- reads  attribution_tables, images
-- column concept_id  VARCHAR the concept whose prompt was looked at; null for mixed models
-- column name        VARCHAR the creator, licence, source, category or concept_id
-- column n_exemplars BIGINT  exemplars of that name
-- column value       DOUBLE  of the measure, summed; may be negative
-- column share       DOUBLE  at least 0; sums to 1 over the names of a concept, unless exemplars were taken out since
WITH rated AS MATERIALIZED (  -- so that its rows, and no others, are joined with images
    FROM attribution_tables
    WHERE
        model_id = $model_id
        AND measure = CASE
            WHEN $measure IN ('progress', 'progress per visit', 'change norm') THEN $measure
            ELSE error('measure is ''' || $measure || '''; it must be progress, progress per visit or change norm')
        END
)
SELECT
    rated.concept_id,
    CASE $per
        WHEN 'creator' THEN exemplars.creator
        WHEN 'license' THEN exemplars.license
        WHEN 'source' THEN exemplars.source
        WHEN 'category' THEN exemplars.category
        WHEN 'concept' THEN exemplars.concept_id
        ELSE error('per is ''' || $per || '''; it must be creator, license, source, category or concept')
    END AS name,
    count(*) AS n_exemplars,
    sum(rated.value) AS value,
    sum(rated.share) AS share
FROM rated
LEFT JOIN images AS exemplars USING (image_id)
GROUP BY rated.concept_id, name
ORDER BY rated.concept_id, share DESC, name NULLS LAST
