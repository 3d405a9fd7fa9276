"""SQL over a snapshot: closed in, and the named queries keep their headers' promises."""

import re

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from conftest import TOY, of_duckdb_2

import attrdb
from attrdb import queries, sql
from attrdb.errors import InvalidValue, NotFound, QueryRefused
from attrdb.sql.relations import relations
from attrdb.store.schema import TABLES

ALL = sorted(queries.all_queries())
VIEWS = {*TABLES, *(one.name for one in relations()), "features", "unfinished_models"}
TRIAL = {"image_id": "m/0/1", "encoder_id": "toy_2", "mapper_id": "m", "model_id": "m", "key_set": "k"}


def test_views_by_role(toy):
    counts = {
        view: toy.sql(f"SELECT count(*) AS n FROM {view}")["n"][0].as_py()
        for view in ("images", "exemplars", "samples", "pretraining_images", "features")
    }
    assert counts == {"images": 7, "exemplars": 2, "samples": 2, "pretraining_images": 3, "features": 7}


def test_a_result_names_its_version(toy):
    assert toy.sql("SELECT 1 AS one").schema.metadata[b"attrdb.images_version"] == str(toy.version).encode()


def test_parameters_are_values_not_text(toy):
    found = toy.sql("SELECT count(*) AS n FROM images WHERE image_id = $id", {"id": "x' OR true --"})
    assert found["n"][0].as_py() == 0


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT * FROM read_parquet('https://example.org/x.parquet')",
        "COPY images TO '/tmp/stolen.parquet'",
        "ATTACH '/tmp/other.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "PRAGMA enable_profiling",
        "DROP VIEW samples",
        "CREATE TABLE t AS SELECT 1",
        "SELECT 1; SELECT 2",
        "EXPLAIN ANALYZE DROP VIEW samples",
        "SELECT * FROM toy",
        "WITH x AS (COPY (SELECT 42 AS a) TO '.tmp/stolen.csv') SELECT * FROM x",
        "SELECT * FROM glob('.tmp/*')",
        "SELECT * FROM read_text('.tmp/kept.txt')",
        "WITH x AS (INSERT INTO models SELECT 1) SELECT * FROM x",
        "",
    ],
)
def test_statements_that_are_refused(toy, statement, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".tmp").mkdir()  # the folder that DuckDB would take for its own
    (tmp_path / ".tmp" / "kept.txt").write_text("mine")
    with pytest.raises(QueryRefused):
        toy.sql(statement)


def test_reading_a_file_is_refused_in_our_words(toy):
    with pytest.raises(QueryRefused, match="reads the database's own tables, not files or the network"):
        toy.sql("SELECT * FROM read_csv('/etc/passwd')")
    with pytest.raises(QueryRefused, match="one SELECT is needed, found: COPY"):
        toy.sql("COPY images TO '/tmp/stolen.parquet'")


def test_a_mistake_gets_duckdbs_words(toy):
    with pytest.raises(QueryRefused, match="colour"):
        toy.sql("SELECT colour FROM images")


# --- named queries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_header_parameters_are_those_of_the_statement(name):
    query = queries.load(name)
    [statement] = duckdb.connect().extract_statements(query.sql)
    assert statement.type == duckdb.StatementType.SELECT
    assert set(statement.named_parameters) == {parameter.name for parameter in query.parameters}


@pytest.mark.parametrize("name", ALL)
def test_header_relations_are_those_of_the_statement(name):
    query = queries.load(name)
    tree = duckdb.connect().execute("SELECT json_serialize_sql(?)", [without_parameters(query.sql)]).fetchone()[0]
    named = set(re.findall(r'"(?:table_name|function_name)":"(\w+)"', tree))
    assert named & VIEWS == set(query.reads)


def without_parameters(statement):
    return re.sub(r"\$\w+", "1", statement)


@pytest.mark.parametrize("name", ALL)
def test_header_columns_are_those_of_an_empty_run(empty, name):
    empty.writer.add_encoder(**TOY)
    query = queries.load(name)
    given = {one.name: TRIAL[one.name] if one.default is None else one.default for one in query.parameters}
    with sql.connect(empty.snapshot) as connection:
        relation = connection.sql(query.sql, params=query.bind(given))
        found = list(zip(relation.columns, map(str, relation.types), strict=True))
    assert found == [(column.name, column.type) for column in query.columns]
    # An empty database does not have their ids.
    if query.reads == ("attribute",) or name in (
        "compare_mappers",
        "source_confidence",
        "source_metrics",
        "source_null",
    ):
        with pytest.raises(QueryRefused, match=r"no image 'm/0/1' in|no method 'toy_2/m'|no key set 'k'"):
            empty.sql(query.sql, query.bind(given))
    else:
        assert empty.sql(query.sql, query.bind(given)).num_rows == 0


@pytest.mark.parametrize("name", ALL)
def test_header_is_complete(name):
    query = queries.load(name)
    assert query.summary
    assert query.source
    assert query.grain.startswith("one row per")
    assert all(parameter.meaning for parameter in query.parameters)
    assert "SELECT *" not in query.sql


def test_parameters_are_checked(toy):
    with pytest.raises(InvalidValue, match="query recall_at_k has no parameter 'n'; it has: k"):
        toy.query("recall_at_k", n=3)
    with pytest.raises(InvalidValue, match="parameter k is 'ten'; it must be INTEGER"):
        toy.query("recall_at_k", k="ten")
    with pytest.raises(InvalidValue, match=r"top_candidates needs image_id .* give it with -p image_id="):
        toy.query("top_candidates")
    with pytest.raises(NotFound, match="no query 'recal_at_k'; nearest are 'recall_at_k'"):
        toy.query("recal_at_k")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("tau", 0, "> 0"), ("tau", -0.1, "> 0"), ("tau", "nan", "> 0"), ("lam", 1.0, "< 1"), ("lam", -1, ">= 0")],
)
def test_parameters_outside_their_range(toy, name, value, says):
    with pytest.raises(InvalidValue, match=f"parameter {name} is .*it must be DOUBLE .*{says}"):
        toy.query("influence", image_id="m/0/1", **{name: value})


@pytest.mark.parametrize("value", [0, 2.5, None, float("nan")])
def test_k_is_a_whole_number_from_1(toy, value):
    with pytest.raises(InvalidValue, match=r"parameter k is .*it must be INTEGER"):
        toy.query("recall_at_k", k=value)


def test_a_query_about_an_image_names_one_that_is_there(toy):
    assert toy.query("influence", image_id="m/0/1").num_rows > 0  # the encoder is the database's first
    with pytest.raises(NotFound, match="no image 'nobody'"):
        toy.query("influence", image_id="nobody")
    with pytest.raises(NotFound, match="no encoder 'clip'"):
        toy.query("top_candidates", image_id="m/0/1", encoder_id="clip")


def test_columns_of_the_same_name_are_numbered(toy):
    assert toy.sql("SELECT 1 AS a, 2 AS a, 3 AS b, 4 AS a").to_pylist() == [{"a": 1, "a_1": 2, "b": 3, "a_2": 4}]


@of_duckdb_2
def test_a_filter_on_a_vector_column_names_the_cure(toy):
    with pytest.raises(QueryRefused, match=r'write "column"::FLOAT\[\] IS NOT NULL'):
        toy.sql("SELECT image_id FROM images WHERE toy_2 IS NOT NULL")
    assert toy.sql("SELECT image_id FROM images WHERE toy_2::FLOAT[] IS NOT NULL").num_rows == 7


def test_a_header_line_that_is_not_understood():
    with pytest.raises(InvalidValue, match="query x: not a parameter line"):
        queries.parse("x", "metrics", "-- Says.\n-- param k INTEGER\nSELECT 1")


# --- metrics: by hand, and against an oracle ------------------------------------------------------------------------


def ranks(entries, method_id="toy_2", gallery="own", size=100):
    rows = [
        {
            "method_id": method_id,
            "gallery": gallery,
            "sample_id": sample,
            "exemplar_id": exemplar,
            "rank": rank,
            "gallery_size": size,
            "images_version": 1,
        }
        for sample, exemplar, rank in entries
    ]
    return pa.Table.from_pylist(rows, TABLES["exemplar_ranks"])


def test_metrics_by_hand(toy):
    entries = [("m/0/1", "m/e0", 1), ("m/0/1", "m/e40", 20), ("m/0/2", "m/e0", 5), ("m/0/2", "m/e40", 3)]
    toy.writer.replace_exemplar_ranks(ranks(entries), "toy_2", "own")
    [recall] = toy.query("recall_at_k", k=4).to_pylist()
    # sample 1 finds one of two, sample 2 one of two
    assert recall["recall_at_k"] == recall["capped_recall_at_k"] == 0.5
    assert recall["chance"] == pytest.approx(0.04)
    assert recall["ceiling"] == 1.0
    assert (recall["n_models"], recall["n_samples"], recall["n_unranked"]) == (1, 2, 0)
    [first] = toy.query("recall_at_k", k=1).to_pylist()
    # of two exemplars one can be first: found 1/2 and 0/2, of what can be found 1/1 and 0/1
    assert (first["ceiling"], first["recall_at_k"], first["capped_recall_at_k"]) == (0.5, 0.25, 0.5)
    [precision] = toy.query("mean_average_precision").to_pylist()
    # sample 1: (1/1 + 2/20) / 2 = 0.55; sample 2: (1/3 + 2/5) / 2 = 11/30
    assert precision["mean_average_precision"] == pytest.approx((0.55 + 11 / 30) / 2)


def test_chance_is_what_a_random_order_gives(toy):
    entries = [(sample, exemplar, 1) for sample in ("m/0/1", "m/0/2") for exemplar in ("m/e0", "m/e40")]
    toy.writer.replace_exemplar_ranks(ranks(entries, size=60), "toy_2", "own")
    rng = np.random.default_rng(0)
    drawn = np.sort(np.stack([rng.choice(60, 2, replace=False) + 1 for _ in range(40_000)]), axis=1)
    simulated = (np.arange(1, 3) / drawn).mean()
    assert toy.query("mean_average_precision")["chance"][0].as_py() == pytest.approx(simulated, rel=0.02)
    assert toy.query("recall_at_k", k=6)["chance"][0].as_py() == pytest.approx((drawn <= 6).mean(), rel=0.02)


def test_what_was_not_ranked_counts_as_not_found(toy):
    toy.writer.replace_exemplar_ranks(ranks([("m/0/1", "m/e0", 1)]), "toy_2", "own")
    [recall] = toy.query("recall_at_k", k=10).to_pylist()
    assert recall["recall_at_k"] == 0.25
    assert recall["n_unranked"] == 3
    [precision] = toy.query("mean_average_precision").to_pylist()
    assert precision["mean_average_precision"] == 0.25
    assert precision["n_unranked"] == 3


def test_ranks_are_replaced_per_encoder_and_gallery(toy):
    toy.writer.replace_exemplar_ranks(ranks([("m/0/1", "m/e0", 9)]), "toy_2", "own")
    toy.writer.replace_exemplar_ranks(ranks([("m/0/1", "m/e0", 7)], gallery="all"), "toy_2", "all")
    toy.writer.replace_exemplar_ranks(ranks([("m/0/2", "m/e0", 2)]), "toy_2", "own")
    found = toy.sql("SELECT gallery, sample_id, rank FROM exemplar_ranks ORDER BY ALL").to_pylist()
    assert found == [
        {"gallery": "all", "sample_id": "m/0/1", "rank": 7},
        {"gallery": "own", "sample_id": "m/0/2", "rank": 2},
    ]


def test_metrics_of_nothing(empty):
    assert empty.query("recall_at_k").num_rows == 0
    assert empty.query("mean_average_precision").num_rows == 0


def test_an_older_snapshot_is_what_an_open_database_sees(toy):
    other = attrdb.open(toy.path)
    toy.writer.append_images(pa.table({"image_id": ["new"], "role": ["pretraining"]}))
    assert other.sql("SELECT count(*) AS n FROM images")["n"][0].as_py() == 7


def test_nearest_gives_cosines_whatever_the_length_of_the_feature(toy):
    found = toy.sql("SELECT image_id, similarity FROM nearest([0.0, 3.0], k := 2)").to_pylist()
    assert [row["image_id"] for row in found] == ["p90", "m/e40"]
    np.testing.assert_allclose([row["similarity"] for row in found], [1, np.sin(np.radians(40))], atol=1e-6)
    for feature, says in (
        ("[0.0, 0.0]", "length 0.0; it must be finite and not zero"),
        ("[1.0]", r"the feature has shape \(1,\), encoder 'toy_2' makes \(2,\)"),
        ("[1.0, NULL]", "length nan; it must be finite"),
    ):
        with pytest.raises(QueryRefused, match=says):
            toy.sql(f"FROM nearest({feature})")
    with pytest.raises(QueryRefused, match="k is 0; at least one candidate"):
        toy.sql("FROM nearest([1.0, 0.0], k := 0)")


def test_attribute_of_every_sample_in_one_statement(toy):
    statement = """
        SELECT samples.image_id AS sample_id, found.rank, found.image_id, found.influence
        FROM samples, attribute(samples.image_id, k := NULL) AS found
        ORDER BY sample_id, rank
    """
    found = toy.sql(statement).to_pylist()
    for sample_id in ("m/0/1", "m/0/2"):
        rows = [row for row in found if row["sample_id"] == sample_id]
        alone = [row for row in toy.attribute(sample_id).to_pylist() if row["influence"] > 0]
        assert [(row["image_id"], row["influence"]) for row in rows] == [
            (row["image_id"], row["influence"]) for row in alone
        ]
        assert sum(row["influence"] for row in rows) == pytest.approx(1)
    assert toy.sql("FROM attribute(NULL)").num_rows == 0


def test_influence_is_shared_out(toy):
    rows = toy.query("influence_by_model", image_id="m/0/1").to_pylist()
    whole = toy.query("influence", image_id="m/0/1").to_pylist()
    assert {row["model_id"]: row["influence"] for row in rows} == {
        model_id: pytest.approx(sum(row["influence"] for row in whole if row["model_id"] == model_id))
        for model_id in ("m", None)
    }
    for by in ("creator", "license", "source"):
        [row] = toy.query(f"influence_by_{by}", image_id="m/0/1").to_pylist()
        assert (row[by], row["n_candidates"], row["influence"]) == (None, len(whole), pytest.approx(1))
