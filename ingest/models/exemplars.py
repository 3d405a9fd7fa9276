"""The exemplars of customized models: reading them from a folder, or from a list of files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from attrdb.errors import InvalidValue
from attrdb.ingest.read.formats import READ
from attrdb.ingest.read.pictures import Picture, read_picture_file
from attrdb.ingest.read.text import MAX_TEXT, read_text
from attrdb.ingest.read.walk import Skipped, caption_beside, picture_files

ExemplarSource = Path | tuple[Path, ...]  # a folder, or files


@dataclass(frozen=True)
class Exemplar:
    picture: Picture
    fields: dict = field(default_factory=dict)  # source, creator, license, uri, prompt ... where known
    token: str | None = None  # of its concept, if its model has several


def read_exemplars(folder: Path, skipped: Skipped | None = None) -> list[Exemplar]:
    """The images of a folder, in the order of their names; a `.txt` of the same name is the caption.

    skipped: what of the folder is not read is added
    raises:  NotFound if there is no such folder, InvalidValue if it has no image, or one that cannot be used
    """
    skipped = Skipped() if skipped is None else skipped
    files = list(picture_files(folder, skipped))
    if not files:
        aside = f". Not read: {'; '.join(skipped.lines())}" if skipped.counts else ""
        raise InvalidValue(f"exemplar folder {folder} has no image; put {READ} files into it{aside}")
    return [_exemplar(file.path, file.caption, folder.name) for file in files]


def read_exemplar(path: Path, source: str) -> Exemplar:
    """raises: InvalidValue for an image, or a caption beside it, that cannot be used"""
    return _exemplar(path, caption_beside(path), source)


def _exemplar(path: Path, caption: Path | None, source: str) -> Exemplar:
    fields = {"source": source, "uri": path.resolve().as_uri()}
    if caption and (text := " ".join(read_text(caption, MAX_TEXT).split())):
        fields["prompt"] = text
    return Exemplar(read_picture_file(path), fields)


def read_source(source: ExemplarSource, skipped: Skipped | None = None) -> list[Exemplar]:
    """skipped: what of a folder is not read is added

    raises: NotFound or InvalidValue for a folder or a file that is gone or cannot be used
    """
    if isinstance(source, Path):
        return read_exemplars(source, skipped)
    return [read_exemplar(path, path.parent.name) for path in source]
