"""The command line: each command parses, calls one library function and prints."""

from __future__ import annotations

from pathlib import Path

import click

import attrdb
from attrdb.cli import ingest, models, query, train, upkeep
from attrdb.cli.common import DB, Commands, ml, quiet_option


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(attrdb.__version__, prog_name="attrdb")
def main() -> None:
    """attrdb says which training images shaped a generated image, and how much.

    Influence scores are estimates, not causal shares.
    """


@main.command()
@DB
def init(db: Path) -> None:
    """Make a new, empty database directory."""
    attrdb.create(db)
    click.echo(f"made {db}", err=True)


main.add_command(ingest.ingest)
main.add_command(ingest.encode)
main.add_command(upkeep.index)
main.add_command(query.attribute)
main.add_command(train.train)
main.add_command(train.calibrate)
main.add_command(train.evaluate)
main.add_command(train.report)


for command in (
    query.run_sql,
    query.run_query,
    query.queries,
    models.models,
    upkeep.status,
    upkeep.optimize,
    upkeep.check,
    upkeep.upgrade,
    upkeep.export,
):
    main.add_command(command)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo"))
@quiet_option
def demo(folder: Path, quiet: bool) -> None:
    """Build a database from the bundled icons, customize four models live, attribute their samples, write a page."""
    module = ml("demo")
    from attrdb.cli.output import progress

    with progress(quiet) as advance:
        page = module.build(folder, advance)
    module.tell(folder, page)
