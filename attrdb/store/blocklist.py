"""Pictures and addresses that were taken out and must not be stored again (`attrdb remove --block`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa

from attrdb.errors import InvalidValue
from attrdb.store.lance_errors import storage
from attrdb.store.snapshot import Snapshot


def address_digest(uri: str | None) -> str | None:
    """The digest by which an address is blocked; None for a file of a disk, whose content may be another one tomorrow."""
    return hashlib.sha256(uri.encode()).hexdigest() if uri and not uri.startswith("file:") else None


class Blocklist:
    """The blocked digests of a database, with the removal that blocked each."""

    def __init__(self, removals: dict[str, str]):
        self.removals = removals

    def refusal(self, name: str, sha256: str | None, uri: str | None) -> str | None:
        """Why a picture is not to be stored; None if it may be."""
        if not self.removals:
            return None
        for noun, digest in (("picture", sha256), ("address", address_digest(uri))):
            if digest in self.removals:
                return (
                    f"image {name}: its {noun} was taken out of this database for good by removal "
                    f"{self.removals[digest]}; leave it out"
                )
        return None

    def check(self, name: str, sha256: str | None, uri: str | None) -> None:
        """raises: InvalidValue if the picture is not to be stored"""
        if refusal := self.refusal(name, sha256, uri):
            raise InvalidValue(refusal)

    def refusals(self, images: pa.Table) -> dict[int, str]:
        """Row number -> why, of the rows that are not to be stored. Samples always may be."""
        if not self.removals:
            return {}
        columns: list[Iterable[str | None]] = [
            images[name].to_pylist() if name in images.column_names else [None] * len(images)
            for name in ("role", "image_id", "sha256", "uri")
        ]
        refusals = {}
        for row, (role, *described) in enumerate(zip(*columns, strict=True)):
            if role != "sample" and (refusal := self.refusal(*described)):
                refusals[row] = refusal
        return refusals


def blocklist(snapshot: Snapshot) -> Blocklist:
    return snapshot.once(_load)


def _load(snapshot: Snapshot) -> Blocklist:
    with storage(snapshot.path):
        rows = snapshot.tables["blocked_digests"].to_table(columns=["digest", "removal_id"])
    return Blocklist(dict(zip(rows["digest"].to_pylist(), rows["removal_id"].to_pylist(), strict=True)))
