-- Exemplar images.
-- grain  one row per exemplar image, with the columns of images
FROM images
WHERE role = 'exemplar'
