-- Mean over samples of the average precision with which a model's exemplars are retrieved.
-- AP of a sample = mean over its model's exemplars, by rank r_1 < r_2 < ..., of j / r_j; an unranked exemplar adds 0.
-- Chance is the expectation over random orders of a gallery of N with E exemplars. H_N is the N-th harmonic number:
-- (H_N + (E - 1) / (N - 1) * (N - H_N)) / N. H_N is computed from its expansion, exact to 1e-4 from N = 30 on.
-- Without ranks there is no row; compute them with: attrdb evaluate.
-- source Wang et al. 2023, section 5
-- grain  one row per method, gallery, kind, split and prompt scheme
-- reads  sample_scores
-- column method_id               VARCHAR
-- column encoder_id              VARCHAR of the method; null unless it is similarity
-- column mapper_id               VARCHAR of the method; empty without a mapper
-- column gallery                 VARCHAR own or all
-- column kind                    VARCHAR object, style, concepts or mixed
-- column split                   VARCHAR split of the models
-- column prompt_scheme           VARCHAR
-- column n_models                BIGINT
-- column n_samples               BIGINT
-- column mean_average_precision  DOUBLE  in [0, 1]
-- column chance                  DOUBLE  expected mean_average_precision in a random order
-- column n_unranked              BIGINT  pairs of sample and exemplar without a rank
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
    avg(average_precision) AS mean_average_precision,
    avg(chance_precision) AS chance,
    sum(n_unranked)::BIGINT AS n_unranked
FROM sample_scores(1)
GROUP BY method_id, encoder_id, mapper_id, gallery, kind, split, prompt_scheme
ORDER BY kind, split, prompt_scheme, gallery, encoder_id, mapper_id, method_id
