"""The tables of how models were trained: what was monitored, and what they would be without some of their exemplars."""

from __future__ import annotations

import pyarrow as pa

from attrdb.store.columns import FLOAT64, INT32, INT64, TEXT, TIMESTAMP, Column, TableSchema, key_column

TRAINING = {
    "monitor_steps": TableSchema(
        "one row per step of a monitored customization and slot of its batch: the image that was drawn, and its loss",
        (
            Column("model_id", TEXT, "the model", required=True),
            Column("step", INT32, "from 0", required=True),
            Column("slot", INT32, "from 0", required=True),
            Column("image_id", TEXT, "the exemplar, or the regularization image", required=True),
            Column("is_exemplar", pa.bool_(), "false for a regularization image", required=True),
            Column("view", INT32, "number of the image's augmented view", required=True),
            Column("timestep", INT32, "of the noise, from 0", required=True),
            Column("loss", FLOAT64, "mean squared error of this slot", required=True),
            Column("gradient_norm", FLOAT64, "of this slot's part of the step's gradient; null if not asked for"),
        ),
    ),
    "monitor_changes": TableSchema(
        "one row per quarter of a monitored customization, cause of change, image and concept: how far it moved K and V of "
        "the concept's prompt. Over all rows of a concept progress adds up to 1",
        (
            Column("model_id", TEXT, "the model", required=True),
            Column("concept_id", TEXT, "the concept; null for `mixed` models: of 16 of their captions"),
            Column("quarter", INT32, "of the steps, from 1 to 4", required=True),
            Column(
                "cause",
                TEXT,
                "`weights` or `token`: what an exemplar's gradients did to them; `regularization`: its images' gradients; "
                "`decay`: of the weights; `rest`: rounding, and images that there was no memory for",
                required=True,
            ),
            Column("image_id", TEXT, "the exemplar; null for causes that are no exemplar's"),
            Column("n_visits", INT32, "slots that drew it, in this quarter"),
            Column(
                "change_norm",
                FLOAT64,
                "sum, over every five steps or fewer, of the length of the change; null for `token` and `rest`",
            ),
            Column(
                "progress", FLOAT64, "share of the whole change, along its direction; may be negative", required=True
            ),
        ),
    ),
    "monitor_probes": TableSchema(
        "one row per probe of a monitored customization: what the U-Net makes of a concept's prompt, from fixed noise",
        (
            Column("model_id", TEXT, "the model", required=True),
            Column("concept_id", TEXT, "the concept; null for `mixed` models: their first prompt", required=False),
            Column("step", INT32, "steps done, from 0", required=True),
            Column("timestep", INT32, "of the noise", required=True),
            Column("seed", INT64, "of the noise", required=True),
            Column("vector", pa.list_(pa.float32()), "output of the U-Net's middle block, mean over positions", True),
            Column("attention", pa.list_(pa.float32()), "mean attention to the token, by cross-attention layer"),
        ),
    ),
    "attribution_tables": TableSchema(
        "one row per measure, concept and exemplar of a monitored model: how much the exemplar shaped the concept; an "
        "estimate",
        (
            Column("model_id", TEXT, "the model", required=True),
            Column("measure", TEXT, "`progress`, `progress per visit` or `change norm`", required=True),
            Column("concept_id", TEXT, "the concept; null for `mixed` models: of 16 of their captions"),
            Column("image_id", TEXT, "the exemplar", required=True),
            Column("value", FLOAT64, "of the measure; may be negative", required=True),
            Column("share", FLOAT64, "the value's positive part, as a share of all exemplars'", required=True),
            Column("n_visits", INT32, "slots that drew it", required=True),
        ),
    ),
    "retrainings": TableSchema(
        "one row per time that a model was trained again without some of its exemplars, by `attrdb truth`",
        (
            key_column("retraining_id", "`<model_id>/<leave>/...`"),
            Column("model_id", TEXT, "the model", required=True),
            Column("leave", TEXT, "what was left out: `none`, `image`, `concept`, `creator` or `half`", required=True),
            Column(
                "name",
                TEXT,
                "the image, concept or creator that was left out, or the number of the half",
                required=True,
            ),
            Column(
                "draws",
                TEXT,
                "`fixed`: steps, noises and timesteps of the model's own training; `redrawn`: new ones for what is left",
                required=True,
            ),
            Column("seed", INT64, "of the training", required=True),
            Column("left_out", pa.list_(TEXT), "image_id of each exemplar that was left out", required=True),
            Column("n_draws", INT32, "noises that the losses in counterfactuals are means over", required=True),
            Column("train_loss", FLOAT64, "mean training loss of the last tenth of the steps", required=True),
            Column(
                "same_weights",
                pa.bool_(),
                "leave `none`, draws `fixed`: whether this machine made the stored weights again, bit for bit",
            ),
            Column("seconds", FLOAT64, "of training and measuring", required=True),
            Column("created_at", TIMESTAMP, "when its row was written"),
        ),
    ),
    "counterfactuals": TableSchema(
        "one row per retraining and sample: how well the model then denoises the sample with its prompt",
        (
            Column("retraining_id", TEXT, "the retraining; rows count once it is in retrainings", required=True),
            Column("model_id", TEXT, "the model", required=True),
            Column("sample_id", TEXT, "image_id of the sample", required=True),
            Column(
                "loss",
                FLOAT64,
                "mean squared error of the denoising, over noises that all retrainings share",
                required=True,
            ),
        ),
    ),
}
