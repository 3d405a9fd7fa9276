-- The middle 95 % of the means of a bootstrap: each replicate draws as many figures as there are, with replacement. The same seed
-- gives the same draws everywhere; they are those of bootstrap_draws.
-- returns   a struct of low and high; both are null without figures
-- argument  figures         a list of numbers, one per model, in the order of model_id
-- argument  n_replicates    number of replicates
-- argument  seed            seed of the draws
list_transform(
    [
        list_transform(
            range(n_replicates),
            lambda replicate: list_avg(
                list_transform(
                    range(len(figures)),
                    lambda place: (figures::DOUBLE[])[
                        (md5_number_lower(seed || '/' || replicate || '/' || place) % len(figures))::BIGINT + 1
                    ]
                )
            )
        )
    ],
    lambda means: {
        'low': list_aggregate(means, 'quantile_cont', 0.025),
        'high': list_aggregate(means, 'quantile_cont', 0.975)
    }
)[1]
