"""What a corpus is made of: sources of one kind each, which give items that are read only when they have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from attrdb.errors import InvalidValue
from attrdb.ingest.read.pictures import Picture, read_picture_file
from attrdb.ingest.read.side_fields import Fields, LabelTables, columns_of, fields_of
from attrdb.ingest.read.text import MAX_TEXT, read_text
from attrdb.ingest.read.walk import FIELDS, File, Skipped, picture_files

PICTURES, SHARDS, PARQUET, ARROW = "picture files", "tar shards", "Parquet files", "Arrow files"  # kinds of sources


@dataclass(frozen=True)
class Item:
    """An image that may be ingested; it is read only when it has to be."""

    image_id: str
    read: Callable[[], Picture]
    fields: Callable[[], dict[str, Any]]
    uri: str | None
    kind: str = PICTURES  # of the source that it is from


@dataclass(frozen=True)
class Source:
    """Items of one kind. files: those that hold them, none for loose pictures; n_items: None where nobody knows yet."""

    kind: str
    files: tuple[Path, ...]
    n_items: int | None
    items: Callable[[], Iterator[Item]]


def refused(image_id: str, error: InvalidValue, kind: str) -> Item:
    """An item that cannot be read, and why."""

    def read() -> NoReturn:
        raise error

    return Item(image_id, read, dict, None, kind)


def folder_items(folder: Path, source: str, labels: LabelTables, chosen: Mapping[str, str]) -> Iterator[Item]:
    """Pictures below a folder. A text file of the same name is the caption, a `.json` file has further fields.

    labels: fields of pictures by their path, from the tables of the folder
    chosen: our columns -> names of fields, by the user's word
    """
    root = folder.resolve()
    for file in picture_files(folder, Skipped()):
        shown = file.inside.encode("utf-8", "replace").decode("utf-8")
        if shown != file.inside:
            error = InvalidValue(f"{folder / shown}: its name is not UTF-8; rename it")
            yield refused(f"{source}/{shown}", error, PICTURES)
            continue
        uri = (file.path.resolve() if file.beside[file.path.name].is_symlink() else root / file.inside).as_uri()
        side_file, side = file.side_file(FIELDS), labels.fields(file.inside)
        if side_file:
            side |= fields_of(side_file)
        columns = {"source": source, "uri": uri, **columns_of(side, chosen=chosen)}
        fields = partial(_with_caption, file, side, columns, chosen)
        yield Item(f"{source}/{file.inside}", partial(read_picture_file, file.path), fields, columns["uri"])


def _with_caption(file: File, side: Fields, columns: dict[str, Any], chosen: Mapping[str, str]) -> dict[str, Any]:
    """The columns with the caption's file read, now that the picture is."""
    if file.caption is None:
        return columns
    return columns | columns_of(side, read_text(file.caption, MAX_TEXT), chosen)
