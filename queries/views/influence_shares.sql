-- Shares of influence over a set of samples by creator, licence, source, category or model of the candidates. The denominator is the
-- number of samples in the set, those that cannot be attributed too: a share is the mean influence per sample, and the rows sum to 1.
-- part says what a row is: 'named'; 'unnamed' for candidates of which the name is not known; 'unattributed', always there, for samples
-- without a feature or score, what the method cannot attribute, as calibrated, and candidates that were not examined. An interval is
-- the middle 95 % of a bootstrap that draws samples; it is null for a single sample. It says how much the share depends on the choice
-- of samples, not how right the estimates are.
-- grain     one row per name, one for all unnamed candidates if any has influence, and one for what is unattributed
-- argument  per                 creator, license, source, category, model or role of the candidates
-- argument  samples = NULL      a predicate on the columns of images that chooses samples; default: all samples
-- argument  method = NULL       a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- argument  tau = NULL          temperature; default: as calibrated, else that of the method's row; where given, the method leaves nothing unattributed
-- argument  lam = NULL          lambda, the cut-off; default: as calibrated, else that of the method's row
-- argument  candidates = NULL   a predicate on the columns of images that candidates must fulfil
-- argument  exact = false       compare every candidate
-- argument  n_replicates = 1000 number of bootstrap replicates, >= 1
-- argument  seed = 0            seed of the bootstrap
WITH chosen AS (
    SELECT sample_id, row_number() OVER (ORDER BY sample_id) - 1 AS number, count(*) OVER () AS n_samples
    FROM (SELECT unnest(_sample_ids(samples::VARCHAR)) AS sample_id)
),
hits AS (
    SELECT
        chosen.number,
        found.image_id,
        found.influence,
        CASE per
            WHEN 'creator' THEN found.creator
            WHEN 'license' THEN found.license
            WHEN 'source' THEN found.source
            WHEN 'category' THEN found.category
            WHEN 'model' THEN found.model_id
            WHEN 'role' THEN found.role
            ELSE error('per is ''' || per || '''; it must be creator, license, source, category, model or role')
        END AS name
    FROM
        chosen,
        attribute(
            chosen.sample_id,
            k := NULL,
            method := method,
            tau := tau,
            lam := lam,
            candidates := candidates,
            exact := exact
        ) AS found
),
rests AS (
    SELECT chosen.number, greatest(0, 1 - coalesce(sum(hits.influence), 0)) AS influence
    FROM chosen
    LEFT JOIN hits ON hits.number = chosen.number
    GROUP BY chosen.number
),
sample_shares AS (
    SELECT
        CASE WHEN name IS NULL THEN 'unnamed' ELSE 'named' END AS part,
        name,
        number,
        sum(influence) AS influence
    FROM hits
    GROUP BY name, number
    UNION ALL
    SELECT 'unattributed' AS part, NULL AS name, number, CASE WHEN influence < 1e-9 THEN 0 ELSE influence END AS influence
    FROM rests
),
candidate_counts AS (
    SELECT name, count(DISTINCT image_id) AS n_candidates FROM hits GROUP BY name
),
shares AS (
    SELECT
        groups.part,
        groups.name,
        count(*) FILTER (sample_shares.influence > 0) AS n_influenced,
        sum(coalesce(sample_shares.influence, 0)) / count(*) AS share,
        list(coalesce(sample_shares.influence, 0) ORDER BY chosen.number) AS by_sample
    FROM (SELECT DISTINCT part, name FROM sample_shares) AS groups
    CROSS JOIN chosen
    LEFT JOIN sample_shares
        ON sample_shares.number = chosen.number
        AND sample_shares.part = groups.part
        AND sample_shares.name IS NOT DISTINCT FROM groups.name
    GROUP BY groups.part, groups.name
),
draws AS (
    SELECT drawn.replicate, drawn.hash % sizes.n_samples AS number, count(*) AS n_draws
    FROM (SELECT max(n_samples) AS n_samples FROM chosen) AS sizes
    JOIN bootstrap_draws((SELECT max(n_samples) FROM chosen), n_replicates, seed) AS drawn ON sizes.n_samples > 1
    GROUP BY ALL
),
weights AS (
    SELECT
        replicates.replicate,
        list(coalesce(draws.n_draws, 0) / chosen.n_samples ORDER BY chosen.number) AS by_sample
    FROM (SELECT DISTINCT replicate FROM draws) AS replicates
    CROSS JOIN chosen
    LEFT JOIN draws ON draws.replicate = replicates.replicate AND draws.number = chosen.number
    GROUP BY replicates.replicate
),
intervals AS (
    SELECT
        shares.part,
        shares.name,
        quantile_cont(list_dot_product(shares.by_sample, weights.by_sample), 0.025) AS share_low,
        quantile_cont(list_dot_product(shares.by_sample, weights.by_sample), 0.975) AS share_high
    FROM shares
    CROSS JOIN weights
    GROUP BY shares.part, shares.name
)
SELECT
    shares.part,
    shares.name,
    shares.share,
    intervals.share_low,
    intervals.share_high,
    (SELECT max(n_samples) FROM chosen) AS n_samples,
    shares.n_influenced,
    CASE WHEN shares.part = 'unattributed' THEN 0 ELSE candidate_counts.n_candidates END AS n_candidates
FROM shares
LEFT JOIN intervals ON intervals.part = shares.part AND intervals.name IS NOT DISTINCT FROM shares.name
LEFT JOIN candidate_counts ON candidate_counts.name IS NOT DISTINCT FROM shares.name
