"""What installed packages add by entry points, such as encoders and methods of customization: found, made and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from attrdb.errors import AttrdbError, InvalidValue

Made = TypeVar("Made")


def check_clash(group: str, name: str, own: Iterable[str], what: str) -> None:
    """what: with its article, such as 'an encoder'

    raises: InvalidValue if a package claims a name that attrdb or another package has
    """
    packages = sorted({package_of(point) for point in entry_points(group=group, name=name)})
    if packages and name in own:
        raise InvalidValue(f"package {packages[0]} adds {what} {name!r}, which attrdb has itself; uninstall it")
    if len(packages) > 1:
        raise InvalidValue(f"the packages {' and '.join(packages)} both add {what} {name!r}; uninstall one of them")


def make(point: EntryPoint, call: Callable[[Any], Made], check: Callable[[Made], None], what: str) -> Made:
    """What a package's object makes, checked.

    call:   calls the object; check: raises TypeError or ValueError for what cannot be used
    what:   with its name, such as "encoder 'mean:3'"
    raises: InvalidValue, with the package named, if either fails; an AttrdbError of the package is passed on
    """
    try:
        made = call(point.load())
        check(made)
    except AttrdbError:
        raise
    except Exception as error:  # whatever code of others raises
        raise InvalidValue(
            f"{what} of package {package_of(point)} fails with {type(error).__name__}: {error}"
        ) from error
    return made


def load(group: str, name: str, call: Callable[[Any], Made], check: Callable[[Made], None], what: str) -> Made | None:
    """What the installed package makes that adds a name to a group, as `make`; None if none adds it."""
    for point in entry_points(group=group, name=name):
        return make(point, call, check, what)
    return None


def check_members(
    made: object, attributes: Mapping[str, tuple[type, ...]], methods: Iterable[str], protocol: str
) -> None:
    """raises: TypeError if an attribute is missing or of another type, or a method is missing; for `make` to complete"""
    for name, kinds in attributes.items():
        if not isinstance(getattr(made, name, None), kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"it needs the attribute {name}, of type {wanted}; see {protocol}")
    for name in methods:
        if not callable(getattr(made, name, None)):
            raise TypeError(f"it needs the method {name}; see {protocol}")


def package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
