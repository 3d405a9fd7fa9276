"""The section of RESULTS.md on IconAbC, from the figures of iconabc/run.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import charts
from markdown import machine, table

from attrdb.pages.report import CUT_OFFS, render_plots

HERE = Path(__file__).parent
PLOTS = HERE / "plots"
DISCUSSION = HERE / "iconabc" / "discussion.md"
NOT_RUN = "## Attribution on IconAbC\n\nThe experiments on the second edition have not been run yet.\n"
LEVEL = 0.05  # of corrected p values below which a comparison has a star
CONTROL = "vae:"  # how the spec of a control begins
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
    "encoders": "mAP on styles against objects, mean over test cases; open: the encoder's features, filled: tuned",
    "curves": "Recall@K against K, averaged over prompt schemes; mappers of the first seed",
    "gains": "Gains of mappers in Recall@10 over the encoder's own features, 95 % intervals, test models, first seed",
    "sorted": "Influence of the candidates in their order, tuned features; dotted: before calibration",
    "reliability": "Influence against the true share of candidates with that influence, on validation models held out",
    "general": "Recall@10 on exemplars against recall at the size of the set on models of unrelated images",
}
PICTURES = {
    kind: f"Samples of {kind} models, their first exemplars, and the first candidates with their influence. A frame marks an "
    "exemplar of the sample's model."
    for kind in ("object", "style")
}

Row = dict[str, Any]


def value(three: Sequence[float]) -> str:
    return f"{three[0]:.3f} ({three[1]:.3f} to {three[2]:.3f})"


def typical(three: Sequence[float]) -> str:
    """A mean log rank as a rank, with its interval."""
    middle, low, high = (f"{math.exp(figure):,.0f}" for figure in three)
    return f"{middle} ({low} to {high})"


def features(row: Row) -> list[str]:
    """The first two columns of a table."""
    return [row["encoder"], {"plain": "-", "both": "yes"}.get(row["variant"], row["variant"])]


def part(title: str, says: str, rest: str) -> str:
    return f"### {title}\n\n{says}\n\n{rest}"


def section(results: Row) -> str:
    counts = ", ".join(f"{row['n']} {row['kind']} {row['split']}" for row in results["models"])
    head = (
        f"## Attribution on IconAbC\n\n{results['images']['pretraining']:,} candidates in addition to the model's own "
        f"exemplars. Models: {counts}. {results['counts']['otherwise']} candidates look different from when they were "
        "frozen. Values are means over models and training seeds, with 95 % intervals of a bootstrap that draws both; models "
        "of one style are drawn together. A typical rank is the exponential of the mean logarithm of ranks. "
        f"`{CONTROL}icon-sd+ENCODER` is a control: all images go through icon-sd's autoencoder first, as samples do. "
        f"{machine(results['machine'])}"
    )
    discussion = DISCUSSION.read_text() if DISCUSSION.exists() else ""
    return "\n".join([head, discussion, *retrieval(results), *rest(results)])


def retrieval(results: Row) -> Iterator[str]:
    """A table per test case."""
    head = [
        "features",
        "tuned",
        *(f"Recall@{k}" for k in CUT_OFFS),
        "@10, gpt",
        "@10, procedural",
        "mAP",
        "typical rank",
    ]
    for (kind, split), title in CASES.items():
        of_case = [row for row in results["cases"] if (row["kind"], row["split"]) == (kind, split)]
        by_scheme: dict[tuple[str, str, str], Row] = {
            (row["encoder"], row["variant"], row["prompt_scheme"]): row for row in of_case
        }
        rows = [row for row in of_case if row["prompt_scheme"] == "both"]
        if not rows:
            continue
        lines = [
            [
                *features(row),
                *(value(row[f"recall_{k}"]) for k in CUT_OFFS),
                *(
                    f"{by_scheme[row['encoder'], row['variant'], scheme]['recall_10'][0]:.3f}"
                    for scheme in ("gpt", "procedural")
                ),
                value(row["map"]),
                typical(row["log_rank"]),
            ]
            for row in rows
        ]
        for name, bound in (("chance", rows[0]["chance"]), ("best possible", rows[0]["ceiling"])):
            recalls = [f"{bound[f'recall_{k}']:.2g}" for k in CUT_OFFS]
            rank = f"{math.exp(bound['log_rank']):,.0f}"
            lines.append([name, "", *recalls, recalls[1], recalls[1], f"{bound['map']:.2g}", rank])
        says = f"{rows[0]['n_models']} models, {rows[0]['n_samples']} samples. Both prompt schemes count the same."
        yield part(title, says, table(head, lines))


def comparisons(results: Row) -> str:
    """A line per question and pair, a column per test case."""
    pairs: dict[tuple[str, ...], dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in results["comparisons"]:
        pair = (row["question"], *features(row["one"]), *features(row["other"]))
        pairs[pair][row["kind"], row["split"]] = row
    lines = []
    for (question, one, tuned, other, other_tuned), of_case in pairs.items():
        names = [f"{encoder}, {how}".removesuffix(", -") for encoder, how in ((one, tuned), (other, other_tuned))]
        lines.append([question, *names, *(compared(of_case.get(case)) for case in CASES)])
    return part(
        "Planned comparisons",
        "The ratio of typical ranks, below 1 where the first is better, with its 95 % interval; then the difference in "
        "Recall@10. Both prompt schemes, paired by model; intervals draw models and seeds. * p < "
        f"{LEVEL:g} by flipping signs of groups of models, after Holm's correction by question and kind of models; nothing "
        "is tested on fewer than six groups. Ablations and settings of other kinds are differences from the chosen mapper.",
        table(["question", "first", "against", *(f"{kind} {split}" for kind, split in CASES)], lines),
    )


def compared(row: Row | None) -> str:
    if row is None:
        return ""
    middle, low, high = (f"{math.exp(figure):.2f}" for figure in row["log_rank"])
    star = " *" if row["p_holm"] is not None and row["p_holm"] < LEVEL else ""
    return f"{middle} ({low} to {high}){star}, {row['recall_10'][0]:+.3f}"


def chosen(results: Row) -> str:
    """What the search has tried and chosen, and what validation says of the chosen mappers."""
    lines = []
    for row in results["chosen"]:
        tried = [trial for trial in results["trials"] if trial["encoder"] == row["encoder"]]
        searched = [trial for trial in tried if trial["variant"] == "both" and trial["seed"] == 0]
        of_chosen = [
            trial
            for trial in tried
            if all(trial[name] == wanted for name, wanted in {**row, "variant": "both"}.items())
            and trial["reason"] is None
        ]
        ranks = ", ".join(f"{math.exp(trial['mean_log_rank']):,.0f}" for trial in of_chosen)
        before = f"{math.exp(of_chosen[0]['mean_log_rank_before']):,.0f}" if of_chosen else "-"
        diverged = sum(trial["reason"] is not None for trial in tried)
        lines.append(
            [
                row["encoder"],
                str(len(searched)),
                str(diverged),
                f"{row['temperature']:g}",
                f"{row['lr']:g}",
                before,
                ranks,
            ]
        )
    return part(
        "Chosen on validation models",
        "Typical ranks of exemplars of validation models among 10,000 candidates. Diverged: mappers of any kind whose "
        "training failed. Settings whose mean log ranks differ by less than 0.05 count as equal; the one nearest to "
        "temperature 0.1 and learning rate 0.001 is taken.",
        table(
            ["features", "settings tried", "diverged", "temperature", "learning rate", "before", "after, by seed"],
            lines,
        ),
    )


def calibrations(results: Row) -> str:
    lines = [
        [
            *features(row),
            row["kind"],
            *(f"{row[name]:.3g}" for name in ("tau", "lam", "unattributed")),
            "infinite" if row["kl_before"] is None else f"{row['kl_before']:.2f}",
            f"{row['kl']:.2f}",
            ", ".join(f"{test['kl']:.2f}" for test in row["tests"]),
            f"{row['validation']['misplaced']:.2f}",
            ", ".join(f"{test['misplaced']:.2f}" for test in row["tests"]),
            ", ".join(f"{test['at_zero']:.2f}" for test in row["tests"]),
        ]
        for row in results["calibrations"]
        if not row["encoder"].startswith(CONTROL)
    ]
    head = ["features", "tuned", "models", "tau", "lambda", "unattributed", "KL, tau = 1", "KL", "KL, test"]
    return part(
        "Calibration",
        "Fitted on validation models, per kind; mappers of the first seed. KL is in nats. Misplaced: the part of influence "
        "that is where the known share is not, by bins of influence, on validation models held out from the fit, and on "
        "test models (of both test splits). At zero: the part of the exemplars' share whose influence is exactly 0 on test "
        "models.",
        table([*head, "misplaced, validation", "misplaced, test", "at zero, test"], lines),
    )


def relatives(results: Row) -> str:
    lines = [
        [
            CASES["style", row["split"]],
            *features(row),
            *(value(row[f"recall_10_{name}"]) for name in ("without", "with")),
            *(typical(row[f"log_rank_{name}"]) for name in ("without", "with")),
        ]
        for row in results["relatives"]
    ]
    return part(
        "Styles among their relatives",
        "The same models, with further icons of the styles' sets in the gallery: other drawings in the style of the "
        "exemplars, of which no model has seen anything.",
        table(["models", "features", "tuned", "Recall@10", "with relatives", "typical rank", "with relatives"], lines),
    )


def general(results: Row) -> str:
    sizes = sorted({row["n_exemplars"] for row in results["general"]})
    by_method: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for row in results["general"]:
        by_method[tuple(features(row))][row["n_exemplars"]] = row
    lines = [[*names, *(value(rows[size]["recall_at_size"]) for size in sizes)] for names, rows in by_method.items()]
    first = next(iter(by_method.values()), {})
    lines.append(["chance", "", *(f"{first[size]['chance']:.2g}" for size in sizes)])
    n_models = ", ".join(f"{first[size]['n_models']} of {size}" for size in sizes)
    return part(
        "General attribution",
        f"Models that were customized on sets of unrelated images: {n_models}. The share of a set of n among the first n.",
        table(["features", "tuned", *(f"sets of {size}" for size in sizes)], lines),
    )


def rest(results: Row) -> Iterator[str]:
    """Comparisons, the choice of settings, calibration, other galleries, plots, pictures, and encoders that are missing."""
    yield comparisons(results)
    yield chosen(results)
    yield calibrations(results)
    if results["relatives"]:
        yield relatives(results)
    if results["general"]:
        yield general(results)
    drawn = all_plots(results)
    names = [name for name in CAPTIONS if name in drawn]
    yield part(
        "Plots", "", "\n".join(f"![{CAPTIONS[name]}](plots/{name}.svg)\n\n*{CAPTIONS[name]}.*\n" for name in names)
    )
    files = {kind: f"results/attributed-{kind}.webp" for kind in PICTURES}
    shown = [kind for kind, file in files.items() if (HERE / file).exists()]
    if shown:
        best = "; ".join(f"{kind} models: {' '.join(features(results['best'][kind]))}" for kind in shown)
        yield part(
            "Attributed pictures",
            f"Samples are chosen by hashes of their ids, the features on validation models ({best}; yes: tuned).",
            "\n".join(f"![{PICTURES[kind]}]({files[kind]})\n\n*{PICTURES[kind]}*\n" for kind in shown),
        )
    minutes = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in results["seconds"].items() if seconds >= 30)
    yield f"Minutes of the run, of all its processes: {minutes or 'less than one'}.\n"
    yield part(
        "Weights not available to this run",
        "`attrdb encode DB --encoder SPEC` adds the paper's encoders; then run the commands of docs/training.md.",
        table(["encoder of the paper", "spec"], [[name, f"`{spec}`"] for name, spec in UNAVAILABLE.items()]),
    )


def all_plots(results: Row) -> dict[str, str]:
    """SVG texts by name."""
    own = {}
    if points := encoder_points(results):
        own["encoders"] = charts.scatter(points)
    if rows := sorted_rows(results):
        own["sorted"] = charts.sorted_influence(rows)
    gains = [row for row in results["plots"]["gains"] if row["split"].startswith("test")]
    return render_plots(results["plots"] | {"gains": gains}) | own


def encoder_points(results: Row) -> list[Row]:
    """The mAP of encoders and controls on both kinds of models, each the mean over test cases."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results["cases"]:
        if row["prompt_scheme"] == "both":
            found[row["encoder"], row["variant"]][row["kind"]].append(row["map"][0])
    return [
        {"encoder": encoder, "variant": variant, **{kind: sum(of) / len(of) for kind, of in by_kind.items()}}
        for (encoder, variant), by_kind in found.items()
        if by_kind.keys() == {"object", "style"}
    ]


def sorted_rows(results: Row) -> list[Row]:
    """Influence by place, of tuned features without controls."""
    return [
        {
            "case": CASES[row["kind"], test["split"]],
            "encoder": row["encoder"],
            "calibrated": calibrated,
            "place": place,
            "influence": influence,
        }
        for row in results["calibrations"]
        if row["variant"] == "both" and not row["encoder"].startswith(CONTROL)
        for test in row["tests"]
        for calibrated, name in ((False, "sorted_before"), (True, "sorted"))
        for place, influence in zip(results["places"], test[name], strict=False)
    ]


def write_plots(results: Row) -> None:
    PLOTS.mkdir(exist_ok=True)
    for name, text in all_plots(results).items():
        (PLOTS / f"{name}.svg").write_text(text, encoding="utf-8")
