-- Which exemplars shaped a monitored model, by concept. An estimate, not a causal share.
-- progress: the exemplar's share of the change of K and V of the concept's prompt, along that change; below 0 it pulled away.
-- progress per visit: corrected for how often chance drew it. change norm: how far it moved them, in whatever direction.
-- source after Brokman et al. 2024, whose procedure is not public, see docs/monitoring.md
-- grain  one row per concept and exemplar, greatest value first; none for a model that was not monitored
-- param  $model_id   VARCHAR the model
-- param  $measure    VARCHAR = 'progress' progress, progress per visit or change norm
-- reads  attribution_tables, images
-- column concept_id  VARCHAR the concept; null for mixed models
-- column image_id    VARCHAR the exemplar
-- column value       DOUBLE  of the measure; may be negative
-- column share       DOUBLE  at least 0; sums to 1 over the exemplars of a concept, unless some were taken out since
-- column n_visits    INTEGER slots of batches that drew it
-- column category    VARCHAR what it shows
-- column creator     VARCHAR who made it
-- column license     VARCHAR under which it may be used
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
    rated.image_id,
    rated.value,
    rated.share,
    rated.n_visits,
    exemplars.category,
    exemplars.creator,
    exemplars.license
FROM rated
LEFT JOIN images AS exemplars USING (image_id)
ORDER BY rated.concept_id, rated.value DESC, rated.image_id
