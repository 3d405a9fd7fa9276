"""The section of RESULTS.md on IconAbC: what tuning gains, ablations, calibration, general attribution, plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from markdown import machine, table

from attrdb.pages.report import CUT_OFFS, render_plots

PLOTS = Path(__file__).parent / "plots"
DISCUSSION = Path(__file__).parent / "iconabc" / "discussion.md"
# Of the paper; no package that we found carries their weights. The spec is what adds each of them.
UNAVAILABLE = {
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
CAPTIONS = {
    "curves": "Recall@K against K, averaged over prompt schemes",
    "gains": "Gains of mappers in Recall@10 over the encoder's own features, 95 % intervals, paired bootstrap over models",
    "reliability": "Influence against the true share of candidates with that influence, on validation models",
    "general": "Recall@10 on exemplars against recall at the size of the set on models of unrelated images",
}


def labels(results: dict) -> dict[str, str]:
    """What a mapper is called in the tables, by its id."""
    names = {}
    for mapper in results["mappers"]:
        settings, encoder_id = mapper["settings"], mapper["encoder_id"]
        rest = mapper["mapper_id"].removeprefix(f"{encoder_id}-")
        names[mapper["mapper_id"]] = {"object": "objects", "style": "styles"}.get(rest, rest)
        if rest.startswith("both-v"):
            names[mapper["mapper_id"]] = f"both, v = {settings['temperature']:g}, lr = {settings['lr']:g}"
    return names


def value(three: list[float]) -> str:
    return f"{three[0]:.3f} ({three[1]:.3f} to {three[2]:.3f})"


def retrieval(results: dict, name_of: dict[str, str]) -> str:
    parts = []
    for (kind, split), title in CASES.items():
        for scheme in ("gpt", "procedural"):
            rows = [
                row
                for row in results["cases"]
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
                f"### {title}, {scheme} prompts\n\n{rows[0]['n_models']} models, {rows[0]['n_samples']} samples.\n\n"
                + table(head, lines + _bounds(rows[0]))
            )
    return "\n".join(parts)


def _bounds(row: dict) -> list[list[str]]:
    """What stands beside every table: chance, and the best that can be reached."""
    return [
        ["chance", "", *(f"{row[f'chance_{k}']:.2g}" for k in CUT_OFFS), f"{row['chance_map']:.2g}"],
        ["best possible", "", *(f"{row[f'ceiling_{k}']:.3f}" for k in CUT_OFFS), "1.000"],
    ]


def gains(results: dict, name_of: dict[str, str]) -> str:
    """The gain in recall of every mapper and test case, with a star where its interval excludes 0."""
    by_mapper: dict[str, dict[tuple, dict]] = defaultdict(dict)
    for row in results["gains"]:
        by_mapper[row["mapper_id"]][row["kind"], row["split"], row["prompt_scheme"]] = row
    cases = [(*case, scheme) for case in CASES for scheme in ("gpt", "procedural")]

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        is_clear = row["n_models"] >= 5 and (row["recall_low"] > 0 or row["recall_high"] < 0)
        mark = " *" if is_clear else ""
        return f"{row['recall_gain']:+.3f} ({row['recall_low']:+.3f} to {row['recall_high']:+.3f}){mark}"

    of_mapper = {row["mapper_id"]: row["encoder_id"] for row in results["mappers"]}
    head = ["features", "tuned on", *(f"{kind} {split}, {scheme}" for kind, split, scheme in cases)]
    lines = [
        [of_mapper[mapper_id], name_of[mapper_id], *(cell(rows.get(case)) for case in cases)]
        for mapper_id, rows in sorted(by_mapper.items(), key=lambda item: (of_mapper[item[0]], item[0]))
    ]
    return part(
        "What tuning gains in Recall@10",
        "Paired bootstrap over models, 95 % each, one training seed. * marks intervals that exclude 0. Not corrected for the "
        "number of comparisons: about five of a hundred such intervals exclude 0 by chance.",
        table(head, lines),
    )


def part(title: str, says: str, rest: str) -> str:
    return f"### {title}\n\n{says}\n\n{rest}"


def section(results: dict) -> str:
    name_of = labels(results)
    counts = ", ".join(f"{row['n']} {row['kind']} {row['split']}" for row in results["models"])
    head = (
        f"## Attribution on IconAbC\n\n{results['images']['pretraining']:,} candidates in addition to the model's own "
        f"exemplars. Models: {counts}. {results['counts']['otherwise']} candidates look different from when they were "
        f"frozen. Values have 95 % intervals of a bootstrap over models. {machine(results['machine'])}"
    )
    discussion = DISCUSSION.read_text() if DISCUSSION.exists() else ""
    return "\n".join([head, discussion, retrieval(results, name_of), gains(results, name_of), *rest(results, name_of)])


def rest(results: dict, name_of: dict[str, str]) -> Iterator[str]:
    """The choice of settings, the mappers, calibration, general attribution, plots, and what could not be had."""

    def features(row: dict) -> list[str]:
        return [row["encoder_id"], name_of.get(row["mapper_id"], "-")]

    tried = [
        [row["encoder_id"], f"{row['temperature']:g}", f"{row['lr']:g}", f"{row['before']:.3f}", f"{row['recall']:.3f}"]
        for row in results["tried"]
    ]
    yield part(
        "Chosen on validation models",
        "Mappers on both kinds, Recall@10 among 10,000 candidates.",
        table(["features", "v", "learning rate", "before", "after"], tried),
    )
    trained = [
        [
            *features(row),
            str(row["metrics"]["best_epoch"]),
            f"{row['metrics']['recall_before']:.3f}",
            f"{row['metrics']['recall']:.3f}",
        ]
        for row in results["mappers"]
    ]
    yield part(
        "All mappers",
        "Recall@10 on their validation models. The name of an ablation is its difference from the chosen mapper on both "
        "kinds.",
        table(["features", "tuned on", "best epoch", "before", "after"], trained),
    )
    calibrations = [
        [*features(row), f"{row['tau']:.4f}", f"{row['lam']:.4f}", f"{row['kl_before']:.2f}", f"{row['kl']:.2f}"]
        for row in results["calibrations"]
    ]
    yield part(
        "Calibration",
        "tau and lambda are fitted on validation models. KL is in nats, with softplus for ReLU, on the same models. Before: "
        "tau = 1 without cut-off.",
        table(["features", "tuned on", "tau", "lambda", "KL before", "KL"], calibrations),
    )
    general = [
        [*features(row), str(row["n_exemplars"]), f"{row['recall_at_size']:.3f}", f"{row['chance']:.2g}"]
        for row in results["general"]
    ]
    yield part(
        "General attribution",
        "Models customized on sets of unrelated images.",
        table(["features", "tuned on", "set size", "recall at size", "chance"], general),
    )
    correlations = [
        [
            row["kind"],
            str(row["n_exemplars"]),
            str(row["n_features"]),
            f"{row['correlation']:.2f}",
            str(row["n_encoders"]),
            "" if row["of_encoders"] is None else f"{row['of_encoders']:.2f}",
        ]
        for row in results["correlations"]
        if row["correlation"] is not None
    ]
    yield "Pearson correlation with Recall@10 on exemplars, over all features above, and over encoders without a mapper:\n"
    yield table(["models", "set size", "features", "correlation", "encoders", "over encoders only"], correlations)
    yield part(
        "Plots",
        "",
        "\n".join(f"![{CAPTIONS[name]}](plots/{name}.svg)\n\n*{CAPTIONS[name]}.*\n" for name in render_plots(results)),
    )
    yield part(
        "Weights not available to this run",
        "`attrdb encode DB --encoder SPEC` adds the paper's encoders; then run the commands of docs/training.md.",
        table(["encoder of the paper", "spec"], [[name, f"`{spec}`"] for name, spec in UNAVAILABLE.items()]),
    )


def write_plots(results: dict) -> None:
    PLOTS.mkdir(exist_ok=True)
    for name, text in render_plots(results).items():
        (PLOTS / f"{name}.svg").write_text(text, encoding="utf-8")
