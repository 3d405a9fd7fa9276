-- What a method gains over another in recall and average precision, with intervals from a paired bootstrap: it draws models and
-- takes both values of each. Every model has the same weight, whatever its number of samples. Samples that were not ranked by both
-- among equally many candidates are left out.
-- grain     one row per gallery, kind, split and prompt scheme
-- argument  method          the method
-- argument  other           the method to compare with
-- argument  k               cut-off of recall, >= 1
-- argument  n_replicates    number of bootstrap replicates, >= 1
-- argument  seed            seed of the bootstrap
WITH paired_samples AS (
    SELECT
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        max(CASE WHEN method_id = method THEN recall END) - max(CASE WHEN method_id = other THEN recall END) AS recall,
        max(CASE WHEN method_id = method THEN average_precision END)
            - max(CASE WHEN method_id = other THEN average_precision END) AS average_precision
    FROM sample_scores(k)
    WHERE method_id IN (
        SELECT CASE
                WHEN wanted IN (SELECT method_id FROM methods) THEN wanted
                ELSE error('no method ''' || wanted || '''; list them with: FROM methods')
            END
        FROM (SELECT unnest([method, other]) AS wanted)
    )
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
    SELECT sizes.n_models, drawn.replicate, drawn.hash % sizes.n_models AS number
    FROM (SELECT DISTINCT n_models FROM numbered_gains) AS sizes
    JOIN bootstrap_draws((SELECT max(n_models) FROM numbered_gains), n_replicates, seed) AS drawn
        ON drawn.place < sizes.n_models
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
