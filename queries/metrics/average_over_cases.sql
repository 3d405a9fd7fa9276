-- Recall and average precision, averaged over the samples of each test case, then over the test cases. So a case with many
-- samples counts no more than one with few. A test case is a split and a prompt scheme. Splits whose name does not begin with
-- 'test' are left out unless test_only is 0. Without ranks there is no row.
-- source Wang et al. 2023, section 5
-- grain  one row per method, gallery and kind
-- param  $k             INTEGER = 10 cut-off, >= 1
-- param  $test_only     INTEGER = 1 1: only splits that begin with 'test'; 0: all, >= 0
-- reads  sample_scores
-- column method_id      VARCHAR
-- column encoder_id     VARCHAR of the method; null unless it is similarity
-- column mapper_id      VARCHAR of the method; empty without a mapper
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object, style, concepts or mixed
-- column n_cases        BIGINT
-- column n_models       BIGINT
-- column recall_at_k    DOUBLE  in [0, 1]; found / all exemplars
-- column capped_recall_at_k      DOUBLE  in [0, 1]; found / min(k, all exemplars)
-- column mean_average_precision  DOUBLE  in [0, 1]
WITH cases AS (
    SELECT
        method_id,
        encoder_id,
        mapper_id,
        gallery,
        kind,
        split,
        prompt_scheme,
        list(DISTINCT model_id) AS models,
        avg(recall) AS recall,
        avg(capped_recall) AS capped_recall,
        avg(average_precision) AS average_precision
    FROM sample_scores($k)
    WHERE $test_only = 0 OR starts_with(split, 'test')
    GROUP BY ALL
)
SELECT
    method_id,
    encoder_id,
    mapper_id,
    gallery,
    kind,
    count(*) AS n_cases,
    len(list_distinct(flatten(list(models))))::BIGINT AS n_models,
    avg(recall) AS recall_at_k,
    avg(capped_recall) AS capped_recall_at_k,
    avg(average_precision) AS mean_average_precision
FROM cases
GROUP BY method_id, encoder_id, mapper_id, gallery, kind
ORDER BY kind, gallery, encoder_id, mapper_id, method_id
