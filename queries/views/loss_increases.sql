-- What each sample loses without some exemplars: the loss without them minus the loss with all, of trainings with the same draws
-- and seed. With several seeds of redrawn training it is the mean over them.
-- grain  one row per kind of draws, what was left out (leave and name) and sample
SELECT
    retrainings.draws,
    retrainings.leave,
    retrainings.name,
    retrainings.model_id,
    counterfactuals.sample_id,
    avg(counterfactuals.loss - whole_losses.loss) AS increase
FROM retrainings
JOIN counterfactuals USING (retraining_id)
JOIN retrainings AS wholes
    ON wholes.leave = 'none'
    AND wholes.model_id = retrainings.model_id
    AND wholes.draws = retrainings.draws
    AND wholes.seed = retrainings.seed
JOIN counterfactuals AS whole_losses
    ON whole_losses.retraining_id = wholes.retraining_id
    AND whole_losses.sample_id = counterfactuals.sample_id
WHERE retrainings.leave <> 'none'
GROUP BY ALL
