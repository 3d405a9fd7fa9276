"""Scores by attrdb's own gradient methods and by those that packages add, stored in the table `scores`.

A package adds a method under the entry point group `attrdb.methods`. Its object is called with the text after the colon of
`attrdb score DB NAME:ARGUMENT` (empty without one) and gives a `Scorer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from attrdb import plugins
from attrdb.attribution.methods import method_rows
from attrdb.database import Database
from attrdb.errors import AttrdbError, InvalidValue, NotFound
from attrdb.progress import Progress, no_progress
from attrdb.store import jobs
from attrdb.store.ids import check_id, lock_file
from attrdb.store.jobs import Job, JobResult
from attrdb.store.locks import exclusive_lock
from attrdb.store.predicates import CANDIDATES, literal
from attrdb.store.schema import TABLES
from attrdb.store.snapshot import Snapshot

GROUP = "attrdb.methods"
BUILT_IN = (
    "in-run",
    "gradient-dot",
    "trac-in",
    "gradient-cosine",
    "influence-function",
    "d-trak",
    "d-trak-layers",
    "data-inf",
)
ATTRIBUTES = {
    "unit": (str,),
    "lowest": (int, float, type(None)),
    "highest": (int, float, type(None)),
    "tau": (int, float),
    "lam": (int, float),
    "settings": (dict,),
}
SAMPLES_PER_COMMIT = 256


class Scorer(Protocol):
    """What a package provides. A higher score must mean more influence.

    unit:            what a score is, in a word or two, such as "gradient dot product"
    lowest, highest: bounds of a score; None: unbounded
    tau, lam:        temperature (in units of the score) and cut-off of influence until `attrdb calibrate` has fitted them
    settings:        all that decides the scores, as JSON values; other settings make another method
    unscored:        may be left out: why a sample has no score, by sample_id, once `scores` was asked for it
    """

    unit: str
    lowest: float | None
    highest: float | None
    tau: float
    lam: float
    settings: dict[str, Any]

    def scores(self, db: Database, sample_ids: Sequence[str]) -> Iterable[pa.Table]:
        """Tables with sample_id, candidate_id and score (finite) of these samples; candidates are exemplars and pretraining
        images. A candidate without a row has no score."""
        ...


def load_scorers(specs: Sequence[str]) -> dict[str, Scorer]:
    """By spec, NAME or NAME:ARGUMENT: scorers of attrdb or of an installed package. attrdb's own share what they compute.

    raises: NotFound for an unknown name, InvalidValue for a wrong argument, and, with the package named, if it fails or is no
            `Scorer`
    """
    ours = [spec for spec in specs if name_of(spec) in BUILT_IN]
    for spec in specs:
        plugins.check_clash(GROUP, name_of(spec), BUILT_IN, "a method")
    scorers = {spec: _added_scorer(spec) for spec in specs if spec not in ours}
    if ours:
        from attrdb.ingest.gradients.scorers import gradient_scorers  # imports torch

        scorers |= gradient_scorers(ours)
    return {spec: scorers[spec] for spec in specs}


def name_of(spec: str) -> str:
    return spec.partition(":")[0]


def _added_scorer(spec: str) -> Scorer:
    name, _, argument = spec.partition(":")
    added = plugins.load(GROUP, name, lambda loaded: loaded(argument), _check_scorer, f"method {spec!r}")
    if added is not None:
        return added
    known = ", ".join([*BUILT_IN, *sorted(entry_points(group=GROUP).names)])
    raise NotFound(f"no method {name!r} to score with; known: {known}")


def _check_scorer(scorer: Any) -> None:
    plugins.check_members(scorer, ATTRIBUTES, ["scores"], "attrdb.ingest.score.Scorer")
    if not (scorer.tau > 0 and 0 <= scorer.lam < 1):
        raise ValueError(f"tau is {scorer.tau} and lam {scorer.lam}; tau must be above 0, lam at least 0 and below 1")
    json.dumps(scorer.settings)


def method_id_of(spec: str, method_id: str | None = None) -> str:
    """The id of a scorer's method: the one given, or one made from its spec; raises InvalidValue for a wrong one."""
    return check_id("method", method_id or re.sub(r"[^a-z0-9]+", "_", spec.lower()).strip("_"))


def score(
    db: Database,
    spec: str,
    scorer: Scorer,
    samples: str = "true",
    method_id: str | None = None,
    report: Progress = no_progress,
) -> JobResult:
    """As `score_all`, by one method.

    method_id: of the method in the database; made from the spec for None
    raises:    InvalidValue for a wrong id, and as `score_all`
    """
    method_id = method_id_of(spec, method_id)
    return score_all(db, {method_id: (spec, scorer)}, samples, report)[method_id]


def score_all(
    db: Database,
    methods: Mapping[str, tuple[str, Scorer]],
    samples: str = "true",
    report: Progress = no_progress,
) -> dict[str, JobResult]:
    """Score the samples that a predicate keeps, in commits of SAMPLES_PER_COMMIT; a rerun skips those that have scores.

    methods: spec and scorer, by method_id
    returns: counts of samples, by method_id
    raises:  InvalidValue for a predicate that cannot be used, scores that cannot be stored, or a method of that id with other
             settings; NotFound if no sample fulfils the predicate; Busy if another process scores by one of the methods, or
             images are taken out meanwhile
    """
    db.refresh()
    db.snapshot.check_predicate("samples", samples)
    for method_id, (spec, scorer) in methods.items():
        _register(db, method_id, spec, scorer)
    snapshot = db.snapshot
    known = set(db.images(f"role = 'sample' AND ({samples})", ["image_id"])["image_id"].to_pylist())
    if not known:
        raise NotFound(f"no sample of {db.path} fulfils {samples!r}")
    candidates = pc.unique(db.images(CANDIDATES, ["image_id"])["image_id"].combine_chunks())
    with ExitStack() as stack:
        scorings = []
        for method_id, (spec, scorer) in methods.items():
            job, left = stack.enter_context(_job(db, method_id, spec, scorer, samples, known))
            scorings.append(_Scoring(db, snapshot, candidates, method_id, spec, scorer, job, left))
        waiting = sorted(set().union(*(scoring.left for scoring in scorings)))
        for start in range(0, len(waiting), SAMPLES_PER_COMMIT):
            for scoring in scorings:
                report("score", len(known) - len(waiting) + start, len(known), f"by {scoring.method_id}")
                scoring.store(waiting[start : start + SAMPLES_PER_COMMIT])
        report("score", len(known), len(known))
        return {scoring.method_id: scoring.job.result(known) for scoring in scorings}


@contextmanager
def _job(
    db: Database, method_id: str, spec: str, scorer: Scorer, samples: str, known: set[str]
) -> Iterator[tuple[Job, set[str]]]:
    """The job of one method, and the samples that have no scores by it yet."""
    with (
        exclusive_lock(lock_file(db.path, "score", method_id), f"samples of {db.path} are being scored by {method_id}"),
        jobs.running(db.writer, "score", method_id, {"spec": spec, "samples": samples} | scorer.settings) as job,
    ):
        scored = db.snapshot.rows("scores", f"method_id = {literal(method_id)}", ["sample_id"])
        left = known - {row["sample_id"] for row in scored}
        job.n_stored = len(known) - len(left)
        yield job, left


@dataclass(frozen=True)
class _Scoring:
    """Scoring by one method.

    snapshot:   of the images when it began
    candidates: image_ids that may have scores
    left:       samples that had no scores when it began
    """

    db: Database
    snapshot: Snapshot
    candidates: pa.Array
    method_id: str
    spec: str
    scorer: Scorer
    job: Job
    left: set[str]

    def store(self, sample_ids: Sequence[str]) -> None:
        """Score those that are left of some samples, in one commit."""
        part = [each for each in sample_ids if each in self.left]
        if not part:
            return
        tables = _asked(self.spec, self.scorer, self.db, part)
        rows = pa.concat_tables([_conformed(table, part, self.candidates) for table in tables] or [_NONE])
        _check_repeats(rows, self.spec)
        method = pa.array([self.method_id] * len(rows), pa.string())
        self.db.writer.append_rows("scores", rows.append_column("method_id", method), self.snapshot)
        done = pc.unique(rows["sample_id"]).to_pylist()
        self.job.mended(done)
        reasons: dict[str, str] = getattr(self.scorer, "unscored", {})
        missing = set(part) - set(done)
        self.job.failed({each: reasons.get(each, f"{self.spec} gives it no score") for each in missing})
        self.job.n_done += len(done)


def _asked(spec: str, scorer: Scorer, db: Database, sample_ids: Sequence[str]) -> list[pa.Table]:
    """raises: InvalidValue for whatever the package's code raises; an AttrdbError is passed on"""
    try:
        return list(scorer.scores(db, sample_ids))
    except AttrdbError:
        raise
    except Exception as error:  # code of others raises anything
        raise InvalidValue(f"method {spec!r} fails with {type(error).__name__}: {error}") from error


def _register(db: Database, method_id: str, spec: str, scorer: Scorer) -> None:
    """Write the method's row; one that exists must be the same method."""
    settings = json.dumps({"spec": spec} | scorer.settings, sort_keys=True)
    row = method_rows(db.snapshot).get(method_id)
    if row is None:
        names = ("unit", "lowest", "highest", "tau", "lam")
        meaning = {name: getattr(scorer, name) for name in names}
        db.writer.add_method({"method_id": method_id, "kind": "stored", "settings": settings} | meaning)
    elif row["kind"] != "stored" or row["settings"] != settings:
        raise InvalidValue(
            f"{db.path} has a method {method_id!r} with other settings ({row['settings']}); name this one with --method-id"
        )


_NONE = TABLES["scores"].empty_table().select(["sample_id", "candidate_id", "score"])


def _conformed(table: pa.Table, sample_ids: Sequence[str], candidates: pa.Array) -> pa.Table:
    """Scores as they are stored.

    raises: InvalidValue for a missing column, another type, a score that is not finite, or an image that was not asked for
    """
    try:
        rows = pa.table({name: table[name].cast(_NONE.schema.field(name).type) for name in _NONE.column_names})
    except (KeyError, pa.ArrowException) as error:
        raise InvalidValue(f"scores need the columns {', '.join(_NONE.column_names)}: {error}") from error
    finite = pc.fill_null(pc.is_finite(rows["score"]), False)
    if not pc.all(finite).as_py() and len(rows):
        row = rows.filter(pc.invert(finite)).slice(0, 1).to_pylist()[0]
        raise InvalidValue(
            f"score {row['score']} of sample {row['sample_id']!r} and {row['candidate_id']!r}; it must be finite"
        )
    for name, allowed, noun in (
        ("sample_id", pa.array(sample_ids), "a sample that was asked for"),
        ("candidate_id", candidates, "an exemplar or a pretraining image of the database"),
    ):
        unknown = rows[name].filter(pc.invert(pc.is_in(rows[name], allowed)))
        if len(unknown):
            raise InvalidValue(f"scores have the {name} {unknown[0].as_py()!r}, which is not {noun}")
    return rows


def _check_repeats(rows: pa.Table, spec: str) -> None:
    pairs = rows.group_by(["sample_id", "candidate_id"]).aggregate([([], "count_all")])
    if len(pairs) < len(rows):
        row = pairs.filter(pc.greater(pairs["count_all"], 1)).to_pylist()[0]
        raise InvalidValue(
            f"method {spec!r} scores sample {row['sample_id']!r} and {row['candidate_id']!r} more than once"
        )
