-- How well each method foretells what every model owes to its exemplars: the rank correlation of its scores with the losses of
-- retrained models, and how often it names what was missed most. Made by attrdb truth and attrdb evaluate --gallery own.
-- source the linear datamodelling score of Park et al. 2023 (TRAK), section 4, for halves; leave-one-out for the others
-- grain  one row per kind of draws, what was left out, model and method, best correlation first
-- param  $leave     VARCHAR = 'half' image, concept, creator or half
-- reads  truth_scores
-- column draws         VARCHAR fixed or redrawn
-- column leave         VARCHAR what was left out
-- column model_id      VARCHAR
-- column method_id     VARCHAR
-- column n_samples     BIGINT  samples with three or more retrainings
-- column n_retrainings BIGINT  of the sample with most
-- column correlation   DOUBLE  in [-1, 1]; mean over samples
-- column top_1         DOUBLE  in [0, 1]; mean over samples
SELECT
    draws,
    leave,
    model_id,
    method_id,
    count(*) AS n_samples,
    max(n_retrainings) AS n_retrainings,
    avg(correlation) AS correlation,
    avg(top_1) AS top_1
FROM truth_scores
WHERE leave = CASE
        WHEN $leave IN ('image', 'concept', 'creator', 'half') THEN $leave
        ELSE error('leave is ''' || $leave || '''; it must be image, concept, creator or half')
    END
GROUP BY draws, leave, model_id, method_id
ORDER BY draws, model_id, correlation DESC, method_id
