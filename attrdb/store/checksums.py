"""Checksums of the files of a database, in its file `checksums`: a line per file, as it was when it was recorded.

    CRC:BYTES PATH CRC      crc32 and size of the file, its path within the database, and crc32 of the line up to there

Files of Lance are written once, so a checksum holds for as long as the file exists. Commands that write record what is new.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

import lance

from attrdb.errors import AttrdbError, InvalidValue
from attrdb.progress import Progress, counted, no_progress
from attrdb.store.files import write_whole
from attrdb.store.ids import files_beside, stored_file
from attrdb.store.lance_errors import storage
from attrdb.store.locks import waiting_lock
from attrdb.store.schema import TABLES, Row
from attrdb.store.snapshot import pinned_tables
from attrdb.store.tables import table_exists

FILE, LOCK = "checksums", ".checksums.lock"
CHUNK = 2**20  # bytes that are read at a time: they stay in the cache of a core

CHANGED: set[Path] = set()  # databases that this process has written to; commands record them at their end

Tables = dict[str, lance.LanceDataset]


@dataclass(frozen=True)
class Recorded:
    """The checksums of files, by path within the database, and the numbers of the lines that are damaged."""

    digests: dict[str, str]
    damaged_lines: list[int]


def live_files(path: Path, tables: Tables) -> Iterator[str]:
    """The files that these versions of the tables are made of, and the weights of the models, by path in the database.

    raises: InvalidValue for a table that keeps files elsewhere
    """
    yield from _table_files(path, tables)
    yield from (file for file in _weights(path, tables["models"]) if (path / file).is_file())


def _table_files(path: Path, tables: Tables) -> Iterator[str]:
    for name, table in tables.items():
        folder = f"{name}.lance"
        for row in table.tracked_files(min_version=table.version).read_all().to_pylist():
            if row["version"] != table.version:
                continue
            if Path(row["base_uri"]).resolve() != (path / folder).resolve():
                raise InvalidValue(
                    f"table {name} of {path} keeps files elsewhere ({row['base_uri']}); copy it into one first"
                )
            yield f"{folder}/{row['path']}"


def _weights(path: Path, models: lance.LanceDataset) -> Iterator[str]:
    """The weights of the models, and the files beside them."""
    for row in models.to_table(columns=["weights_path"]).to_pylist():
        if not row["weights_path"]:
            continue
        try:
            weights = PurePath(row["weights_path"])
            for file in (weights, *files_beside(weights)):
                yield stored_file(path, str(file)).relative_to(path).as_posix()
        except (InvalidValue, ValueError):
            continue  # a row that names a file outside of the database, or no file


def read(path: Path) -> Recorded:
    """What is recorded of a database."""
    digests: dict[str, str] = {}
    damaged = []
    try:
        lines = (path / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    for number, line in enumerate(lines, 1):
        content, _, crc = line.rpartition(b" ")
        if crc != b"%08x" % zlib.crc32(content):
            damaged.append(number)
            continue
        digest, _, file = content.decode().partition(" ")
        digests[file] = digest
    return Recorded(digests, damaged)


def record(path: Path, tables: Tables, report: Progress = no_progress) -> int:
    """Record the live files that are not recorded yet, and forget files that exist no more; the number of new records.

    Files that are recorded are not read again: their damage stays known.
    raises: StorageError for a full or read-only disk, InvalidValue as `live_files`
    """
    with waiting_lock(path / LOCK, exclusive=True), storage(path):
        known = read(path)
        kept = {file: digest for file, digest in known.digests.items() if (path / file).exists()}
        new = dict(_digests(path, [file for file in live_files(path, tables) if file not in kept], report))
        if new or len(kept) < len(known.digests) or known.damaged_lines:
            write_lines(path / FILE, kept | new)
    return len(new)


def record_changed() -> None:
    """Record the new files of every database in CHANGED; raises as `record`."""
    while CHANGED:
        path = CHANGED.pop()
        if (path / "images.lance").is_dir():
            record(path, pinned_tables(path, [name for name in TABLES if table_exists(path / f"{name}.lance")]))


def write_lines(file: Path, digests: dict[str, str]) -> None:
    """Write the file of checksums; raises StorageError."""
    lines = (f"{digest} {name}".encode() for name, digest in digests.items())
    text = b"".join(line + b" %08x\n" % zlib.crc32(line) for line in lines)
    write_whole(file, lambda part: part.write_bytes(text))


def unrecorded(path: Path, tables: Tables) -> list[str]:
    """The live files that have no checksum yet."""
    known = read(path).digests
    with storage(path):
        return [file for file in live_files(path, tables) if file not in known]


def verify(path: Path, tables: Tables, report: Progress = no_progress) -> list[Row]:
    """The recorded files that are not as recorded, with what was found and needed.

    Files that exist no more are passed over, unless they are live, or the newest of a table.
    """
    with storage(path):
        live = set(_table_files(path, tables))
    with suppress(AttrdbError, OSError), storage(path):  # where the table of models is damaged, that is found below
        live |= set(_weights(path, tables["models"]))
    known = read(path)
    live |= {file for file in known.digests if _is_newer(file, tables)}
    present = [file for file in known.digests if file in live or (path / file).exists()]
    found = dict(_digests(path, present, report))
    wrong: list[Row] = [
        {"file": file, "needed": known.digests[file], "found": found.get(file, "no file")}
        for file in present
        if found.get(file) != known.digests[file] and (file in live or (path / file).exists())
    ]
    wrong += [
        {"file": FILE, "needed": "a line with its own checksum", "found": f"line {n}"} for n in known.damaged_lines
    ]
    return wrong


def _is_newer(file: str, tables: Tables) -> bool:
    """Whether a file is the manifest of a later version of a table than the one that is read."""
    manifest = re.fullmatch(r"(\w+)\.lance/_versions/(\d+)\.manifest", file)
    # Lance numbers its manifests downwards.
    return manifest is not None and manifest[1] in tables and 2**64 - 1 - int(manifest[2]) > tables[manifest[1]].version


def changed_in(path: Path, folders: Iterable[str]) -> list[str]:
    """The recorded files of some folders that are not as recorded, or are gone."""
    known = read(path).digests
    inside = [file for file in known if file.startswith(tuple(f"{folder}/" for folder in folders))]
    found = dict(_digests(path, inside, no_progress))
    return [file for file in inside if found.get(file) != known[file]]


def _digests(path: Path, files: Iterable[str], report: Progress) -> Iterator[tuple[str, str]]:
    """The checksums of files, on all cores; those that are gone are left out."""
    sizes = {file: (path / file).stat().st_size for file in files if (path / file).is_file()}
    add = counted(report, "checksums", sum(sizes.values()))

    def digest(file: str) -> str | None:
        try:
            return digest_of(path / file)
        except FileNotFoundError:  # old versions are deleted meanwhile
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, size), found in zip(sizes.items(), pool.map(digest, sizes), strict=True):
            add(size)
            if found is not None:
                yield file, found


def digest_of(file: Path) -> str:
    """The checksum of a file: crc32 finds every flipped bit, as sha256 does, in less than half of the time."""
    crc = n_bytes = 0
    buffer = memoryview(bytearray(CHUNK))
    with file.open("rb", buffering=0) as reader:
        while n := reader.readinto(buffer):
            crc = zlib.crc32(buffer[:n], crc)
            n_bytes += n
    return f"{crc:08x}:{n_bytes}"
