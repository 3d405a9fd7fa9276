"""SQL over one snapshot: DuckDB in-process, read-only and closed in.

Views and macros are declared in RELATIONS, from which the data dictionary is generated.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from attrdb.attribution import Attribution, attribute, check_enough, nearest
from attrdb.errors import QueryRefused
from attrdb.influence import DEFAULT_LAM, DEFAULT_TAU
from attrdb.schema import feature_columns, feature_matrix
from attrdb.snapshot import Snapshot, among


@dataclass(frozen=True)
class Relation:
    """A view or a table macro: what a row is, how it is called and the SQL behind it."""

    name: str
    grain: str
    sql: str
    arguments: str = ""  # of a macro


def _by_role(name: str, role: str) -> Relation:
    return Relation(name, f"one row per {role} image, with the columns of images", f"FROM images WHERE role = '{role}'")


_DESCRIBED = """
    SELECT hits.rank, hits.image_id, images.role, images.model_id, images.source, images.category, images.creator,
           images.license, {columns}
    FROM (SELECT unnest({call}, max_depth := 2)) AS hits
    JOIN images ON images.image_id = hits.image_id
    ORDER BY hits.rank
"""

# H_N is the N-th harmonic number by its expansion, right to 1e-4 from N = 30 on.
_SAMPLE_SCORES = """
    WITH evaluations AS (
        SELECT encoder_id, mapper_id, gallery, max(gallery_size) AS largest_gallery
        FROM exemplar_ranks
        GROUP BY encoder_id, mapper_id, gallery
    ),
    truth AS (
        SELECT evaluations.*, models.kind, models.split, models.model_id, samples.prompt_scheme,
               samples.image_id AS sample_id, exemplars.image_id AS exemplar_id
        FROM evaluations
        CROSS JOIN models
        JOIN samples ON samples.model_id = models.model_id
        JOIN exemplars ON exemplars.model_id = models.model_id
    ),
    ranked AS (
        SELECT truth.*, ranks.rank, coalesce(ranks.gallery_size, truth.largest_gallery) AS gallery_size,
               row_number() OVER (
                   PARTITION BY truth.encoder_id, truth.mapper_id, truth.gallery, truth.sample_id
                   ORDER BY ranks.rank ASC NULLS LAST, truth.exemplar_id
               ) / ranks.rank AS precision_at_rank
        FROM truth
        LEFT JOIN exemplar_ranks AS ranks
            ON ranks.encoder_id = truth.encoder_id AND ranks.mapper_id = truth.mapper_id
            AND ranks.gallery = truth.gallery AND ranks.sample_id = truth.sample_id
            AND ranks.exemplar_id = truth.exemplar_id
    ),
    cut AS (
        SELECT *, coalesce(k, count(*) OVER (PARTITION BY encoder_id, mapper_id, gallery, sample_id)) AS cut_off
        FROM ranked
    ),
    counted AS (
        SELECT encoder_id, mapper_id, gallery, kind, split, prompt_scheme, model_id, sample_id, cut_off,
               count(*) AS n_exemplars, max(gallery_size) AS n, ln(n) + 0.5772156649 + 1 / (2 * n) AS harmonic,
               count(CASE WHEN rank <= cut_off THEN 1 END) AS n_found,
               avg(coalesce(precision_at_rank, 0.0)) AS average_precision, count(*) - count(rank) AS n_unranked
        FROM cut
        GROUP BY ALL
    )
    SELECT encoder_id, mapper_id, gallery, kind, split, prompt_scheme, model_id, sample_id, n_exemplars,
           n_found / n_exemplars AS recall, n_found / least(cut_off, n_exemplars) AS capped_recall, average_precision,
           least(1.0, cut_off / n) AS chance_recall, least(1.0, cut_off / n_exemplars) AS best_recall,
           (harmonic + (n_exemplars - 1) / greatest(n - 1, 1) * (n - harmonic)) / n AS chance_precision, n_unranked
    FROM counted
"""

RELATIONS = (
    _by_role("exemplars", "exemplar"),
    _by_role("samples", "sample"),
    _by_role("pretraining_images", "pretraining"),
    Relation(
        "sample_scores",
        "one row per sample and evaluation (encoder, mapper, gallery): how its model's exemplars were ranked. recall: found "
        "among the first k / all of them, with k NULL among as many as there are; capped_recall: / min(k, all of them); "
        "average_precision: mean of j / r_j over them by rank; chance_recall and chance_precision: expected of a random "
        "order; best_recall: the most that recall can be. An exemplar that was never ranked counts as not found, and in "
        "n_unranked",
        _SAMPLE_SCORES,
        "k",
    ),
    Relation(
        "nearest",
        "one row per candidate (exemplar or pretraining image) of a feature, most similar first, ties by image_id. "
        "feature: a feature of the encoder, as in the view features; encoder_id: the database's first when left out; "
        "candidates: a predicate on the columns of images that they must fulfil. By the encoder's index where there is one, "
        "unless exact",
        _DESCRIBED.format(
            columns="hits.similarity",
            call="_nearest(feature::FLOAT[], k::BIGINT, encoder_id::VARCHAR, candidates::VARCHAR, exact::BOOLEAN)",
        ),
        "feature, k := 10, encoder_id := NULL, candidates := NULL, exact := false",
    ),
    Relation(
        "attribute",
        "one row per candidate of a stored image, most similar first, with its influence, an estimate. k := NULL: every "
        "candidate that has influence. complete is false where more candidates than could be kept have influence, and "
        "missing_influence bounds their share. tau and lam are as calibrated where they are left out, else "
        f"{DEFAULT_TAU} and {DEFAULT_LAM}; candidates and exact as in nearest",
        _DESCRIBED.format(
            columns="hits.similarity, hits.influence, hits.complete, hits.missing_influence",
            call="_attribute(sample::VARCHAR, k::BIGINT, encoder_id::VARCHAR, tau::DOUBLE, lam::DOUBLE, mapper_id::VARCHAR, "
            "candidates::VARCHAR, exact::BOOLEAN)",
        ),
        "sample, k := 10, encoder_id := NULL, tau := NULL, lam := NULL, mapper_id := NULL, candidates := NULL, "
        "exact := false",
    ),
)

# Made from what the snapshot holds, and so not in RELATIONS.
FEATURES_GRAIN = "one row per image and encoder that has encoded it; feature is a FLOAT[] of unit length"
UNFINISHED_GRAIN = (
    "one row per model whose images are stored and whose row in models is not: its job runs or was killed"
)

_HIT = pa.struct([("rank", pa.int64()), ("image_id", pa.string()), ("similarity", pa.float64())])
_SHARE = pa.struct([*_HIT, ("influence", pa.float64()), ("complete", pa.bool_()), ("missing_influence", pa.float64())])


def connect(snapshot: Snapshot) -> duckdb.DuckDBPyConnection:
    """A connection that sees the tables of the snapshot, RELATIONS and `features`, and no file, network or setting.

    Views, macros and functions are made once for a snapshot, which takes some 20 ms, and shared by its connections.
    """
    with snapshot.lock:
        if snapshot.catalog is None:
            snapshot.catalog = _catalog(snapshot)
        connection = snapshot.catalog.cursor()
    _register(connection, snapshot)  # what is registered is a connection's own
    return connection


def _register(connection: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
    for name, dataset in snapshot.tables.items():
        connection.register(name if name != "images" or not snapshot.hidden_models else "_images", dataset)
    connection.register("unfinished_models", pa.table({"model_id": pa.array(snapshot.hidden_models, pa.string())}))


def _catalog(snapshot: Snapshot) -> duckdb.DuckDBPyConnection:
    # Without the last, DuckDB lets SQL read and write in its temporary folder, and a CTE may hold a COPY.
    closed = {"enable_external_access": "false", "autoload_known_extensions": "false", "temp_directory": ""}
    connection = duckdb.connect(config=closed)
    _register(connection, snapshot)
    if snapshot.hidden_models:
        connection.execute(f"CREATE VIEW images AS FROM _images WHERE {snapshot.visible('true')}")
    connection.execute(f"CREATE VIEW features AS {_features(snapshot.tables['images'].schema)}")
    # The snapshot keeps the catalog; were its functions to keep the snapshot, neither would ever be let go.
    owner = weakref.ref(snapshot)
    # DuckDB counts the parameters of a function, so that they have to be spelled out here.
    connection.create_function(
        "_nearest",
        lambda feature, k, encoder_id, candidates, exact: _together(
            partial(_nearest, owner()), _HIT, feature, k, encoder_id, candidates, exact
        ),
        ["FLOAT[]", "BIGINT", "VARCHAR", "VARCHAR", "BOOLEAN"],
        _sql_type(_HIT),
        type="arrow",
        null_handling="special",
    )
    connection.create_function(
        "_attribute",
        lambda sample, k, encoder_id, tau, lam, mapper_id, candidates, exact: _together(
            partial(_attribute, owner()), _SHARE, sample, k, encoder_id, tau, lam, mapper_id, candidates, exact
        ),
        ["VARCHAR", "BIGINT", "VARCHAR", "DOUBLE", "DOUBLE", "VARCHAR", "VARCHAR", "BOOLEAN"],
        _sql_type(_SHARE),
        type="arrow",
        null_handling="special",
    )
    for one in RELATIONS:
        what = f"MACRO {one.name}({one.arguments}) AS TABLE" if one.arguments else f"VIEW {one.name} AS"
        connection.execute(f"CREATE {what} {one.sql}")
    connection.execute("SET lock_configuration = true")
    return connection


_SQL_TYPES = {pa.int64(): "BIGINT", pa.string(): "VARCHAR", pa.float64(): "DOUBLE", pa.bool_(): "BOOLEAN"}


def _sql_type(item: pa.StructType) -> str:
    """A list of such structs, in DuckDB's words."""
    return f"STRUCT({', '.join(f'{field.name} {_SQL_TYPES[field.type]}' for field in item)})[]"


def _features(images: pa.Schema) -> str:
    # The null test reads the cast column: DuckDB would push one on the column itself down, and Lance's Arrow bridge
    # cannot filter a vector column (pylance 14.0: 'No match for FieldRef').
    nothing = "SELECT image_id, role, model_id, '' AS encoder_id, NULL::FLOAT[] AS feature FROM images WHERE false"
    parts = [
        f"SELECT image_id, role, model_id, '{encoder}' AS encoder_id, \"{encoder}\"::FLOAT[] AS feature FROM images "
        f'WHERE "{encoder}"::FLOAT[] IS NOT NULL'
        for encoder in feature_columns(images)
    ]
    return " UNION ALL ".join(parts or [nothing])


def _together(find: Callable[..., list], item: pa.StructType, *columns: pa.Array) -> pa.Array:
    """What DuckDB calls with a block of rows: those that ask with the same settings are searched for together."""
    rows = list(zip(*(column.to_pylist() for column in columns), strict=True))
    answers: list[list[dict] | None] = [None] * len(rows)
    alike: dict[tuple, list[int]] = {}
    for number, (query, *settings) in enumerate(rows):
        if query is not None:
            alike.setdefault(tuple(settings), []).append(number)
    for settings, numbers in alike.items():
        found = find([rows[number][0] for number in numbers], *settings)
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    return pa.array(answers, pa.list_(item))


def _nearest(
    snapshot: Snapshot,
    features: list[list[float]],
    k: int | None,
    encoder_id: str | None,
    candidates: str | None,
    exact: bool | None,
) -> list[list[dict]]:
    encoder_id = snapshot.encoder_id(encoder_id)
    dimension = snapshot.encoders[encoder_id]["dimension"]
    for feature in features:
        if len(feature) != dimension or None in feature:
            raise QueryRefused(f"nearest: a feature of length {len(feature)}, encoder {encoder_id!r} makes {dimension}")
    if k is None or k < 1:
        raise QueryRefused(f"nearest: k is {k}; at least one candidate must be asked for")
    queries = np.array(features, dtype=np.float32)
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise QueryRefused("nearest: a feature that is zero or not finite; it must point somewhere")
    hits = nearest(snapshot, encoder_id, queries / norms, k, candidates=candidates, exact=bool(exact))
    for ids in hits.ids:
        check_enough(snapshot, encoder_id, candidates, k, len(ids))
    return [
        [
            {"rank": rank, "image_id": image_id, "similarity": similarity}
            for rank, (image_id, similarity) in enumerate(zip(ids, similarities, strict=True), 1)
        ]
        for ids, similarities in zip(hits.ids, hits.similarity, strict=True)
    ]


def _attribute(
    snapshot: Snapshot,
    samples: list[str],
    k: int | None,
    encoder_id: str | None,
    tau: float | None,
    lam: float | None,
    mapper_id: str | None,
    candidates: str | None,
    exact: bool | None,
) -> list[list[dict] | None]:
    encoder_id, mapper = snapshot.compared(encoder_id, mapper_id)
    tau, lam = snapshot.calibration(encoder_id, mapper_id, tau, lam)
    where = f"{among('image_id', samples)} AND `{encoder_id}` IS NOT NULL"
    stored = snapshot.images(where, ["image_id", encoder_id])
    if not len(stored):
        return [None] * len(samples)
    ids = stored["image_id"].to_pylist()
    features = feature_matrix(stored[encoder_id])
    found = attribute(
        snapshot,
        encoder_id,
        features,
        ids,
        k=k,
        tau=tau,
        lam=lam,
        mapper=mapper,
        candidates=candidates,
        exact=bool(exact),
    )
    answers = dict(zip(ids, map(_share_rows, found), strict=True))
    return [answers.get(sample) for sample in samples]


def _share_rows(found: Attribution) -> list[dict]:
    return [
        {
            "rank": rank,
            "image_id": image_id,
            "similarity": similarity,
            "influence": share,
            "complete": found.complete,
            "missing_influence": found.missing_influence,
        }
        for rank, (image_id, similarity, share) in enumerate(
            zip(found.ids, found.similarity, found.influence, strict=True), 1
        )
    ]


def run(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    parameters: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> pa.Table:
    """The result of one SELECT; a column name that stands twice gets a number, so that no format loses one.

    most:   only that many of its first rows
    raises: QueryRefused with DuckDB's own words, or for anything but one SELECT; OSError for a damaged file
    """
    with _refused():
        relation = _asked(connection, statement, parameters)
        result = (relation if most is None else relation.limit(most)).to_arrow_table()
    return result.rename_columns(_distinct(result.column_names))


def stream(
    connection: duckdb.DuckDBPyConnection, statement: str, parameters: Mapping[str, Any], rows: int
) -> Iterator[pa.RecordBatch]:
    """The result of one SELECT in batches of some rows, in constant memory; raises as `run`."""
    with _refused():
        yield from _asked(connection, statement, parameters).to_arrow_reader(rows)


def _asked(
    connection: duckdb.DuckDBPyConnection, statement: str, parameters: Mapping[str, Any] | None
) -> duckdb.DuckDBPyRelation:
    parsed = connection.extract_statements(statement)
    if len(parsed) != 1 or parsed[0].type != duckdb.StatementType.SELECT:
        found = ", ".join(one.type.name for one in parsed) or "nothing"
        raise QueryRefused(f"one SELECT is needed, found: {found}; attrdb's tables change through attrdb ingest")
    return connection.sql(statement, params=dict(parameters or {}))


@contextmanager
def _refused() -> Iterator[None]:
    """Turns what DuckDB says into QueryRefused, or OSError for a damaged file."""
    try:
        yield
    except duckdb.PermissionException as error:
        raise QueryRefused(
            f"SQL in attrdb reads the database's own tables, not files or the network: {_first_line(error)}"
        ) from error
    except duckdb.Error as error:
        if damaged := re.search(r"reading the stream registered as '_?(\w+)' failed: (.*)", str(error)):
            raise OSError(f"table {damaged[1]}: {damaged[2]}") from error
        if "No match for FieldRef" in str(error):
            raise QueryRefused('Lance cannot filter on a vector column: write "column"::FLOAT[] IS NOT NULL') from error
        # An error of attrdb's own, raised inside nearest() or attribute(), comes back wrapped in DuckDB's words.
        _, _, own = str(error).partition("while executing the UDF: ")
        raise QueryRefused(own.partition(": ")[2] or str(error)) from error


def _distinct(names: list[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        number = 0
        while (candidate := f"{name}_{number}" if number else name) in taken:
            number += 1
        taken.append(candidate)
    return taken


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
