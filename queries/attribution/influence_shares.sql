-- Whom, or what, the samples of a set owe: shares by creator, licence, source, category or model, with intervals. Estimates, not causal shares.
-- The denominator is the number of samples in the set: a share is the mean influence per sample, and the rows sum to 1. What cannot be
-- attributed is a row of its own, and so are candidates without a name. An interval is the middle 95 % of a bootstrap that draws samples.
-- source Wang et al. 2023, Eq. 6 (with ReLU), averaged; the intervals are ours
-- grain  one row per name, greatest share first; then one for unnamed candidates if any has influence, and one for what is unattributed
-- param  $per          VARCHAR = creator what names candidates: creator, license, source, category, model or role
-- param  $samples      VARCHAR = NULL a predicate on the columns of images that chooses samples; default: all samples
-- param  $method       VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $tau          DOUBLE = NULL temperature, > 0; default: as calibrated
-- param  $lam          DOUBLE = NULL lambda, >= 0 and < 1; default: as calibrated
-- param  $candidates   VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact        BOOLEAN = false compare every candidate, even if there is an index
-- param  $n_replicates INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed         INTEGER = 0 seed of the bootstrap
-- reads  influence_shares
-- column part          VARCHAR named, unnamed (the name is not known) or unattributed (no feature or score, as calibrated, or not examined)
-- column name          VARCHAR null unless named
-- column share         DOUBLE  in [0, 1]; mean influence per sample of the set
-- column share_low     DOUBLE  null for a single sample
-- column share_high    DOUBLE
-- column n_samples     BIGINT  samples in the set, the denominator
-- column n_influenced  BIGINT  samples that owe something to it
-- column n_candidates  BIGINT  its candidates with influence
SELECT part, name, share, share_low, share_high, n_samples, n_influenced, n_candidates
FROM influence_shares(
    $per,
    samples := $samples,
    method := $method,
    tau := $tau,
    lam := $lam,
    candidates := $candidates,
    exact := $exact,
    n_replicates := $n_replicates,
    seed := $seed
)
ORDER BY part = 'unattributed', part = 'unnamed', share DESC, name
