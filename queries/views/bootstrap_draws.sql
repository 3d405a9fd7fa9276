-- The draws of a bootstrap over models: in each replicate one draw per place, with replacement. Which of n models a draw takes is
-- hash % n; a bootstrap over n models uses the places below n. The same seed gives the same draws everywhere.
-- grain     one row per replicate and place
-- argument  n_places        the largest number of models
-- argument  n_replicates    how many replicates
-- argument  seed            of the draws
SELECT
    replicates.replicate,
    places.place,
    md5_number_lower(seed || '/' || replicates.replicate || '/' || places.place) AS hash
FROM (SELECT unnest(range(n_replicates)) AS replicate) AS replicates
CROSS JOIN (SELECT unnest(range(n_places)) AS place) AS places
