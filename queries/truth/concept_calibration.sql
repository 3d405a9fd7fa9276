-- Whether the shares of concepts that each method gives can be taken at their word: where they can, the mean of truth_share in each
-- bin is that of share.
-- source DeGroot and Fienberg 1983, the reliability diagram
-- grain  one row per truth, method and bin of share that is not empty
-- param  $bins  INTEGER = 10 number of bins of equal width, >= 1
-- reads  concept_scores
-- column truth       VARCHAR prompt, fixed or redrawn
-- column method_id   VARCHAR
-- column bin_low     DOUBLE  lower end of the bin, which belongs to it
-- column bin_high    DOUBLE  upper end, which belongs to the last bin only
-- column n           BIGINT  samples and concepts in the bin
-- column share       DOUBLE  mean, in [0, 1]
-- column truth_share DOUBLE  mean, in [0, 1]
WITH binned AS (
    SELECT
        truth,
        method_id,
        least(floor(share * $bins), $bins - 1) AS bin,
        share,
        truth_share
    FROM concept_scores
)
SELECT
    truth,
    method_id,
    bin / $bins AS bin_low,
    (bin + 1) / $bins AS bin_high,
    count(*) AS n,
    avg(share) AS share,
    avg(truth_share) AS truth_share
FROM binned
GROUP BY truth, method_id, bin
ORDER BY truth, method_id, bin
