-- Draws of a bootstrap over models: each replicate has one draw per place, with replacement. A draw takes model number hash % n of n models.
-- A bootstrap over n models uses the places below n. The same seed gives the same draws everywhere.
-- grain     one row per replicate and place
-- argument  n_places        the largest number of models
-- argument  n_replicates    number of replicates
-- argument  seed            seed of the draws
SELECT
    replicates.replicate,
    places.place,
    md5_number_lower(seed || '/' || replicates.replicate || '/' || places.place) AS hash
FROM (SELECT unnest(range(n_replicates)) AS replicate) AS replicates
CROSS JOIN (SELECT unnest(range(n_places)) AS place) AS places
