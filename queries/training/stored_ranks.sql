-- Ranks of the exemplars of scored samples among the candidates that a stored method has scored. An exemplar without a score has
-- no row and counts in metrics as not found.
-- source attrdb
-- grain  one row per sample and scored exemplar of its model
-- param  $method        VARCHAR = NULL a stored method
-- param  $gallery       VARCHAR = own own: the exemplars of the sample's model and the pretraining images; all: every exemplar
-- reads  images, scores
-- column sample_id      VARCHAR
-- column exemplar_id    VARCHAR
-- column score          DOUBLE
-- column rank           BIGINT  1 + number of scored candidates with a higher score; ties by image_id
-- column gallery_size   BIGINT  number of scored candidates
WITH scored AS (
    SELECT
        scores.sample_id,
        scores.candidate_id,
        scores.score,
        candidates.role = 'exemplar' AND candidates.model_id = queries.model_id AS is_own
    FROM scores
    JOIN images AS queries ON queries.image_id = scores.sample_id AND queries.role = 'sample'
    JOIN images AS candidates ON candidates.image_id = scores.candidate_id
    WHERE scores.method_id = $method
        AND (
            candidates.role = 'pretraining'
            OR (candidates.role = 'exemplar' AND ($gallery = 'all' OR candidates.model_id = queries.model_id))
        )
),
ranked AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY sample_id ORDER BY score DESC, candidate_id) AS rank,
        count(*) OVER (PARTITION BY sample_id) AS gallery_size
    FROM scored
)
SELECT sample_id, candidate_id AS exemplar_id, score, rank, gallery_size
FROM ranked
WHERE is_own
ORDER BY sample_id, rank
