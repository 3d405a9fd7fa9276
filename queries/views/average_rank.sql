-- The rank of a value among those of its group, from 1 for the smallest; equal values share the mean of their ranks. The correlation
-- (corr) of two such ranks is Spearman's.
-- returns   DOUBLE
-- argument  figure    a number
-- argument  one_group what the rows of a group have in common; several columns as (one, other)
rank() OVER (PARTITION BY one_group ORDER BY figure)
    + (count(*) OVER (PARTITION BY one_group ORDER BY figure RANGE CURRENT ROW) - 1) / 2
