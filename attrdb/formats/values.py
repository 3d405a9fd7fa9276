"""Arrow values as Python holds them; times that Python has no type for as text, in DuckDB's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

# DuckDB's values of time without an end, by the bits of the type.
_ENDLESS = {2**63 - 1: "infinity", 1 - 2**63: "-infinity", 2**31 - 1: "infinity", 1 - 2**31: "-infinity"}
_DAY = 86_400 * 10**9  # nanoseconds
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}


def values(column: pa.Array) -> list[Any]:
    """The values of a column, each as `value`."""
    if not _holds_times(column.type):
        listed: list[Any] = column.to_pylist()
        return listed
    return [value(scalar) for scalar in column]


def value(scalar: pa.Scalar) -> Any:
    """One value: a list, dict or list of pairs of values where its type is a list, a struct or a map."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_map(kind):
        keys, items = scalar.values.field(0), scalar.values.field(1)
        return list(zip(values(keys), values(items), strict=True))
    if pa.types.is_struct(kind):
        return {field.name: value(scalar[number]) for number, field in enumerate(kind)}
    if pa.types.is_union(kind):
        return value(scalar.value)
    if pa.types.is_nested(kind):
        return values(scalar.values)
    if pa.types.is_interval(kind):
        return _interval(scalar)
    if not pa.types.is_temporal(kind):
        return scalar.as_py()
    is_end_of_day = pa.types.is_time64(kind) and scalar.value == _DAY // 1000  # 24:00:00, which is not 00:00:00
    if getattr(kind, "unit", None) != "ns" and scalar.value not in _ENDLESS and not is_end_of_day:
        try:
            return scalar.as_py()
        except (OverflowError, ValueError):  # before the year 1 or after 9999
            pass
    return _time(scalar)


def _holds_times(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_times(kind.field(number).type) for number in range(kind.num_fields))
    return bool(pa.types.is_temporal(kind) or pa.types.is_interval(kind))


def _interval(scalar: pa.Scalar) -> str:
    """Months, days and time, such as 1 year 2 months 3 days 04:05:06."""
    months, days, nanoseconds = scalar.as_py()
    parts = [(int(months / 12), "year"), (months - 12 * int(months / 12), "month"), (days, "day")]
    words = [f"{number} {unit}{'' if abs(number) == 1 else 's'}" for number, unit in parts if number]
    if nanoseconds or not words:
        words.append(f"{'-' if nanoseconds < 0 else ''}{_clock(abs(nanoseconds))}")
    return " ".join(words)


def _clock(nanoseconds: int) -> str:
    """A time of day, or more than a day of hours."""
    seconds, rest = divmod(nanoseconds, 10**9)
    digits = f".{rest:09d}".rstrip("0") if rest else ""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{digits}"


def _time(scalar: pa.Scalar) -> str:
    """A date, time or moment as text."""
    kind, number = scalar.type, scalar.value
    if number in _ENDLESS:
        return _ENDLESS[number]
    if pa.types.is_date32(kind):
        return _date(number)
    if pa.types.is_date64(kind):
        return _date(number // 86_400_000)
    nanoseconds = number if kind.unit == "ns" else number * _MICROSECONDS[kind.unit] * 1000
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        return f"{'-' if nanoseconds < 0 else ''}{_clock(abs(nanoseconds))}"
    days, of_day = divmod(nanoseconds, _DAY)
    # As where Python has a type: times with a zone are given in UTC.
    return f"{_date(days)} {_clock(of_day)}{'+00:00' if kind.tz else ''}"


def _date(days: int) -> str:
    """A day, counted from 1970, such as 20000-01-31 or 0044-03-15 (BC)."""
    year, month, day = str(np.datetime64(days, "D")).rsplit("-", 2)
    if int(year) <= 0:
        return f"{1 - int(year):04d}-{month}-{day} (BC)"
    return f"{year.lstrip('+')}-{month}-{day}"
