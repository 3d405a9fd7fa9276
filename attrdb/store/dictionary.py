"""The tables of an attrdb directory: their columns, and what they mean.

The data dictionary (docs/dictionary.md) is generated from this file, `dictionary_of_training` and
`dictionary_of_provenance`.
"""

from __future__ import annotations

import pyarrow as pa

from attrdb.store.columns import FLOAT64, INT32, INT64, TEXT, TIMESTAMP, Column, TableSchema, key_column
from attrdb.store.dictionary_of_provenance import PROVENANCE
from attrdb.store.dictionary_of_training import TRAINING

DICTIONARY = {
    "images": TableSchema(
        "one row per image: exemplars, samples, pretraining images, keys and answers of source-model tests. Every "
        "encoder adds one column, named after its "
        "encoder_id: fixed_size_list<float32>[dimension], unit length, null until encoded",
        (
            key_column("image_id", "stable text id, such as `<model_id>/<prompt number>/<seed>` or `<source>/<file>`"),
            # Plain text: a bitmap index refuses a dictionary column.
            Column("role", TEXT, "`exemplar`, `sample`, `pretraining`, `key` or `answer`", required=True),
            Column("model_id", TEXT, "the customized model of an exemplar or sample; null for others"),
            Column(
                "source", TEXT, "the data set it came from; `synthesized` for samples; the model of a key or answer"
            ),
            Column("split", TEXT, "such as `train`, `val` or `test`"),
            Column("category", TEXT, "what an exemplar shows, or its style; class of a pretraining image"),
            Column("concept_id", TEXT, "the concept of an exemplar, if its model was customized on several"),
            Column("prompt", TEXT, "caption of an image, or the prompt that made a sample"),
            Column(
                "prompt_scheme",
                TEXT,
                "of a sample: `gpt`, `procedural`, for two concepts `pair` or `blend`; `user` from a file, `caption` of an "
                "exemplar",
            ),
            Column("seed", INT64, "of a sample: seed of its starting noise"),
            Column("uri", TEXT, "where the image was read from"),
            Column("sha256", TEXT, "of the encoded bytes; as the data set states it where the bytes are not stored"),
            Column("width", INT32, "pixels, of the original"),
            Column("height", INT32, "pixels, of the original"),
            Column("creator", TEXT, "who made it"),
            Column("license", TEXT, "under which it may be used"),
            Column("metadata", TEXT, "JSON text: what the data set says beyond these columns"),
            Column("image", pa.binary(), "the encoded image, or null"),
        ),
    ),
    "models": TableSchema(
        "one row per customized model, written after its images; a model without it is not shown",
        (
            key_column("model_id", "id of the customized model"),
            Column("base_model", TEXT, "folder or hub id of the base model"),
            Column("base_model_hash", TEXT, "of the base model's weights"),
            Column("method", TEXT, "of customization, such as `custom-diffusion`"),
            Column(
                "kind",
                TEXT,
                "`object`, `style`, `concepts`: several of them, or `mixed`: unrelated images, each with its caption",
            ),
            Column("category", TEXT, "what its exemplars show, or the style's name"),
            Column("split", TEXT, "such as `train`, `val` or `test`"),
            Column(
                "train_prompt",
                TEXT,
                "the prompt it was customized with, `{caption}` for that of each exemplar; null for `mixed` and `concepts`",
            ),
            Column("token", TEXT, "the modifier token that names the concept; null for `mixed` and `concepts`"),
            Column("settings", TEXT, "JSON text: all that decides the model and its samples"),
            Column("settings_hash", TEXT, "sha256 of the settings; file names, and choices of the machine, left out"),
            Column("weights_path", TEXT, "of the trained weights, inside the database directory"),
            Column("weights_hash", TEXT, "sha256 of that file"),
            Column("n_exemplars", INT32, "how many exemplars it was customized on"),
            Column("n_samples", INT32, "how many samples were drawn from it"),
            Column("customize_seconds", FLOAT64, "seconds of training"),
            Column("synthesize_seconds", FLOAT64, "seconds of sampling"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "encoders": TableSchema(
        "one row per encoder whose features this database holds",
        (
            key_column("encoder_id", "also the name of its column in images"),
            Column("spec", TEXT, "what loads it, such as `open_clip:ViT-B-32/openai`"),
            Column("dimension", INT32, "length of its features"),
            Column("preprocessing", TEXT, "JSON text: what is done to a picture before the network sees it"),
            Column("weights_fingerprint", TEXT, "of its weights; empty while all its features were imported"),
        ),
    ),
    "mappers": TableSchema(
        "one row per mapper: a learned pair of maps on an encoder's features, one for training images and one for samples",
        (
            key_column("mapper_id", "id of the mapper"),
            Column("encoder_id", TEXT, "whose features it maps", required=True),
            Column("form", TEXT, "`affine`, `gain` or `mlp`", required=True),
            Column(
                "trained_on",
                TEXT,
                "kind of the models: `object`, `style`, `both`; or `attribution-table`",
            ),
            Column(
                "parameters",
                pa.list_(pa.struct([("name", TEXT), ("shape", pa.list_(INT32)), ("values", pa.list_(pa.float32()))])),
                "its arrays, row by row: `exemplar.weight` is W and `exemplar.bias` b, for exemplars and pretraining images; "
                "`sample.weight` and `sample.bias` are those for samples",
            ),
            Column("settings", TEXT, "JSON text: all that it was trained with"),
            Column("images_version", INT64, "version of images that it was trained on"),
            Column(
                "curves",
                TEXT,
                "JSON text: an object per epoch or step: loss; in validation recall and mean log rank, or rank correlation",
            ),
            Column("metrics", TEXT, "JSON text: of the epoch or step that was kept"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "methods": TableSchema(
        "one row per attribution method: a way of scoring candidates for an image; a higher score means more influence. "
        "Every encoder and every mapper is one; packages add others",
        (
            key_column(
                "method_id",
                "`<encoder_id>` for similarity of its features, `<encoder_id>/<mapper_id>` with a mapper; of other methods "
                "an id without a slash",
            ),
            Column("kind", TEXT, "`similarity`, or `stored`: its scores are in the table scores", required=True),
            Column("encoder_id", TEXT, "similarity: whose features are compared"),
            Column("mapper_id", TEXT, "similarity: the mapper that maps the features; null without one"),
            Column("unit", TEXT, "what a score is, such as `cosine`", required=True),
            Column("lowest", FLOAT64, "lowest possible score; null: unbounded"),
            Column("highest", FLOAT64, "highest possible score; null: unbounded"),
            Column("tau", FLOAT64, "temperature of influence, in units of the score, until calibrated", required=True),
            Column("lam", FLOAT64, "cut-off of influence until calibrated", required=True),
            Column("settings", TEXT, "JSON text: what made its scores"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "scores": TableSchema(
        "one row per sample and candidate that a stored method has scored; the other candidates have no score",
        (
            Column("method_id", TEXT, "the method", required=True),
            Column("sample_id", TEXT, "image_id of the sample", required=True),
            Column("candidate_id", TEXT, "image_id of the candidate", required=True),
            Column("score", FLOAT64, "in the method's unit; a higher score means more influence", required=True),
        ),
    ),
    "calibrations": TableSchema(
        "one row per method whose influence was calibrated, and one for each kind of models where there are several; without "
        "any, tau and lambda are those of the method's row",
        (
            key_column("calibration_id", "`<method_id>`, or `<method_id>:<kind>`"),
            Column("method_id", TEXT, "the method", required=True),
            Column(
                "kind",
                TEXT,
                "whose samples it is for: those of models of this kind; null: of all that have no row of their own",
            ),
            Column("tau", FLOAT64, "temperature of influence, above 0", required=True),
            Column("lam", FLOAT64, "cut-off of influence, at least 0 and below 1", required=True),
            Column(
                "unattributed",
                FLOAT64,
                "share of influence that the method can attribute to no candidate: it is spread evenly over all; null "
                "before schema 10",
            ),
            Column(
                "kl",
                FLOAT64,
                "mean divergence of the exemplars' shares from influence, in nats; before schema 10 with a softplus in place "
                "of ReLU",
            ),
            Column(
                "kl_before",
                FLOAT64,
                "the same without a cut-off at temperature 1; for scores that are no cosines, at their spread",
            ),
            Column("n_samples", INT64, "number of samples used for the fit"),
            Column("gallery_size", INT64, "number of pretraining images that the samples were compared with"),
            Column("split", TEXT, "split of the models whose samples were used"),
            Column(
                "reliability",
                TEXT,
                "JSON text: influence and share of exemplars, an object per bin: `before` and `fitted` on the same samples, "
                "`held_out` on each half of the models with what was fitted on the other half",
            ),
            Column("images_version", INT64, "version of images that it was fitted on"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "exemplar_ranks": TableSchema(
        "one row per sample and exemplar of its model, for a method and gallery; all metrics come from it",
        (
            Column("method_id", TEXT, "the method that scored the candidates", required=True),
            Column(
                "gallery", TEXT, "`own` (its model's exemplars) or `all`, with the pretraining images", required=True
            ),
            Column("sample_id", TEXT, "image_id of the sample", required=True),
            Column("exemplar_id", TEXT, "image_id of the exemplar", required=True),
            Column("score", FLOAT64, "of the exemplar, in the method's unit; null for ranks of before schema 6"),
            Column("rank", INT64, "1 + candidates with a higher score, ties by image_id", required=True),
            Column("gallery_size", INT64, "number of candidates with a score in the gallery", required=True),
            Column("images_version", INT64, "version of images that was ranked"),
        ),
    ),
    "attributions": TableSchema(
        "one row per sample and candidate that `attrdb attribute --samples` has stored, of the first k of each sample; "
        "influence is an estimate",
        (
            Column("method_id", TEXT, "the method that scored the candidates", required=True),
            Column("sample_id", TEXT, "image_id of the sample", required=True),
            Column("rank", INT64, "place of the candidate, from 1, ties by image_id", required=True),
            Column("candidate_id", TEXT, "image_id of the candidate", required=True),
            Column("score", FLOAT64, "of the candidate, in the method's unit", required=True),
            Column("influence", FLOAT64, "share of all candidates' influence, at least 0", required=True),
            Column(
                "complete",
                pa.bool_(),
                "whether every candidate with influence that the search finds was looked at",
                required=True,
            ),
            Column(
                "missing_influence",
                FLOAT64,
                "what all candidates with influence lack to 1: the unattributed share, and at most that of candidates that "
                "were not looked at",
            ),
            Column("k", INT64, "number of candidates asked for"),
            Column("exact", pa.bool_(), "whether every candidate was compared, also where there was an index"),
            Column("tau", FLOAT64, "temperature of influence"),
            Column("lam", FLOAT64, "cut-off of influence"),
            Column("images_version", INT64, "version of images that was searched"),
            Column("unattributed", FLOAT64, "share of influence that no candidate has; null before schema 10"),
        ),
    ),
    "indices": TableSchema(
        "one row per encoder whose features have an index that attrdb built, with its settings and recall",
        (
            key_column("encoder_id", "the encoder; the index is on its column of images"),
            Column("kind", TEXT, "of the index, in Lance's words", required=True),
            Column("n_partitions", INT32, "partitions that the features are divided into", required=True),
            Column("n_probes", INT32, "partitions that a query looks into", required=True),
            Column("oversampling", INT32, "hits per answer that are compared exactly", required=True),
            Column("recall", FLOAT64, "recall@10 against an exact scan, with these settings", required=True),
            Column("n_queries", INT32, "number of queries that recall was measured with"),
            Column(
                "queries", TEXT, "kind of these queries: `samples`, or `candidates` if there are hardly any samples"
            ),
            Column("n_rows", INT64, "features when its partitions were chosen; with many more of them, rebuild it"),
            Column("device", TEXT, "device that built it"),
            Column("seconds", FLOAT64, "seconds of the build, without measuring recall"),
            Column("images_version", INT64, "version of images that recall was measured on"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "mapper_searches": TableSchema(
        "one row per mapper that was folded into queries of its encoder's index, with the settings and their recall",
        (
            key_column("mapper_id", "the mapper"),
            Column("encoder_id", TEXT, "the encoder whose index is searched", required=True),
            Column(
                "used",
                pa.bool_(),
                "whether searches use the index; otherwise they compare all candidates",
                required=True,
            ),
            Column("n_probes", INT32, "partitions that a query looks into", required=True),
            Column("oversampling", INT32, "hits per answer that are compared exactly", required=True),
            Column(
                "norm_correction",
                pa.list_(pa.float32()),
                "subtracted from the folded query, see attrdb/search/ivf.py",
                required=True,
            ),
            Column("recall", FLOAT64, "recall@10 against an exact scan, with these settings", required=True),
            Column("n_queries", INT32, "number of queries that recall was measured with"),
            Column("images_version", INT64, "version of images that recall was measured on"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "jobs": TableSchema(
        "one row per job; a job that is rerun keeps its id",
        (
            key_column("job_id", "`<command>/<what it works on>`"),
            Column("command", TEXT, "such as `ingest corpus` or `encode`", required=True),
            Column("settings", TEXT, "JSON text: what it was started with"),
            Column("state", TEXT, "`running`, `done`, `incomplete` (some items failed) or `failed`", required=True),
            Column("n_done", INT64, "items finished by the last run"),
            Column("n_failed", INT64, "items that failed and are not done yet, see failures"),
            Column("message", TEXT, "why it failed"),
            Column("host", TEXT, "machine of the last run"),
            Column("pid", INT64, "process of the last run; `running` without that process: it was killed"),
            Column("started_at", TIMESTAMP, "when the last run began"),
            Column("ended_at", TIMESTAMP, "when it ended; null while it runs"),
        ),
    ),
    "failures": TableSchema(
        "one row per item that a job could not do; a later run that can do it deletes the row",
        (
            key_column("failure_id", "`<job_id> <item>`"),
            Column("job_id", TEXT, "the job", required=True),
            Column("item", TEXT, "image_id, file or model_id", required=True),
            Column("reason", TEXT, "what was found, what was needed", required=True),
            Column("failed_at", TIMESTAMP, "when it last failed"),
        ),
    ),
    "removals": TableSchema(
        "one row per `attrdb remove`: that images were taken out, and how many; nothing of the images themselves",
        (
            key_column("removal_id", "time and a part of the digest"),
            Column(
                "state",
                TEXT,
                "`begun`, `deleting`, `purging` or `done`; one that is not done is finished by the next `attrdb remove`",
                required=True,
            ),
            Column("chosen_by", TEXT, "what named the images: `where`, `creator` or `ids`", required=True),
            Column("digest", TEXT, "sha256 of that predicate, name or list of lines", required=True),
            Column("reason", TEXT, "as it was given"),
            Column("n_images", INT64, "images taken out, those of removed models included", required=True),
            Column("n_features", INT64, "their features, of all encoders", required=True),
            Column("n_models", INT64, "models that were customized on one of them", required=True),
            Column("models", TEXT, "what became of those models: `list`, `mark` or `remove`", required=True),
            Column(
                "n_results",
                INT64,
                "ranks, attributions, scores and rows of monitoring that were taken out with them",
                required=True,
            ),
            Column("n_blocked", INT64, "digests that it added to blocked_digests", required=True),
            Column("purged", pa.bool_(), "whether older versions were deleted too", required=True),
            Column(
                "images_version",
                INT64,
                "version of images without them; what was fitted on an older one was fitted with them",
            ),
            Column("attrdb_version", TEXT, "that took them out"),
            Column("started_at", TIMESTAMP, "when it began"),
            Column("ended_at", TIMESTAMP, "when it ended; null until then"),
        ),
    ),
    "marked_models": TableSchema(
        "one row per model that `attrdb remove --models mark` has marked: it was customized on images that are gone",
        (
            key_column("model_id", "the model"),
            Column("removal_id", TEXT, "the removal, the last of several", required=True),
            Column("n_exemplars", INT32, "exemplars that were taken out, by all removals", required=True),
            Column(
                "n_regularization", INT32, "regularization images that were taken out, by all removals", required=True
            ),
            Column("marked_at", TIMESTAMP, "when"),
        ),
    ),
    "blocked_digests": TableSchema(
        "one row per picture or address that `attrdb remove --block` keeps from being stored again",
        (
            key_column("digest", "sha256, unsalted: of a picture's encoded bytes, or of the text of an address"),
            Column("kind", TEXT, "`image` or `uri`", required=True),
            Column("removal_id", TEXT, "the removal that blocked it", required=True),
            Column("blocked_at", TIMESTAMP, "when"),
        ),
    ),
    "concepts": TableSchema(
        "one row per concept that a model was customized on; a model of kind `concepts` has several",
        (
            key_column("concept_id", "`<model_id>/<token>`"),
            Column("model_id", TEXT, "the model", required=True),
            Column("token", TEXT, "the modifier token that names the concept", required=True),
            Column("kind", TEXT, "`object` or `style`", required=True),
            Column("category", TEXT, "what its exemplars show, or the style's name"),
            Column(
                "train_prompt",
                TEXT,
                "the prompt that its exemplars were learned with, `{caption}` for that of each",
                required=True,
            ),
            Column("n_exemplars", INT32, "how many exemplars it has"),
        ),
    ),
    **TRAINING,
    **PROVENANCE,
}
