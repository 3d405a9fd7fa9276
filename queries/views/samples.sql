-- Generated samples.
-- grain  one row per sample image, with the columns of images
FROM images
WHERE role = 'sample'
