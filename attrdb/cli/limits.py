"""The options --timeout, --memory and --rows of commands that run SQL."""

from __future__ import annotations

from functools import wraps
from typing import Any

import click

from attrdb.errors import InvalidValue


class Size(click.ParamType):  # type: ignore[type-arg]  # as `Id`
    """Bytes, written as a number and a unit."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, context: click.Context | None) -> int:
        from attrdb.sql.limits import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except InvalidValue as error:
            self.fail(str(error), param, context)


TIMEOUT = 600.0  # seconds


def limit_options(command: Any) -> Any:
    """--timeout and --memory of commands that run SQL; the command gets them as one `limits`."""

    @wraps(command)
    def with_limits(*args: Any, timeout: float, memory: int | None, **values: Any) -> Any:
        from attrdb.sql.limits import Limits

        return command(*args, limits=Limits(timeout or None, memory), **values)

    with_limits = click.option(
        "--memory",
        type=Size(),
        metavar="SIZE",
        help="Memory that a statement may use, such as 4GB. Default: half of what is free.",
    )(with_limits)
    return click.option(
        "--timeout",
        type=float,
        default=TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        help="End a statement after this time; 0 for no limit.",
    )(with_limits)


def rows_option(command: Any) -> Any:
    return click.option(
        "--rows",
        type=click.IntRange(0),
        metavar="N",
        help="Write the first N rows. Default: 100 on a terminal, else all.",
    )(command)
