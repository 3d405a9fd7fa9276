"""Figures of the experiments: means of methods over models and training seeds, and planned comparisons of them.

Of every model, kind of figure and training seed there is one value, the mean over the model's samples. Models of one style
are one group, whose members are drawn together.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tuned import ABLATIONS, BY_KIND, CHOSEN, PAPER, PLAIN, Method

sys.path.insert(0, str(Path(__file__).parents[1]))
from comparisons import arranged, difference, holm, mean_of

from attrdb.database import Database

CUT_OFFS = (5, 10, 100)
FIGURES = (*(f"recall_{k}" for k in CUT_OFFS), "map", "log_rank")
SCHEMES = ("gpt", "procedural", "both")
TEST_CASES = (("object", "test"), ("object", "test_unseen"), ("style", "test"), ("style", "test_artists"))
TESTED = "log_rank"  # the figure that p values are of, as validation compares; the others are told beside it
SHOWN = ("recall_10", TESTED)  # of a comparison
RELEASED = ("released-gain", "released-mlp")
CONTROL = "vae:icon-sd+"  # before the spec of an encoder: the control that closes the rendering gap
PIXELS = "pixels:"

SCORES = """\
SELECT method_id, kind, split, prompt_scheme, model_id, max(n_exemplars) AS n_exemplars, count(*) AS n_samples,
    avg(recall) AS recall, avg(average_precision) AS map, avg(chance_recall) AS chance_recall,
    avg(best_recall) AS best_recall, avg(chance_precision) AS chance_map
FROM sample_scores($k) WHERE gallery = 'own' GROUP BY ALL
"""
RANKS = """\
SELECT method_id, model_id, prompt_scheme, avg(ln(rank)) AS log_rank, avg(ln(gallery_size)) - 1 AS chance
FROM exemplar_ranks JOIN samples ON samples.image_id = exemplar_ranks.sample_id
WHERE gallery = 'own' GROUP BY ALL
"""
GENERAL = """\
SELECT method_id, n_exemplars, model_id, avg(recall) AS recall, avg(chance_recall) AS chance
FROM sample_scores(NULL) WHERE gallery = 'own' AND kind = 'mixed' GROUP BY ALL
"""
GROUPS = """\
SELECT model_id, CASE WHEN kind = 'style' THEN split || '/' || category ELSE model_id END AS member_of FROM models
"""

Case = tuple[str, str, str]  # kind, split and prompt scheme


@dataclass
class Values:
    """The values of all methods, per model.

    of:      figure -> value, by method_id, case and model
    groups:  of the models
    chance, ceiling: figure -> value in a random order, and the best possible one, by case and model
    n_samples: by case
    """

    of: dict[str, dict[Case, dict[str, dict[str, float]]]]
    groups: dict[str, str]
    chance: dict[Case, dict[str, dict[str, float]]]
    ceiling: dict[Case, dict[str, dict[str, float]]]
    n_samples: dict[Case, int]

    def array(self, method: Method, case: Case, figure: str) -> np.ndarray:
        """(n_seeds, n_models), models in the order of `models`."""
        rows = [
            {"seed": seed, "model_id": model_id, figure: values[figure]}
            for seed, method_id in enumerate(method.method_ids)
            for model_id, values in self.of[method_id][case].items()
        ]
        return arranged(rows, figure, self.models(case))

    def models(self, case: Case) -> list[str]:
        return sorted(self.chance[case])

    def groups_of(self, case: Case) -> list[str]:
        return [self.groups[model_id] for model_id in self.models(case)]

    def mean(self, method: Method, case: Case, figure: str) -> float:
        return float(self.array(method, case, figure).mean())


def read_values(db: Database) -> Values:
    """All values of the methods that were ranked, per prompt scheme and for both schemes together."""
    values = Values(
        defaultdict(lambda: defaultdict(lambda: defaultdict(dict))),
        {row["model_id"]: row["member_of"] for row in db.sql(GROUPS).to_pylist()},
        defaultdict(lambda: defaultdict(dict)),
        defaultdict(lambda: defaultdict(dict)),
        defaultdict(int),
    )
    case_of, counted = {}, set()
    for k in CUT_OFFS:
        for row in db.sql(SCORES, {"k": k}).to_pylist():
            case, model_id = (row["kind"], row["split"], row["prompt_scheme"]), row["model_id"]
            case_of[model_id, row["prompt_scheme"]] = case
            values.of[row["method_id"]][case][model_id] |= {f"recall_{k}": row["recall"], "map": row["map"]}
            values.chance[case][model_id] |= {f"recall_{k}": row["chance_recall"], "map": row["chance_map"]}
            values.ceiling[case][model_id] |= {
                f"recall_{k}": row["best_recall"],
                "map": 1.0,
                "log_rank": math.lgamma(row["n_exemplars"] + 1) / row["n_exemplars"],
            }
            if (case, model_id) not in counted:
                counted.add((case, model_id))
                values.n_samples[case] += row["n_samples"]
    for row in db.sql(RANKS).to_pylist():
        case, model_id = case_of[row["model_id"], row["prompt_scheme"]], row["model_id"]
        values.of[row["method_id"]][case][model_id]["log_rank"] = row["log_rank"]
        values.chance[case][model_id]["log_rank"] = row["chance"]
    for by_case in (*values.of.values(), values.chance, values.ceiling):
        _add_both(by_case)
    for kind, split, scheme in list(values.n_samples):
        values.n_samples[kind, split, "both"] += values.n_samples[kind, split, scheme]
    return values


def _add_both(by_case: dict[Case, dict[str, dict[str, float]]]) -> None:
    """Add the means over prompt schemes of each model."""
    models: dict[tuple[str, str, str], list[dict[str, float]]] = defaultdict(list)
    for (kind, split, _), of_models in by_case.items():
        for model_id, figures in of_models.items():
            models[kind, split, model_id].append(figures)
    for (kind, split, model_id), figures in models.items():
        means = {name: float(np.mean([one[name] for one in figures])) for name in figures[0]}
        by_case[kind, split, "both"][model_id] = means


def cases(values: Values, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One row per test case, prompt scheme and method."""
    rows = []
    for kind, split in TEST_CASES:
        for scheme in SCHEMES:
            case = (kind, split, scheme)
            if not values.chance.get(case):
                continue
            chance, ceiling = (
                {figure: float(np.mean([of[figure] for of in bound[case].values()])) for figure in FIGURES}
                for bound in (values.chance, values.ceiling)
            )
            for method in methods:
                row = {"kind": kind, "split": split, "prompt_scheme": scheme, **_named(method)}
                row |= {"n_models": len(values.models(case)), "n_samples": values.n_samples[case]}
                row |= {"chance": chance, "ceiling": ceiling, "n_seeds": len(method.method_ids)}
                for figure in FIGURES:
                    row[figure] = interval(mean_of(values.array(method, case, figure), values.groups_of(case)))
                rows.append(row)
    return rows


def interval(estimate: Any) -> list[float]:
    return [estimate.mean, estimate.low, estimate.high]


def _named(method: Method) -> dict[str, str]:
    return {"encoder": method.encoder, "variant": method.variant}


def best_on_validation(values: Values, methods: Sequence[Method], kind: str) -> Method:
    """The method with the lowest mean log rank on the validation models of a kind."""
    return min(methods, key=lambda method: values.mean(method, (kind, "val", "both"), TESTED))


def main_methods(methods: Sequence[Method]) -> list[Method]:
    """Encoders and their controls, each plain and with the chosen mapper."""
    return [method for method in methods if method.variant in (PLAIN, CHOSEN)]


def is_learned(method: Method) -> bool:
    """Whether it compares what a network sees in the images as they are stored."""
    return not method.encoder.startswith((PIXELS, CONTROL))


def planned(values: Values, methods: Sequence[Method], kind: str) -> list[tuple[str, Method, Method]]:
    """The comparisons on models of a kind: question, a method, and what it is compared with."""
    of = {(method.encoder, method.variant): method for method in methods}
    pairs: list[tuple[str, Method | None, Method | None]] = []
    for encoder in dict.fromkeys(method.encoder for method in methods if not method.encoder.startswith(CONTROL)):
        control = CONTROL + encoder
        plain, chosen = of[encoder, PLAIN], of.get((encoder, CHOSEN))
        pairs.append(("tuned against plain", chosen, plain))
        pairs.append(("tuned against plain, control", of.get((control, CHOSEN)), of.get((control, PLAIN))))
        pairs.append(("control against stored", of.get((control, PLAIN)), plain))
        pairs.append(("control against stored, tuned", of.get((control, CHOSEN)), chosen))
        pairs += [
            ("one kind against both", of.get((encoder, variant)), chosen) for variant in BY_KIND if variant == kind
        ]
        pairs += [("ablation against chosen", of.get((encoder, variant)), chosen) for variant in (*ABLATIONS, PAPER)]
        pairs += [("released form against affine", of.get((encoder, variant)), chosen) for variant in RELEASED]
    plain_and_tuned = main_methods(methods)
    learned = [method for method in plain_and_tuned if is_learned(method)]
    pixels = [method for method in plain_and_tuned if method.encoder.startswith(PIXELS)]
    if learned and pixels:
        best = [best_on_validation(values, some, kind) for some in (learned, pixels)]
        pairs.append(("best learned encoder against pixels", *best))
    return [
        (question, one, other)
        for question, one, other in pairs
        if one and other and not (question.startswith("ablation") and one.variant in RELEASED)
    ]


def comparisons(values: Values, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One row per planned comparison and test case, over both prompt schemes; Holm's correction is by question and kind."""
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in TEST_CASES):
        splits = [split for of, split in TEST_CASES if of == kind and values.chance.get((kind, split, "both"))]
        for question, one, other in planned(values, methods, kind) if splits else ():
            for split in splits:
                case = (kind, split, "both")
                row: dict[str, Any] = {"question": question, "kind": kind, "split": split}
                row |= {"one": _named(one), "other": _named(other)}
                for figure in SHOWN:
                    arrays = (values.array(method, case, figure) for method in (one, other))
                    found = difference(*arrays, values.groups_of(case))
                    row[figure] = interval(found)
                rows.append(row | {"n_models": found.n_models, "n_seeds": found.n_seeds, "p": found.p})
    families: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for number, row in enumerate(rows):
        if row["p"] is not None:
            families[row["question"], row["kind"]][number] = row["p"]
    corrected = {number: p for family in families.values() for number, p in holm(family).items()}
    return [row | {"p_holm": corrected.get(number)} for number, row in enumerate(rows)]


def general(db: Database, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Recall at the size of the set on models of unrelated images, one row per size and method."""
    of_model: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in db.sql(GENERAL).to_pylist():
        of_model[row["method_id"], row["n_exemplars"]][row["model_id"]] = row
    rows = []
    for size in sorted({size for _, size in of_model}):
        for method in methods:
            seeds = [of_model[method_id, size] for method_id in method.method_ids]
            models = sorted(seeds[0])
            values = np.array([[of[model_id]["recall"] for model_id in models] for of in seeds])
            chance = float(np.mean([seeds[0][model_id]["chance"] for model_id in models]))
            row = {"n_exemplars": size, **_named(method), "n_models": len(models), "n_seeds": len(seeds)}
            rows.append(row | {"recall_at_size": interval(mean_of(values)), "chance": chance})
    return rows


def relatives(values: Values, beside: Values, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Styles among further icons of their sets, `beside` values of the gallery without them; one row per split and method."""
    rows = []
    for kind, split in TEST_CASES:
        case = (kind, split, "both")
        if kind != "style" or not values.chance.get(case):
            continue
        for method in methods:
            row: dict[str, Any] = {"split": split, **_named(method), "n_models": len(values.models(case))}
            for figure in SHOWN:
                for name, of in (("without", beside), ("with", values)):
                    estimate = mean_of(of.array(method, case, figure), of.groups_of(case))
                    row[f"{figure}_{name}"] = interval(estimate)
            rows.append(row)
    return rows
