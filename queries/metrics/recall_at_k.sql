-- Share of a model's exemplars among the first k candidates of its samples, beside chance and the best possible value.
-- Averaged over the samples of a test case (method, gallery, kind, split and prompt scheme). A pair that was never ranked counts
-- as not found and in n_unranked; compute ranks with: attrdb evaluate. Without ranks there is no row.
-- source Wang et al. 2023, section 5
-- grain  one row per method, gallery, kind, split and prompt scheme
-- param  $k             INTEGER = 10 cut-off, >= 1
-- reads  sample_scores
-- column method_id      VARCHAR
-- column encoder_id     VARCHAR of the method; null unless it is similarity
-- column mapper_id      VARCHAR of the method; empty without a mapper
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object, style, concepts or mixed
-- column split          VARCHAR split of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column n_samples      BIGINT
-- column recall_at_k    DOUBLE  in [0, 1]; found / all exemplars
-- column capped_recall_at_k  DOUBLE  in [0, 1]; found / min(k, all exemplars)
-- column chance         DOUBLE  expected recall_at_k in a random order
-- column ceiling        DOUBLE  highest possible recall_at_k, below 1 if a model has more than k exemplars
-- column n_unranked     BIGINT  pairs of sample and exemplar without a rank
SELECT
    method_id,
    encoder_id,
    mapper_id,
    gallery,
    kind,
    split,
    prompt_scheme,
    count(DISTINCT model_id) AS n_models,
    count(*) AS n_samples,
    avg(recall) AS recall_at_k,
    avg(capped_recall) AS capped_recall_at_k,
    avg(chance_recall) AS chance,
    avg(best_recall) AS ceiling,
    sum(n_unranked)::BIGINT AS n_unranked
FROM sample_scores($k)
GROUP BY method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme
ORDER BY kind, split, prompt_scheme, gallery, encoder_id, mapper_id, method_id
