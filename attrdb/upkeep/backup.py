"""Backup: a copy of one moment of a database in a directory of its own, and the way back.

    BACKUP/manifest.json     the versions of the tables, and path, bytes and sha256 of every file
    BACKUP/manifest.sha256   sha256 of manifest.json
    BACKUP/database/         the files, by their paths in the database

Of every table the files of one version are copied, and the weights of the models that it shows. Older versions and
half-done jobs are not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import lance

from attrdb.errors import Busy, InvalidValue, NotFound, StorageError
from attrdb.progress import Progress, counted, no_progress
from attrdb.store import checksums
from attrdb.store.checksums import live_files
from attrdb.store.lance_errors import storage
from attrdb.store.locks import exclusive_lock
from attrdb.store.schema import SCHEMA_VERSION, TABLES
from attrdb.store.snapshot import pinned_tables
from attrdb.store.tables import check_schema_version, open_table, schema_version, table_exists
from attrdb.text import size_text

FORMAT = 1  # of a backup
MANIFEST, MANIFEST_HASH, FILES = "manifest.json", "manifest.sha256", "database"
UNFINISHED = "unfinished"  # file in a directory that is being written
CHUNK = 8 * 2**20  # bytes that are copied at a time
SHOWN = 5  # damaged files that are named


@dataclass(frozen=True)
class BackedUp:
    """What a backup holds: the version of images, and how many files and bytes."""

    images_version: int
    n_files: int
    n_bytes: int


# --- backup ----------------------------------------------------------------------------------------------------------


def backup(path: Path, target: Path, report: Progress = no_progress) -> BackedUp:
    """Copy a database, as it is at one moment, to a new directory, which appears when it is whole.

    Readers and writers go on meanwhile. A database of an older schema version is copied as it is.
    raises: NotFound if there is no database, InvalidValue if there is something at the target, it lies in the database, or
            a removal is unfinished; Busy if maintenance runs; StorageError for a full disk, a file that is gone or damaged
    """
    report("back up", 0, None)
    if not (path / "images.lance").is_dir():
        raise NotFound(f"{path} is not an attrdb database (no images.lance in it)")
    if target.resolve().is_relative_to(path.resolve()):
        raise InvalidValue(f"{target} lies inside the database {path}; name a place outside it")
    with ExitStack() as held:
        if os.access(path, os.W_OK):  # nobody deletes older files of a disk that cannot be written
            held.enter_context(exclusive_lock(path / ".maintenance.lock", f"{path} is being maintained"))
        part = held.enter_context(part_of(target))
        with storage(path):
            tables = _tables(path)
            files = list(live_files(path, tables))
        known = checksums.read(path).digests
        sizes = {file: _size(path, file) for file in files}
        _check_room(target, sum(sizes.values()))
        add = counted(report, "back up", sum(sizes.values()))
        entries: list[dict[str, Any]] = []
        recorded: dict[str, str] = {}
        for file in files:
            digest, n_bytes = _copy(path / file, part / FILES / file, add)
            recorded[file] = checksums.digest_of(part / FILES / file)
            if known.get(file, recorded[file]) != recorded[file]:
                raise StorageError(
                    f"{path / file} is not as it was written, and no backup was made; restore it from an earlier backup, and "
                    f"see: attrdb check {path} --deep"
                )
            entries.append({"path": file, "bytes": n_bytes, "sha256": digest})
        checksums.write_lines(part / FILES / checksums.FILE, recorded)
        text = (part / FILES / checksums.FILE).read_bytes()
        entries.append({"path": checksums.FILE, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()})
        manifest = {
            "format": FORMAT,
            "attrdb_version": version("attrdb"),
            "schema_version": schema_version(tables["images"]),
            "created_at": datetime.now(UTC).isoformat(),
            "versions": {name: table.version for name, table in tables.items()},
            "files": entries,
        }
        text = json.dumps(manifest, indent=1).encode()
        _write(part / MANIFEST, text)
        _write(part / MANIFEST_HASH, hashlib.sha256(text).hexdigest().encode())
    return BackedUp(tables["images"].version, len(entries), sum(entry["bytes"] for entry in entries))


def _tables(path: Path) -> dict[str, lance.LanceDataset]:
    """The tables that the database has, at versions that belong together."""
    found = schema_version(open_table(path, "images"))
    if found == 0 or found > SCHEMA_VERSION:
        check_schema_version(path, found)
    tables = pinned_tables(path, [name for name in TABLES if table_exists(path / f"{name}.lance")])
    if "removals" in tables and tables["removals"].count_rows("state <> 'done'"):
        raise InvalidValue(
            f"a removal of {path} is unfinished (attrdb status names it); rerun its command, then back up what is left"
        )
    return tables


def _size(path: Path, file: str) -> int:
    try:
        return (path / file).stat().st_size
    except FileNotFoundError as error:
        raise StorageError(
            f"{path / file} is gone, which the backup needs; rerun it, and see: attrdb check {path}"
        ) from error


# --- restore ---------------------------------------------------------------------------------------------------------


def restore(source: Path, path: Path, report: Progress = no_progress) -> BackedUp:
    """Make a database of a backup. It appears when it is whole, and only if every file is as it was backed up.

    raises: NotFound if there is no backup, InvalidValue if there is something at the path, or a newer attrdb made the
            backup; StorageError, with the files named, for a damaged backup, and for a full disk
    """
    report("restore", 0, None)
    manifest = _manifest(source)
    entries = manifest["files"]
    n_bytes = sum(entry["bytes"] for entry in entries)
    with part_of(path) as part:
        _check_room(path, n_bytes)
        add = counted(report, "restore", n_bytes)
        damaged = [entry["path"] for entry in entries if not _restored(source / FILES, part, entry, add)]
        if damaged:
            more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
            raise StorageError(
                f"backup {source} is damaged, and nothing was restored: {', '.join(damaged[:SHOWN])}{more} "
                f"{'is' if len(damaged) == 1 else 'are'} missing or not as backed up; restore from another backup"
            )
    return BackedUp(manifest["versions"]["images"], len(entries), n_bytes)


def _manifest(source: Path) -> dict[str, Any]:
    """The manifest of a backup, checked."""
    if not (source / MANIFEST).is_file():
        raise NotFound(f"{source} is no backup of a database (no {MANIFEST} in it)")
    try:
        text = (source / MANIFEST).read_bytes()
        wanted = (source / MANIFEST_HASH).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"backup {source} cannot be read, and nothing was restored: {error}") from error
    if hashlib.sha256(text).hexdigest() != wanted.strip():
        raise StorageError(
            f"backup {source} is damaged, and nothing was restored: {MANIFEST} is not as backed "
            "up; restore from another backup"
        )
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] > FORMAT or manifest["schema_version"] > SCHEMA_VERSION:
        raise InvalidValue(f"backup {source} was made by attrdb {manifest['attrdb_version']}; install a newer attrdb")
    for entry in manifest["files"]:
        parts = PurePosixPath(entry["path"]).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise InvalidValue(
                f"backup {source} names the file {entry['path']!r}, which lies outside of it; it is not restored"
            )
    return manifest


def _restored(files: Path, part: Path, entry: dict[str, Any], add: Callable[[int], None]) -> bool:
    """Copy a file of a backup; whether it is as it was backed up."""
    file = files / entry["path"]
    if file.is_symlink() or not file.is_file():
        return False
    return _copy(file, part / entry["path"], add) == (entry["sha256"], entry["bytes"])


# --- both ------------------------------------------------------------------------------------------------------------


@contextmanager
def part_of(target: Path) -> Iterator[Path]:
    """A directory beside the target that becomes it at the end, and is deleted if there is no such end.

    One that a killed process has left is begun anew.
    """
    if target.exists() or target.is_symlink():
        raise InvalidValue(f"{target} exists already; name a new directory")
    part = target.with_name(f"{target.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageError(f"{part} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{target} is being written by another process; wait for it") from error
        if any(part.iterdir()) and not (part / UNFINISHED).exists():
            raise InvalidValue(f"{part} exists, and attrdb did not make it; move it, or name another target")
        try:
            (part / UNFINISHED).touch()
            for old in part.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif old.name != UNFINISHED:
                    old.unlink()
            yield part
            (part / UNFINISHED).unlink()
            os.fsync(folder)
            part.rename(target)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(f"{target} could not be written, and nothing is left there: {error}") from error
            raise
    finally:
        os.close(folder)


def _check_room(target: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise StorageError(
            f"{target} needs {size_text(n_bytes)} of disk, {size_text(free)} are free; nothing was written"
        )


def _copy(source: Path, target: Path, add: Callable[[int], None]) -> tuple[str, int]:
    """Copy a file; its sha256 and bytes. A link is not followed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, n_bytes = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
            n_bytes += len(chunk)
            add(len(chunk))
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest(), n_bytes


def _write(file: Path, content: bytes) -> None:
    with file.open("xb") as writer:
        writer.write(content)
        writer.flush()
        os.fsync(writer.fileno())
