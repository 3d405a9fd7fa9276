"""Features of images, streamed from Lance in blocks of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lance
import pyarrow as pa

from attrdb.store.schema import feature_matrix

# Image ids (n,) text, and features (n, dimension) float32, or these as a torch tensor on the device that searches them.
Block = tuple[pa.Array, Any]

BLOCK_ROWS = 4096  # rows that Lance reads at a time; reading 8,192 takes 1.4 times as long
BLOCK_BYTES = 16 << 20  # of features
# Bounds the memory of Lance.
READ_AHEAD: dict[str, Any] = {"batch_readahead": 4, "fragment_readahead": 1, "io_buffer_size": 128 << 20}
FEW_ROWS = 0.1  # share of all rows; below it, a scalar index decides which to read


def stream(
    dataset: lance.LanceDataset,
    encoder_id: str,
    where: str,
    key: str = "image_id",
    fragments: Sequence[int] | None = None,
) -> Iterator[Block]:
    """Ids (or `_rowid`) and features of the encoded rows that the predicate keeps, in blocks of at most BLOCK_BYTES features.

    fragments: ids of the fragments to read; None for all
    """
    dimension = dataset.schema.field(encoder_id).type.list_size
    # With a scalar index that decides which rows to read, Lance takes twice the time, unless they are few.
    few = fragments is None and dataset.count_rows(where) < FEW_ROWS * dataset.count_rows()
    batches = dataset.scanner(
        columns=[encoder_id, *([] if key == "_rowid" else [key])],
        with_row_id=key == "_rowid",
        filter=where,
        use_scalar_index=few,
        fragments=None if fragments is None else [*filter(None, map(dataset.get_fragment, fragments))],
        batch_size=max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * dimension))),
        **READ_AHEAD,
    ).to_batches()
    for batch in batches:
        # In the filter, "IS NOT NULL" would make Lance copy every feature, which takes twice the time of all the rest.
        if batch[encoder_id].null_count:
            batch = batch.filter(batch[encoder_id].is_valid())
        if batch.num_rows:
            yield batch[key], feature_matrix(batch[encoder_id])
