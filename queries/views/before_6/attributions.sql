-- attributions before schema 6, with today's columns.
-- grain  one row per row of the older table
SELECT
    CASE WHEN mapper_id = '' THEN encoder_id ELSE encoder_id || '/' || mapper_id END AS method_id,
    sample_id,
    rank,
    candidate_id,
    similarity AS score,
    influence,
    complete,
    missing_influence,
    k,
    exact,
    tau,
    lam,
    images_version,
    NULL::DOUBLE AS unattributed
FROM _attributions_5
