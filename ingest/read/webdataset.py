"""Webdataset shards, such as img2dataset writes: tar files with `<key>.jpg`, `<key>.txt` and `<key>.json` side by side.

A key ends at the first point of a member's name, as in webdataset; what follows is the field's name, such as `jpg` or
`left.png`. A shard is walked once, header by header. Captions and fields are read on the way, a picture only when it is
asked for, and nothing is extracted to a name that the shard chooses.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from attrdb.errors import InvalidValue
from attrdb.ingest.read import shard_file
from attrdb.ingest.read.formats import picture_suffixes
from attrdb.ingest.read.pictures import MAX_BYTES, Picture, read_picture
from attrdb.ingest.read.shard_file import Content, shard_stem
from attrdb.ingest.read.side_fields import Fields, columns_of, parse_fields
from attrdb.ingest.read.sources import SHARDS, Item, refused
from attrdb.ingest.read.text import MAX_TEXT, clean
from attrdb.ingest.read.walk import EMPTY_SHARDS, HIDDEN, Skipped, is_hidden
from attrdb.text import decode

CAPTIONS = ("txt", "text", "caption")
TEXTS = (*CAPTIONS, "json", "cls")
FAILED = "failed"  # how img2dataset's word for an image that it could not fetch begins
MAX_NAMED = 8  # members of a sample that are named in an error
# What tarfile raises for a damaged shard, besides its own: a number or a name that is none, a size beyond the file.
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, *shard_file.DAMAGE)


@dataclass(frozen=True)
class Shard:
    """A tar file of a data set. prefix: what goes before its keys to make ids."""

    path: Path
    source: str
    prefix: str


@dataclass(frozen=True)
class Member:
    """Where a picture lies in a shard: `size` bytes from `start` on."""

    tar: Path
    name: str
    content: Content
    start: int
    size: int


@dataclass
class Record:
    """What a shard has under one key. images and texts: by the field's name, which is in lower case."""

    key: str
    images: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    problem: str | None = None  # why it cannot be used

    def text(self, *names: str) -> tuple[str, bytes] | None:
        """The first of the fields that is there: of the name itself, else the only one whose name ends so."""
        for name in names:
            if name in self.texts:
                return name, self.texts[name]
            longer = [other for other in self.texts if other.endswith(f".{name}")]
            if len(longer) == 1:
                return longer[0], self.texts[longer[0]]
        return None

    def image(self, chosen: str | None) -> Member:
        """The picture that is meant; chosen: the field, by the user's word

        raises: InvalidValue if there is none, or several
        """
        if chosen and chosen.lower() in self.images:
            return self.images[chosen.lower()]
        if not self.images:
            others = f"; it has: {', '.join(self.others)}" if self.others else ""
            raise InvalidValue(f"has no image{others}")
        plain = [name for name in self.images if "." not in name]
        if len(self.images) > 1 and len(plain) != 1:
            names = ", ".join(self.images)
            raise InvalidValue(
                f"has several images: {names}; which is meant? Choose one with --column image={next(iter(self.images))}. If "
                "they belong to different samples, pack them under names with one point"
            )
        return self.images[plain[0] if plain else next(iter(self.images))]


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a shard, or with a member that belongs to no sample."""

    where: str  # the shard's name, for a member with its own after it
    error: InvalidValue


def check_shards(shards: Sequence[Shard]) -> None:
    """raises: InvalidValue if no shard has an image: with what is wrong with the first, if it is damaged"""
    troubles = []
    for shard in shards:
        for record in _records(shard.path, Skipped()):
            if isinstance(record, Trouble):
                troubles.append(record.error)
            elif record.images:
                return
    if troubles:
        raise troubles[0]
    kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in picture_suffixes()))
    raise InvalidValue(f"{shards[0].path} has no image in it; {kinds} members are read")


def count_images(shards: Sequence[Shard]) -> int | None:
    """How many images the shards hold, by the `<shard>_stats.json` beside each; None where one has none."""
    counts = [_successes(shard.path) for shard in shards]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _successes(tar: Path) -> int | None:
    try:
        count = json.loads(tar.with_name(f"{shard_stem(tar.name)}_stats.json").read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) else None


def webdataset_items(shards: Sequence[Shard], columns: Mapping[str, str], skipped: Skipped) -> Iterator[Item]:
    """The samples of tar files, `<prefix>/<key>` each.

    What cannot be used is an item too, whose `read` raises the InvalidValue that says why: a sample without an image or
    that was not fetched, a key that came before, a member that points outside the shard, a shard that is cut off.
    columns: ours -> the names of fields, by the user's word
    skipped: hidden members are added
    """
    # A private file of sqlite's: keys of any number of shards, in constant memory.
    with closing(sqlite3.connect("", isolation_level=None, check_same_thread=False)) as keys:
        keys.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, tar TEXT) WITHOUT ROWID")
        for shard in shards:
            n_records = 0
            for n_records, record in enumerate(_records(shard.path, skipped), 1):  # noqa: B007
                if isinstance(record, Record):
                    image_id = f"{shard.prefix}/{record.key}"
                    record = _repeated(keys, image_id, record.key, shard.path) or record
                if isinstance(record, Trouble):
                    yield refused(f"{shard.prefix}/{record.where}", record.error, SHARDS)
                    continue
                try:
                    yield _item(record, shard, columns, image_id)
                except InvalidValue as error:
                    where = f"{shard.path} sample {record.key!r}"
                    yield refused(image_id, InvalidValue(f"{where}{_joined(str(error))}"), SHARDS)
            if not n_records:
                skipped.add(EMPTY_SHARDS, shard.path.name)


def _joined(problem: str) -> str:
    """A problem after the name of what has it: as its verb, or after a colon."""
    return f" {problem}" if problem.startswith(("has ", "was ")) else f": {problem}"


def _repeated(keys: sqlite3.Connection, image_id: str, key: str, tar: Path) -> Trouble | None:
    if keys.execute("INSERT OR IGNORE INTO keys VALUES (?, ?)", (image_id, str(tar))).rowcount:
        return None
    (first,) = keys.execute("SELECT tar FROM keys WHERE key = ?", (image_id,)).fetchone()
    return Trouble(
        f"{tar.name}/{key}",  # not the id of the first, which is stored
        InvalidValue(
            f"{tar} sample {key!r}: {first} has this key already, and the first is kept; the members of a key must stand "
            "together, and no key may come twice"
        ),
    )


# --- a sample ---------------------------------------------------------------------------------------------------------


def _item(record: Record, shard: Shard, columns: Mapping[str, str], image_id: str) -> Item:
    """raises: InvalidValue with the problem alone"""
    if record.problem:
        raise InvalidValue(record.problem)
    fields = _fields(record)
    status = fields.get("status", "success")
    if isinstance(status, str) and (status.startswith(FAILED) or (status != "success" and not record.images)):
        raise InvalidValue(f"was not fetched: {clean(status)}, {fields.get('error_message') or 'no reason given'}")
    member = record.image(columns.get("image"))
    caption = record.text(*CAPTIONS)
    text = clean(decode(caption[1], f"its .{caption[0]}")) if caption else None
    row: dict[str, Any] = columns_of(fields, text, {ours: name for ours, name in columns.items() if ours != "image"})
    row = {"source": shard.source, **row}
    row.setdefault("uri", f"{shard.path.resolve().as_uri()}#{quote(member.name)}")
    return Item(image_id, partial(_read, member), lambda: row, row["uri"], SHARDS)


def _fields(record: Record) -> Fields:
    side = record.text("json")
    fields = parse_fields(side[1], f"its .{side[0]}") if side else {}
    if label := record.text("cls"):
        fields.setdefault("cls", clean(decode(label[1], f"its .{label[0]}")))
    return fields


def _read(member: Member) -> Picture:
    where = f"{member.tar} member {member.name!r}"
    try:
        encoded = member.content.read(member.start, member.size)
    except OSError as error:
        raise InvalidValue(f"{where} cannot be read: {error.strerror}") from error
    return read_picture(where, encoded)


# --- a shard ----------------------------------------------------------------------------------------------------------


def _records(path: Path, skipped: Skipped) -> Iterator[Record | Trouble]:
    """The samples of a shard, and between them what is wrong with it. Damage drops the sample that it may fall into."""
    record: Record | None = None
    last = "the beginning"
    try:
        with (
            shard_file.opened(path) as (file, content, damage),
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
        ):
            for info in _headers(tar):
                if refusal := _refusal(info.name):
                    error = InvalidValue(f"{path} member {info.name!r} is refused: {refusal}; pack the shard again")
                    yield Trouble(f"{path.name}/{info.name!r}", error)
                    continue
                inside = PurePosixPath(info.name)
                if any(is_hidden(part) for part in inside.parts):
                    if not info.isdir():
                        skipped.add(HIDDEN, f"{path.name}/{info.name}")
                    continue
                stem, _, name = inside.name.partition(".")
                if info.isdir() or not stem:
                    continue
                key = (inside.parent / stem).as_posix()
                if record and record.key != key:
                    yield record
                    last = f"sample {record.key!r}"
                    record = None
                record = record or Record(key)
                _take(record, name.lower(), info, tar, path, content)
            if damage:
                raise damage
    except InvalidValue as error:
        yield Trouble(path.name, error)
        return
    except DAMAGE as error:
        reason = f"{path} is damaged or cut off after {last} ({error}); what stands before is kept"
        yield Trouble(path.name, InvalidValue(f"{reason}: fetch it again and rerun the command"))
        return
    if record:
        yield record


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


def _take(record: Record, name: str, info: tarfile.TarInfo, tar: tarfile.TarFile, path: Path, content: Content) -> None:
    """Note a member with its sample. Sizes are checked before anything is read."""
    ending = name.rpartition(".")[2]
    is_text, is_image = ending in TEXTS, f".{ending}" in picture_suffixes()
    if not is_text and not is_image:
        if len(record.others) < MAX_NAMED:
            record.others.append(name)
        return
    limit = MAX_TEXT if is_text else MAX_BYTES
    if not info.isreg() or info.issparse():
        record.problem = f"member {info.name!r} is a link, a device or sparse; only plain files are read"
    elif info.size > limit:
        record.problem = f"member {info.name!r} has {info.size:,} bytes, more than {limit:,}"
    elif name in record.texts or name in record.images:
        record.problem = f"member {info.name!r} is a second one of its kind under this key; which is meant?"
    elif is_text:
        opened = tar.extractfile(info)
        assert opened is not None  # a plain file
        record.texts[name] = opened.read()
    else:
        record.images[name] = Member(path, info.name, content, info.offset_data, info.size)
