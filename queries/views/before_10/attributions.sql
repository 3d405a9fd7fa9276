-- attributions before schema 10, with today's columns.
-- grain  one row per row of the older table
SELECT *, NULL::DOUBLE AS unattributed
FROM _attributions_9
