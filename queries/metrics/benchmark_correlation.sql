-- How well the benchmark on exemplars predicts general attribution: a Pearson correlation. It is computed over all methods that
-- were evaluated on both, from two recalls: recall@k on object and style models, averaged over test cases, and recall at the size
-- of the set on models of unrelated images. Null for fewer than three methods, or if all values are equal.
-- source Wang et al. 2023, Fig. 10
-- grain  one row per gallery, set size and kind of the exemplars
-- param  $k             INTEGER = 10 cut-off on object and style models, >= 1
-- param  $split         VARCHAR = test beginning of the split of the object and style models
-- reads  sample_scores
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object or style
-- column n_exemplars    BIGINT  size of the set
-- column n_features     BIGINT  methods compared
-- column n_encoders     BIGINT  encoders of these methods, each other method counts as one; mappers of one encoder are not independent
-- column correlation    DOUBLE  in [-1, 1], over all methods
-- column of_encoders    DOUBLE  the same, over methods without a mapper
WITH exemplar_cases AS (
    SELECT method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme, avg(recall) AS recall
    FROM sample_scores($k)
    WHERE kind IN ('object', 'style') AND starts_with(split, $split)
    GROUP BY method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme
),
on_exemplars AS (
    SELECT method_id, encoder_id, mapper_id, gallery, kind, avg(recall) AS recall
    FROM exemplar_cases
    GROUP BY method_id, encoder_id, mapper_id, gallery, kind
),
on_sets AS (
    SELECT method_id, encoder_id, mapper_id, gallery, n_exemplars, avg(recall) AS recall
    FROM sample_scores(NULL)
    WHERE kind = 'mixed'
    GROUP BY method_id, encoder_id, mapper_id, gallery, n_exemplars
),
compared AS (
    SELECT
        one.gallery,
        one.kind,
        other.n_exemplars,
        count(*) AS n_features,
        count(DISTINCT coalesce(one.encoder_id, one.method_id)) AS n_encoders,
        corr(one.recall, other.recall) AS correlation,
        count(CASE WHEN one.mapper_id = '' THEN 1 END) AS n_plain,
        corr(one.recall, other.recall) FILTER (WHERE one.mapper_id = '') AS of_encoders
    FROM on_exemplars AS one
    JOIN on_sets AS other
        ON other.method_id = one.method_id AND other.gallery = one.gallery
    GROUP BY one.gallery, one.kind, other.n_exemplars
)
SELECT
    gallery,
    kind,
    n_exemplars,
    n_features,
    n_encoders,
    CASE WHEN n_features >= 3 AND NOT isnan(correlation) THEN correlation END AS correlation,
    CASE WHEN n_plain >= 3 AND NOT isnan(of_encoders) THEN of_encoders END AS of_encoders
FROM compared
ORDER BY gallery, kind, n_exemplars
