"""The section of RESULTS.md on IconAbC: what tuning gains, ablations, calibration, general attribution, plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from markdown import machine, table

from attrdb.report import CUT_OFFS, drawn

PLOTS = Path(__file__).parent / "plots"
DISCUSSION = Path(__file__).parent / "iconabc" / "discussion.md"
# Of the paper; no package that we found carries their weights. The spec is what adds each of them.
NOT_HAD = {
    "CLIP": "open_clip:ViT-B-32/openai",
    "DINO": "timm:vit_base_patch16_224.dino",
    "MoCo v3": "timm:vit_base_patch16_224/vit-b-300ep.pth.tar?mean=imagenet&std=imagenet&crop=0.875",
    "ViT": "timm:vit_base_patch16_384.augreg_in21k_ft_in1k",
    "ALADIN": "torchscript:aladin.pt?size=SIZE",
    "SSCD": "torchscript:sscd_disc_mixup.torchscript.pt?size=288&resize=squash&interpolation=bilinear",
}
CASES = {
    ("object", "test"): "Objects, seen classes",
    ("object", "test_unseen"): "Objects, unseen classes",
    ("style", "test"): "Styles of icon sets",
    ("style", "test_artists"): "Styles of Open Clip Art artists, another source",
}
SAYS = {
    "curves": "Recall@K against K, averaged over prompt schemes",
    "gains": "What mappers gain in Recall@10 over the encoder's own features, 95 % intervals, paired bootstrap over models",
    "reliability": "Influence against the share that candidates with it had, on validation models",
    "general": "Recall@10 on exemplars against recall at the size of the set on models of unrelated images",
}


def labels(found: dict) -> dict[str, str]:
    """What a mapper is called in the tables, by its id."""
    names = {}
    for mapper in found["mappers"]:
        settings, encoder_id = mapper["settings"], mapper["encoder_id"]
        rest = mapper["mapper_id"].removeprefix(f"{encoder_id}-")
        names[mapper["mapper_id"]] = {"object": "objects", "style": "styles"}.get(rest, rest)
        if rest.startswith("both-v"):
            names[mapper["mapper_id"]] = f"both, v = {settings['temperature']:g}"
    return names


def value(three: list[float]) -> str:
    return f"{three[0]:.3f} ({three[1]:.3f} to {three[2]:.3f})"


def retrieval(found: dict, name_of: dict[str, str]) -> str:
    parts = []
    for (kind, split), title in CASES.items():
        for scheme in ("gpt", "procedural"):
            rows = [
                row
                for row in found["cases"]
                if (row["kind"], row["split"], row["prompt_scheme"]) == (kind, split, scheme)
            ]
            if not rows:
                continue
            head = ["features", "tuned on", *(f"Recall@{k}" for k in CUT_OFFS), "mAP"]
            lines = [
                [row["encoder_id"], name_of.get(row["mapper_id"], "-")]
                + [value(row[f"recall_{k}"]) for k in CUT_OFFS]
                + [value(row["map"])]
                for row in sorted(rows, key=lambda row: (row["encoder_id"], row["mapper_id"]))
            ]
            parts.append(
                f"### {title}, {scheme} prompts\n\n{rows[0]['n_models']} models, {rows[0]['n_samples']} samples; chance: "
                f"Recall@10 {rows[0]['chance']:.2g}; best possible: {rows[0]['ceiling']:.3f}.\n\n{table(head, lines)}"
            )
    return "\n".join(parts)


def gains(found: dict, name_of: dict[str, str]) -> str:
    """The gain in recall of every mapper and test case, with a star where its interval excludes 0."""
    by_mapper: dict[str, dict[tuple, dict]] = defaultdict(dict)
    for row in found["gains"]:
        by_mapper[row["mapper_id"]][row["kind"], row["split"], row["prompt_scheme"]] = row
    cases = [(*case, scheme) for case in CASES for scheme in ("gpt", "procedural")]

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        mark = " *" if row["recall_low"] > 0 or row["recall_high"] < 0 else ""
        return f"{row['recall_gain']:+.3f} ({row['recall_low']:+.3f} to {row['recall_high']:+.3f}){mark}"

    of_mapper = {one["mapper_id"]: one["encoder_id"] for one in found["mappers"]}
    head = ["features", "tuned on", *(f"{kind} {split}, {scheme}" for kind, split, scheme in cases)]
    lines = [
        [of_mapper[mapper_id], name_of[mapper_id], *(cell(rows.get(case)) for case in cases)]
        for mapper_id, rows in sorted(by_mapper.items(), key=lambda item: (of_mapper[item[0]], item[0]))
    ]
    return (
        "### What tuning gains in Recall@10\n\nPaired bootstrap over models; * where the interval excludes 0.\n\n"
        + table(head, lines)
    )


def section(found: dict) -> str:
    name_of = labels(found)
    counts = ", ".join(f"{row['n']} {row['kind']} {row['split']}" for row in found["models"])
    tried = [
        [row["encoder_id"], f"{row['temperature']:g}", f"{row['lr']:g}", f"{row['before']:.3f}", f"{row['recall']:.3f}"]
        for row in found["tried"]
    ]
    calibrations = [
        [
            row["encoder_id"],
            name_of.get(row["mapper_id"], "-"),
            f"{row['tau']:.4f}",
            f"{row['lam']:.4f}",
            f"{row['kl_before']:.2f}",
            f"{row['kl']:.2f}",
        ]
        for row in found["calibrations"]
    ]
    general = [
        [
            row["encoder_id"],
            name_of.get(row["mapper_id"], "-"),
            str(row["n_exemplars"]),
            f"{row['recall_at_size']:.3f}",
            f"{row['chance']:.2g}",
        ]
        for row in found["general"]
    ]
    correlations = [
        [row["kind"], str(row["n_exemplars"]), str(row["n_features"]), f"{row['correlation']:.2f}"]
        for row in found["correlations"]
        if row["correlation"] is not None
    ]
    trained = [
        [
            row["encoder_id"],
            name_of[row["mapper_id"]],
            str(row["metrics"]["best_epoch"]),
            f"{row['metrics']['recall_before']:.3f}",
            f"{row['metrics']['recall']:.3f}",
        ]
        for row in found["mappers"]
    ]
    missing = table(["encoder of the paper", "what adds it"], [[name, f"`{spec}`"] for name, spec in NOT_HAD.items()])
    plots = "\n".join(f"![{SAYS[name]}](plots/{name}.svg)\n\n*{SAYS[name]}.*\n" for name in drawn(found))
    discussion = DISCUSSION.read_text() if DISCUSSION.exists() else ""
    return (
        f"## Attribution on IconAbC\n\n{found['images']['pretraining']:,} candidates beside a model's own exemplars; models: "
        f"{counts}. Values with 95 % intervals of a bootstrap over models. {machine(found['machine'])}\n{discussion}\n"
        f"{retrieval(found, name_of)}\n{gains(found, name_of)}\n"
        f"### Chosen on validation models\n\nMappers on both kinds, Recall@10 among 10,000 candidates.\n\n"
        f"{table(['features', 'v', 'learning rate', 'before', 'after'], tried)}\n"
        f"### All mappers\n\n{table(['features', 'tuned on', 'best epoch', 'validation recall before', 'after'], trained)}\n"
        f"### Calibration\n\ntau and lambda fitted on validation models; KL in nats, before at tau = 1 without a cut-off.\n\n"
        f"{table(['features', 'tuned on', 'tau', 'lambda', 'KL before', 'KL'], calibrations)}\n"
        f"### General attribution\n\nModels customized on sets of unrelated images.\n\n"
        f"{table(['features', 'tuned on', 'set size', 'recall at size', 'chance'], general)}\n"
        "Pearson correlation with Recall@10 on exemplars, over all features above:\n\n"
        f"{table(['models', 'set size', 'features', 'correlation'], correlations)}\n"
        f"### Plots\n\n{plots}\n"
        f"### Weights not available to this run\n\n`attrdb encode DB --encoder SPEC` adds the paper's encoders, then the "
        f"commands of docs/training.md:\n\n{missing}"
    )


def write_plots(found: dict) -> None:
    PLOTS.mkdir(exist_ok=True)
    for name, text in drawn(found).items():
        (PLOTS / f"{name}.svg").write_text(text, encoding="utf-8")
