"""Choose how candidates are searched: compare all of them, or only those that an encoder's index finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attrdb.search import exact as exact_search
from attrdb.search import ivf
from attrdb.search.mapper import Mapper
from attrdb.store.lance_errors import storage
from attrdb.store.predicates import CANDIDATES
from attrdb.store.snapshot import Snapshot

EXACT_BELOW_ROWS = 20_000  # up to so many candidates, all are compared even if there is an index
HIT_COST = 8  # time of a hit of the index, as a multiple of that of a candidate in a scan
BREAK_EVEN_QUERIES = 128  # the products of so many queries with a candidate take as long as reading it


def candidates_predicate(candidates: str | None) -> str:
    """The predicate of candidates that fulfil one of the caller's; of all candidates for None."""
    return CANDIDATES if candidates is None else f"{CANDIDATES} AND ({candidates})"


def count(snapshot: Snapshot, candidates: str | None = None) -> int:
    """The number of candidates that fulfil a checked predicate, with or without a feature."""
    return snapshot.count(candidates_predicate(candidates))


def nearest(
    snapshot: Snapshot,
    encoder_id: str,
    queries: np.ndarray,
    k: int,
    *,
    mapper: Mapper | None = None,
    candidates: str | None = None,
    exact: bool = False,
) -> exact_search.Hits:
    """The k most similar candidates of each query, or fewer; through the encoder's index if that takes less time.

    With a mapper all candidates are compared, unless measurements showed that the index finds enough.

    queries:    (n_queries, dimension) float32, unit length, before they are mapped
    candidates: an SQL predicate on the columns of images; only candidates that fulfil it are searched
    exact:      compare all candidates, without the index
    raises:     InvalidValue for a predicate that Lance refuses
    """
    if candidates is not None:
        snapshot.check_predicate("candidates", candidates)
    where = candidates_predicate(candidates)
    index = None if exact else index_for(snapshot, encoder_id, mapper)
    n_candidates = count(snapshot, candidates) if index else 0
    if index is None or n_candidates <= max(EXACT_BELOW_ROWS, k) or not _pays(index, n_candidates, len(queries), k):
        return exact_search.top_k(snapshot.features(encoder_id, where), queries, k, mapper=mapper)
    with storage(snapshot.path):
        visible = snapshot.visible(where)
        hits = ivf.top_k(snapshot.tables["images"], index, visible, n_candidates, queries, k, mapper)
    short = [query for query, ids in enumerate(hits.ids) if len(ids) < k]
    if short:
        complete = exact_search.top_k(snapshot.features(encoder_id, where), queries[short], k, mapper=mapper)
        for query, ids, similarity in zip(short, complete.ids, complete.similarity, strict=True):
            hits.ids[query], hits.similarity[query] = ids, similarity
    return hits


def _pays(index: ivf.Index, n_candidates: int, n_queries: int, k: int) -> bool:
    """Whether the index takes less time than comparing all candidates, which are read once for all queries."""
    hits = ivf.n_hits(index, k)
    scan = n_candidates * (1 + n_queries / BREAK_EVEN_QUERIES)
    return hits <= ivf.FETCHED and n_queries * hits * HIT_COST < scan


def indices(snapshot: Snapshot) -> dict[str, ivf.Index]:
    """The indices that attrdb built and that still exist, by encoder_id."""
    return snapshot.once(_indices)


def index_for(snapshot: Snapshot, encoder_id: str, mapper: Mapper | None) -> ivf.Index | None:
    """The index of an encoder, with the settings for a mapper; None if all candidates are to be compared."""
    if mapper is not None:
        return snapshot.once(_mapper_indices).get(mapper.mapper_id)
    return indices(snapshot).get(encoder_id)


def _indices(snapshot: Snapshot) -> dict[str, ivf.Index]:
    columns = ["encoder_id", "kind", "n_partitions", "n_probes", "oversampling"]
    known = [ivf.Index(**row) for row in snapshot.rows("indices", columns=columns)]
    with storage(snapshot.path):
        images = snapshot.tables["images"]
        kinds = {index.name: index.index_type for index in images.describe_indices()}
        return {
            index.encoder_id: replace(index, **ivf.coverage(images, index.encoder_id))
            for index in known
            if kinds.get(index.name) == index.kind
        }


def _mapper_indices(snapshot: Snapshot) -> dict[str, ivf.Index]:
    """By mapper_id, the indices of those mappers that find enough through them."""
    known = indices(snapshot)
    return {
        row["mapper_id"]: replace(
            known[row["encoder_id"]],
            n_probes=row["n_probes"],
            oversampling=row["oversampling"],
            # The column was `tilt` before schema 6.
            norm_correction=np.asarray(row.get("norm_correction", row.get("tilt")), np.float32),
        )
        for row in snapshot.rows("mapper_searches", "used")
        if row["encoder_id"] in known
    }
