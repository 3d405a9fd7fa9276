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
    """The lines of a removal: what went, what stays, what is to be computed again."""
    if removal.resumed:
        click.echo("finished this removal, which had been interrupted")
    if removal.n_images:
        roles = ", ".join(f"{n:,} {role}" for role, n in removal.images.items())
        verb = "would take out" if removal.dry_run else "took out"
        click.echo(f"{verb} {_n(removal.n_images, 'image')} ({roles}), {_n(removal.n_features, 'feature')}")
    else:
        click.echo("nothing to take out: no image is named")
    if removal.n_not_found:
        verb = "names" if removal.n_not_found == 1 else "name"
        click.echo(
            f"  {_n(removal.n_not_found, 'line')} {verb} no image: {_some(removal.not_found, removal.n_not_found)}"
        )
    if removal.n_copies:
        shown = _some(removal.copies, removal.n_copies)
        click.echo(f"  {_n(removal.n_copies, 'other image')} with the same bytes not taken out: {shown}")
    _print_models(removal)
    for table, n_rows in removal.results.items():
        if n_rows:
            click.echo(f"  {_n(n_rows, 'row')} of {table}")
    for encoder_id in removal.dropped_indices:
        click.echo(f"  the index of {encoder_id}; build it again: attrdb index {db} --encoder {encoder_id}")
    for kind, names in removal.fitted.items():
        if names:
            click.echo(f"  {kind} stay, which were fitted with them: {', '.join(names)}")
    if removal.n_blocked:
        click.echo(f"  {_n(removal.n_blocked, 'digest')} of pictures and addresses blocked")
    again = {"exemplar_ranks": "attrdb evaluate", "attributions": "attrdb attribute --samples"}
    if commands := [command for table, command in again.items() if removal.results[table]]:
        click.echo(f"  to compute results again: {', '.join(commands)}")
    if removal.purged:
        click.echo("  older versions and their files deleted")
    elif removal.n_images and not purge and not removal.dry_run:
        click.echo("  older versions still hold them; rerun the command with --purge to delete those")


def _print_models(removal: Removal) -> None:
    action = {"list": "it stays", "mark": "it stays and is marked", "remove": "it goes, with its samples and weights"}
    for model in removal.models:
        if model.action is None:
            click.echo(f"  {_n(model.n_samples, 'sample')} of model {model.model_id}")
            continue
        counts = ((model.n_exemplars, "exemplar"), (model.n_regularization, "regularization image"))
        uses = " and ".join(_n(n, noun) for n, noun in counts if n)
        click.echo(f"  model {model.model_id} was customized on {uses} of these: {action[model.action]}")
    for model_id in removal.unfinished_models:
        click.echo(f"  the half-done job of model {model_id}, which uses them")


def _n(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _some(names: list[str], n: int) -> str:
    return ", ".join(names) + (", ..." if n > len(names) else "")
