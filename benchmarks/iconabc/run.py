"""The experiments on IconAbC, from its frozen files: python benchmarks/iconabc/run.py WORK --json FILE

    gallery, exemplars and samples -> WORK/iconabc-DIGEST.attrdb       the digest is of the frozen files
    per encoder, and per control `vae:icon-sd+ENCODER`:
        features                                                       encoded.py
        mappers: settings chosen on validation models, three seeds     tuned.py
        calibration on validation models, ranks of all models          measured.py
    with --json, of all encoders:
        styles among further icons of their sets -> WORK/iconabc-DIGEST-relatives.attrdb
        figures -> FILE, pictures beside it, a page -> WORK/report.html

A step is skipped if its result is stored, so rerunning the command resumes it. All choices are made on validation models
alone. Two processes may work on different encoders at once:

    python benchmarks/iconabc/run.py WORK --encoder vgg-gram &
    python benchmarks/iconabc/run.py WORK --encoder efficientnet-lite0 --encoder icon-moco
    python benchmarks/iconabc/run.py WORK --json FILE                  the rest
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import compared
import measured
from encoded import load_compiled
from frozen import HERE, TABLES, load
from pictures import write_pictures
from render import rendered
from rich.console import Console
from tuned import ABLATIONS, BY_KIND, CHOSEN, PAPER, PAPER_TEMPERATURE, PLAIN, Method, Trial, Tuner

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from attrdb.database import Database, open_or_create
from attrdb.ingest.encode.add_encoder import backfill
from attrdb.pages import report
from attrdb.store.files import write_whole
from attrdb.store.locks import waiting_lock
from attrdb.store.schema import encoder_id_of
from attrdb.upkeep.optimize import optimize

FROZEN = HERE
ENCODERS = ("efficientnet-lite0", "vgg-gram", "icon-clip", "icon-moco", "pixels:8")
ABLATED = "icon-moco"
console = Console(stderr=True)


def digest() -> str:
    """The digest of the frozen files, so that results on other files are not taken for theirs."""
    files = [FROZEN / f"{name}.parquet" for name in TABLES]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


class Run:
    """The experiments in a folder: what is stored there, what it took, and the steps that are left."""

    def __init__(self, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.seconds_file = work, work / "seconds.jsonl"
        path = work / f"iconabc-{digest()}.attrdb"
        counts_file = path.with_suffix(".json")
        with waiting_lock(work / ".load.lock", exclusive=True):  # another process may have begun, too
            with self.step("render"):
                self.icons = rendered(work)
            self.db = open_or_create(path)
            if not counts_file.exists():
                with self.step("load"):
                    counts = load(self.db, self.icons, FROZEN)
                    optimize(self.db.writer)  # of one fragment, an epoch takes half the time
                write_whole(counts_file, lambda part: part.write_text(json.dumps(counts)))
        self.counts = json.loads(counts_file.read_text())
        self.db.refresh()
        self.tuners: dict[str, Tuner] = {}
        self.chosen: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str, subject: str = "") -> Iterator[None]:
        """Show a step, and record its seconds once it has ended."""
        started = time.monotonic()
        with console.status(f"{name} {subject}"):
            yield
        seconds = time.monotonic() - started
        with self.seconds_file.open("a") as file:
            file.write(json.dumps({"step": name, "subject": subject, "seconds": round(seconds, 2)}) + "\n")

    def seconds(self) -> dict[str, float]:
        """By step, of all processes."""
        total: dict[str, float] = defaultdict(float)
        for line in self.seconds_file.read_text().splitlines():
            row = json.loads(line)
            total[row["step"]] += row["seconds"]
        return {name: round(value, 1) for name, value in total.items()}

    def encode(self, db: Database, spec: str) -> None:
        """Give every image that lacks it a feature of the encoder."""
        column = encoder_id_of(spec)
        if column in db.encoders and not db.snapshot.count(f"`{column}` IS NULL"):
            return
        with self.step("encode", spec):
            backfill(db, load_compiled(spec, self.work, console.log))
        db.refresh()

    def part(self, spec: str) -> list[Method]:
        """An encoder and its control: features, mappers, calibrations and ranks; their methods."""
        control = compared.CONTROL + spec
        for each in (spec, control):
            self.encode(self.db, each)
        with self.step("train", spec):
            methods = self.tuned(spec, control)
        for method in compared.main_methods(methods):
            first = method.method_ids[0]
            with self.step("calibrate", first):
                measured.fit(self.db, first)
            with self.step("hold out", first):
                measured.hold_out(self.db, first, measured.held_out_file(self.work, first))
        for method in methods:
            self.rank(self.db, method)
        return methods

    def tuned(self, spec: str, control: str) -> list[Method]:
        """The methods of an encoder and of its control, which takes the settings that were chosen for the encoder."""
        self.tuners[spec] = tuner = Tuner(self.db, spec, encoder_id_of(spec), console.log)
        self.tuners[control] = of_control = Tuner(self.db, control, encoder_id_of(control), console.log)
        point = tuner.choose()
        self.chosen.append({"encoder": spec, "temperature": point[0], "lr": point[1]})
        methods = [Method(each.spec, PLAIN, (each.encoder_id,)) for each in (tuner, of_control)]
        methods += [tuner.method(CHOSEN, point), of_control.method(CHOSEN, point)]
        methods += [tuner.method(variant, point, **changes) for variant, changes in BY_KIND.items()]
        if spec == ABLATED:
            methods += [tuner.method(variant, point, **changes) for variant, changes in ABLATIONS.items()]
            if point[0] != PAPER_TEMPERATURE and (paper := tuner.method(CHOSEN, tuner.paper_point())):
                methods.append(replace(paper, variant=PAPER))
        return [method for method in methods if method]

    def rank(self, db: Database, method: Method) -> None:
        for method_id in method.method_ids:
            with self.step("rank", method_id):
                measured.rank(db, method_id)

    def relatives(self, methods: Sequence[Method]) -> Database:
        """The copy with further icons of the styles' sets, encoded and ranked by encoders and their chosen mappers."""
        method_ids = [method_id for method in methods for method_id in method.method_ids]
        with self.step("load relatives"):
            copy = measured.with_relatives(self.db, method_ids, self.icons, FROZEN)
        for spec in dict.fromkeys(method.encoder for method in methods):
            self.encode(copy, spec)
        for method in methods:
            self.rank(copy, method)
        return copy

    def trials(self) -> list[Trial]:
        return [trial for tuner in self.tuners.values() for trial in tuner.trials.values()]

    def figures(self, methods: Sequence[Method]) -> dict[str, Any]:
        """What FILE holds."""
        main = compared.main_methods(methods)
        stored = [method for method in main if not method.encoder.startswith(compared.CONTROL)]
        related = self.relatives(stored)
        with self.step("compare"):
            values = compared.read_values(self.db)
            found = {
                "cases": compared.cases(values, main),
                "comparisons": compared.comparisons(values, methods),
                "general": compared.general(self.db, main),
                "relatives": compared.relatives(compared.read_values(related), values, stored),
                "best": {
                    kind: asdict(compared.best_on_validation(values, stored, kind)) for kind in ("object", "style")
                },
            }
        shown = [method.method_ids[0] for method in stored]
        page = report.figures(self.db, measured.GALLERY, shown)
        (self.work / "report.html").write_text(report.render(self.db, page), encoding="utf-8")
        return {
            "machine": describe("torch", "lancedb", "duckdb"),
            "counts": self.counts,
            "models": page["models"],
            "images": page["images"],
            "methods": [asdict(method) for method in methods],
            "chosen": self.chosen,
            "trials": [asdict(trial) for trial in self.trials()],
            **found,
            "places": measured.PLACES,
            "calibrations": calibration_rows(self.db, self.work, main),
            "plots": {name: page[name] for name in ("curves", "gains", "general", "calibrations")},
            "seconds": self.seconds(),
        }


def calibration_rows(db: Database, work: Path, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One row per method and kind: the fit, what it is worth on halves of the validation models, and on test models."""
    stored = {
        (row["method_id"], row["kind"]): row
        for row in db.sql("SELECT * FROM calibrations WHERE kind IS NOT NULL").to_pylist()
    }
    rows = []
    for method in methods:
        [method_id, *_] = method.method_ids
        tests = json.loads(measured.held_out_file(work, method_id).read_text())
        for kind in sorted({row["kind"] for row in tests}):
            fit = stored[method_id, kind]
            row = {"encoder": method.encoder, "variant": method.variant, "kind": kind}
            row |= {name: fit[name] for name in ("tau", "lam", "unattributed", "kl", "kl_before", "n_samples")}
            row["validation"] = measured.worth(json.loads(fit["reliability"])["held_out"])
            row["tests"] = [
                {name: test[name] for name in ("split", "kl", "reliability", "sorted_before", "sorted")}
                | measured.worth(test["reliability"])
                for test in tests
                if test["kind"] == kind
            ]
            rows.append(row)
    return rows


def write(results: dict[str, Any], out: Path) -> None:
    """One line per key, so that a change of one figure is a change of one line."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda part: part.write_text("{\n" + ",\n".join(lines) + "\n}\n"))


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--encoder", "specs", multiple=True, default=ENCODERS, show_default=True, help="Repeatable.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write figures of these encoders.")
def main(work: Path, specs: tuple[str, ...], out: Path | None) -> None:
    """Run the experiments; stored results are kept."""
    run = Run(work)
    methods = []
    for spec in specs:
        methods += run.part(spec)
        console.log(f"{spec}: done")
    if out:
        results = run.figures(methods)
        write(results, out)
        for kind, best in results["best"].items():
            write_pictures(run.db, best["method_ids"][0], kind, out.with_name(f"attributed-{kind}.webp"))
        console.log(f"wrote {out} and {work / 'report.html'}")


if __name__ == "__main__":
    main()
