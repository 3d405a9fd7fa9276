-- The first candidates of one image by a method. The encoder's index is used if there is one, unless exact.
-- Without candidates there is no row.
-- source Wang et al. 2023, section 4
-- grain  one row per candidate, best first
-- param  $image_id    VARCHAR the image to attribute
-- param  $method      VARCHAR = NULL a method_id, encoder_id or mapper_id; default: similarity of the first encoder
-- param  $k           INTEGER = 10 number of candidates, >= 1
-- param  $candidates  VARCHAR = NULL a predicate on the columns of images that candidates must fulfil
-- param  $exact       BOOLEAN = false compare every candidate, even if there is an index
-- reads  attribute
-- column rank         BIGINT  from 1; ties by image_id
-- column image_id     VARCHAR the candidate
-- column role         VARCHAR exemplar or pretraining
-- column model_id     VARCHAR of an exemplar
-- column source       VARCHAR
-- column category     VARCHAR
-- column creator      VARCHAR
-- column license      VARCHAR
-- column score        DOUBLE  in the method's unit
-- column similarity   DOUBLE  cosine in [-1, 1]; null unless the method is similarity
SELECT rank, image_id, role, model_id, source, category, creator, license, score, similarity
FROM attribute($image_id, k := $k, method := $method, candidates := $candidates, exact := $exact)
ORDER BY rank
