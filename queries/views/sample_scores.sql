-- Recall and average precision of each sample, for every method and gallery that was evaluated.
-- recall: share of the exemplars of the sample's model among the first k; with k NULL, among the first n of n exemplars.
-- capped_recall: found / min(k, n). average_precision: mean of j / r_j over the exemplars by rank r_1 < r_2 < ...
-- chance_recall and chance_precision: expectation in a random order. best_recall: the highest possible recall.
-- An exemplar that was never ranked counts as not found and in n_unranked.
-- The harmonic number H_N is computed from its expansion, exact to 1e-4 from N = 30 on.
-- grain     one row per sample, method and gallery
-- argument  k                   cut-off, >= 1
WITH evaluations AS (
    SELECT method_id, gallery, max(gallery_size) AS largest_gallery
    FROM _exemplar_ranks
    GROUP BY method_id, gallery
),
truth AS (
    SELECT
        evaluations.*,
        models.kind,
        models.split,
        models.model_id,
        samples.prompt_scheme,
        samples.image_id AS sample_id,
        exemplars.image_id AS exemplar_id
    FROM evaluations
    CROSS JOIN models
    JOIN samples ON samples.model_id = models.model_id
    JOIN exemplars ON exemplars.model_id = models.model_id
),
ranked AS (
    SELECT
        truth.*,
        ranks.rank,
        coalesce(ranks.gallery_size, truth.largest_gallery) AS gallery_size,
        row_number() OVER (
            PARTITION BY truth.method_id, truth.gallery, truth.sample_id
            ORDER BY ranks.rank ASC NULLS LAST, truth.exemplar_id
        ) / ranks.rank AS precision_at_rank
    FROM truth
    LEFT JOIN _exemplar_ranks AS ranks
        ON ranks.method_id = truth.method_id
        AND ranks.gallery = truth.gallery
        AND ranks.sample_id = truth.sample_id
        AND ranks.exemplar_id = truth.exemplar_id
),
cut AS (
    SELECT *, coalesce(k, count(*) OVER (PARTITION BY method_id, gallery, sample_id)) AS cut_off
    FROM ranked
),
counted AS (
    SELECT
        method_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        model_id,
        sample_id,
        cut_off,
        count(*) AS n_exemplars,
        max(gallery_size) AS n,
        ln(n) + 0.5772156649 + 1 / (2 * n) AS harmonic,
        count(CASE WHEN rank <= cut_off THEN 1 END) AS n_found,
        avg(coalesce(precision_at_rank, 0.0)) AS average_precision,
        count(*) - count(rank) AS n_unranked
    FROM cut
    GROUP BY ALL
)
SELECT
    counted.method_id,
    methods.encoder_id,
    coalesce(methods.mapper_id, '') AS mapper_id,
    gallery,
    counted.kind,
    split,
    prompt_scheme,
    model_id,
    sample_id,
    n_exemplars,
    n_found / n_exemplars AS recall,
    n_found / least(cut_off, n_exemplars) AS capped_recall,
    average_precision,
    least(1.0, cut_off / n) AS chance_recall,
    least(1.0, cut_off / n_exemplars) AS best_recall,
    (harmonic + (n_exemplars - 1) / greatest(n - 1, 1) * (n - harmonic)) / n AS chance_precision,
    n_unranked
FROM counted
LEFT JOIN methods ON methods.method_id = counted.method_id
