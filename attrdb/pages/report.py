"""The results of a database's benchmark, as plain data, and as one page with plots and a gallery of queries."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import jinja2

import attrdb
from attrdb.database import Database
from attrdb.errors import NotFound
from attrdb.pages import plots
from attrdb.pages.html import data_uri
from attrdb.pages.truth import concept_tables, removal_tables, truth_figures
from attrdb.store.methods import similarity_id
from attrdb.store.predicates import among
from attrdb.store.schema import Row
from attrdb.text import fixed

CUT_OFFS = (5, 10, 100)
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
CREDITED = ("prompt", "creator", "license")  # of a candidate
CASE = ("kind", "split", "prompt_scheme")
METHOD = ("method_id", "encoder_id", "mapper_id")
N_CANDIDATES = 6
QUERIES_PER_CASE = 2
SIDE = 128  # pixels; larger pictures are scaled down to it


def figures(db: Database, gallery: str = "own", method_ids: Collection[str] = ()) -> dict[str, Any]:
    """The results that the tables and plots show, as JSON types.

    method_ids: only these methods; all that were evaluated if empty
    raises:     NotFound if nothing was evaluated on that gallery
    returns, by key:
        methods      the rows of the methods that were evaluated
        cases        one row per test case and method: recall at CUT_OFFS and mean average precision with intervals, chance
                     and ceilings; n_unranked: pairs that were never ranked, which count as misses
        curves       recall at CURVE, averaged over prompt schemes
        gains        in recall at 10: of mappers over their encoder's own features, of stored methods over similarity of the
                     first encoder
        general, correlations   the queries general_attribution and benchmark_correlation
        mappers, attribution_models, calibrations   their rows
        removal_intervals, between_concepts, within_concept   answers of these queries
    """

    def is_shown(row: Row) -> bool:
        return not method_ids or "method_id" not in row or row["method_id"] in method_ids

    def of_gallery(name: str, **parameters: Any) -> list[Row]:
        rows = db.query(name, **parameters).to_pylist()
        return [row for row in rows if row["gallery"] == gallery and is_shown(row)]

    recall = {k: of_gallery("recall_at_k", k=k) for k in sorted({*CUT_OFFS, *CURVE})}
    mappers = db.sql("SELECT * EXCLUDE (parameters) FROM mappers ORDER BY mapper_id").to_pylist()
    cases = _cases(
        {k: of_gallery("recall_intervals", k=k) for k in CUT_OFFS},
        {k: recall[k] for k in CUT_OFFS},
        of_gallery("mean_average_precision"),
    )
    if not cases:
        by = f" by {', '.join(method_ids)}" if method_ids else ""
        raise NotFound(f"{db.path} has no ranks{by} on gallery {gallery!r}; fill them with: attrdb evaluate {db.path}")
    evaluated = {row["method_id"] for row in cases}
    methods = [row for name, row in db.methods.items() if name in evaluated]
    gains = [
        {**{name: method[name] for name in METHOD}, "other": other, **row}
        for method in methods
        if (other := method["encoder_id"] or db.encoder_id()) != method["method_id"]
        for row in of_gallery("compare_methods", method=method["method_id"], other=other, k=10)
    ]
    calibrations = db.sql("SELECT * FROM calibrations ORDER BY method_id, kind NULLS FIRST").to_pylist()
    trained = [
        _plain(row, ("settings", "metrics", "curves"))
        for row in mappers
        if is_shown({"method_id": similarity_id(row["encoder_id"], row["mapper_id"])})
    ]
    return {
        "gallery": gallery,
        "images_version": db.version,
        "images": db.status()["images_by_role"],
        "models": db.sql("SELECT kind, split, count(*) AS n FROM models GROUP BY ALL ORDER BY ALL").to_pylist(),
        "methods": [_plain(row, ("settings",)) for row in methods],
        "cases": cases,
        "curves": [point for k in CURVE for point in _averaged(k, recall[k])],
        "gains": gains,
        "general": of_gallery("general_attribution"),
        "correlations": of_gallery("benchmark_correlation"),
        "mappers": [row for row in trained if row["trained_on"] != "attribution-table"],
        "attribution_models": [row for row in trained if row["trained_on"] == "attribution-table"],
        "calibrations": [_plain(row, ("reliability",)) for row in calibrations if is_shown(row)],
        **truth_figures(db, is_shown),
    }


def _plain(row: Row, texts: Iterable[str]) -> Row:
    """A row with its JSON texts parsed, and its times as text."""
    plain = {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row.items()}
    return plain | {name: json.loads(row[name] or "{}") for name in texts}


def _cases(intervals: dict[int, list[Row]], recall: dict[int, list[Row]], precision: list[Row]) -> list[Row]:
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in (*CASE, *METHOD))

    cases: dict[tuple[Any, ...], Row] = {}
    for k, rows in intervals.items():
        for row in rows:
            case = cases.setdefault(key(row), {name: row[name] for name in (*CASE, *METHOD, "n_models")})
            case[f"recall_{k}"] = [row["recall_at_k"], row["recall_low"], row["recall_high"]]
            case["map"] = [row["mean_average_precision"], row["precision_low"], row["precision_high"]]
    for k, rows in recall.items():
        for row in rows:
            cases[key(row)] |= {f"chance_{k}": row["chance"], f"ceiling_{k}": row["ceiling"]}
    for row in precision:
        cases[key(row)] |= {"n_samples": row["n_samples"], "n_unranked": row["n_unranked"], "chance_map": row["chance"]}
    return list(cases.values())


def _averaged(k: int, rows: list[Row]) -> list[Row]:
    """Recall of kind, split and method: the mean over prompt schemes."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in ("kind", "split", *METHOD))].append(row)
    return [
        {
            **dict(zip(("kind", "split", *METHOD), names, strict=True)),
            "k": k,
            "recall": sum(row["recall_at_k"] for row in group) / len(group),
            "chance": sum(row["chance"] for row in group) / len(group),
        }
        for names, group in groups.items()
    ]


def method_name(row: Row) -> str:
    """The id of the mapper if there is one, else of the method."""
    name: str = row["mapper_id"] or row["method_id"]
    return name


def case_name(row: Row) -> str:
    parts = ((name, row.get(name)) for name in CASE)
    return " · ".join(str(value) if value else "no split" for name, value in parts if value or name == "split")


def render_plots(results: dict[str, Any]) -> dict[str, str]:
    """The plots of the results of `figures`, as SVG, by name; without those that would be empty."""
    curves = [
        {**row, "case": case_name(row), "method": method_name(row)}
        for row in sorted(results["curves"], key=lambda row: (row["kind"] or "", row["split"] or ""))
        if row["kind"] != "mixed"
    ]
    gains = [
        {
            "case": case_name(row),
            "method": method_name(row),
            "value": row["recall_gain"],
            "low": row["recall_low"],
            "high": row["recall_high"],
        }
        for row in results["gains"]
        if row["kind"] != "mixed"
    ]
    reliability = [
        {"case": f"{calibration.get('kind') or 'all'} models, {on}", "method": method_name(calibration), **row}
        for calibration in results["calibrations"]
        for on, rows in [_measured(calibration["reliability"])]
        for row in rows
    ]
    charts = {
        "curves": (plots.recall_curves, curves),
        "gains": (plots.gains, gains),
        "reliability": (plots.reliability, reliability),
        "general": (plots.general, _both(results)),
    }
    return {name: plot(rows) for name, (plot, rows) in charts.items() if rows}


def _measured(reliability: dict[str, list[Row]]) -> tuple[str, list[Row]]:
    """The table on models that were held out, if there is one, else on those of the fit; and which it is."""
    held_out = reliability.get("held_out")
    return ("held out", held_out) if held_out else ("of the fit", reliability["fitted"])


def _both(results: dict[str, Any]) -> list[Row]:
    """Recall on exemplars and in general attribution: a point for every method that has both."""
    tests: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in results["curves"]:
        if row["k"] == 10 and row["kind"] != "mixed" and (row["split"] or "").startswith("test"):
            tests[row["kind"], method_name(row)].append(row["recall"])
    return [
        {
            "case": f"sets of {row['n_exemplars']} · {kind} models",
            "method": method_name(row),
            "x": sum(tests[kind, method_name(row)]) / len(tests[kind, method_name(row)]),
            "y": row["recall_at_size"],
        }
        for kind in ("object", "style")
        for row in results["general"]
        if tests[kind, method_name(row)]
    ]


# --- the page -----------------------------------------------------------------------------------------------------------


def render(db: Database, results: dict[str, Any]) -> str:
    """The page with the results of `figures`, as one HTML text with its plots and pictures inside."""
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in results["cases"]:
        by_case[case_name(row)].append({**row, "method": method_name(row)})
    evaluated = {row["mapper_id"] for row in results["cases"]}
    # Only mappers that were validated on the same models can be compared: those on both kinds, if there are any.
    validated = [row for row in results["mappers"] if row["mapper_id"] in evaluated and row["metrics"]]
    on_both = [row for row in validated if row["trained_on"] == "both"]
    tuned = min(on_both or validated, key=_validation_order, default=None)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("attrdb.pages"), autoescape=True, trim_blocks=True)
    environment.filters["fixed"] = fixed
    environment.filters["picture"] = lambda encoded: data_uri(encoded, SIDE)[0]
    return environment.get_template("report.html").render(
        results=results,
        cases=by_case,
        cut_offs=CUT_OFFS,
        plots=render_plots(results),
        removals=removal_tables(results["removal_intervals"]),
        within=removal_tables(results["within_concept"]),
        concepts=concept_tables(results["between_concepts"]),
        tuned=tuned,
        queries=_queries(db, _shown_methods(results, tuned)),
        n_unranked=sum(row["n_unranked"] for row in results["cases"]),
        version=attrdb.__version__,
        database=db.path,
    )


def _shown_methods(results: dict[str, Any], tuned: Row | None) -> list[Row]:
    """The methods of the gallery: each encoder alone, the best mapper, attribution models, then stored methods."""
    learned = [tuned["mapper_id"]] if tuned else []
    learned += [row["mapper_id"] for row in results["attribution_models"]]
    similarity = [row for row in results["methods"] if row["kind"] == "similarity"]
    shown = [row for mapper_id in [None, *learned] for row in similarity if row["mapper_id"] == mapper_id]
    shown += [row for row in results["methods"] if row["kind"] != "similarity"]
    return shown or results["methods"]


def _queries(db: Database, methods: list[Row]) -> list[Row]:
    """Some samples of every test split, with their exemplars and the first candidates of each method.

    The samples are chosen by their ids alone.
    """
    chosen = db.sql(
        """
        SELECT models.kind, models.split, samples.model_id, samples.image_id, samples.prompt, samples.image
        FROM samples JOIN models ON models.model_id = samples.model_id
        WHERE models.kind <> 'mixed' AND samples.image_id IN (
            SELECT sample_id FROM exemplar_ranks WHERE method_id = $method_id
        )
        QUALIFY row_number() OVER (
            PARTITION BY models.kind, models.split, samples.prompt_scheme ORDER BY md5(samples.image_id)
        ) <= $n
        ORDER BY models.kind, models.split, samples.image_id
        """,
        {"n": QUERIES_PER_CASE, "method_id": methods[0]["method_id"]},
    ).to_pylist()
    tests = [row for row in chosen if (row["split"] or "").startswith("test")] or chosen
    hits = [_hits(db, [row["image_id"] for row in tests], method["method_id"]) for method in methods]
    models = among("model_id", {row["model_id"] for row in tests})
    exemplars = db.images(f"role = 'exemplar' AND {models}", ["image_id", "model_id", "image"])
    exemplars = exemplars.sort_by("image_id").to_pylist()
    candidates = among("image_id", {hit["image_id"] for of_method in hits for hit in of_method})
    known = {row["image_id"]: row for row in db.images(candidates, ["image_id", "image", *CREDITED]).to_pylist()}
    for row in tests:
        of_model = {image["image_id"]: image["image"] for image in exemplars if image["model_id"] == row["model_id"]}
        row["exemplars"] = list(of_model.values())
        row["answers"] = [
            {
                "method": method_name(method),
                "hits": [
                    hit
                    | {
                        "image": known[hit["image_id"]]["image"],
                        "credit": _credit(known[hit["image_id"]]),
                        "true": hit["image_id"] in of_model,
                    }
                    for hit in of_method
                    if hit["sample_id"] == row["image_id"]
                ],
            }
            for method, of_method in zip(methods, hits, strict=True)
        ]
    return tests


def _credit(row: Row) -> str:
    """What is known of a candidate: caption, creator, licence; its id where nothing is."""
    return ", ".join(row[name] for name in CREDITED if row[name]) or str(row["image_id"])


def _hits(db: Database, sample_ids: list[str], method_id: str) -> list[Row]:
    """The first candidates of some samples, best first, from one search.

    The ids alone are searched for: with a condition on `samples` that is a subquery, DuckDB attributes all samples first.
    """
    hits: list[Row] = db.sql(
        """
        SELECT queries.image_id AS sample_id, hits.image_id, hits.influence
        FROM (SELECT unnest($sample_ids) AS image_id) AS queries,
            attribute(queries.image_id, k := $k, method := $method) AS hits
        ORDER BY hits.rank
        """,
        {"k": N_CANDIDATES, "method": method_id, "sample_ids": sample_ids},
    ).to_pylist()
    return hits


def _validation_order(mapper: Row) -> tuple[Any, ...]:
    """A sort key: by mean log rank in validation; after these, by recall, mappers of an earlier attrdb, which lack it."""
    metrics = mapper["metrics"]
    has_rank = "mean_log_rank" in metrics
    return not has_rank, metrics["mean_log_rank"] if has_rank else -metrics["recall"], mapper["mapper_id"]
