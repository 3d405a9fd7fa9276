-- What a mapper gains over another one, or over the encoder's own features, in recall and average precision, model by model: a
-- paired bootstrap draws models and takes both values of each. An interval that excludes 0 is evidence of a gain, for this one
-- comparison: of many, some exclude 0 by chance. A model counts as one, whatever its number of samples. Samples that were not
-- ranked by both, or not among equally many candidates, are left out.
-- source Wang et al. 2023, section 5; the intervals are ours
-- grain  one row per gallery, kind, split and prompt scheme
-- param  $mapper_id     VARCHAR the mapper
-- param  $other_id      VARCHAR = '' what it is compared with: a mapper_id, empty for the encoder's own features
-- param  $encoder_id    VARCHAR whose features are compared; the mapper's encoder when left out
-- param  $k             INTEGER = 10 cut-off, >= 1
-- param  $n_replicates  INTEGER = 1000 of the bootstrap, >= 1
-- param  $seed          INTEGER = 0 of the bootstrap
-- reads  sample_scores
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object or style
-- column split          VARCHAR of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column recall_gain    DOUBLE  mean difference of recall_at_k
-- column recall_low     DOUBLE  of the middle 95 % of the replicates
-- column recall_high    DOUBLE
-- column precision_gain DOUBLE  mean difference of average precision
-- column precision_low  DOUBLE
-- column precision_high DOUBLE
WITH paired_samples AS (
    SELECT
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        max(CASE WHEN mapper_id = $mapper_id THEN recall END)
            - max(CASE WHEN mapper_id = $other_id THEN recall END) AS recall,
        max(CASE WHEN mapper_id = $mapper_id THEN average_precision END)
            - max(CASE WHEN mapper_id = $other_id THEN average_precision END) AS average_precision
    FROM sample_scores($k)
    WHERE encoder_id = $encoder_id AND mapper_id IN ($mapper_id, $other_id)
    GROUP BY gallery, kind, split, prompt_scheme, model_id, sample_id
    HAVING count(*) = 2 AND sum(n_unranked) = 0 AND min(chance_recall) = max(chance_recall)
),
gains AS (
    SELECT
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        avg(recall) AS recall,
        avg(average_precision) AS average_precision
    FROM paired_samples
    GROUP BY gallery, kind, split, prompt_scheme, model_id
),
numbered_gains AS (
    SELECT
        *,
        count(*) OVER case_of AS n_models,
        row_number() OVER (case_of ORDER BY model_id) - 1 AS number
    FROM gains
    WINDOW case_of AS (PARTITION BY gallery, kind, split, prompt_scheme)
),
draws AS (
    SELECT
        sizes.n_models,
        replicates.replicate,
        md5_number_lower($seed || '/' || replicates.replicate || '/' || places.place) % sizes.n_models AS number
    FROM (SELECT DISTINCT n_models FROM numbered_gains) AS sizes
    CROSS JOIN (SELECT unnest(range($n_replicates)) AS replicate) AS replicates
    CROSS JOIN (SELECT unnest(range((SELECT max(n_models) FROM numbered_gains))) AS place) AS places
    WHERE places.place < sizes.n_models
),
replicate_means AS (
    SELECT
        gains.gallery,
        gains.kind,
        gains.split,
        gains.prompt_scheme,
        draws.replicate,
        avg(gains.recall) AS recall,
        avg(gains.average_precision) AS average_precision
    FROM numbered_gains AS gains
    JOIN draws ON draws.n_models = gains.n_models AND draws.number = gains.number
    GROUP BY ALL
),
means AS (
    SELECT
        gallery,
        kind,
        split,
        prompt_scheme,
        count(*) AS n_models,
        avg(recall) AS recall_gain,
        avg(average_precision) AS precision_gain
    FROM numbered_gains
    GROUP BY ALL
)
SELECT
    means.gallery,
    means.kind,
    means.split,
    means.prompt_scheme,
    means.n_models,
    means.recall_gain,
    quantile_cont(replicates.recall, 0.025) AS recall_low,
    quantile_cont(replicates.recall, 0.975) AS recall_high,
    means.precision_gain,
    quantile_cont(replicates.average_precision, 0.025) AS precision_low,
    quantile_cont(replicates.average_precision, 0.975) AS precision_high
FROM means
JOIN replicate_means AS replicates
    ON replicates.gallery = means.gallery
    AND replicates.kind IS NOT DISTINCT FROM means.kind
    AND replicates.split IS NOT DISTINCT FROM means.split
    AND replicates.prompt_scheme IS NOT DISTINCT FROM means.prompt_scheme
GROUP BY ALL
ORDER BY means.kind, means.split, means.prompt_scheme, means.gallery
