"""Webdataset shards, as img2dataset writes them: tar files with `<key>.jpg`, `<key>.txt` and `<key>.json` side by side.

A shard is walked once, header by header. Captions and fields are read on the way, a picture only when it is asked for,
and nothing is ever extracted to disk.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.read.pictures import MAX_BYTES, SUFFIXES, Picture, read_picture
from attrdb.ingest.read.sources import Item, refused

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "json")
MAX_TEXT = 2**20  # bytes of a caption or of a sample's fields
# The fields that images have a column for, by their names in lower case: LAION writes URL and LICENSE.
COLUMNS = {"url": "uri", "license": "license", "creator": "creator", "author": "creator", "caption": "prompt"}
# What tarfile raises for a damaged shard, besides its own: a number or a name that is none, a size beyond the file.
DAMAGE = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Member:
    """Where a picture lies in a shard: `size` bytes from `start` on."""

    tar: Path
    name: str
    start: int
    size: int


@dataclass
class Sample:
    """What a shard has under one key."""

    key: str
    images: list[Member] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a shard, or with a member that belongs to no sample."""

    where: str  # the shard's name, for a member with its own after it
    error: InvalidValue


def shards(path: Path) -> list[Path]:
    """The tar files of a webdataset, by name: the file itself, or those in the folder. Empty where it is none."""
    if path.is_dir():
        return sorted(file for file in path.glob("*.tar") if file.is_file())
    return [path] if path.suffix == ".tar" and path.is_file() else []


def count_webdataset(path: Path) -> int | None:
    """How many images the shards hold, by the `<shard>_stats.json` beside each; None where one has none.

    raises: NotFound if there is no shard, InvalidValue if the first is damaged from the start or has no image
    """
    tars = shards(path)
    if not tars:
        raise NotFound(f"no webdataset at {path}; a .tar file, or a folder with .tar files in it, is needed")
    for found in _samples(tars[0]):
        if isinstance(found, Trouble):
            raise found.error
        if found.images:
            break
    else:
        raise InvalidValue(f"{tars[0]} has no image in it; {', '.join(IMAGES)} members are read")
    counts = [_successes(tar) for tar in tars]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _successes(tar: Path) -> int | None:
    try:
        found = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def webdataset_items(path: Path, source: str) -> Iterator[Item]:
    """The samples of a .tar file, or of the .tar files in a folder, `<source>/<key>` each.

    What cannot be used is an item too, whose `read` raises the InvalidValue that says why: a sample without an image or
    that was not fetched, a key that came before, a member that points outside the shard, a shard that is cut off.
    """
    # A private file of sqlite's: keys of any number of shards, in constant memory.
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as keys:
        keys.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, tar TEXT) WITHOUT ROWID")
        for tar in shards(path):
            for found in _samples(tar):
                if isinstance(found, Sample):
                    found = _repeated(keys, found.key, tar) or found
                if isinstance(found, Trouble):
                    yield refused(f"{source}/{found.where}", found.error)
                    continue
                image_id = f"{source}/{found.key}"
                try:
                    yield _item(found, tar, source, image_id)
                except InvalidValue as error:
                    yield refused(image_id, error)


def _repeated(keys: sqlite3.Connection, key: str, tar: Path) -> Trouble | None:
    if keys.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (key, str(tar))).rowcount:
        return None
    (first,) = keys.execute("SELECT tar FROM keys WHERE key = ?", (key,)).fetchone()
    said = f"{tar} sample {key!r}: {first} has this key already, and the first is kept"
    return Trouble(
        f"{tar.name}/{key}",  # not the id of the first, which is stored
        InvalidValue(f"{said}; the members of a key must stand together, and no key may come twice"),
    )


# --- a sample ---------------------------------------------------------------------------------------------------------


def _item(sample: Sample, tar: Path, source: str, image_id: str) -> Item:
    where = f"{tar} sample {sample.key!r}"
    if sample.problem:
        raise InvalidValue(f"{where}: {sample.problem}")
    given = _fields(where, sample.texts.get("json", b"{}"))
    status = given.get("status", "success")
    if status != "success":
        raise InvalidValue(f"{where} was not fetched: {status}, {given.get('error_message') or 'no reason given'}")
    if not sample.images:
        raise InvalidValue(f"{where} has no image; {', '.join(IMAGES)} are read")
    member = sample.images[0]
    row: dict[str, str | None] = {"source": source}
    for name, value in list(given.items()):
        column = COLUMNS.get(name.lower())
        if column and column not in row and value:
            row[column] = _text(f"{where} field {name!r}", value)
            del given[name]
    if "txt" in sample.texts:
        caption = _decoded(where, "txt", sample.texts["txt"]).strip()
        if row.get("prompt", caption) != caption:
            given["caption"] = row["prompt"]  # the .txt is what a model was trained on
        row["prompt"] = caption or None
    row.setdefault("uri", f"{tar.resolve().as_uri()}#{quote(member.name)}")
    row["metadata"] = json.dumps(given, sort_keys=True) if given else None
    return Item(image_id, partial(_read, member), lambda: row, row["uri"])


def _fields(where: str, encoded: bytes) -> dict:
    try:
        # NaN is no JSON, but Python's writer puts it there; null is what it says.
        found = json.loads(_decoded(where, "json", encoded), parse_constant=lambda _: None)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidValue(f"{where}: its .json is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidValue(f"{where}: its .json must be an object, found {type(found).__name__}")
    return found


def _decoded(where: str, extension: str, encoded: bytes) -> str:
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{where}: its .{extension} is not UTF-8 text: {error}") from error


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"{where} must be text, found {value!r}")
    # JSON can spell half a character, which no column can hold.
    return value.encode("utf-8", "replace").decode("utf-8").strip()


def _read(member: Member) -> Picture:
    where = f"{member.tar} member {member.name!r}"
    try:
        with member.tar.open("rb") as file:
            file.seek(member.start)
            encoded = file.read(member.size)
    except OSError as error:
        raise InvalidValue(f"{where} cannot be read: {error.strerror}") from error
    return read_picture(where, encoded)


# --- a shard ----------------------------------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[Sample | Trouble]:
    """The samples of a shard, and between them what is wrong with it. Damage drops the sample that it may fall into."""
    sample: Sample | None = None
    last = "the beginning"
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in _headers(tar):
                if refusal := _refusal(info.name):
                    error = InvalidValue(f"{path} member {info.name!r} is refused: {refusal}; pack the shard again")
                    yield Trouble(f"{path.name}/{info.name!r}", error)
                    continue
                inside = PurePosixPath(info.name)
                stem, _, extension = inside.name.partition(".")
                if info.isdir() or not stem:  # hidden files are leavings of file managers
                    continue
                key = (inside.parent / stem).as_posix()
                if sample and sample.key != key:
                    yield sample
                    last = f"sample {sample.key!r}"
                    sample = None
                sample = sample or Sample(key)
                _take(sample, extension.lower(), info, tar, path)
    except DAMAGE as error:
        said = f"{path} is damaged or cut off after {last} ({error}); what stands before is kept"
        yield Trouble(path.name, InvalidValue(f"{said}: fetch it again, uncompressed, and give the command again"))
        return
    if sample:
        yield sample


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a shard, one in memory at a time.

    raises: those of DAMAGE, also where tarfile takes a shard that is cut off for a whole one
    """
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it; tarfile keeps every header otherwise
        if info.size < 0:  # would lead back to a header before it, for ever
            raise tarfile.ReadError(f"member {info.name!r} claims {info.size} bytes")
        yield info
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end marker")


def _refusal(name: str) -> str | None:
    """Why a member's name cannot be used."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or parts[:1] == ("/",):
        return "its name points outside the shard"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None


def _take(sample: Sample, extension: str, info: tarfile.TarInfo, tar: tarfile.TarFile, path: Path) -> None:
    """Note a member with its sample. Sizes are checked before anything is read."""
    if extension not in IMAGES + TEXTS:
        return
    limit = MAX_TEXT if extension in TEXTS else MAX_BYTES
    if not info.isreg() or info.issparse():
        sample.problem = f"member {info.name!r} is a link, a device or sparse; only plain files are read"
    elif info.size > limit:
        sample.problem = f"member {info.name!r} has {info.size:,} bytes, more than {limit:,}"
    elif extension in sample.texts or (extension in IMAGES and sample.images):
        sample.problem = f"member {info.name!r} is a second one of its kind under this key; which is meant?"
    elif extension in TEXTS:
        opened = tar.extractfile(info)
        assert opened is not None  # a plain file
        sample.texts[extension] = opened.read()
    else:
        sample.images.append(Member(path, info.name, info.offset_data, info.size))
