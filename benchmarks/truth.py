"""The section of RESULTS.md on removals: what models owe to their exemplars, and which method foretells it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from markdown import machine, table

DISCUSSION = Path(__file__).parent / "removals" / "discussion.md"
SCHEMES = ("gpt", "procedural", "pair", "blend")
LEAVES = {"half": "random halves (LDS)", "concept": "each concept", "image": "each image"}


def interval(row: dict, name: str = "correlation") -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def number(value: float | None) -> str:
    """Of one model there is no spread."""
    return "-" if value is None else f"{value:.3f}"


def of_name(method_id: str) -> str:
    """Attribution models by their own name."""
    return f"`{short(method_id.rpartition('/')[2])}`"


def short(encoder_id: str) -> str:
    """Without the kind and most settings of one that is a file."""
    return encoder_id.removeprefix("torchscript_").partition("_mean_")[0]


def removals(rows: list[dict]) -> Iterator[str]:
    for leave, title in LEAVES.items():
        chosen = [row for row in rows if row["leave"] == leave and row["draws"] == "fixed"]
        if not chosen:
            continue
        body = [
            [of_name(row["method_id"]), interval(row), f"{row['top_1']:.2f}", number(row["detectable"])]
            for row in chosen
        ]
        yield (
            f"### Without {title}\n\n{chosen[0]['n_models']} models. By chance, a sample's correlation has a standard "
            f"deviation of {chosen[0]['chance_sd']:.2f}.\n\n"
            + table(["method", "rank correlation", "greatest loss found", "smallest detectable mean"], body)
        )


def between(rows: list[dict], truth: str, title: str) -> str:
    by_method: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["truth"] == truth and row["correlation"] is not None:
            by_method.setdefault(row["method_id"], {})[row["prompt_scheme"]] = row
    ordered = sorted(by_method.items(), key=lambda item: -sum(row["correlation"] for row in item[1].values()))
    body = [
        [
            of_name(method),
            *(f"{of[s]['correlation']:.2f}, {share(of[s]['top_1'])}" if s in of else "-" for s in SCHEMES),
        ]
        for method, of in ordered
    ]
    return f"### Between concepts: {title}\n\n" + table(["method", *SCHEMES], body)


def errors(rows: list[dict]) -> str:
    """Mean over prompt schemes, by truth."""
    of: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row, error in product(rows, ("error", "shifted_error")):
        if row["truth"] in ("prompt", "fixed") and row[error] is not None:
            of.setdefault(row["method_id"], {}).setdefault((row["truth"], error), []).append(row[error])
    columns = list(product(("prompt", "fixed"), ("error", "shifted_error")))
    body = [
        [of_name(method), *(f"{mean(found[one]):.2f}" if one in found else "-" for one in columns)]
        for method, found in sorted(of.items(), key=lambda item: mean(item[1].get(columns[2], [1.0])))
    ]
    return (
        "### Between concepts: shares taken at their word\n\nAbsolute difference of the true share of a concept and what a "
        "method says: its share of all positive scores, or, where scores are cosines, (1 + mean cosine) / 2, which need not "
        "add up to 1. Mean over prompt schemes. Four equal shares are 0.38 from the truth where a prompt names one "
        "concept.\n\n" + table(["method", "prompt: shares", "shifted cosine", "loss: shares", "shifted cosine"], body)
    )


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def gains(found: dict[str, list[dict]], leave: str) -> Iterator[str]:
    for method, rows in found.items():
        chosen = [row for row in rows if row["leave"] == leave and row["draws"] == "fixed"]
        if chosen:
            parts = [f"{of_name(row['other'])} {interval_of_gain(row)}" for row in chosen]
            yield f"What {of_name(method)} gains over: " + "; ".join(parts) + ".\n"


def interval_of_gain(row: dict) -> str:
    return f"{row['gain']:+.3f} ({row['gain_low']:+.3f} to {row['gain_high']:+.3f})"


def within(rows: list[dict]) -> Iterator[str]:
    """Of fixed draws; nothing where no image was left out."""
    chosen = [row for row in rows if row["draws"] == "fixed"]
    if chosen:
        body = [[of_name(row["method_id"]), interval(row), share(row["top_1"])] for row in chosen]
        yield (
            "### Within a concept\n\nRank correlation of the scores of a concept's exemplars with what a sample of this "
            "concept alone loses without each of them, and how often the exemplar that is missed most comes first. "
            f"{chosen[0]['n_models']} models, {chosen[0]['n_samples']} samples, four exemplars for each; by chance, the "
            "first is right in 25 %.\n\n" + table(["method", "rank correlation", "first"], body)
        )


def tried(rows: Sequence[dict]) -> str:
    """The best step of each loss, by teacher and features."""
    kept: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        kept.setdefault((row["teacher"], row["features"]), []).append(row)
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    body = [
        [
            f"`{teacher}`",
            of_name(features),
            number(of[0]["correlation_before"]),
            *(best_of(of, loss) for loss in losses),
        ]
        for (teacher, features), of in kept.items()
    ]
    return (
        "### Attribution models on validation models\n\nMean rank correlation of cosines with the scores of the teacher, of "
        "the best temperature v of each loss; `one-hot` learns pairs, and no scores. Of each teacher and encoder, the best "
        "is chosen (bold), and beside it the best of pairs.\n\n"
        + table(["teacher", "features", "before", *losses], body)
    )


def best_of(rows: list[dict], loss: str) -> str:
    of_loss = [row for row in rows if row["loss"] == loss]
    if not of_loss:
        return "-"
    best = max(of_loss, key=lambda row: row["correlation"])
    found = f"{best['correlation']:.3f} (v {best['temperature']:g})"
    return f"**{found}**" if best["chosen"] else found


def section(results: dict) -> str:
    counts = [
        [row["leave"], row["draws"], str(row["n_models"]), str(row["n"]), f"{row['seconds']:.0f}"]
        for row in results["retrainings"]
    ]
    concepts = [row for row in results["learned_concepts"] if row["draws"] == "fixed"]
    n_learned = sum(bool(row["is_learned"]) for row in concepts)
    parts = [
        "## What models owe to their exemplars\n\nModels of four concepts (two objects, two styles) with four pictures each, "
        f"customized from {results['base_model']}, "
        "trained again without some of them, with the same draws; the rank correlation, over retrainings, of the summed "
        "scores of what was left out with a sample's loss then. Mean over models, with the middle 95 % of a bootstrap over "
        f"models. Random scores have 0. Baselines: benchmarks/removals/controls.py. {machine(results['machine'])}\n"
        + table(["left out", "draws", "models", "retrainings", "seconds, median"], counts),
        *removals(results["removal_intervals"]),
        *gains(results["gains"], "concept"),
        "### Between concepts\n\nRank correlation over a model's samples and concepts of scores and truth, and how often the "
        "concept of the greatest truth comes first; by prompt scheme. "
        f"{n_learned} of {len(concepts)} concepts were learned: their own samples lose more than three times what unrelated "
        "samples vary by. All concepts count unless it is said otherwise.\n",
        between(results["between_concepts"], "prompt", "what the prompt names"),
        between(results["between_concepts"], "fixed", "what samples lose without each concept"),
        between(results["between_learned_concepts"], "fixed", "the same, of learned concepts alone"),
        errors(results["between_concepts"]),
        *within(results["within_concept"]),
        tried(results["tried"]),
    ]
    if DISCUSSION.exists():
        parts.append(DISCUSSION.read_text(encoding="utf-8"))
    return "\n".join(parts)
