"""Features of all images, on a CPU in half the time: networks are compiled, and a picture is reconstructed once.

    picture -> encoder                                     its features
    picture -> autoencoder of a base model -> encoder      the control `vae:BASE+ENCODER`

Both are the product's encoders and are stored by its `backfill`. An encoder's identity does not depend on how it is run:
compiled features differ from others in their last digits.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attrdb.ingest.encode import Encoder, Pixels, load_encoder, reconstructed
from attrdb.ingest.encode.stream import SMALL_BATCH

CLOSE = 1e-4  # by which an element of a compiled feature of unit length may differ
ONE_LEVEL = 1  # of grey, by which compiled reconstructions may differ: they are rounded


class Kept:
    """Reconstructed pictures, by a digest of the picture that was reconstructed. Several processes may use the file."""

    def __init__(self, file: Path):
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(file, timeout=600, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS pictures (digest BLOB PRIMARY KEY, pixels BLOB NOT NULL)")

    def find(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        """The pixels of those that are kept."""
        marks = ", ".join("?" * len(digests))
        with self._lock:
            return dict(self._connection.execute(f"SELECT * FROM pictures WHERE digest IN ({marks})", digests))

    def add(self, pictures: Mapping[bytes, bytes]) -> None:
        with self._lock, self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO pictures VALUES (?, ?)", pictures.items())


class SharedReconstruction(reconstructed.Reconstructed):
    """`vae:BASE+ENCODER`, which takes a reconstruction from a file of the folder if any encoder has made it before."""

    def __init__(self, base_model: str, inner: Encoder, folder: Path):
        super().__init__(base_model, inner)
        autoencoder, _, _ = self.weights_fingerprint.partition("-")
        self._kept = Kept(folder / f"reconstructed-{autoencoder}.sqlite")

    def _reconstructed(self, batch: np.ndarray) -> np.ndarray:
        digests = [hashlib.sha256(picture.tobytes()).digest() for picture in batch]
        known = self._kept.find(digests)
        missing = {digest: row for row, digest in enumerate(digests) if digest not in known}
        if missing:
            pictures = in_parts(self.reconstruct, batch[list(missing.values())])
            made = {digest: picture.tobytes() for digest, picture in zip(missing, pictures, strict=True)}
            self._kept.add(made)
            known |= made
        return np.stack([np.frombuffer(known[digest], np.uint8).reshape(batch.shape[1:]) for digest in digests])

    def reconstruct(self, batch: np.ndarray) -> np.ndarray:
        """(n, size, size, 3) uint8, computed and not kept."""
        return super()._reconstructed(batch)

    def compile(self) -> None:
        """raises: as `compile_encoder`"""
        compile_encoder(self._inner)
        batch = _noise(self)
        expected = self.reconstruct(batch).astype(int)
        self._vae.encoder.compile()
        self._vae.decoder.compile()
        difference = np.abs(self.reconstruct(batch) - expected).max()
        if difference > ONE_LEVEL:
            raise ValueError(f"reconstructed pictures differ by {difference} grey levels")


def in_parts(work: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> np.ndarray:
    """The results of SMALL_BATCH pictures at a time. The last part is filled up: for another size, torch compiles again."""
    results = []
    for start in range(0, len(batch), SMALL_BATCH):
        part = batch[start : start + SMALL_BATCH]
        filling = np.repeat(part[-1:], SMALL_BATCH - len(part), axis=0)
        results.append(work(np.concatenate([part, filling]))[: len(part)])
    return np.concatenate(results)


def compile_encoder(encoder: Encoder) -> None:
    """Let torch compile an encoder's network, in place, and run it once.

    raises: ValueError if features differ by more than CLOSE, and whatever torch raises where it cannot compile
    """
    if isinstance(encoder, SharedReconstruction):
        encoder.compile()
    elif not isinstance(encoder, Pixels):  # it has no network
        batch = _noise(encoder)
        expected = _unit(encoder.features(batch))
        encoder.features = partial(in_parts, torch.compile(encoder.features))
        difference = np.abs(_unit(encoder.features(batch)) - expected).max()
        if not difference <= CLOSE:
            raise ValueError(f"features differ by {difference:.2g}")


def load_shared(spec: str, folder: Path) -> Encoder:
    """The encoder of a spec; reconstructions are shared by way of the folder."""
    prefix, _, argument = spec.partition(":")
    if prefix != reconstructed.PREFIX:
        return load_encoder(spec)
    base_model, inner = reconstructed.split(argument)
    return SharedReconstruction(base_model, load_encoder(inner), folder)


def load_compiled(spec: str, folder: Path, log: Callable[[str], None]) -> Encoder:
    """`load_shared`, compiled on a CPU; as it is, with a line in the log, where that fails."""
    encoder = load_shared(spec, folder)
    if not getattr(encoder, "concurrent", False):  # on an accelerator
        return encoder
    import torch._inductor.config as inductor  # it takes a second

    try:
        with _one_thread(), inductor.patch(freezing=True):
            compile_encoder(encoder)
    except Exception as error:  # of dynamo, inductor or the C++ compiler, of any kind
        reason = str(error).strip().partition("\n")[0]
        log(f"{spec} runs uncompiled ({type(error).__name__}: {reason})")
        return load_shared(spec, folder)
    return encoder


def _noise(encoder: Encoder) -> np.ndarray:
    """A batch of prepared pictures of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (SMALL_BATCH, 64, 64, 3), np.uint8)
    return np.stack([encoder.prepare(Image.fromarray(picture)) for picture in pixels])


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the threads that run the encoder afterwards: compiled code has the number of threads in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
