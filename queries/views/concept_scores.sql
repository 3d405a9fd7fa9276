-- What every evaluated method says that each sample owes to each concept of its model, beside each truth. score is the mean score of
-- the concept's exemplars; share is the sum of their positive scores over that of the exemplars of all concepts, 0 if there is none.
-- Scores are those of `attrdb evaluate --gallery own`. Samples with an exemplar that has no score are left out, and models of one
-- concept.
-- grain  one row per method, truth, sample and concept of its model
WITH members AS (
    SELECT
        model_id,
        concept_id,
        image_id AS exemplar_id,
        count(*) OVER (PARTITION BY model_id) AS n_exemplars
    FROM exemplars
    WHERE concept_id IS NOT NULL
),
scored AS (
    SELECT
        ranks.method_id,
        ranks.sample_id,
        members.model_id,
        members.concept_id,
        avg(ranks.score) AS score,
        sum(greatest(ranks.score, 0.0)) AS positive
    FROM _exemplar_ranks AS ranks  -- first: DuckDB builds its hash table of the other one, which is small
    JOIN members USING (exemplar_id)
    WHERE ranks.gallery = 'own' AND ranks.score IS NOT NULL
    GROUP BY ranks.method_id, ranks.sample_id, members.model_id, members.concept_id
    QUALIFY sum(count(*)) OVER (PARTITION BY ranks.method_id, ranks.sample_id) = any_value(members.n_exemplars)
),
shared AS (
    SELECT
        *,
        CASE WHEN positive > 0 THEN positive / sum(positive) OVER one_sample ELSE 0.0 END AS share,
        count(*) OVER one_sample AS n_concepts
    FROM scored
    WINDOW one_sample AS (PARTITION BY method_id, sample_id)
)
SELECT
    shared.method_id,
    truths.truth,
    shared.model_id,
    shared.sample_id,
    shared.concept_id,
    shared.score,
    shared.share,
    truths.share AS truth_share
FROM shared
JOIN concept_truth AS truths USING (sample_id, concept_id)
WHERE shared.n_concepts >= 2
