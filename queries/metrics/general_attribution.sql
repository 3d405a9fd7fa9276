-- Recall at the size of the set, for models that were customized on sets of n unrelated images: the share of these images among the
-- first n candidates. A pair that was never ranked counts as not found. Without ranks there is no row.
-- source Wang et al. 2023, Fig. 10
-- grain  one row per method, gallery, split and set size
-- reads  sample_scores
-- column method_id      VARCHAR
-- column encoder_id     VARCHAR of the method; null unless it is similarity
-- column mapper_id      VARCHAR of the method; empty without a mapper
-- column gallery        VARCHAR own or all
-- column split          VARCHAR split of the models
-- column n_exemplars    BIGINT  size of the set
-- column n_models       BIGINT
-- column n_samples      BIGINT
-- column recall_at_size DOUBLE  in [0, 1]
-- column chance         DOUBLE  expectation in a random order
SELECT
    method_id,
    encoder_id,
    mapper_id,
    gallery,
    split,
    n_exemplars,
    count(DISTINCT model_id) AS n_models,
    count(*) AS n_samples,
    avg(recall) AS recall_at_size,
    avg(chance_recall) AS chance
FROM sample_scores(NULL)
WHERE kind = 'mixed'
GROUP BY method_id, encoder_id, mapper_id, gallery, split, n_exemplars
ORDER BY n_exemplars, split, gallery, encoder_id, mapper_id, method_id
