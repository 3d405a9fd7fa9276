-- Pairs of an exemplar and a sample of the same model, in the order of a training epoch. Each sample occurs once, with one
-- exemplar of its model, drawn at random. At each position each model occurs once, so the models of a batch within one position
-- are distinct. Seed and epoch determine order and draws. Models without an exemplar or without a sample have no row.
-- source Wang et al. 2023, section 4 (one pair of each of several models); the order is ours
-- grain  one row per sample
-- param  $kind          VARCHAR = both object, style or both
-- param  $split         VARCHAR = train split of the models
-- param  $prompt_scheme VARCHAR = both prompt scheme of the samples: gpt, procedural or both
-- param  $seed          INTEGER = 0 seed of the order and the draws
-- param  $epoch         INTEGER = 0 number of the epoch, from 0, >= 0
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
