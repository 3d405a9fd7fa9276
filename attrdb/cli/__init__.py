"""The command line: each command parses, calls one library function and prints."""

from __future__ import annotations

from pathlib import Path

import click

import attrdb
from attrdb.cli import ingest, models, provenance, query, remove, shell, train, upkeep
from attrdb.cli.common import DB, Commands, ml, quiet_option


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(attrdb.__version__, prog_name="attrdb")
def main() -> None:
    """attrdb says which training images shaped a generated image, and how much.

    Influence scores are estimates, not causal shares.
    """


@click.command(short_help="Make a new, empty database.")
@DB
def init(db: Path) -> None:
    """Make a new, empty database directory."""
    attrdb.create(db)
    click.echo(f"made {db}", err=True)


@click.command(short_help="Build a small database with models, and a page on it.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("demo"))
@quiet_option
def demo(folder: Path, quiet: bool) -> None:
    """Build a database from the bundled icons, customize four models live, attribute their samples, write a page."""
    module = ml("demo")
    from attrdb.cli.output import progress

    with progress(quiet) as advance:
        page = module.build(folder, advance)
    module.tell(folder, page)


main.add_section("Start", demo, init)
main.add_section("Bring in", ingest.ingest, ingest.encode, upkeep.import_, remove.remove)
main.add_section(
    "Ask", query.attribute, query.run_sql, shell.shell, query.run_query, query.queries, query.methods, models.models
)
main.add_section("Learn", train.train, train.score, train.truth, train.calibrate, train.evaluate, train.report)
main.add_section("Test a model", provenance.keys, provenance.answers, provenance.source_test)
main.add_section(
    "Keep",
    upkeep.status,
    upkeep.index,
    upkeep.optimize,
    upkeep.check,
    upkeep.backup,
    upkeep.restore,
    upkeep.export,
    upkeep.upgrade,
)
