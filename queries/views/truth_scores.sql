-- How well each evaluated method foretells what models owe to their exemplars, sample by sample: the rank correlation, over the
-- retrainings of the sample's model, of the summed scores of the exemplars that were left out with the loss of the sample then.
-- For halves that is the linear datamodelling score (LDS). Scores are those of `attrdb evaluate --gallery own`. Retrainings that
-- left out an exemplar without a score are not counted. A method whose sums are all equal has correlation 0. top_1: whether the
-- greatest loss is that without the exemplars of the greatest sum, 1 / n if n sums are equally great.
-- With several seeds of redrawn training, a loss is the mean over them.
-- grain     one row per method, kind of draws, what was left out, and sample with three or more retrainings
WITH losses AS (
    SELECT
        retrainings.draws,
        retrainings.leave,
        retrainings.name,
        retrainings.model_id,
        counterfactuals.sample_id,
        any_value(retrainings.left_out) AS left_out,
        avg(counterfactuals.loss) AS loss
    FROM retrainings
    JOIN counterfactuals USING (retraining_id)
    WHERE retrainings.leave <> 'none'
    GROUP BY ALL
),
left_out AS (
    SELECT draws, leave, name, model_id, unnest(any_value(left_out)) AS exemplar_id
    FROM losses
    GROUP BY draws, leave, name, model_id
),
sums AS (
    SELECT
        ranks.method_id,
        left_out.draws,
        left_out.leave,
        left_out.name,
        ranks.sample_id,
        sum(ranks.score) AS score,
        count(*) AS n_scored
    FROM left_out
    JOIN _exemplar_ranks AS ranks ON ranks.exemplar_id = left_out.exemplar_id
    WHERE ranks.gallery = 'own' AND ranks.score IS NOT NULL
    GROUP BY ALL
),
ranked AS (
    SELECT
        sums.method_id,
        losses.*,
        sums.score,
        average_rank(sums.score, (sums.method_id, losses.draws, losses.leave, losses.sample_id)) AS score_rank,
        average_rank(losses.loss, (sums.method_id, losses.draws, losses.leave, losses.sample_id)) AS loss_rank,
        max(sums.score) OVER one_sample = sums.score AS is_top_score,
        max(losses.loss) OVER one_sample = losses.loss AS is_top_loss
    FROM losses
    JOIN sums USING (draws, leave, name, sample_id)
    WHERE sums.n_scored = len(losses.left_out)
    WINDOW one_sample AS (PARTITION BY sums.method_id, losses.draws, losses.leave, losses.sample_id)
)
SELECT
    method_id,
    draws,
    leave,
    model_id,
    sample_id,
    count(*) AS n_retrainings,
    CASE
        WHEN min(score_rank) = max(score_rank) OR min(loss_rank) = max(loss_rank) THEN 0.0
        ELSE corr(score_rank, loss_rank)
    END AS correlation,
    count_if(is_top_score AND is_top_loss) / count_if(is_top_score) AS top_1
FROM ranked
GROUP BY method_id, draws, leave, model_id, sample_id
HAVING count(*) >= 3
