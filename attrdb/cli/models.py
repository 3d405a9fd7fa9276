"""Commands that look at customized models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import attrdb
from attrdb.cli.common import DB, Id, at_option, ml, quiet_option
from attrdb.cli.rows import Output, output_options
from attrdb.errors import InvalidValue


@click.group(short_help="List the customized models, show one, change their split.")
def models() -> None:
    """The customized models: list them, look at one, change their split or category."""


@models.command("list", short_help="List every customized model.")
@DB
@at_option
@output_options
def list_models(db: Path, at: str | None, output: Output) -> None:
    """List every customized model of the database, one row each."""
    from attrdb.models import list_models

    output.write(list_models(attrdb.open(db, read_only=True, at=at)))


@models.command("set", short_help="Change the split or category of models.")
@DB
@click.argument("model_ids", metavar="ID...", nargs=-1, required=True, type=Id("model"))
@click.option("--split", help="Their split from now on: train and val are learned from, others are not.")
@click.option("--category", help="What their exemplars show, or their style.")
def set_labels(db: Path, model_ids: tuple[str, ...], split: str | None, category: str | None) -> None:
    """Give the models ID... another split or category, with their exemplars and samples.

    `attrdb train` learns from split train and is stopped by split val, so some models need val. Weights and samples stay as
    they are; so do mappers, which are named if they were trained on a split that changes.
    """
    from attrdb.models import set_models

    changed = set_models(attrdb.open(db), model_ids, split=split, category=category)
    click.echo(f"{changed.n_models:,} models changed, with {changed.n_images:,} images", err=True)
    if changed.fitted:
        click.echo(
            f"trained on a split as it was before: {', '.join(changed.fitted)}; a figure for a model that was trained on "
            "says little, so train anew before you evaluate",
            err=True,
        )


@models.command("show", short_help="Show settings, figures, exemplars and prompts of a model.")
@DB
@click.argument("model_id", metavar="ID", type=Id("model"))
@at_option
@click.option("--json", "as_json", is_flag=True, help="JSON instead of lines for reading.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a page with its pictures and its loss curve, in one file.",
)
@click.option(
    "--regenerate",
    "n_regenerated",
    type=click.IntRange(1),
    metavar="N",
    help="Make N of its samples again from the stored weights, and compare.",
)
@click.option("--base-model", help="With --regenerate: where the base model is now, if it was moved.")
@quiet_option
def show(
    db: Path,
    model_id: str,
    at: str | None,
    as_json: bool,
    html: Path | None,
    n_regenerated: int | None,
    base_model: str | None,
    quiet: bool,
) -> None:
    """All that is known of the model ID: settings, figures, exemplars, prompts.

    Samples that are made again are equal on the kind of machine that made them; others round otherwise.
    """
    from attrdb.cli.output import print_table
    from attrdb.models import describe, monitoring_in_words

    if as_json and html:
        raise InvalidValue("--html writes a page and --json prints: give one of them")
    if base_model and not n_regenerated:
        raise InvalidValue("--base-model is for --regenerate; say how many samples to make again")
    database = attrdb.open(db, read_only=True, at=at)
    found = describe(database, model_id)
    if html:
        html.write_text(ml("pages.model_page").render(database, model_id), encoding="utf-8")
        click.echo(f"wrote {html}", err=True)
    again = _regenerated(database, model_id, n_regenerated, base_model, quiet) if n_regenerated else None
    if as_json:
        click.echo(json.dumps(found | ({"regenerated": again.to_pylist()} if again else {}), indent=2))
        return
    if not html and again is None:
        _print_model(found, monitoring_in_words(database, model_id))
    if again is not None:
        print_table(again)
        n_equal = sum(again["equal"].to_pylist())
        click.echo(f"{n_equal} of {len(again)} samples made again are equal to those stored", err=True)


def _regenerated(database: Any, model_id: str, n_samples: int, base_model: str | None, quiet: bool) -> Any:
    from attrdb.cli.output import progress

    compare = ml("ingest.customize.verify_samples").compare
    with progress(quiet) as advance:
        return compare(database, model_id, n_samples, base_model, advance)


def _print_model(model: dict[str, Any], monitored: str | None) -> None:
    from attrdb.models import kind_in_words, settings_by_group
    from attrdb.text import shown

    def line(name: str, value: Any, indent: str = "  ") -> None:
        click.echo(f"{indent}{name.replace('_', ' ')}: {shown(value)}")

    click.echo(f"{shown(model['model_id'])}: customized {kind_in_words(model)}")
    for name, value in model.items():
        if not isinstance(value, (dict, list)) and value is not None and name not in ("model_id", "kind"):
            line(name, value)
    if model["kind"] == "concepts":
        click.echo("  concepts")
        for concept in model["concepts"]:
            n = concept["n_exemplars"]
            what = f"{concept['kind']}, {concept['category']}, {n} exemplar{'s' * (n != 1)}"
            line(concept["token"], f"{what}, trained with “{concept['train_prompt']}”", "    ")
    losses = model["training"].get("losses", [])
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        click.echo(f"  loss: {losses[0]:.4g} at first, {sum(last) / len(last):.4g} over the last {len(last)} steps")
    elif "problem" in model["training"]:
        click.echo(f"  loss: not known, {shown(model['training']['problem'])}")
    if monitored is not None:
        line("monitored", monitored)
    for group, values in settings_by_group(model).items():
        click.echo(f"  settings, {group.replace('_', ' ')}")
        for name, value in values.items():
            line(name, value, "    ")
    counts: dict[tuple[str, str], int] = {}
    for sample in model["samples"]:
        key = (sample["prompt_scheme"] or "-", sample["prompt"] or "-")
        counts[key] = counts.get(key, 0) + 1
    click.echo("  prompts, with their samples")
    for (scheme, prompt), n_samples in counts.items():
        click.echo(f"    {scheme}, {n_samples}: {shown(prompt)}")
