-- Exemplar images before schema 8, with the column concept_id, which images did not have.
-- grain  one row per exemplar image
SELECT *, NULL::VARCHAR AS concept_id
FROM images
WHERE role = 'exemplar'
