-- Share of a model's exemplars among the first k candidates of its samples, beside chance and the best possible value.
-- Averaged over the samples of a test case (encoder, gallery, kind, split and prompt scheme). A pair that was never ranked counts
-- as not found and is counted in n_unranked; fill the ranks with: attrdb evaluate. Without ranks there is no row.
-- source Wang et al. 2023, section 5
-- grain  one row per method, gallery, kind, split and prompt scheme
-- param  $k             INTEGER = 10 cut-off, >= 1
-- reads  sample_scores
-- column method_id      VARCHAR
-- column encoder_id     VARCHAR whose features the method compares; null for a method that is no similarity
-- column mapper_id      VARCHAR empty: features without a mapper
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object or style
-- column split          VARCHAR of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column n_samples      BIGINT
-- column recall_at_k    DOUBLE  in [0, 1]; found / all exemplars
-- column capped_recall_at_k  DOUBLE  in [0, 1]; found / min(k, all exemplars)
-- column chance         DOUBLE  recall_at_k expected of a random order
-- column ceiling        DOUBLE  best possible, below 1 where a model has more than k exemplars
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
