"""Encoding a long stream of pictures: reading, preparing and the networks at the same time, in order, in constant memory.

On a CPU every core takes whole batches, with one thread for each inside torch. Two threads sharing one batch wait for each
other after every layer, and the picture that is being decoded meanwhile takes one of them away: benchmarks/encoding.py.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from attrdb.errors import AttrdbError, InvalidValue

if TYPE_CHECKING:
    from attrdb.ingest.encode import Encoder

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL_BATCH = 16  # pictures, where every core has a batch of its own
LARGE_BATCH = 64  # where one batch has the whole device


def ahead(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    workers: int,
    depth: int,
    initializer: Callable[[], object] | None = None,
) -> Generator[Result, None, None]:
    """work(item) for every item, in order, computed in `workers` threads while the caller uses earlier results.

    At most `depth` items are taken and not yet given back; the items themselves are drawn in the caller's thread. What
    `work` or the items raise comes up in its place, after the results before it. Closing it waits for what has begun.
    """
    pending: deque[Future[Result]] = deque()
    source = iter(items)
    failure: Exception | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="attrdb-ahead", initializer=initializer)
    try:
        while True:
            while failure is None and len(pending) < depth:
                try:
                    pending.append(pool.submit(work, next(source)))
                except Exception as error:  # StopIteration among them
                    failure = error
            if not pending:
                break
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None and not isinstance(failure, StopIteration):
        raise failure


@dataclass(frozen=True)
class Encoded:
    """What became of an item: its features, or why it has none."""

    item: Any
    kept: Any  # what `read` wanted kept of it
    features: tuple[np.ndarray, ...]  # one of (dimension,) for every encoder, float32, unit length
    error: InvalidValue | None = None


def encode_stream(
    encoders: Sequence[Encoder], items: Iterable[Item], read: Callable[[Item], tuple[Any, Image.Image]]
) -> Generator[Encoded, None, None]:
    """The items in order, each with its unit-length feature by every encoder; a picture is read and decoded once.

    read: item -> (what to keep of it, its RGB picture), called in several threads; an InvalidValue of it becomes the
        item's `error`, as does a feature that is zero or not finite; anything else ends the stream
    Encoders that all have `concurrent = True` run in as many threads as torch is set to use, and until the stream ends or is
    closed torch has one thread for an operation. Of other encoders `features` is called in one thread at a time.
    """
    spread = all(getattr(encoder, "concurrent", False) for encoder in encoders)
    workers, batch = os.cpu_count() or 1, SMALL_BATCH if spread else LARGE_BATCH

    def prepare(item: Item) -> tuple[Encoded, list[np.ndarray]]:
        try:
            kept, image = read(item)
            return Encoded(item, kept, ()), [_prepare(encoder, image) for encoder in encoders]
        except InvalidValue as error:
            return Encoded(item, None, (), error), []

    def forward(block: list[tuple[Encoded, list[np.ndarray]]]) -> list[Encoded]:
        readable = [prepared for item, prepared in block if not item.error]
        columns = zip(*readable, strict=True)
        results = [unit_features(encoder, np.stack(c)) for encoder, c in zip(encoders, columns, strict=bool(readable))]
        rows = iter(range(len(readable)))
        return [item if item.error else _encoded(item, results, next(rows)) for item, _ in block]

    with (
        _lanes(spread) as (lanes, initializer),
        closing(ahead(items, prepare, workers, 2 * batch * lanes)) as prepared,
        closing(ahead(_blocks(prepared, batch), forward, lanes, 2 * lanes, initializer)) as blocks,
    ):
        for block in blocks:
            yield from block


def _prepare(encoder: Encoder, image: Image.Image) -> np.ndarray:
    """raises: InvalidValue, whatever the encoder raises: one picture that it cannot take ends no job"""
    try:
        return encoder.prepare(image)
    except AttrdbError:
        raise
    except Exception as error:
        size = f"{image.width}x{image.height}"
        reason = f"{type(error).__name__}: {error}"
        raise InvalidValue(f"encoder {encoder.spec!r} cannot prepare the picture of {size} pixels: {reason}") from error


def unit_features(encoder: Encoder, batch: np.ndarray) -> tuple[np.ndarray, list[InvalidValue | None]]:
    """(n, dimension) float32 features of unit length of prepared pictures, and for each of them an error or None.

    raises: InvalidValue if the encoder does not give n features of its dimension
    """
    features = np.asarray(encoder.features(batch), dtype=np.float32)
    if features.shape != (len(batch), encoder.dimension):
        raise InvalidValue(
            f"encoder {encoder.spec!r} makes features of shape {features.shape} of {len(batch)} pictures; "
            f"needed is {(len(batch), encoder.dimension)}"
        )
    norms = np.linalg.norm(features, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    errors = [
        None if good else InvalidValue(f"encoder {encoder.spec!r} makes a feature of length {norm} of the picture")
        for good, norm in zip(usable, norms, strict=True)
    ]
    return features / np.where(usable, norms, 1)[:, None], errors


def _encoded(item: Encoded, results: list[tuple[np.ndarray, list]], row: int) -> Encoded:
    error = next((errors[row] for _, errors in results if errors[row]), None)
    return replace(item, error=error, features=() if error else tuple(features[row] for features, _ in results))


def _blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    source = iter(items)
    while block := list(islice(source, size)):
        yield block


@contextmanager
def _lanes(spread: bool) -> Iterator[tuple[int, Callable[[], object] | None]]:
    """How many threads run the networks, and what each does first."""
    if not spread or find_spec("torch") is None:  # without torch there are no networks: `pixels:N` alone
        yield 1, None
        return
    import torch

    threads = torch.get_num_threads()
    try:
        yield threads, lambda: torch.set_num_threads(1)
    finally:
        # Inside torch the number is a thread's own, but MKL has one for the whole process.
        torch.set_num_threads(threads)
