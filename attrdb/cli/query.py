"""Commands that ask: attribution, SQL, named queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import (
    DB,
    Id,
    at_option,
    form_options,
    method_option,
    ml,
    print_table,
    queries_option,
    quiet_option,
)
from attrdb.errors import InvalidValue, NotFound
from attrdb.search.memory import use_the_machine


@click.command()
@DB
@click.argument("image", required=False)
@click.option("--samples", metavar="PREDICATE", help="Store the attributions of all samples that fulfil it, see below.")
@click.option("--top", "k", type=click.IntRange(1), default=10, show_default=True, help="How many candidates.")
@method_option
@click.option(
    "--encoder", "encoder_id", type=Id("encoder"), help="Similarity of this encoder; the first when left out."
)
@click.option("--mapper", "mapper_id", type=Id("mapper"), help="Similarity with this mapper.")
@click.option("--tau", type=float, help="Temperature of influence. Default: as calibrated.")
@click.option("--lambda", "lam", type=float, help="Cut-off of influence. Default: as calibrated.")
@click.option("--candidates", metavar="PREDICATE", help="Only candidates that fulfil it, such as \"license = 'CC0'\".")
@click.option("--exact", is_flag=True, help="Compare all candidates, also where there is an index.")
@at_option
@form_options
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
    form: str | None,
    quiet: bool,
) -> None:
    """The candidates that most resemble IMAGE (a stored image_id or an image file), with their influence.

    With --samples instead of IMAGE (such as --samples "split = 'test'", or "true" for all), they are stored in the table
    `attributions` for every sample that fulfils the predicate. Interrupted, the command goes on when it is given again.
    """
    use_the_machine()
    if (image is None) == (samples is None):
        raise click.UsageError("give an IMAGE, or --samples with a predicate")
    if samples is not None:
        if candidates is not None or at is not None:
            raise click.UsageError("--samples stores attributions to all candidates as they are now")
        _attribute_samples(db, samples, quiet, (method, encoder_id, mapper_id), k=k, tau=tau, lam=lam, exact=exact)
        return
    database = attrdb.open(db, read_only=True, at=at)
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
    print_table(found, form)


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
    request = AttributionRequest(method=resolve_method(database.snapshot, *names), **settings)
    with progress(quiet) as advance:
        found = attribute_samples(
            database.writer, samples, request, lambda done, total: advance("attribute", done, total)
        )
    click.echo(f"{found.n_attributed:,} samples attributed, {found.n_stored:,} were already", err=True)


@click.command("sql")
@DB
@click.argument("statement")
@click.option(
    "-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="Value of $NAME, as text; repeatable."
)
@at_option
@form_options
def run_sql(db: Path, statement: str, params: tuple[str, ...], at: str | None, form: str | None) -> None:
    """Run one SELECT over the database's tables and views."""
    use_the_machine()
    print_table(attrdb.open(db, read_only=True, at=at).sql(statement, _given(params)), form)


@click.command("query")
@DB
@click.argument("name")
@click.option("-p", "--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter, repeatable.")
@queries_option
@at_option
@form_options
def run_query(
    db: Path,
    name: str,
    params: tuple[str, ...],
    query_folders: tuple[Path, ...],
    at: str | None,
    form: str | None,
) -> None:
    """Run a named query."""
    use_the_machine()
    database = attrdb.open(db, read_only=True, at=at, query_folders=query_folders)
    print_table(database.query(name, **_given(params)), form)


def _given(params: tuple[str, ...]) -> dict[str, str]:
    for param in params:
        if "=" not in param:
            raise InvalidValue(f"parameter {param!r} is not of the form name=value")
    return dict(param.split("=", 1) for param in params)


@click.group()
def queries() -> None:
    """The named queries."""


@queries.command("list")
@queries_option
@form_options
def list_queries(query_folders: tuple[Path, ...], form: str | None) -> None:
    """Every named query, with its group and what its rows say."""
    import pyarrow as pa

    from attrdb.queries import all_queries

    rows = [
        {
            "name": query.name,
            "group": query.group,
            "parameters": " ".join(f"{one.name}={one.default or '?'}" for one in query.parameters),
            "summary": query.summary,
        }
        for query in all_queries(query_folders).values()
    ]
    print_table(pa.Table.from_pylist(rows), form)


@queries.command("show")
@click.argument("name")
@queries_option
def show_query(name: str, query_folders: tuple[Path, ...]) -> None:
    """The SQL of a named query, with its header."""
    from attrdb.queries import load

    click.echo(load(name, query_folders).sql, nl=False)
