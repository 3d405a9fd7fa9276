-- Pairs of an exemplar and a sample of one model, in the order in which an epoch of training takes them: every sample once, with
-- one of its model's exemplars drawn for it. At one position every model stands once, so that the models of a batch taken from
-- one position are distinct. The order and the draws follow from seed and epoch. Models without exemplar or sample have no row.
-- source Wang et al. 2023, section 4 (one pair of each of several models); the order is ours
-- grain  one row per sample
-- param  $kind          VARCHAR = both object, style or both
-- param  $split         VARCHAR = train of the models
-- param  $prompt_scheme VARCHAR = both of the samples: gpt, procedural or both
-- param  $seed          INTEGER = 0 of the order and the draws
-- param  $epoch         INTEGER = 0 from 0, >= 0
-- reads  exemplars, models, samples
-- column position       BIGINT  from 0
-- column model_id       VARCHAR
-- column exemplar_id    VARCHAR
-- column sample_id      VARCHAR
WITH draws AS (
    SELECT '/' || $seed || '/' || $epoch AS draw
),
chosen_models AS (
    SELECT model_id
    FROM models
    WHERE split = $split AND ($kind = kind OR ($kind = 'both' AND kind IN ('object', 'style')))
),
placed_samples AS (
    SELECT
        samples.model_id,
        samples.image_id AS sample_id,
        row_number() OVER (
            PARTITION BY samples.model_id ORDER BY md5(samples.image_id || draw), samples.image_id
        ) - 1 AS position,
        md5_number_lower(samples.image_id || draw || '/exemplar') AS drawn_number
    FROM samples
    JOIN chosen_models ON chosen_models.model_id = samples.model_id
    CROSS JOIN draws
    WHERE $prompt_scheme IN ('both', samples.prompt_scheme)
),
numbered_exemplars AS (
    SELECT
        model_id,
        image_id AS exemplar_id,
        row_number() OVER (PARTITION BY model_id ORDER BY image_id) - 1 AS number,
        count(*) OVER (PARTITION BY model_id) AS n_exemplars
    FROM exemplars
)
SELECT
    placed_samples.position,
    placed_samples.model_id,
    numbered_exemplars.exemplar_id,
    placed_samples.sample_id
FROM placed_samples
JOIN numbered_exemplars
    ON numbered_exemplars.model_id = placed_samples.model_id
    AND numbered_exemplars.number = placed_samples.drawn_number % numbered_exemplars.n_exemplars
CROSS JOIN draws
ORDER BY
    placed_samples.position,
    md5(placed_samples.model_id || draw || '/' || placed_samples.position),
    placed_samples.model_id
