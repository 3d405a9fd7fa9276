"""Options of commands, made from the declarations in attrdb.ingest.options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from attrdb.cli.common import Id
from attrdb.ingest.options import Option

PLAIN_TYPES = {str: click.STRING, int: click.INT, Path: click.Path(path_type=Path)}


def model_options(options: Iterable[Option]) -> Callable[[Any], Any]:
    """Options of a model. The value of an option that is left out is None: the base model and the method have defaults."""

    def add(command: Any) -> Any:
        for option in reversed(list(options)):
            command = click.option(
                _flag(option),
                type=_type(option),
                is_flag=option.type is bool,
                default=None,
                required=option.required,
                help=f"{option.help}{_default_sentence(option)}{_unless_sentence(option)}",
            )(command)
        return command

    return add


def machine_options(options: Iterable[Option]) -> Callable[[Any], Any]:
    """Options with the defaults of their declarations."""

    def add(command: Any) -> Any:
        for option in reversed(list(options)):
            command = click.option(
                _flag(option), type=_type(option), default=option.default, show_default=True, help=option.help
            )(command)
        return command

    return add


def _flag(option: Option) -> str:
    return "--" + option.name.replace("_", "-")


def _type(option: Option) -> click.ParamType[Any]:
    if option.name == "model_id":
        return Id("model", new=True)
    if option.type is bool:
        return click.BOOL
    if option.choices:
        return click.Choice(option.choices)
    if option.bound is None:
        return PLAIN_TYPES[option.type]
    least = option.above if option.at_least is None else option.at_least
    range_type: Callable[..., click.ParamType[Any]] = click.IntRange if option.type is int else click.FloatRange
    return range_type(min=least, min_open=option.at_least is None)


def _default_sentence(option: Option) -> str:
    default = option.default_shown
    return "" if option.required or option.type is bool or default is None else f" Default: {default}."


def _unless_sentence(option: Option) -> str:
    return f" Required unless there is --{option.unless}." if option.unless else ""
