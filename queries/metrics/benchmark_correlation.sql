-- Does the benchmark on exemplars foretell general attribution? Over all features that were evaluated on both (encoders, with
-- and without mappers), the Pearson correlation of recall@k on object and style models, averaged over test cases, with recall
-- at the size of the set on models of unrelated images. Empty where fewer than three were evaluated, or all are equal.
-- source Wang et al. 2023, Fig. 10
-- grain  one row per gallery, set size and kind of the exemplars
-- param  $k             INTEGER = 10 cut-off on object and style models, >= 1
-- param  $split         VARCHAR = test how the name of the object and style models' split begins
-- reads  models, samples, exemplars, exemplar_ranks, sample_scores
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object or style
-- column n_exemplars    BIGINT  size of the set
-- column n_features     BIGINT  encoders and mappers compared
-- column n_encoders     BIGINT  of which they are; mappers on one encoder are not independent of each other
-- column correlation    DOUBLE  in [-1, 1], over all of them
-- column of_encoders    DOUBLE  the same over encoders without a mapper
WITH exemplar_cases AS (
    SELECT encoder_id, mapper_id, gallery, kind, split, prompt_scheme, avg(recall) AS recall
    FROM sample_scores($k)
    WHERE kind <> 'mixed' AND starts_with(split, $split)
    GROUP BY encoder_id, mapper_id, gallery, kind, split, prompt_scheme
),
on_exemplars AS (
    SELECT encoder_id, mapper_id, gallery, kind, avg(recall) AS recall
    FROM exemplar_cases
    GROUP BY encoder_id, mapper_id, gallery, kind
),
sets AS (
    SELECT models.model_id, count(*) AS n_exemplars
    FROM models
    JOIN exemplars ON exemplars.model_id = models.model_id
    WHERE models.kind = 'mixed'
    GROUP BY models.model_id
),
evaluations AS (
    SELECT DISTINCT encoder_id, mapper_id, gallery
    FROM exemplar_ranks
),
set_scores AS (
    SELECT
        evaluations.encoder_id,
        evaluations.mapper_id,
        evaluations.gallery,
        sets.n_exemplars,
        samples.image_id AS sample_id,
        avg(CASE WHEN ranks.rank <= sets.n_exemplars THEN 1.0 ELSE 0.0 END) AS recall
    FROM evaluations
    CROSS JOIN sets
    JOIN samples ON samples.model_id = sets.model_id
    JOIN exemplars ON exemplars.model_id = sets.model_id
    LEFT JOIN exemplar_ranks AS ranks
        ON ranks.encoder_id = evaluations.encoder_id
        AND ranks.mapper_id = evaluations.mapper_id
        AND ranks.gallery = evaluations.gallery
        AND ranks.sample_id = samples.image_id
        AND ranks.exemplar_id = exemplars.image_id
    GROUP BY ALL
),
on_sets AS (
    SELECT encoder_id, mapper_id, gallery, n_exemplars, avg(recall) AS recall
    FROM set_scores
    GROUP BY encoder_id, mapper_id, gallery, n_exemplars
),
compared AS (
    SELECT
        one.gallery,
        one.kind,
        other.n_exemplars,
        count(*) AS n_features,
        count(DISTINCT one.encoder_id) AS n_encoders,
        corr(one.recall, other.recall) AS correlation,
        count(CASE WHEN one.mapper_id = '' THEN 1 END) AS n_plain,
        corr(one.recall, other.recall) FILTER (WHERE one.mapper_id = '') AS of_encoders
    FROM on_exemplars AS one
    JOIN on_sets AS other
        ON other.encoder_id = one.encoder_id AND other.mapper_id = one.mapper_id AND other.gallery = one.gallery
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
