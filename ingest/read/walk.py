"""Walking a folder from outside: its files in order, and what is passed over, counted by kind.

Hidden and system files are passed over. A link is followed if it ends inside the folder, or in the cache of a hub that the
folder belongs to, whose files are all links. A link to a folder is not: what is in that folder is read under its own name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attrdb.errors import NotFound
from attrdb.ingest.read.formats import HEIC_ADVICE, HEIC_SUFFIXES, OTHER_SUFFIXES, picture_suffixes

SYSTEM_NAMES = frozenset(
    (
        "__macosx",
        "@eadir",
        "#recycle",
        "@recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "__pycache__",
    )
)
CAPTIONS = (".txt", ".TXT", ".caption")
FIELDS = ".json"
EXAMPLES = 3  # names of a kind that are shown

HIDDEN = "hidden or system files and folders"
OUTSIDE = "links that lead out of the folder"
NOWHERE = "links that lead nowhere"
FOLDER_LINKS = "links to folders, which are read under their own names only"
UNREADABLE = "folders that cannot be opened"
SPECIAL = "devices, pipes and sockets"
DATABASES = "attrdb databases"
HEIC = f"HEIC pictures, {HEIC_ADVICE}"
OTHER_PICTURES = "pictures in formats that are not read"
OTHER_FILES = "other files"
SIDE_FILES = "side files of img2dataset, whose fields stand beside the pictures too"
NO_PICTURES = "tables without pictures"
EMPTY_SHARDS = "tar shards with nothing in them"
BY_ENDING = (OTHER_PICTURES, OTHER_FILES)


@dataclass
class Skipped:
    """What is not read, by kind: how many, and the first names, or how many of each ending."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        names = self.names.setdefault(kind, Counter())
        if kind in BY_ENDING:
            names[Path(name).suffix.lower() or "no ending"] += 1
        elif len(names) < EXAMPLES:
            names[name] += 1

    def lines(self, but: Sequence[str] = ()) -> list[str]:
        """'other files: 2 (.md 1, .csv 1)', a line per kind, but for some kinds."""
        kinds = sorted(kind for kind in self.counts if kind not in but)
        return [f"{kind}: {self.counts[kind]:,} ({self._shown(kind)})" for kind in kinds]

    def _shown(self, kind: str) -> str:
        names = self.names[kind]
        if kind in BY_ENDING:
            return ", ".join(f"{ending} {count:,}" for ending, count in names.most_common())
        return ", ".join([*names, *(["..."] if self.counts[kind] > sum(names.values()) else [])])


@dataclass(frozen=True)
class File:
    """A file that may be read. inside: its path within the folder, with slashes."""

    path: Path
    inside: str
    beside: dict[str, os.DirEntry[str]]  # all entries of its folder, by name
    fence: Fence

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    def side_file(self, *suffixes: str) -> Path | None:
        """The file of the same name with one of the endings, if it may be read."""
        for suffix in suffixes:
            entry = self.beside.get(self.path.stem + suffix)
            if entry and entry.is_file() and not (entry.is_symlink() and self.fence.refusal(entry.path)):
                return Path(entry.path)
        return None

    @property
    def caption(self) -> Path | None:
        return self.side_file(*CAPTIONS)

    def has_picture(self) -> bool:
        """Whether a picture of the same name lies beside it, as beside a caption."""
        names = (self.path.stem + written for suffix in picture_suffixes() for written in (suffix, suffix.upper()))
        return not self.beside.keys().isdisjoint(names)


class Fence:
    """How far links are followed."""

    def __init__(self, root: Path):
        self.root = os.path.realpath(root)
        folders = (Path(self.root), *Path(self.root).parents)
        blobs = next((str(one.with_name("blobs")) for one in folders if one.name == "snapshots"), None)
        self.allowed = [self.root, *([blobs] if blobs else [])]

    def refusal(self, path: str) -> str | None:
        """Why a link is not followed, as a kind of `Skipped`; None if it is."""
        target = os.path.realpath(path)
        if not os.path.exists(target):
            return NOWHERE
        if not any(os.path.commonpath((target, folder)) == folder for folder in self.allowed):
            return OUTSIDE
        return FOLDER_LINKS if os.path.isdir(target) else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one of the system's or of a program, by its name."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def walk(root: Path, skipped: Skipped) -> Iterator[File]:
    """The regular files below a folder, by path.

    raises: NotFound if there is no such folder
    """
    if not root.is_dir():
        raise NotFound(f"no folder {root}")
    fence = Fence(root)
    # A stack of its own, because folders may lie deeper than Python's calls.
    waiting = [_listed(str(root), "", skipped)]
    while waiting:
        entry, inside, beside = next(waiting[-1], (None, "", {}))
        if entry is None:
            waiting.pop()
        elif is_hidden(entry.name):
            skipped.add(HIDDEN, inside + "/" * entry.is_dir())
        elif entry.is_symlink() and (refusal := fence.refusal(entry.path)):
            skipped.add(refusal, inside)
        elif entry.is_dir():
            waiting.append(_listed(entry.path, inside + "/", skipped))
        elif entry.is_file():
            yield File(Path(entry.path), inside, beside, fence)
        else:
            skipped.add(SPECIAL, inside)


Listed = tuple[os.DirEntry[str], str, dict[str, os.DirEntry[str]]]


def _listed(folder: str, inside: str, skipped: Skipped) -> Iterator[Listed]:
    """The entries of a folder by name, each with its path inside the root and all entries of the folder."""
    try:
        with os.scandir(folder) as entries:
            beside = {entry.name: entry for entry in entries}
    except OSError:
        skipped.add(UNREADABLE, inside)
        return
    if "images.lance" in beside:
        skipped.add(DATABASES, inside or folder)
        return
    for name in sorted(beside):
        yield beside[name], inside + name, beside


def caption_beside(path: Path) -> Path | None:
    """The caption's file beside a picture that was named alone, if it lies in the picture's folder."""
    fence = Fence(path.parent)
    files = (path.with_suffix(suffix) for suffix in CAPTIONS)
    return next((file for file in files if file.is_file() and not fence.refusal(str(file))), None)


def skip_other(file: File, skipped: Skipped) -> None:
    """Count a file that is none of those that are read."""
    if file.suffix in HEIC_SUFFIXES:
        skipped.add(HEIC, file.inside)
    elif file.suffix in OTHER_SUFFIXES:
        skipped.add(OTHER_PICTURES, file.inside)
    elif not (file.path.name.endswith((*CAPTIONS, FIELDS)) and file.has_picture()):
        skipped.add(OTHER_FILES, file.inside)


def picture_files(folder: Path, skipped: Skipped) -> Iterator[File]:
    """The pictures below a folder, by path; all other files are counted.

    raises: NotFound if there is no such folder
    """
    for file in walk(folder, skipped):
        if file.suffix in picture_suffixes():
            yield file
        else:
            skip_other(file, skipped)
