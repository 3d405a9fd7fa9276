-- How far redrawn truth can be trusted: chance draws each retraining anew, so two seeds disagree. reliability is the mean rank
-- correlation, over samples, of the losses of two seeds; ceiling is the highest correlation that a perfect method could expect
-- with the mean over the seeds. Truth with fixed draws has no such noise: its ceiling is 1.
-- source Spearman 1910 and Brown 1910, for the reliability of a mean
-- grain  one row per what was left out and model with two or more seeds
-- reads  counterfactuals, retrainings
-- column leave       VARCHAR what was left out
-- column model_id    VARCHAR
-- column n_seeds     BIGINT
-- column reliability DOUBLE  of one seed; in [-1, 1]
-- column ceiling     DOUBLE  in [0, 1]
WITH losses AS (
    SELECT retrainings.leave, retrainings.name, retrainings.model_id, retrainings.seed, counterfactuals.sample_id, counterfactuals.loss
    FROM retrainings
    JOIN counterfactuals USING (retraining_id)
    WHERE retrainings.draws = 'redrawn' AND retrainings.leave <> 'none'
),
pairs AS (
    SELECT
        one.leave,
        one.model_id,
        one.sample_id,
        one.seed,
        other.seed AS other_seed,
        rank() OVER (one_pair ORDER BY one.loss) AS one_rank,
        rank() OVER (one_pair ORDER BY other.loss) AS other_rank
    FROM losses AS one
    JOIN losses AS other
        ON other.leave = one.leave
        AND other.name = one.name
        AND other.sample_id = one.sample_id
        AND other.seed > one.seed
    WINDOW one_pair AS (PARTITION BY one.leave, one.sample_id, one.seed, other.seed)
),
correlations AS (
    SELECT leave, model_id, corr(one_rank, other_rank) AS reliability
    FROM pairs
    GROUP BY leave, model_id, sample_id, seed, other_seed
    HAVING count(*) >= 3
),
seeds AS (
    SELECT leave, model_id, count(DISTINCT seed) AS n_seeds
    FROM losses
    GROUP BY leave, model_id
),
means AS (
    SELECT leave, model_id, avg(reliability) AS reliability
    FROM correlations
    GROUP BY leave, model_id
)
SELECT
    leave,
    model_id,
    n_seeds,
    reliability,
    sqrt(greatest(0.0, n_seeds * reliability / (1 + (n_seeds - 1) * reliability))) AS ceiling
FROM means
JOIN seeds USING (leave, model_id)
ORDER BY leave, model_id
