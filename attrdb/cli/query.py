"""Commands that ask: attribution, SQL, named queries."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import (
    DB,
    Id,
    asked_encoder_option,
    at_option,
    method_option,
    ml,
    queries_option,
    quiet_option,
    renamed,
    stored_encoder_id,
    with_option,
)
from attrdb.cli.limits import limit_options, rows_option
from attrdb.cli.rows import Output, output_options
from attrdb.errors import AttrdbError, InvalidValue, NotFound
from attrdb.search.memory import use_the_machine
from attrdb.text import decode


@click.command(short_help="Find the images that shaped an image, with their influence.")
@DB
@click.argument("image", required=False)
@click.option(
    "--samples", metavar="PREDICATE", help="Store the attributions of all samples that fulfil PREDICATE, see above."
)
@click.option(
    "-k", "--k", "k", type=click.IntRange(1), default=10, show_default=True, help="Number of candidates per image."
)
@renamed("--top", "-k", "k")
@method_option
@asked_encoder_option
@click.option("--mapper", "mapper_id", type=Id("mapper"), help="Similarity with this mapper, in the place of a method.")
@click.option("--tau", type=float, help="Temperature of influence. Default: as calibrated.")
@click.option("--lambda", "lam", type=float, help="Cut-off of influence. Default: as calibrated.")
@click.option(
    "--candidates",
    metavar="PREDICATE",
    help="Search only candidates that fulfil PREDICATE, such as \"license = 'CC0'\".",
)
@click.option("--exact", is_flag=True, help="Compare every candidate, even if there is an index.")
@at_option
@output_options
@quiet_option
def attribute(
    db: Path,
    image: str | None,
    samples: str | None,
    k: int,
    method: str | None,
    encoder_id: str | None,
    mapper_id: str | None,
    tau: float | None,
    lam: float | None,
    candidates: str | None,
    exact: bool,
    at: str | None,
    output: Output,
    quiet: bool,
) -> None:
    """The candidates that most resemble IMAGE (a stored image_id or an image file), with their influence.

    With --samples instead of IMAGE (such as --samples "split = 'test'", or "true" for all), they are stored in the table
    `attributions` for every sample that fulfils the predicate. Rerunning an interrupted command resumes it.
    """
    use_the_machine()
    if samples is not None and image is None:
        if output != Output():
            raise click.UsageError("--samples stores its rows and prints none; leave --format and --output out")
        if candidates is not None or at is not None:
            raise click.UsageError("--samples stores attributions to all candidates as they are now")
        _attribute_samples(db, samples, quiet, (method, encoder_id, mapper_id), k=k, tau=tau, lam=lam, exact=exact)
        return
    if image is None or samples is not None:
        raise click.UsageError("give an IMAGE, or --samples with a predicate")
    database = attrdb.open(db, read_only=True, at=at)
    encoder_id = stored_encoder_id(database, encoder_id)
    query: Any = image
    if not database.snapshot.stored([image]):
        if not Path(image).is_file():
            raise NotFound(f"{image!r} is neither an image_id of {db} nor an image file")
        query = _encoded_file(database, Path(image), method, encoder_id, mapper_id)
    found = database.attribute(
        query,
        k=k,
        method=method,
        encoder_id=encoder_id,
        mapper_id=mapper_id,
        tau=tau,
        lam=lam,
        candidates=candidates,
        exact=exact,
    )
    output.write(found)


def _encoded_file(database: Any, image: Path, method: str | None, encoder_id: str | None, mapper_id: str | None) -> Any:
    """The feature of an image file, by the encoder of a method that is similarity."""
    from attrdb.attribution.methods import method_rows, resolve_method

    method_id = resolve_method(database.snapshot, method, encoder_id, mapper_id)
    encoder_id = method_rows(database.snapshot)[method_id]["encoder_id"]
    if encoder_id is None:
        raise InvalidValue(f"method {method_id!r} has scores of stored samples only; give the image_id of a sample")
    return ml("ingest.encode").encode_file(database, image, encoder_id)


def _attribute_samples(
    db: Path, samples: str, quiet: bool, names: tuple[str | None, str | None, str | None], **settings: Any
) -> None:
    from attrdb.attribution.batch import attribute_samples
    from attrdb.attribution.methods import resolve_method
    from attrdb.attribution.query import AttributionRequest
    from attrdb.cli.output import progress

    database = attrdb.open(db)
    method, encoder, mapper = names
    by = resolve_method(database.snapshot, method, stored_encoder_id(database, encoder), mapper)
    request = AttributionRequest(method=by, **settings)
    with progress(quiet) as advance:
        found = attribute_samples(database.writer, samples, request, advance)
    click.echo(f"{found.n_done:,} samples attributed, {found.n_stored:,} were already", err=True)


@click.command(short_help="List the attribution methods.")
@DB
@at_option
@output_options
def methods(db: Path, at: str | None, output: Output) -> None:
    """List the attribution methods that --method takes, with what their scores mean.

    Every encoder and every mapper is one (kind similarity); others are stored by `attrdb score`. tau, lam and unattributed
    are those that influence has now; `SELECT * FROM calibrations` has them by kind of models.
    """
    import pyarrow as pa

    from attrdb.attribution.influence import Calibrated
    from attrdb.attribution.methods import calibration, is_calibrated, method_rows

    columns = [(name, pa.string()) for name in ("method_id", "kind", "encoder_id", "mapper_id", "unit")]
    columns += [(name, pa.float64()) for name in Calibrated._fields] + [("calibrated", pa.bool_())]
    snapshot = attrdb.open(db, read_only=True, at=at).snapshot
    rows = []
    for method_id, row in method_rows(snapshot).items():
        now = calibration(snapshot, method_id)._asdict()
        rows.append(row | now | {"calibrated": is_calibrated(snapshot, method_id)})
    output.write(pa.Table.from_pylist(rows, pa.schema(columns)))


@click.command("sql", short_help="Run one SELECT over the tables and views.")
@DB
@click.argument("statement", required=False)
@click.option(
    "--file",
    "statement_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read the statement from FILE, in the place of STATEMENT.",
)
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="Value of $NAME, as text; repeatable."
)
@with_option
@at_option
@rows_option
@limit_options
@output_options
def run_sql(
    db: Path,
    statement: str | None,
    statement_file: Path | None,
    params: tuple[str, ...],
    relations: dict[str, Path],
    at: str | None,
    rows: int | None,
    limits: Any,
    output: Output,
) -> None:
    """Run one SELECT over the database's tables and views. STATEMENT may be - for standard input.

    PIVOT, DESCRIBE, SUMMARIZE and EXPLAIN of a SELECT work too.
    A table of your own joins in with --with contracts=contracts.csv: it is loaded before the statement runs.
    """
    from attrdb.queries import parameters_of

    use_the_machine()
    if (statement is None) == (statement_file is None):
        raise click.UsageError("give a STATEMENT (- for standard input), or --file with a file that holds one")
    if statement is None or statement == "-":
        statement = _read_statement(statement_file)
    database = attrdb.open(db, read_only=True, at=at)
    _write_rows(database, statement, parameters_of(params), relations, rows, limits, output)


def _read_statement(file: Path | None) -> str:
    """The text of a file, or of standard input for None and -."""
    name = "standard input" if file is None or str(file) == "-" else str(file)
    encoded = sys.stdin.buffer.read() if name == "standard input" else Path(name).read_bytes()
    return decode(encoded, name)


def _write_rows(
    database: Any,
    statement: str,
    parameters: dict[str, Any],
    relations: dict[str, Path],
    rows: int | None,
    limits: Any,
    output: Output,
) -> None:
    """Write the result of a statement: on a screen the first rows, elsewhere all, unless a number is given."""
    from attrdb.shell.session import ROWS_ON_SCREEN

    if rows is None and output == Output() and sys.stdout.isatty():
        rows = ROWS_ON_SCREEN
    table = database.sql(
        statement,
        parameters,
        relations,
        timeout=limits.seconds,
        memory=limits.memory,
        rows=None if rows is None else rows + 1,
    )
    output.write(table if rows is None else table.slice(0, rows))
    if rows is not None and len(table) > rows:
        click.echo(f"the first {rows:,} rows; --rows N writes more, --output FILE all of them", err=True)


def complete_query(context: click.Context, parameter: click.Parameter, typed: str) -> list[str]:
    """The names of queries that begin as typed, for the completion of a shell."""
    from attrdb.queries import all_queries

    try:
        names = all_queries(context.params.get("query_folders") or ())
    except AttrdbError:  # the command itself says what is wrong
        return []
    return [name for name in names if name.startswith(typed)]


@click.command("query", short_help="Run a named query.")
@DB
@click.argument("name", shell_complete=complete_query)
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the query; repeatable."
)
@queries_option
@with_option
@at_option
@rows_option
@limit_options
@output_options
def run_query(
    db: Path,
    name: str,
    params: tuple[str, ...],
    query_folders: tuple[Path, ...],
    relations: dict[str, Path],
    at: str | None,
    rows: int | None,
    limits: Any,
    output: Output,
) -> None:
    """Run a named query."""
    from attrdb.queries import parameters_of

    use_the_machine()
    database = attrdb.open(db, read_only=True, at=at, query_folders=query_folders)
    statement, parameters = database.bound_query(name, **parameters_of(params))
    _write_rows(database, statement, parameters, relations, rows, limits, output)


@click.group(short_help="List the named queries, or show the SQL of one.")
def queries() -> None:
    """The named queries."""


@queries.command("list", short_help="List every named query with its parameters.")
@queries_option
@output_options
def list_queries(query_folders: tuple[Path, ...], output: Output) -> None:
    """List every named query by group, with its parameters and what its rows say.

    A parameter with `?` has no default. encoder_id can always be left out: the database's first encoder takes its place.
    """
    import pyarrow as pa

    from attrdb.formats.listing import query_listing
    from attrdb.queries import all_queries

    found = list(all_queries(query_folders).values())
    rows = [
        {"name": query.name, "group": query.group, "parameters": query.usage, "summary": query.summary}
        for query in found
    ]
    output.write_laid_out(query_listing(found), pa.Table.from_pylist(rows))


@queries.command("show", short_help="Show the SQL of a named query.")
@click.argument("name", shell_complete=complete_query)
@queries_option
def show_query(name: str, query_folders: tuple[Path, ...]) -> None:
    """The SQL of a named query, with its header."""
    from attrdb.queries import load

    click.echo(load(name, query_folders).sql, nl=False)
