"""The tables of source-model attribution: what a suspicious model was asked, what it answered, and what that says."""

from __future__ import annotations

from attrdb.store.columns import FLOAT64, INT32, TEXT, TIMESTAMP, Column, TableSchema, key_column

PROVENANCE = {
    "key_sets": TableSchema(
        "one row per key set: prompts and pictures of a source model, by which models are tested for having learned from it",
        (
            key_column("key_set_id", "id of the key set"),
            Column("source", TEXT, "name of the source model", required=True),
            Column("strategy", TEXT, "how its keys were chosen: `generation`, `detection` or `random`", required=True),
            Column("descriptor", TEXT, "what distances are of: `l2`, or the spec of an encoder", required=True),
            Column("descriptor_hash", TEXT, "of the encoder's weights; null for `l2`"),
            Column("n_answers", INT32, "answers per key that a model is asked for", required=True),
            Column("settings", TEXT, "JSON text: all that decided which keys were chosen"),
            Column("created_at", TIMESTAMP, "when its row was written; its keys count once it is there"),
        ),
    ),
    "keys": TableSchema(
        "one row per key: a prompt, and the picture of the source model that answers to it are compared with",
        (
            key_column("key_id", "`<key_set_id>/<number>`"),
            Column("key_set_id", TEXT, "the key set", required=True),
            Column("number", INT32, "from 1, in the order in which keys were chosen", required=True),
            Column("prompt", TEXT, "what models are asked", required=True),
            Column("image_id", TEXT, "the reference: the picture that answers are compared with", required=True),
            Column(
                "self_distance",
                FLOAT64,
                "strategy `generation`: mean distance of the source's own answers from each other; otherwise the smallest "
                "distance of its answers from the reference",
            ),
            Column(
                "reference_distance",
                FLOAT64,
                "smallest distance of another model's answers from the reference, the median over models; null without any",
            ),
        ),
    ),
    "suspects": TableSchema(
        "one row per model whose answers are stored, suspicious or innocent",
        (
            key_column("suspect_id", "name of the model"),
            Column("origin", TEXT, "where its answers were read from"),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "suspect_labels": TableSchema(
        "one row per model of which it is known whether it learned from a source",
        (
            key_column("label_id", "`<source>/<suspect_id>`"),
            Column("source", TEXT, "name of the source model", required=True),
            Column("suspect_id", TEXT, "the model", required=True),
            Column("label", TEXT, "`innocent` or `infringing`", required=True),
            Column(
                "stratum",
                TEXT,
                "kind of innocent: `unrelated`, `topic`, `generator`, `lineage`, or a word of one's own",
            ),
            Column("rho", FLOAT64, "share of its training images that the source has made, where known"),
        ),
    ),
    "answers": TableSchema(
        "one row per answer: a picture that a model made when it was asked a key's prompt",
        (
            key_column("image_id", "its picture in images, of role `answer`"),
            Column("key_id", TEXT, "the key", required=True),
            Column("suspect_id", TEXT, "the model", required=True),
            Column("distance", FLOAT64, "from the key's reference, by the key set's descriptor", required=True),
        ),
    ),
    "verdicts": TableSchema(
        "one row per test of a model: what its answers say about training on a source's pictures; an estimate",
        (
            key_column("verdict_id", "`<key_set_id>/<suspect_id>`"),
            Column("key_set_id", TEXT, "the key set", required=True),
            Column("suspect_id", TEXT, "the model", required=True),
            Column("conf", FLOAT64, "share of the keys to which an answer comes near; null without innocent models"),
            Column(
                "threshold",
                FLOAT64,
                "largest distance that is near; null: the nearest tenth of the models compared, it among them",
            ),
            Column("p", FLOAT64, "largest p-value over the strata of innocent models; null without one of two models"),
            Column("n_keys", INT32, "keys that it answered", required=True),
            Column("n_answers", INT32, "answers that were compared", required=True),
            Column("n_innocents", INT32, "innocent models that p rests on", required=True),
            Column("strata", TEXT, "JSON text: an object per stratum: n, conf of its models, p", required=True),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
}
