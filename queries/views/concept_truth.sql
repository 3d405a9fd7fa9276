-- What each sample owes to each concept of its model, by three truths. 'prompt' is known by construction: the share of the concept
-- in the prompt. It says what was asked for, not what the picture owes. The only concept that a text names has share 1, several have
-- equal parts, and one that is not named has 0; a blend shares by the weights of its parts. A text names a concept that contains its
-- token, in upper or lower case. 'fixed' and 'redrawn' are measured, by training again without the concept with such draws: increase
-- is what the sample loses, and share is the positive part of it over the sum of these; 0 if no concept has one. A sample counts only
-- if its model was trained again without each of its concepts.
-- grain  one row per truth, sample and concept of its model
WITH blends AS (
    SELECT
        image_id AS sample_id,
        model_id,
        prompt,
        regexp_extract(prompt, '(?s)^[\s\v]*\((.*)\)[\s\v]*\.blend\(([^()]*)\)[\s\v]*$', ['texts', 'weights']) AS lists
    FROM samples
    WHERE prompt IS NOT NULL
),
parsed AS ( -- null texts: no JSON strings; both lists by the rule of ingest/blends.py
    SELECT
        sample_id,
        model_id,
        prompt,
        CASE
            WHEN regexp_full_match(
                lists.texts || ',',
                '([ \t\n\r]*"([^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*"[ \t\n\r]*,)+'
            ) THEN TRY(from_json('[' || lists.texts || ']', '["VARCHAR"]'))
        END AS texts,
        CASE
            WHEN regexp_full_match(
                lists.weights || ',',
                '([ \t\n\r]*(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?[ \t\n\r]*,)+'
            ) THEN TRY_CAST(regexp_extract_all(lists.weights, '[^, \t\n\r]+') AS DOUBLE[])
        END AS weights,
        coalesce(
            len(texts) >= 2 AND len(texts) = len(weights) AND list_min(weights) > 0 AND isfinite(list_sum(weights)),
            false
        ) AS is_blend
    FROM blends
),
parts AS (
    SELECT
        sample_id,
        model_id,
        unnest(range(CASE WHEN is_blend THEN len(texts) ELSE 1 END)) AS part,
        unnest(CASE WHEN is_blend THEN texts ELSE [prompt] END) AS text,
        unnest(CASE WHEN is_blend THEN weights ELSE [1.0] END) AS weight
    FROM parsed
),
named AS (
    SELECT
        parts.sample_id,
        parts.model_id,
        concepts.concept_id,
        parts.weight,
        contains(lower(parts.text), lower(concepts.token)) AS is_named,
        count_if(is_named) OVER (PARTITION BY parts.sample_id, parts.part) AS n_named
    FROM parts
    JOIN concepts USING (model_id)
),
n_concepts AS (
    SELECT model_id, count(*) AS n_concepts
    FROM concepts
    GROUP BY model_id
)
SELECT
    'prompt' AS truth,
    sample_id,
    model_id,
    concept_id,
    sum(CASE WHEN is_named THEN weight / n_named ELSE 0.0 END) / sum(weight) AS share,
    NULL::DOUBLE AS increase
FROM named
GROUP BY sample_id, model_id, concept_id
UNION ALL
SELECT
    draws,
    sample_id,
    model_id,
    name,
    CASE
        WHEN max(increase) OVER one_sample > 0
            THEN greatest(increase, 0.0) / sum(greatest(increase, 0.0)) OVER one_sample
        ELSE 0.0
    END,
    increase
FROM loss_increases
JOIN n_concepts USING (model_id)
WHERE leave = 'concept'
WINDOW one_sample AS (PARTITION BY draws, sample_id)
QUALIFY count(*) OVER one_sample = n_concepts
