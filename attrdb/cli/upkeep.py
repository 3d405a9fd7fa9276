"""Commands that keep a database: status, upkeep, checks, upgrades, exports."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import DB, asked_encoder_option, at_option, device_option, quiet_option, stored_encoder_id
from attrdb.cli.rows import Output, output_options
from attrdb.errors import AttrdbError
from attrdb.search.memory import use_the_machine
from attrdb.text import size_text, visible

EXACT = {
    "none": "searched exactly (attrdb index makes large galleries quicker)",
    "dropped": "searched exactly, its index is gone: attrdb index builds it again",
    "unknown": "searched exactly, its index is not attrdb's: attrdb index puts one in its place",
}
BEHIND = {
    "behind": "; many rows came later: attrdb optimize",
    "outgrown": "; outgrown: build it again with attrdb index",
}


@click.command(short_help="Show what is stored, what is open, and what to do next.")
@DB
@at_option
@click.option("--json", "as_json", is_flag=True, help="JSON instead of lines for reading.")
def status(db: Path, at: str | None, as_json: bool) -> None:
    """What the database holds, how complete it is, and what waits for `optimize`."""
    found = attrdb.open(db, read_only=True, at=at).status()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{found['path']}: {found['n_images']:,} images, version {found['version']}, {_size(found['bytes'])}")
    for what in ("images_by_role", "models_by_kind"):
        counts = ", ".join(f"{n:,} {name}" for name, n in found[what].items()) or "none"
        click.echo(f"  {what.replace('_', ' ')}: {counts}")
    for name, encoder in found["encoders"].items():
        left = f", {encoder['n_to_encode']:,} to encode" if encoder["n_to_encode"] else ""
        done = f"{encoder['n_encoded']:,} of {found['n_images']:,} encoded{left}"
        click.echo(f"  encoder {name}: {encoder['dimension']}-d, {done}; {_searched(encoder['index'])}")
    for mapper in found["mappers"]:
        click.echo(
            f"  mapper {mapper['mapper_id']}: {mapper['form']}, on {mapper['encoder_id']}, of {mapper['trained_on']}; "
            f"{_searched_with(mapper)}"
        )
    for one in found["calibrations"]:
        of = f"mapper {one['mapper_id']}" if one["mapper_id"] else f"method {one['method_id']}"
        samples = f", samples of {one['kind']} models" if one["kind"] else ""
        fitted = (
            f"tau {one['tau']:.4g}, lambda {one['lam']:.4g}, {one['unattributed'] or 0:.2g} unattributed; fitted among "
            f"{one['gallery_size']:,} pretraining images"
        )
        click.echo(f"  influence by {of}{samples}: {fitted}")
    for one in found["fitted_before_removals"]:
        click.echo(f"  {one['kind']} {one['id']} was fitted on images that were taken out since ({one['n_images']:,})")
    _print_upkeep(found, "  ")
    for one in found["unfinished_removals"]:
        click.echo(f"  removal {one['removal_id']} is unfinished ({one['state']}); rerun its command")
    for model_id in found["unfinished_models"]:
        click.echo(f"  model {model_id} is unfinished and not shown; give its ingest command again")
    for one in found["in_progress"]:
        how_far = f"{one['stage']} {one['done']:,} of {one['total']:,}" if one["total"] else one["stage"]
        said = f"by process {one['pid']} on {one['host']}, {one['silent_seconds']:.0f} s ago"
        click.echo(f"  model {one['model_id']} is being made: {how_far}, {said}")
    for job in found["open_jobs"]:
        done = f"{job['n_done'] or 0:,} done, {job['n_failed'] or 0:,} failed"
        click.echo(
            f"  job {job['job_id']}: {job['state']}, {done}{': ' + visible(job['message']) if job['message'] else ''}"
        )


def _searched(index: dict[str, Any]) -> str:
    """How an encoder's features are searched, in words."""
    state = index["state"]
    if state in EXACT:
        return EXACT[state]
    said = f"recall@10 {index['recall']:.3f} on {index['n_queries']} {index['queries']}"
    partitions = f"{index['n_probes']:,} of {index['n_partitions']:,} partitions"
    return f"searched by index, {said}, {partitions}{BEHIND.get(state, '')}"


def _searched_with(mapper: dict[str, Any]) -> str:
    """How features are searched with a mapper, in words."""
    if mapper["recall"] is None:
        return "searched exactly"
    if not mapper["by_index"]:
        return f"searched exactly, its index finds {mapper['recall']:.2f} of the exact first 10"
    return f"searched by index, recall@10 {mapper['recall']:.3f}"


def _print_upkeep(found: dict[str, Any], indent: str) -> None:
    for name, table in found["tables"].items():
        files = f"{table['fragments']:,} fragments, {table['versions_kept']:,} versions, {_size(table['bytes'])}"
        click.echo(f"{indent}table {name}: {table['rows']:,} rows, {files}")
    for index in found["indices"]:
        parts = f"{index['segments']} segments, {index['n_unindexed']:,} rows not indexed"
        click.echo(f"{indent}index on {index['column']} ({index['type']}): {parts}")


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


@click.command(short_help="Index new rows; merge small files and index segments.")
@DB
@click.option(
    "--drop-older-than",
    type=click.IntRange(0, 36_500),
    metavar="DAYS",
    help="Also delete versions older than this and free their disk space; --at cannot read them any more.",
)
@quiet_option
def optimize(db: Path, drop_older_than: int | None, quiet: bool) -> None:
    """Index new rows, merge index segments and small fragments, then check the indices."""
    from attrdb.cli.output import progress
    from attrdb.upkeep import optimize

    age = None if drop_older_than is None else timedelta(days=drop_older_than)
    with progress(quiet) as advance:
        result = optimize.optimize(attrdb.open(db).writer, age, advance)
    for when, state in (("before", result.before), ("after", result.after)):
        click.echo(f"{when}: {_size(state['bytes'])}")
        _print_upkeep(state, "  ")
    if drop_older_than is None and result.after["bytes"] > result.before["bytes"]:
        click.echo(
            "it has grown, because older versions keep the files that were merged; --drop-older-than DAYS deletes "
            "versions of that age, 0 all but the newest",
            err=True,
        )


@click.command(short_help="Build an index, which makes large galleries quick to search.")
@DB
@asked_encoder_option
@device_option
@quiet_option
def index(db: Path, encoder_id: str | None, device: str, quiet: bool) -> None:
    """Build the index of an encoder's features, and measure its recall against an exact search.

    Searches look into it from then on, those with a mapper if enough is found through it; images that come later are found
    too, and are taken into it by `optimize`.
    """
    from attrdb.cli.output import progress
    from attrdb.search import exact as exact_search
    from attrdb.search import index_build

    use_the_machine()
    device, database = exact_search.accelerator(device), attrdb.open(db)
    what = index_build.plan(database.snapshot, stored_encoder_id(database, encoder_id))
    click.echo(
        f"{what.kind} of some {what.n_rows:,} features of {what.encoder_id}, {what.dimension}-d: {what.n_partitions:,} "
        f"partitions, on {device}; at most {size_text(what.memory)} of memory and {size_text(what.disk)} of disk",
        err=True,
    )
    with progress(quiet) as advance:
        row = index_build.build(database.writer, what.encoder_id, device, advance)
    asked = f"probing {row['n_probes']:,} of {row['n_partitions']:,} partitions, {row['oversampling']} hits per answer"
    measured = f"recall@10 {row['recall']:.3f} on {row['n_queries']} {row['queries']}"
    click.echo(f"built in {row['seconds']:.1f} s; {measured}, {asked}", err=True)
    database.refresh()
    mappers = (
        "SELECT mapper_id, used AS by_index, recall FROM mapper_searches WHERE encoder_id = $id ORDER BY mapper_id"
    )
    for mapper in database.sql(mappers, {"id": what.encoder_id}).to_pylist():
        click.echo(f"mapper {mapper['mapper_id']}: {_searched_with(mapper)}", err=True)


@click.command(short_help="Read every file and test every row and index.")
@DB
@click.option("--deep", is_flag=True, help="Also compare every file with its checksum: any changed byte is found.")
@click.option("--record", is_flag=True, help="Record the checksums of files that have none yet, before the check.")
@output_options
@quiet_option
def check(db: Path, deep: bool, record: bool, output: Output, quiet: bool) -> None:
    """Read every file, run every query of the group `checks`, and test the indices; exit 1 if anything is wrong.

    With --format or --output there is one row per wrong row: check, meaning, and the row as JSON text.
    """
    from attrdb.cli.output import print_table, progress
    from attrdb.store import checksums
    from attrdb.upkeep import health

    snapshot = attrdb.open(db, read_only=True).snapshot
    with progress(quiet) as advance:
        if record:
            click.echo(f"{checksums.record(db, snapshot.tables, advance):,} checksums recorded", err=True)
        findings = health.check(snapshot, advance, deep)
    if deep and not findings and (unknown := checksums.unrecorded(db, snapshot.tables)):
        click.echo(
            f"{len(unknown):,} files have no checksum yet, such as {unknown[0]}; record them: attrdb check {db} --record",
            err=True,
        )
    if output != Output():
        output.write(_wrong_rows(findings))
    for finding in findings if output == Output() else ():
        click.echo(f"{finding.check}: {finding.meaning}")
        print_table(finding.rows)
    if findings:
        raise AttrdbError(f"{sum(len(one.rows) for one in findings)} rows in {len(findings)} checks are wrong")
    click.echo(f"{db}: nothing found", err=True)


def _wrong_rows(findings: list[Any]) -> Any:
    import pyarrow as pa

    from attrdb.formats.text import rows

    found = [
        {"check": finding.check, "meaning": finding.meaning, "row": json.dumps(row)}
        for finding in findings
        for row in rows(finding.rows)
    ]
    return pa.Table.from_pylist(found, pa.schema([(name, pa.string()) for name in ("check", "meaning", "row")]))


@click.command(short_help="Bring an older database to the current schema version.")
@DB
def upgrade(db: Path) -> None:
    """Bring a database that an older attrdb made to this one's schema version."""
    from attrdb.store import upgrades

    before, after = upgrades.upgrade(db)
    click.echo(f"{db}: schema version {before}, now {after}" if before != after else f"{db}: nothing to do", err=True)


@click.command(short_help="Write all tables as Parquet files, or one DuckDB file.")
@DB
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--duckdb", "form", flag_value="duckdb", type=str, help="One DuckDB file instead of a folder of Parquet files."
)
@click.option("--no-vectors", is_flag=True, help="Leave the features out.")
@click.option("--no-images", is_flag=True, help="Leave the encoded images out.")
@at_option
@quiet_option
def export(
    db: Path, target: Path, form: str | None, no_vectors: bool, no_images: bool, at: str | None, quiet: bool
) -> None:
    """Write every table to TARGET, for people without attrdb: Parquet files in a new folder, or one DuckDB file."""
    from attrdb.cli.output import progress
    from attrdb.sql import export as exporting

    with progress(quiet) as advance:
        counts = exporting.export(
            attrdb.open(db, read_only=True, at=at).snapshot,
            target,
            form=form or "parquet",
            vectors=not no_vectors,
            images=not no_images,
            report=advance,
        )
    click.echo(f"{target}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()), err=True)


@click.command("import", short_help="Make a database of an export.")
@DB
@click.argument("source", metavar="EXPORT", type=click.Path(path_type=Path))
@quiet_option
def import_(db: Path, source: Path, quiet: bool) -> None:
    """Make the new database DB of EXPORT, a folder of Parquet files that `attrdb export` wrote, equal in every row.

    Indices and the weights of models are not in an export; `attrdb backup` copies them too.
    """
    from attrdb.cli.output import progress
    from attrdb.upkeep.import_export import import_export

    with progress(quiet) as report:
        counts = import_export(source, db, report)
    click.echo(f"{db}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items() if n), err=True)
    click.echo(f"no index is in an export; build it again with: attrdb index {db}", err=True)


@click.command(short_help="Copy a database, as it is now, while others use it.")
@DB
@click.argument("target", type=click.Path(path_type=Path))
@quiet_option
def backup(db: Path, target: Path, quiet: bool) -> None:
    """Copy the database to the new directory TARGET, with a sha256 of every file; `attrdb restore` brings it back.

    It holds the newest version of every table and the weights of all models, not older versions or half-done jobs.
    """
    from attrdb.cli.output import progress
    from attrdb.upkeep import backup as backing_up

    with progress(quiet) as report:
        done = backing_up.backup(db, target, report)
    said = f"{done.n_files:,} files, {_size(done.n_bytes)}, version {done.images_version} of images"
    click.echo(f"{target}: {said}", err=True)


@click.command(short_help="Make a database of a backup, after checking every file.")
@click.argument("backup", type=click.Path(path_type=Path))
@DB
@quiet_option
def restore(backup: Path, db: Path, quiet: bool) -> None:
    """Make the new database DB of a BACKUP. If one of its files is damaged, that is named and nothing is restored."""
    from attrdb.cli.output import progress
    from attrdb.upkeep import backup as backing_up

    with progress(quiet) as report:
        done = backing_up.restore(backup, db, report)
    said = f"{done.n_files:,} files, {_size(done.n_bytes)}, version {done.images_version} of images"
    click.echo(f"{db}: {said}", err=True)
