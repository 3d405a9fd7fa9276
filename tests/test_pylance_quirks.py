"""What attrdb works around in pylance 14, one canary each. A test that fails here means that Lance has changed.

Then see whether the code that the test names can be simplified, and raise the cap on pylance in pyproject.toml. Not here,
since they take a large dataset, several processes or a stopwatch to be seen:

- A filter `IS NOT NULL` on a vector column copies the column; a scalar index that keeps most rows makes a scan slower than
  none (store/features.py). Batches of 8,192 rows take longer than two of 4,096.
- Left free to look into more cells (`maximum_nprobes`), a search takes twice the time; it keeps one core busy, of however
  many queries; one that goes beyond the index compares for one query after the other (search/ivf.py).
- An index in several segments may give a row twice (search/ivf.py, `_hits`).
- Nearly all of a build with Lance's own parameters goes into dividing the features (search/index_build.py).
- Two cores are kept for reading unless LANCE_CPU_THREADS says otherwise (search/memory.py).
- There is no commit over two tables (store/snapshot.py, `hidden_models`), and Lance does not work after a fork
  (ingest/models/executors.py).
- A damaged data file raises errors of many kinds (upkeep/health.py; tests/test_storage.py changes bytes at random).
- `merge_insert` of one column writes the whole rows again; `update_columns` does not (ingest/encode/add_encoder.py).
- `alter_columns` declares more keys as needed than it needs (store/upgrades.py; mypy sees it).
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pytest
from conftest import of_duckdb_2
from lance.commit import CommitConflictError

from attrdb.search import ivf

KEY = {"lance-schema:unenforced-primary-key": "true"}
N, DIMENSION = 300, 8


@pytest.fixture
def write(tmp_path):
    """Writes a table as a dataset; its path."""

    def write(table, name="table", **options):
        path = str(tmp_path / f"{name}.lance")
        lance.write_dataset(table, path, **options)
        return path

    return write


def vectors(dimension=DIMENSION, **columns):
    values = np.random.default_rng(0).normal(size=(N, dimension)).astype(np.float32)
    return pa.table({"feature": pa.FixedSizeListArray.from_arrays(values.ravel(), dimension), **columns})


def inserted_twice(path, metadata, use_index):
    """Whether two writers that have not seen each other's rows both insert an id."""
    schema = pa.schema([pa.field("id", pa.string(), nullable=False, metadata=metadata)])
    lance.write_dataset(pa.table({"id": ["old"]}, schema=schema), path)
    lance.dataset(path).create_scalar_index("id", "BTREE")
    for writer in [lance.dataset(path), lance.dataset(path)]:
        insert = writer.merge_insert("id").when_not_matched_insert_all().use_index(use_index)
        insert.execute(pa.table({"id": ["new"]}, schema=schema))
    return lance.dataset(path).count_rows("id = 'new'") == 2


def test_a_merge_through_an_index_commits_no_keys(tmp_path):
    """store/writer.py, `append_images`: `use_index(False)` can go."""
    assert inserted_twice(str(tmp_path / "indexed.lance"), KEY, use_index=True)
    assert not inserted_twice(str(tmp_path / "read.lance"), KEY, use_index=False)


def test_only_a_primary_key_keeps_writers_from_inserting_an_id_twice(tmp_path):
    """store/columns.py, `Column.field`: the metadata of keys can go."""
    assert inserted_twice(str(tmp_path / "plain.lance"), None, use_index=False)


def test_a_merge_that_gives_up_raises_no_conflict_error(write):
    """store/writer.py, `commit`: the test of the error's words can go."""
    path = write(pa.table({"id": ["a"], "value": [1]}))
    first, second = lance.dataset(path), lance.dataset(path)
    rows = pa.table({"id": ["a"], "value": [2]})
    first.merge_insert("id").when_matched_update_all().conflict_retries(0).execute(rows)
    with pytest.raises(OSError, match="concurrent") as caught:
        second.merge_insert("id").when_matched_update_all().conflict_retries(0).execute(rows)
    assert not isinstance(caught.value, CommitConflictError)


@of_duckdb_2
def test_a_null_test_on_a_vector_column_cannot_be_pushed_down(write):
    """sql/relations.py, `features_view`, need not cast the column; sql/connection.py, `_refused`, need not explain it."""
    table = pa.table({"feature": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))})
    connection = duckdb.connect()
    connection.register("images", lance.dataset(write(table)))
    with pytest.raises(duckdb.Error, match="No match for FieldRef"):
        connection.sql("SELECT count(*) FROM images WHERE feature IS NOT NULL").fetchall()
    assert connection.sql("SELECT count(*) FROM images WHERE feature::FLOAT[] IS NOT NULL").fetchall() == [(1,)]


def test_fast_search_goes_by_a_scalar_index_that_covers_less(write):
    """search/ivf.py: `Index.filtered` can go, and `use_scalar_index` with it."""
    path = write(vectors(role=["sample"] * N))
    lance.dataset(path).create_scalar_index("role", "BITMAP")
    lance.write_dataset(vectors(role=["exemplar"] * N), path, mode="append")
    lance.dataset(path).create_index("feature", "IVF_FLAT", num_partitions=1)

    def n_found(use_scalar_index):
        found = lance.dataset(path).to_table(
            columns=["_distance"],
            filter="role = 'exemplar'",
            prefilter=True,
            fast_search=True,
            use_scalar_index=use_scalar_index,
            nearest={"column": "feature", "q": np.ones(DIMENSION, np.float32), "k": 5},
        )
        return len(found)

    assert (n_found(True), n_found(False)) == (0, 5)


def test_an_index_is_named_after_its_column(write):
    """search/ivf.py, `index_name`, has to follow."""
    path = write(vectors())
    lance.dataset(path).create_index("feature", "IVF_FLAT", num_partitions=1)
    assert [one.name for one in lance.dataset(path).describe_indices()] == [ivf.index_name("feature")]


def test_one_bit_a_dimension_takes_whole_bytes(write):
    """search/index_build.py, `plan`: IVF_SQ is not needed."""
    with pytest.raises(ValueError, match="divisible by 8"):
        lance.dataset(write(vectors(12))).create_index("feature", "IVF_RQ", num_partitions=1, num_bits=1)


def test_cells_of_rows_are_taken_from_one_fragment_only(write):
    """search/index_build.py, `build`: `max_rows_per_file` can go."""
    cells = pa.table({"row_id": pa.array(range(N), pa.uint64()), "partition": pa.array([0, 1] * (N // 2), pa.uint32())})
    images = lance.dataset(write(vectors()))
    for name, rows in (("one", N), ("three", N // 3)):
        divided = write(cells, name, max_rows_per_file=rows)
        options = {"num_partitions": 2, "ivf_centroids": np.eye(2, DIMENSION, dtype=np.float32)}
        if name == "one":
            images.create_index("feature", "IVF_FLAT", precomputed_partition_dataset=divided, **options)
        else:
            with pytest.raises(ValueError, match="only one fragment"):
                images.create_index("feature", "IVF_FLAT", precomputed_partition_dataset=divided, **options)


@pytest.mark.parametrize("predicate", ["n = 1) OR (true", "n = 1 -- OR true", "n = 1) no SQL ("])
def test_what_follows_a_bracket_too_many_is_ignored(write, predicate):
    """store/predicates.py: `fault_of` need not look for brackets and comments."""
    assert lance.dataset(write(pa.table({"n": [1, 2, 3]}))).count_rows(predicate) == 1


def test_times_of_versions_have_no_zone(write):
    """store/history.py: `_utc` can go."""
    [version] = lance.dataset(write(pa.table({"n": [1]}))).versions()
    assert version["timestamp"].tzinfo is None


def test_names_of_manifests_count_down(write):
    """store/tables.py, `open_table`: the newest manifest is the last by name."""
    path = write(pa.table({"n": [1]}))
    [oldest] = Path(path).glob("_versions/*.manifest")
    lance.write_dataset(pa.table({"n": [2]}), path, mode="append")
    assert min(Path(path).glob("_versions/*.manifest")) < oldest


def test_errors_name_places_in_the_source_of_lance(write):
    """store/lance_errors.py: `words_of` need not take them out."""
    with pytest.raises(ValueError, match=r"/\S+\.rs:\d+"):
        lance.dataset(write(pa.table({"n": [1]}))).to_table(filter="nothing = 1")


def test_a_panic_is_no_exception(write):
    """store/lance_errors.py, `by_lance`: the test by name can go, and `storage` can catch Exception."""
    path = write(pa.table({"n": [1]}))
    [manifest] = Path(path).glob("_versions/*.manifest")
    content = bytearray(manifest.read_bytes())
    # Where the manifest begins in its file: its length is read from there, and is far too large.
    content[-16:-8] = (len(content) - 20).to_bytes(8, "little")
    content[-20:-16] = b"\xff\xff\xff\x7f"
    manifest.write_bytes(content)
    with pytest.raises(BaseException, match="out of range") as caught:
        lance.dataset(path)
    assert type(caught.value).__name__ == "PanicException"
    assert not isinstance(caught.value, Exception)
