-- exemplar_ranks before schema 6, with today's columns.
-- grain  one row per row of the older table
SELECT
    CASE WHEN mapper_id = '' THEN encoder_id ELSE encoder_id || '/' || mapper_id END AS method_id,
    gallery,
    sample_id,
    exemplar_id,
    NULL::DOUBLE AS score,
    rank,
    gallery_size,
    images_version
FROM _exemplar_ranks_5
