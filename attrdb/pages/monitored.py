"""What was noted while a model was customized, as its page shows it: which image moved the model when."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attrdb.database import Database
from attrdb.models import monitoring_level
from attrdb.pages import plots
from attrdb.pages.html import data_uri
from attrdb.store.schema import Row
from attrdb.text import fixed

MAX_EXEMPLARS = 64  # rows of a heat map
MAX_BINS = 300  # of a strip
N_SHADES = 5  # of a strip
N_QUARTERS = 4
SIDE = 96  # pixels; larger pictures are scaled down to it
CAUSES = ("token", "regularization", "decay", "rest")  # that are no exemplar's

STRIPS = """\
SELECT image_id, step * $n_bins // $n_steps AS bin, avg(loss) AS loss, count(*) AS n_visits
FROM monitor_steps
WHERE model_id = $id AND is_exemplar
GROUP BY ALL
ORDER BY ALL
"""
OF_EXEMPLARS = """\
SELECT concept_id, image_id, quarter, sum(progress) AS progress
FROM monitor_changes
WHERE model_id = $id AND image_id IS NOT NULL
GROUP BY ALL
"""
OF_NO_EXEMPLAR = """\
SELECT concept_id, cause, quarter, sum(progress) AS progress
FROM monitor_changes
WHERE model_id = $id AND image_id IS NULL
GROUP BY ALL
"""
ATTENTION = """\
SELECT concept_id, step, avg(list_avg(attention)) AS attention
FROM monitor_probes
WHERE model_id = $id
GROUP BY ALL
HAVING attention IS NOT NULL
ORDER BY step
"""


@dataclass(frozen=True)
class Cell:
    """Progress as a heat map shows it.

    text:     per cent of the whole change
    strength: of the colour, from 0 to 1
    """

    text: str
    is_negative: bool = False
    strength: float = 0.0


@dataclass(frozen=True)
class Strip:
    """The steps that drew an exemplar.

    paths: the path of an SVG by shade from 1, a unit square per bin
    """

    paths: dict[int, str]
    label: str
    n_visits: int = 0


@dataclass(frozen=True)
class Line:
    """An exemplar's row of a heat map.

    title:        caption, creator, licence and id
    of_concept:   token of its own concept, where the heat map is of another
    cells:        one per quarter; none of a model whose changes were not noted
    value, share: progress in all quarters, and its share of the exemplars'; None as `cells`
    """

    picture: str | None
    alt: str
    title: str
    of_concept: str | None
    strip: Strip
    cells: list[Cell]
    value: str | None
    share: str | None


@dataclass(frozen=True)
class HeatMap:
    """Exemplars by time, for one concept.

    title:      the concept's token; None of a model that has no other
    n_left_out: exemplars that there are beside those of `lines`
    others:     what is no exemplar's: a name, a cell per quarter, and their sum
    attention:  plot of the attention to the token; None without probes, or without a token
    """

    title: str | None
    lines: list[Line]
    n_left_out: int
    others: list[tuple[str, list[Cell], Cell]]
    attention: str | None


@dataclass(frozen=True)
class Monitored:
    """quarters: the steps of each, from 1, in words; binned: a strip has fewer bins than there were steps"""

    level: str
    n_steps: int
    n_bins: int
    quarters: list[str]
    maps: list[HeatMap]

    @property
    def binned(self) -> bool:
        return self.n_bins < self.n_steps


def monitored(db: Database, model: dict[str, Any]) -> Monitored | None:
    """The heat maps of a described model, see `attrdb.models.describe`; None if it was not monitored."""
    level = monitoring_level(db, model["model_id"])
    if level is None:
        return None
    of_model = {"id": model["model_id"]}
    [counted] = db.sql("SELECT max(step) + 1 AS n_steps FROM monitor_steps WHERE model_id = $id", of_model).to_pylist()
    n_steps = model["settings"].get("customize", {}).get("steps") or counted["n_steps"] or 1
    n_bins = min(n_steps, MAX_BINS)
    strips = _strips(db.sql(STRIPS, of_model | {"n_bins": n_bins, "n_steps": n_steps}).to_pylist(), n_steps, n_bins)
    if level == "steps":
        rated = _by_visits(model, strips)
    else:
        rated = {row["concept_id"]: [] for row in db.sql(OF_NO_EXEMPLAR, of_model).to_pylist()}
        for row in db.query("attribution_table", model_id=model["model_id"]).to_pylist():
            rated.setdefault(row["concept_id"], []).append(row)
    maps = _HeatMaps(db, model, strips, rated)
    return Monitored(level, n_steps, n_bins, _quarters(n_steps), [maps.of(concept_id) for concept_id in maps.order])


class _HeatMaps:
    """Makes the heat maps of a model.

    rated: by concept its exemplars, greatest first: image_id, and value and share if changes were noted
    """

    def __init__(
        self, db: Database, model: dict[str, Any], strips: dict[str, Strip], rated: dict[str | None, list[Row]]
    ):
        self.strips, self.rated = strips, rated
        self.shown = {concept_id: _greatest(rows) for concept_id, rows in rated.items()}
        self.exemplars = {row["image_id"]: row for row in model["exemplars"]}
        self.tokens = {row["concept_id"]: row["token"] for row in model["concepts"]}
        self.order = sorted(rated, key=lambda concept_id: (*self.tokens, concept_id).index(concept_id))
        self.pictures = _pictures(db, {row["image_id"] for rows in self.shown.values() for row in rows})
        self.progress: dict[tuple[str | None, str], dict[int, float]] = defaultdict(dict)
        self.attention: dict[str | None, dict[int, float]] = defaultdict(dict)
        of_model = {"id": model["model_id"]}
        for row in db.sql(OF_EXEMPLARS, of_model).to_pylist():
            self.progress[row["concept_id"], row["image_id"]][row["quarter"]] = row["progress"]
        for row in db.sql(OF_NO_EXEMPLAR, of_model).to_pylist():
            self.progress[row["concept_id"], row["cause"]][row["quarter"]] = row["progress"]
        for row in db.sql(ATTENTION, of_model).to_pylist():
            self.attention[row["concept_id"]][row["step"]] = row["attention"]

    def of(self, concept_id: str | None) -> HeatMap:
        shown = self.shown[concept_id]
        scale = Scale.of(
            value for row in shown for value in self.progress.get((concept_id, row["image_id"]), {}).values()
        )
        causes = [cause for cause in CAUSES if (concept_id, cause) in self.progress]
        attention = self.attention.get(concept_id)
        return HeatMap(
            title=self.tokens.get(concept_id or "", concept_id) if len(self.order) > 1 else None,
            lines=[self._line(concept_id, row, scale) for row in shown],
            n_left_out=len(self.rated[concept_id]) - len(shown),
            others=[(cause, *scale.cells(self.progress[concept_id, cause])) for cause in causes],
            attention=plots.attention(list(attention), list(attention.values())) if attention else None,
        )

    def _line(self, concept_id: str | None, row: Row, scale: Scale) -> Line:
        image_id, value = row["image_id"], row.get("value")
        exemplar = self.exemplars.get(image_id, {})
        caption = exemplar.get("prompt") or exemplar.get("category") or "exemplar"
        credit = [exemplar.get(name) for name in ("creator", "license")]
        own_concept = exemplar.get("concept_id")
        return Line(
            picture=self.pictures.get(image_id),
            alt=", ".join(filter(None, [caption, *credit])),
            title=", ".join(filter(None, [caption, *credit, image_id])),
            of_concept=self.tokens.get(own_concept) if own_concept != concept_id else None,
            strip=self.strips.get(image_id, Strip({}, "not drawn in any step")),
            cells=[] if value is None else scale.cells(self.progress[concept_id, image_id])[0],
            value=None if value is None else scale.text(value),
            share=None if value is None else scale.text(row["share"]),
        )


@dataclass(frozen=True)
class Scale:
    """How a heat map shows progress.

    largest: absolute value, which has the full colour
    digits:  after the point, of per cent
    """

    largest: float
    digits: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale:
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        return cls(largest, 1 if largest >= 0.01 else 2)

    def text(self, value: float) -> str:
        if not math.isfinite(value):
            return "not finite"
        text = fixed(abs(value) * 100, self.digits)
        return f"−{text}" if value < 0 and float(text) else text

    def cell(self, value: float | None) -> Cell:
        if value is None:
            return Cell("–")
        colour = min(1.0, abs(value) / self.largest) if self.largest and math.isfinite(value) else 0.0
        return Cell(self.text(value), value < 0, round(colour, 2))

    def cells(self, by_quarter: dict[int, float]) -> tuple[list[Cell], Cell]:
        """A cell per quarter, and one of their sum."""
        quarters = [self.cell(by_quarter.get(quarter)) for quarter in range(1, N_QUARTERS + 1)]
        return quarters, self.cell(sum(by_quarter.values()))


def _greatest(rows: list[Row]) -> list[Row]:
    """Those of the largest absolute values, in their order."""
    if len(rows) <= MAX_EXEMPLARS:
        return rows
    places = sorted(range(len(rows)), key=lambda place: -abs(rows[place].get("value") or 0.0))[:MAX_EXEMPLARS]
    return [rows[place] for place in sorted(places)]


def _by_visits(model: dict[str, Any], strips: dict[str, Strip]) -> dict[str | None, list[Row]]:
    """The exemplars of each concept of a model, those that were drawn most often first."""
    several = model["kind"] == "concepts"
    rated: dict[str | None, list[Row]] = defaultdict(list)
    for row in model["exemplars"]:
        rated[row["concept_id"] if several else None].append(row)
    for rows in rated.values():
        rows.sort(
            key=lambda row: (-strips[row["image_id"]].n_visits if row["image_id"] in strips else 0, row["image_id"])
        )
    return dict(rated)


def _strips(rows: list[Row], n_steps: int, n_bins: int) -> dict[str, Strip]:
    """The strip of each exemplar. The shades are fifths of all bins that drew one, by mean loss.

    rows: image_id, bin, loss, n_visits
    """
    losses = sorted(row["loss"] for row in rows)
    by_image: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_image[row["image_id"]].append(row)
    strips = {}
    for image_id, bins in by_image.items():
        paths: dict[int, str] = defaultdict(str)
        for row in bins:
            paths[1 + bisect_left(losses, row["loss"]) * N_SHADES // len(losses)] += f"M{row['bin']} 0h1v1h-1z"
        n_visits = sum(row["n_visits"] for row in bins)
        mean = sum(row["loss"] * row["n_visits"] for row in bins) / n_visits
        spans = "steps" if n_bins == n_steps else "spans of steps"
        label = f"drawn {n_visits:,} times, in {len(bins)} of {n_bins} {spans}; mean loss {mean:.3g}"
        strips[image_id] = Strip(dict(sorted(paths.items())), label, n_visits)
    return strips


def _pictures(db: Database, image_ids: set[str]) -> dict[str, str]:
    """Data URIs of those pictures that are stored."""
    rows = db.sql(
        "SELECT image_id, image FROM images WHERE image IS NOT NULL AND image_id IN (SELECT unnest($ids))",
        {"ids": sorted(image_ids)},
    )
    return {row["image_id"]: data_uri(row["image"], SIDE)[0] for row in rows.to_pylist()}


def _quarters(n_steps: int) -> list[str]:
    """The steps of each quarter, from 1; a dash for a quarter without a step."""
    starts = [-(-quarter * n_steps // N_QUARTERS) + 1 for quarter in range(N_QUARTERS + 1)]
    spans = [(start, end - 1) for start, end in itertools.pairwise(starts)]
    return ["–" if first > last else f"{first}" if first == last else f"{first}–{last}" for first, last in spans]
