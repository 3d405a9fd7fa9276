"""Which images are to be taken out, and which of their features are stored."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attrdb.errors import InvalidValue, NotFound
from attrdb.progress import Progress
from attrdb.store.blocklist import address_digest
from attrdb.store.features import stream
from attrdb.store.lance_errors import storage
from attrdb.store.predicates import among_parts, literal
from attrdb.store.schema import CANDIDATE_ROLES, OF_TESTS
from attrdb.store.snapshot import Snapshot
from attrdb.text import check_text

MODELS = ("list", "mark", "remove")
DESCRIBED = ["image_id", "role", "model_id", "sha256", "uri", "prompt"]
CHOSEN = pa.schema([(name, pa.string()) for name in DESCRIBED])
IDS_PER_FILTER = 50_000  # ids in one predicate
SAME_DIRECTION = 1e-6  # of 1 - cosine, up to which a centroid counts as the feature itself
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
SHOWN = 5  # lines without an image that are named
BLOCKED = (*CANDIDATE_ROLES, *OF_TESTS)  # roles of pictures that may be kept from coming back


@dataclass(frozen=True)
class RemovalRequest:
    """What is to be taken out, and how. One of where, creator and ids is given.

    where:     an SQL predicate on the columns of images
    creator:   the images of one creator
    ids:       image ids, addresses (uri) or sha256 of encoded bytes, each of which may name several images
    reason:    kept in the table `removals`
    models:    what becomes of models that were customized on one of the images: `list` reports them, `mark` keeps that in the
               table `marked_models`, `remove` takes them out with their exemplars, samples and weights
    purge:     also delete every older version and every file that holds the images
    drop_tags: with purge, delete tags that other clients have set; without, they are an error
    block:     keep digests of the images, so that they are not stored again
    """

    where: str | None = None
    creator: str | None = None
    ids: tuple[str, ...] | None = None
    reason: str | None = None
    models: str = "list"
    purge: bool = False
    drop_tags: bool = False
    block: bool = False

    def check(self, snapshot: Snapshot) -> None:
        """raises: InvalidValue for anything but one choice, a wrong predicate or a wrong value"""
        n_given = sum(choice is not None for choice in (self.where, self.creator, self.ids))
        if n_given != 1:
            raise InvalidValue(f"{n_given} of where, creator and ids are given; exactly one says what is taken out")
        if self.ids == ():
            raise InvalidValue("ids is empty; give image ids, addresses or sha256")
        if self.models not in MODELS:
            raise InvalidValue(f"models is {self.models!r}; it must be one of {', '.join(MODELS)}")
        if self.drop_tags and not self.purge:
            raise InvalidValue("drop_tags goes with purge: without it, older versions and their tags stay")
        for name, text in [
            ("creator", self.creator),
            ("reason", self.reason),
            *(("id", text) for text in self.ids or ()),
        ]:
            check_text(name, text or "")
        if self.where is not None:
            snapshot.check_predicate("where", self.where)

    @property
    def chosen_by(self) -> str:
        return "where" if self.where is not None else "creator" if self.creator is not None else "ids"

    @property
    def digest(self) -> str:
        """sha256 of what was given, which itself is not kept."""
        texts = self.ids if self.ids is not None else [self.where if self.where is not None else self.creator or ""]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def read_ids(path: Path) -> tuple[str, ...]:
    """The lines of a file of ids, each once; empty lines are passed over.

    raises: NotFound if there is no such file, InvalidValue if it is not UTF-8 text or has no line
    """
    if not path.is_file():
        raise NotFound(f"no file {path}; write one image id, address or sha256 per line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} is not UTF-8 text: {error}") from error
    lines = tuple(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not lines:
        raise InvalidValue(f"{path} has no line; write one image id, address or sha256 per line")
    return lines


@dataclass(frozen=True)
class Choice:
    """Images that are chosen, in the columns of CHOSEN, and the given ids that name no image."""

    images: pa.Table
    not_found: tuple[str, ...] = ()

    @property
    def ids(self) -> pa.ChunkedArray:
        return self.images["image_id"]

    def of_role(self, *roles: str) -> pa.Table:
        return self.images.filter(pc.is_in(self.images["role"], pa.array(roles)))

    def also(self, others: pa.Table) -> Choice:
        """With further images; those that are chosen already count once."""
        new = others.filter(pc.invert(pc.is_in(others["image_id"], self.ids.combine_chunks())))
        return Choice(pa.concat_tables([self.images, new]), self.not_found)


def choose(snapshot: Snapshot, request: RemovalRequest, report: Progress) -> Choice:
    """The images that a request names, those of unfinished models too."""
    if request.ids is None:
        where = request.where if request.where is not None else f"creator = {literal(request.creator or '')}"
        return Choice(images_of(snapshot, where))
    return _named(snapshot, request.ids, report)


def images_of(snapshot: Snapshot, where: str) -> pa.Table:
    """The images that a predicate keeps, hidden ones too."""
    with storage(snapshot.path):
        return snapshot.tables["images"].to_table(columns=DESCRIBED, filter=where).cast(CHOSEN)


def _named(snapshot: Snapshot, ids: tuple[str, ...], report: Progress) -> Choice:
    """The images whose id, address or sha256 is among the given ones."""
    given = pa.array([name.lower() if SHA256.fullmatch(name) else name for name in ids])
    images = snapshot.tables["images"]
    seen: set[str] = set()
    found, done, total = [CHOSEN.empty_table()], 0, images.count_rows()
    with storage(snapshot.path):
        for batch in images.to_batches(columns=DESCRIBED):
            matches = [pc.is_in(batch[name], given) for name in ("image_id", "uri", "sha256")]
            matched = batch.filter(pc.or_(pc.or_(matches[0], matches[1]), matches[2]))
            if len(matched):
                found.append(pa.Table.from_batches([matched]).cast(CHOSEN))
                seen.update(name for column in ("image_id", "uri", "sha256") for name in matched[column].to_pylist())
            done += len(batch)
            report("find images", done, total)
    return Choice(
        pa.concat_tables(found),
        tuple(name for name, key in zip(ids, given.to_pylist(), strict=True) if key not in seen),
    )


def digests(choice: Choice) -> dict[str, str]:
    """Digest -> kind (`image` or `uri`), of the images that are chosen and of the ids that name none yet."""
    found = {sha256: "image" for sha256 in choice.of_role(*BLOCKED)["sha256"].to_pylist() if sha256}
    for name in choice.not_found:
        if SHA256.fullmatch(name):
            found[name.lower()] = "image"
    addresses = [*choice.of_role(*BLOCKED)["uri"].to_pylist(), *choice.not_found]
    for address in addresses:
        if address and "://" in address and (digest := address_digest(address)):
            found[digest] = "uri"
    return found


@dataclass(frozen=True)
class Encoded:
    """The features of the chosen images by one encoder: how many, how many of candidates, and of which roles.

    in_index: one of them is a centroid of the encoder's index, which then holds it
    """

    n: int
    roles: frozenset[str]
    in_index: bool


def encoded(snapshot: Snapshot, choice: Choice, report: Progress) -> dict[str, Encoded]:
    """What each encoder has of the chosen images."""
    images = snapshot.tables["images"]
    image_ids = choice.ids.to_pylist()
    roles = dict(zip(image_ids, choice.images["role"].to_pylist(), strict=True))
    found = {}
    for number, encoder_id in enumerate(snapshot.encoders):
        report("find features", number, len(snapshot.encoders))
        centroids = _centroids(images, encoder_id)
        n, in_index = 0, False
        seen: set[str] = set()
        for where in among_parts("image_id", image_ids, IDS_PER_FILTER):
            with storage(snapshot.path):
                for ids, features in stream(images, encoder_id, where):
                    n += len(ids)
                    seen.update(roles[image_id] for image_id in ids.to_pylist())
                    if centroids is not None and not in_index:
                        in_index = bool((features @ centroids.T).max() > 1 - SAME_DIRECTION)
        found[encoder_id] = Encoded(n, frozenset(seen), in_index)
    return found


def _centroids(images: lance.LanceDataset, encoder_id: str) -> np.ndarray | None:
    """The centroids of all vector indices on an encoder's column, at unit length; None if there is no index."""
    names = [index.name for index in images.describe_indices() if index.field_names == [encoder_id]]
    models = [images.get_ivf_model(name).centroids for name in names]
    if not models:
        return None
    centroids = np.concatenate([np.stack(model.to_numpy(zero_copy_only=False)) for model in models])
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(centroids, norms, out=np.zeros_like(centroids), where=norms > 0)
    return unit
