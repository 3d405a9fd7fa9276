-- The candidates most similar to one image: every stored exemplar and pretraining image is compared, exactly.
-- Without candidates there is no row.
-- source Wang et al. 2023, section 4
-- grain  one row per candidate, best first
-- param  $image_id    VARCHAR the image to attribute
-- param  $encoder_id  VARCHAR whose features are compared; the database's first encoder when left out
-- param  $mapper_id   VARCHAR = NULL that maps the features; none when left out
-- param  $k           INTEGER = 10 how many candidates, >= 1
-- reads  attribute
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column source       VARCHAR
-- column category     VARCHAR
-- column creator      VARCHAR
-- column license      VARCHAR
-- column similarity   DOUBLE  cosine in [-1, 1]
SELECT rank, image_id, role, model_id, source, category, creator, license, similarity
FROM attribute($image_id, k := $k, encoder_id := $encoder_id, mapper_id := $mapper_id)
ORDER BY rank
