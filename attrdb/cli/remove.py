"""The command that takes images out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

import attrdb
from attrdb.cli.common import DB, quiet_option
from attrdb.errors import InvalidValue

if TYPE_CHECKING:
    from attrdb.upkeep.removal.remove import Removal

MODELS = ("list", "mark", "remove")


@click.command(short_help="Take images out, with all that was computed from them.")
@DB
@click.option("--where", metavar="PREDICATE", help="The images that fulfil an SQL predicate on the columns of images.")
@click.option("--creator", metavar="NAME", help="The images of one creator.")
@click.option(
    "--ids",
    "ids_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The images of a list: an image id, an address (uri) or a sha256 per line.",
)
@click.option("--reason", metavar="TEXT", help="Why; kept in the table removals.")
@click.option(
    "--models",
    type=click.Choice(MODELS),
    default=MODELS[0],
    show_default=True,
    help="What becomes of models that were customized on one of the images: list them, mark them in the table "
    "marked_models, or remove them with their exemplars, samples and weights.",
)
@click.option("--purge", is_flag=True, help="Also delete all older versions and files, which hold the images.")
@click.option(
    "--drop-tags", is_flag=True, help="With --purge: delete tags that keep older versions, instead of refusing."
)
@click.option("--block", is_flag=True, help="Keep sha256 digests of the images, so that no import stores them again.")
@click.option("--dry-run", is_flag=True, help="Say what would be taken out, and take nothing out.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of lines for reading.")
@quiet_option
def remove(
    db: Path,
    where: str | None,
    creator: str | None,
    ids_file: Path | None,
    reason: str | None,
    models: str,
    purge: bool,
    drop_tags: bool,
    block: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Take images out, with their features and every rank, score and attribution that they were part of.

    One of --where, --creator and --ids says which. Interrupted, rerun the command: it resumes. A row in the table removals
    stays.
    """
    from attrdb.cli.output import progress
    from attrdb.upkeep.removal.choose import read_ids

    given = {"--where": where, "--creator": creator, "--ids": ids_file}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        which = " and ".join(named) or "none"
        raise InvalidValue(f"give one of --where, --creator and --ids, which say what is taken out; found {which}")
    if drop_tags and not purge:
        raise InvalidValue("--drop-tags goes with --purge: without it, older versions and their tags stay")
    ids = None if ids_file is None else read_ids(ids_file)
    with progress(quiet) as report:
        removal = attrdb.open(db).remove(
            where=where,
            creator=creator,
            ids=ids,
            reason=reason,
            models=models,
            purge=purge,
            drop_tags=drop_tags,
            block=block,
            dry_run=dry_run,
            report=report,
        )
    if as_json:
        click.echo(json.dumps({"n_images": removal.n_images} | asdict(removal), indent=2))
    else:
        _print(db, removal, purge)


def _print(db: Path, removal: Removal, purge: bool) -> None:
    """The lines of a removal: what went, what it leaves, what is to be computed again."""
    if removal.resumed:
        click.echo("finished a removal that was interrupted")
    roles = ", ".join(f"{n:,} {role}" for role, n in removal.images.items())
    verb = "would take out" if removal.dry_run else "took out"
    n_images = f"{removal.n_images:,} images ({roles})" if removal.n_images else "no image: none is named"
    click.echo(f"{verb} {n_images}, {removal.n_features:,} features")
    if removal.n_not_found:
        shown = ", ".join(removal.not_found) + (", ..." if removal.n_not_found > len(removal.not_found) else "")
        click.echo(f"  {removal.n_not_found:,} lines name no image: {shown}")
    if removal.n_copies:
        shown = ", ".join(removal.copies) + (", ..." if removal.n_copies > len(removal.copies) else "")
        click.echo(
            f"  {removal.n_copies:,} other images have the same bytes and stay: {shown} (--ids takes their sha256)"
        )
    _print_models(removal)
    for table, n_rows in removal.results.items():
        if n_rows:
            click.echo(f"  {n_rows:,} rows of {table}")
    for encoder_id in removal.dropped_indices:
        click.echo(
            f"  the index of {encoder_id} held one of the images; build it again: attrdb index {db} --encoder {encoder_id}"
        )
    for kind, names in removal.fitted.items():
        if names:
            click.echo(f"  {kind} that were fitted with them stay: {', '.join(names)}")
    if removal.n_blocked:
        click.echo(f"  {removal.n_blocked:,} digests of pictures and addresses are blocked")
    again = {
        "exemplar_ranks": "attrdb evaluate",
        "attributions": "attrdb attribute --samples",
        "scores": "attrdb score",
    }
    if commands := [command for table, command in again.items() if removal.results[table] and table != "scores"]:
        click.echo(f"  to be computed again: {', '.join(commands)}")
    if removal.purged:
        click.echo("  older versions and their files are deleted")
    elif removal.n_images and not purge:
        click.echo("  older versions still hold them, until the command is rerun with --purge")


def _print_models(removal: Removal) -> None:
    done = {"list": "stays", "mark": "stays and is marked", "remove": "goes, with its samples and weights"}
    for model in removal.models:
        if model.action is None:
            click.echo(f"  model {model.model_id} loses {model.n_samples:,} samples")
            continue
        uses = [f"{model.n_exemplars:,} of them"] if model.n_exemplars else []
        uses += [f"{model.n_regularization:,} as regularization images"] if model.n_regularization else []
        click.echo(f"  model {model.model_id} was customized on {' and '.join(uses)}: it {done[model.action]}")
    for model_id in removal.unfinished_models:
        click.echo(f"  unfinished model {model_id} uses one of them: its job is given up")
