-- What a mapper gains over another one, or over the encoder's own features, in recall and average precision. The bootstrap is
-- paired: it draws models and takes both values of each. An interval that excludes 0 is evidence of a gain for this one
-- comparison; among many comparisons some exclude 0 by chance. Samples that were not ranked by both among equally many candidates
-- are left out.
-- source Wang et al. 2023, section 5; the intervals are ours
-- grain  one row per gallery, kind, split and prompt scheme
-- param  $mapper_id     VARCHAR the mapper
-- param  $other_id      VARCHAR = '' the mapper to compare with; empty: the encoder's own features
-- param  $encoder_id    VARCHAR encoder; default: that of the mapper
-- param  $k             INTEGER = 10 cut-off, >= 1
-- param  $n_replicates  INTEGER = 1000 number of bootstrap replicates, >= 1
-- param  $seed          INTEGER = 0 seed of the bootstrap
-- reads  method_gains
-- column gallery        VARCHAR own or all
-- column kind           VARCHAR object, style, concepts or mixed
-- column split          VARCHAR split of the models
-- column prompt_scheme  VARCHAR
-- column n_models       BIGINT
-- column recall_gain    DOUBLE  mean difference of recall_at_k
-- column recall_low     DOUBLE  lower end of the middle 95 % of the replicates
-- column recall_high    DOUBLE
-- column precision_gain DOUBLE  mean difference of average precision
-- column precision_low  DOUBLE
-- column precision_high DOUBLE
FROM method_gains(
    $encoder_id || '/' || $mapper_id,
    CASE WHEN $other_id = '' THEN $encoder_id ELSE $encoder_id || '/' || $other_id END,
    $k,
    $n_replicates,
    $seed
)
ORDER BY kind, split, prompt_scheme, gallery
