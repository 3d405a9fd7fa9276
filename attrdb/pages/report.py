"""What a database's benchmark says: its figures as plain data, and on one page with plots and a gallery of queries."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jinja2

import attrdb
from attrdb.database import Database
from attrdb.errors import NotFound
from attrdb.pages import plots
from attrdb.pages.html import data_uri
from attrdb.store.predicates import among

CUT_OFFS = (5, 10, 100)
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
CASE = ("kind", "split", "prompt_scheme")
N_CANDIDATES = 6
QUERIES_A_CASE = 2
SIDE = 128  # pixels; larger pictures are scaled down to it


def figures(db: Database, gallery: str = "own") -> dict[str, Any]:
    """Everything that the tables and plots show, as JSON types.

    cases:       recall at CUT_OFFS and mean average precision with intervals, chance and ceilings, of every test case and
                 kind of features; n_unranked: pairs that were never ranked and count as misses
    curves:      recall at CURVE, averaged over prompt schemes
    gains:       of every mapper over its encoder's own features, in recall at 10
    general, correlations: the queries general_attribution and benchmark_correlation
    mappers, calibrations: their rows
    raises: NotFound if nothing was evaluated on that gallery
    """

    def of_gallery(name: str, **parameters: Any) -> list[dict]:
        return [row for row in db.query(name, **parameters).to_pylist() if row["gallery"] == gallery]

    recall = {k: of_gallery("recall_at_k", k=k) for k in sorted({*CUT_OFFS, *CURVE})}
    mappers = db.sql("SELECT * EXCLUDE (parameters) FROM mappers ORDER BY mapper_id").to_pylist()
    cases = _cases(
        {k: of_gallery("recall_intervals", k=k) for k in CUT_OFFS},
        {k: recall[k] for k in CUT_OFFS},
        of_gallery("mean_average_precision"),
    )
    if not cases:
        raise NotFound(f"{db.path} has no ranks on gallery {gallery!r}; fill them with: attrdb evaluate {db.path}")
    gains = [
        {"mapper_id": mapper["mapper_id"], "encoder_id": mapper["encoder_id"], **row}
        for mapper in mappers
        for row in of_gallery("compare_mappers", mapper_id=mapper["mapper_id"], encoder_id=mapper["encoder_id"], k=10)
    ]
    calibrations = db.sql("SELECT * FROM calibrations ORDER BY method_id").to_pylist()
    return {
        "gallery": gallery,
        "images_version": db.version,
        "images": db.status()["images_by_role"],
        "models": db.sql("SELECT kind, split, count(*) AS n FROM models GROUP BY ALL ORDER BY ALL").to_pylist(),
        "cases": cases,
        "curves": [point for k in CURVE for point in _averaged(k, recall[k])],
        "gains": gains,
        "general": of_gallery("general_attribution"),
        "correlations": of_gallery("benchmark_correlation"),
        "mappers": [_plain(row, ("settings", "metrics", "curves")) for row in mappers],
        "calibrations": [_plain(row, ("reliability",)) for row in calibrations],
    }


def _plain(row: dict, texts: Iterable[str]) -> dict:
    """A row with its JSON texts read, and its times as text."""
    plain = {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}
    return plain | {name: json.loads(row[name] or "{}") for name in texts}


def _cases(intervals: dict[int, list[dict]], beside: dict[int, list[dict]], precision: list[dict]) -> list[dict]:
    def key(row: dict) -> tuple:
        return tuple(row[name] for name in (*CASE, "encoder_id", "mapper_id"))

    found: dict[tuple, dict] = {}
    for k, rows in intervals.items():
        for row in rows:
            case = found.setdefault(
                key(row), {name: row[name] for name in (*CASE, "encoder_id", "mapper_id", "n_models")}
            )
            case[f"recall_{k}"] = [row["recall_at_k"], row["recall_low"], row["recall_high"]]
            case["map"] = [row["mean_average_precision"], row["precision_low"], row["precision_high"]]
    for k, rows in beside.items():
        for row in rows:
            found[key(row)] |= {f"chance_{k}": row["chance"], f"ceiling_{k}": row["ceiling"]}
    for row in precision:
        found[key(row)] |= {"n_samples": row["n_samples"], "n_unranked": row["n_unranked"], "chance_map": row["chance"]}
    return list(found.values())


def _averaged(k: int, rows: list[dict]) -> list[dict]:
    """Recall of kind, split and features: the mean over prompt schemes."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["kind"], row["split"], row["encoder_id"], row["mapper_id"]].append(row)
    return [
        {
            "kind": kind,
            "split": split,
            "encoder_id": encoder_id,
            "mapper_id": mapper_id,
            "k": k,
            "recall": sum(row["recall_at_k"] for row in group) / len(group),
            "chance": sum(row["chance"] for row in group) / len(group),
        }
        for (kind, split, encoder_id, mapper_id), group in groups.items()
    ]


def features_name(row: dict) -> str:
    """An encoder, or the mapper on it."""
    return row["mapper_id"] or row["encoder_id"]


def case_name(row: dict) -> str:
    return " · ".join(str(row[name]) for name in CASE if row.get(name))


def drawn(found: dict) -> dict[str, str]:
    """The plots of `figures`, as SVG, by name; of what there is nothing of there is no plot."""
    curves = [
        {**row, "case": case_name(row), "features": features_name(row)}
        for row in sorted(found["curves"], key=lambda row: (row["kind"] or "", row["split"] or ""))
        if row["kind"] != "mixed"
    ]
    gains = [
        {
            "case": case_name(row),
            "features": row["mapper_id"],
            "value": row["recall_gain"],
            "low": row["recall_low"],
            "high": row["recall_high"],
        }
        for row in found["gains"]
        if row["kind"] != "mixed"
    ]
    told = [
        {"features": features_name(one), **row} for one in found["calibrations"] for row in one["reliability"]["fitted"]
    ]
    ways = {
        "curves": (plots.recall_curves, curves),
        "gains": (plots.gains, gains),
        "reliability": (plots.reliability, told),
        "general": (plots.general, _both(found)),
    }
    return {name: plot(rows) for name, (plot, rows) in ways.items() if rows}


def _both(found: dict) -> list[dict]:
    """What general attribution is compared with: a point for every kind of features that both benchmarks have."""
    tests: dict[tuple, list[float]] = defaultdict(list)
    for row in found["curves"]:
        if row["k"] == 10 and row["kind"] != "mixed" and (row["split"] or "").startswith("test"):
            tests[row["kind"], features_name(row)].append(row["recall"])
    return [
        {
            "case": f"sets of {row['n_exemplars']} · {kind} models",
            "features": features_name(row),
            "x": sum(tests[kind, features_name(row)]) / len(tests[kind, features_name(row)]),
            "y": row["recall_at_size"],
        }
        for kind in ("object", "style")
        for row in found["general"]
        if tests[kind, features_name(row)]
    ]


# --- the page -----------------------------------------------------------------------------------------------------------


def render(db: Database, found: dict[str, Any]) -> str:
    """The page of `figures` as one HTML text, with its plots and pictures inside."""
    by_case: dict[str, list[dict]] = defaultdict(list)
    for row in found["cases"]:
        by_case[case_name(row)].append({**row, "features": features_name(row)})
    evaluated = {row["mapper_id"] for row in found["cases"]}
    # Validation compares only mappers that were validated on the same models: those on both kinds, if there are any.
    known = [one for one in found["mappers"] if one["mapper_id"] in evaluated and one["metrics"]]
    on_both = [one for one in known if one["trained_on"] == "both"]
    tuned = min(on_both or known, key=_validated, default=None)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("attrdb.pages"), autoescape=True, trim_blocks=True)
    environment.filters["picture"] = lambda encoded: data_uri(encoded, SIDE)[0]
    return environment.get_template("report.html").render(
        found=found,
        cases=by_case,
        cut_offs=CUT_OFFS,
        plots=drawn(found),
        tuned=tuned,
        queries=_queries(db, tuned["encoder_id"] if tuned else found["cases"][0]["encoder_id"], tuned),
        n_unranked=sum(row["n_unranked"] for row in found["cases"]),
        version=attrdb.__version__,
        database=db.path,
    )


def _queries(db: Database, encoder_id: str, tuned: dict | None) -> list[dict]:
    """Some samples of every split that is for tests, with their exemplars and what was attributed, without and with a mapper.

    Which ones follows from their ids alone.
    """
    chosen = db.sql(
        """
        SELECT models.kind, models.split, samples.model_id, samples.image_id, samples.prompt, samples.image
        FROM samples JOIN models ON models.model_id = samples.model_id
        WHERE models.kind <> 'mixed' AND samples.image_id IN (
            SELECT sample_id FROM exemplar_ranks WHERE encoder_id = $encoder_id
        )
        QUALIFY row_number() OVER (
            PARTITION BY models.kind, models.split, samples.prompt_scheme ORDER BY md5(samples.image_id)
        ) <= $n
        ORDER BY models.kind, models.split, samples.image_id
        """,
        {"n": QUERIES_A_CASE, "encoder_id": encoder_id},
    ).to_pylist()
    tests = [row for row in chosen if (row["split"] or "").startswith("test")] or chosen
    ways = [
        {"encoder_id": encoder_id, "mapper_id": mapper_id}
        for mapper_id in [None] + ([tuned["mapper_id"]] if tuned else [])
    ]
    hits = [_hits(db, [row["image_id"] for row in tests], **way) for way in ways]
    models = among("model_id", {row["model_id"] for row in tests})
    exemplars = db.images(f"role = 'exemplar' AND {models}", ["image_id", "model_id", "image"])
    exemplars = exemplars.sort_by("image_id").to_pylist()
    candidates = among("image_id", {hit["image_id"] for of_way in hits for hit in of_way})
    image_of = {one["image_id"]: one["image"] for one in db.images(candidates, ["image_id", "image"]).to_pylist()}
    for row in tests:
        own = {one["image_id"]: one["image"] for one in exemplars if one["model_id"] == row["model_id"]}
        row["exemplars"] = list(own.values())
        row["answers"] = [
            {
                "features": features_name(way),
                "hits": [
                    hit | {"image": image_of[hit["image_id"]], "true": hit["image_id"] in own}
                    for hit in of_way
                    if hit["sample_id"] == row["image_id"]
                ],
            }
            for way, of_way in zip(ways, hits, strict=True)
        ]
    return tests


def _hits(db: Database, sample_ids: list[str], encoder_id: str, mapper_id: str | None) -> list[dict]:
    """The first candidates of some samples, best first; they are searched for together."""
    return db.sql(
        f"""
        SELECT asked.image_id AS sample_id, found.image_id, found.influence
        FROM samples AS asked, attribute(
            asked.image_id, k := $k, encoder_id := $encoder_id, mapper_id := $mapper_id
        ) AS found
        WHERE {among("asked.image_id", sample_ids)}
        ORDER BY found.rank
        """,
        {"k": N_CANDIDATES, "encoder_id": encoder_id, "mapper_id": mapper_id},
    ).to_pylist()


def _validated(mapper: dict) -> tuple:
    """Orders mappers by how well they ranked validation exemplars; after them, by recall, those that were not measured so."""
    metrics = mapper["metrics"]
    ranked = "mean_log_rank" in metrics
    return not ranked, metrics["mean_log_rank"] if ranked else -metrics["recall"], mapper["mapper_id"]
