-- Images that base models were pretrained on.
-- grain  one row per pretraining image, with the columns of images
FROM images
WHERE role = 'pretraining'
