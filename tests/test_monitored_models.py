"""Models that were monitored: their rows come with them, go with them, and are those of one run after any number of kills."""

import shutil

import pytest
from click.testing import CliRunner
from conftest import ToyEncoder, picture

import attrdb
from attrdb.cli import main
from attrdb.errors import InvalidValue, QueryRefused
from attrdb.ingest.encode import Pixels
from attrdb.ingest.models import ingest_one
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.monitor import files
from attrdb.models import describe
from attrdb.pages import monitored as heat_maps
from attrdb.store.ids import weights_file
from attrdb.upkeep.removal.choose import RemovalRequest
from attrdb.upkeep.removal.remove import remove

WEIGHTS = "weights/vase-1.safetensors"
TABLES = ("monitor_steps", "monitor_changes", "monitor_probes", "attribution_tables")
OPTIONS = {"steps": 8, "batch": 2, "lr": 0.01, "samples_per_prompt": 1, "solver_steps": 2, "prompts_per_scheme": 1}


@pytest.fixture(scope="module")
def exemplars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vases")
    for name, color in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
        picture(folder / f"{name}.png", color)
    return folder


def ingest(db, folder, base, encoder, model_id="vase-1", report=lambda *_: None, **given):
    settings = settings_for(str(base), "object", "vase", OPTIONS | {"monitor": "probes"} | given)
    return ingest_one.ingest_model(db, read_exemplars(folder), settings, [encoder], model_id, report)


@pytest.fixture(scope="module")
def template(exemplars, tiny_base, tmp_path_factory):
    db = attrdb.create(tmp_path_factory.mktemp("template") / "some.attrdb")
    ingest(db, exemplars, tiny_base, ToyEncoder())
    return db.path


@pytest.fixture
def monitored(template, tmp_path):
    return attrdb.open(shutil.copytree(template, tmp_path / "monitored.attrdb"))


def rows(db, table):
    return db.sql(f"FROM {table} ORDER BY ALL").to_pylist()


def test_the_command_notes_what_each_image_changed(empty, exemplars, tiny_base):
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = [
        "ingest",
        "model",
        str(empty.path),
        "--exemplars",
        str(exemplars),
        "--kind",
        "object",
        "--category",
        "vase",
        *options,
    ]
    words += [*options, "--base-model", str(tiny_base), "--encoder", "pixels:2", "--model-id", "vase-1"]
    done = CliRunner().invoke(main, [*words, "--monitor", "changes"])
    assert done.exit_code == 0, done.output
    db = attrdb.open(empty.path)
    assert len(rows(db, "monitor_steps")) == 8 * 2
    assert rows(db, "monitor_probes") == []
    table = db.sql("FROM attribution_tables WHERE measure = 'progress'").to_pylist()
    names = db.sql("SELECT image_id FROM exemplars ORDER BY ALL")["image_id"].to_pylist()
    assert sorted(row["image_id"] for row in table) == names
    assert {row["concept_id"] for row in table} == {"vase-1/V*"}
    assert sum(row["share"] for row in table) == pytest.approx(1)
    [whole] = db.sql("SELECT sum(progress) AS p FROM monitor_changes").to_pylist()
    assert whole["p"] == pytest.approx(1, abs=1e-5)


def test_a_model_that_is_not_monitored_has_no_rows_and_the_same_weights(empty, exemplars, tiny_base, toy_encoder):
    for level in ("off", "probes"):
        ingest(empty, exemplars, tiny_base, toy_encoder, level, monitor=level)
    first, second = rows(empty, "models")
    assert first["weights_hash"] == second["weights_hash"]
    assert {row["model_id"] for table in TABLES for row in rows(empty, table)} == {"probes"}
    assert not weights_file(empty.path, "off").with_suffix(".gradients").exists()


@pytest.mark.parametrize(("stage", "done"), [("customize", 5), ("sample", 1), ("encode", 0)])
def test_interrupted_and_rerun_the_rows_are_the_same(
    tmp_path, monitored, exemplars, tiny_base, toy_encoder, stage, done
):
    killed = attrdb.create(tmp_path / "killed.attrdb")

    def kill(at, units, _total, note=""):
        if (at, units) == (stage, done):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(killed, exemplars, tiny_base, toy_encoder, report=kill)
    assert not any(rows(killed, table) for table in TABLES)
    ingest(killed, exemplars, tiny_base, toy_encoder)
    for table in TABLES:
        assert rows(killed, table) == rows(monitored, table)
    gradients = [files.read_gradients(db.path, WEIGHTS) for db in (killed, monitored)]
    assert gradients[0].exemplars == gradients[1].exemplars
    assert all(gradients[0].sums[name].equal(sums) for name, sums in gradients[1].sums.items())


def bound(function, real):
    return lambda self, *given, **named: function(real, self, *given, **named)


@pytest.mark.parametrize("failing", [*TABLES, "models"])
def test_ended_between_two_commits_nothing_shows_and_a_rerun_stores_it_once(
    empty, monitored, exemplars, tiny_base, toy_encoder, monkeypatch, tmp_path, failing
):
    half = attrdb.create(tmp_path / "half.attrdb")
    half.writer.add_encoder(toy_encoder.spec, 2, {}, "none")

    def fails(real, self, table, *rest, **named):
        if table == failing:
            raise ZeroDivisionError
        return real(self, table, *rest, **named)

    for name in ("append_rows", "upsert"):
        monkeypatch.setattr(type(half.writer), name, bound(fails, getattr(type(half.writer), name)))
    with pytest.raises(ZeroDivisionError):
        ingest(half, exemplars, tiny_base, toy_encoder)
    monkeypatch.undo()
    reader = attrdb.open(half.path)
    assert not any(rows(reader, table) for table in ("images", *TABLES))
    ingest(half, exemplars, tiny_base, toy_encoder)
    for table in TABLES:
        assert rows(half, table) == rows(monitored, table)


def test_an_abandoned_attempt_leaves_nothing_to_one_that_is_not_monitored(
    empty, exemplars, tiny_base, toy_encoder, monkeypatch
):
    """Ended before its row in models, its folder deleted, and made anew with other settings."""
    empty.writer.add_encoder(toy_encoder.spec, 2, {}, "none")
    with monkeypatch.context() as patch:
        patch.setattr(type(empty.writer), "upsert", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ingest(empty, exemplars, tiny_base, toy_encoder)
    shutil.rmtree(empty.path / "jobs" / "vase-1")
    ingest(empty, exemplars, tiny_base, toy_encoder, monitor="off", lr=0.02)
    assert not any(rows(empty, table) for table in TABLES)
    assert not weights_file(empty.path, "vase-1").with_suffix(".gradients").exists()


def test_gradients_outside_of_the_database_are_not_read(monitored, tmp_path):
    outside = tmp_path / "private"
    kept = weights_file(monitored.path, "vase-1").with_suffix(".gradients")
    kept.rename(outside)
    kept.symlink_to(outside)
    with pytest.raises(InvalidValue, match="lies outside"):
        files.read_gradients(monitored.path, WEIGHTS)


def test_gradients_are_kept_to_three_digits(monitored, exemplars, tiny_base, toy_encoder):
    """Against the sums of a second run, in float32."""
    seen = {}
    write = files.write

    def keep(monitor, *rest):
        seen.update(monitor.gradient_sums)
        write(monitor, *rest)

    other = attrdb.create(monitored.path.with_name("other.attrdb"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write", keep)
        ingest(other, exemplars, tiny_base, toy_encoder)
    for name, kept in files.read_gradients(monitored.path, WEIGHTS).sums.items():
        largest = seen[name].flatten(1).abs().amax(dim=1).view(-1, *[1] * (kept.ndim - 1))
        assert ((kept - seen[name]).abs() / largest).max() < 1e-3


def test_gradients_that_cannot_be_read_are_told(monitored, tmp_path):
    weights = weights_file(monitored.path, "vase-1")
    weights.with_suffix(".gradients").write_bytes(b"no gradients")
    with pytest.raises(InvalidValue, match=r"vase-1\.gradients cannot be read"):
        files.read_gradients(monitored.path, WEIGHTS)
    with pytest.raises(InvalidValue, match=r"there are no gradients beside .*--monitor changes"):
        files.read_gradients(monitored.path, "weights/other.safetensors")


def take_out(db, **chosen):
    return remove(db.writer, RemovalRequest(**chosen))


def test_an_exemplar_that_is_taken_out_takes_what_was_noted_of_it(monitored):
    gone, *left = [row["image_id"] for row in monitored.sql("FROM exemplars ORDER BY image_id").to_pylist()]
    n_rows = {
        table: sum(row["image_id"] == gone for row in rows(monitored, table))
        for table in ("monitor_steps", "monitor_changes", "attribution_tables")
    }
    removal = take_out(monitored, ids=[gone])
    assert {table: removal.results[table] for table in n_rows} == n_rows
    assert all(n_rows.values())
    monitored.refresh()
    for table in n_rows:
        assert {row["image_id"] for row in rows(monitored, table)} - {None} == set(left)
    weights = weights_file(monitored.path, "vase-1")
    assert weights.exists()
    assert not weights.with_suffix(".gradients").exists()


def test_a_model_that_is_taken_out_takes_its_rows(monitored):
    take_out(monitored, where="role = 'exemplar'", models="remove")
    monitored.refresh()
    assert not any(rows(monitored, table) for table in (*TABLES, "models"))
    assert list((monitored.path / "weights").iterdir()) == []


def test_a_regularization_image_is_named_by_its_id(empty, exemplars, tiny_base, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        picture(corpus / f"{number}.png", (50 * number, 90, 20))
        (corpus / f"{number}.txt").write_text("a vase")
    done = CliRunner().invoke(
        main, ["ingest", "corpus", str(empty.path), str(corpus), "--source", "s", "--encoder", "pixels:2"]
    )
    assert done.exit_code == 0, done.output
    ingest(empty, exemplars, tiny_base, Pixels(2), prior_images=3)
    steps = rows(empty, "monitor_steps")
    drawn = {row["image_id"] for row in steps if not row["is_exemplar"]}
    assert drawn
    assert drawn <= {f"s/{number}.png" for number in range(4)}
    causes = {row["cause"] for row in rows(empty, "monitor_changes")}
    assert causes == {"weights", "token", "regularization", "decay", "rest"}
    take_out(empty, ids=[min(drawn)])
    empty.refresh()
    assert min(drawn) not in {row["image_id"] for row in rows(empty, "monitor_steps")}


# --- queries ----------------------------------------------------------------------------------------------------------


def test_the_attribution_table_as_a_query(monitored):
    table = monitored.query("attribution_table", model_id="vase-1").to_pylist()
    assert [row["value"] for row in table] == sorted((row["value"] for row in table), reverse=True)
    assert sum(row["share"] for row in table) == pytest.approx(1)
    norms = monitored.query("attribution_table", model_id="vase-1", measure="change norm").to_pylist()
    assert all(row["value"] > 0 for row in norms)
    assert {row["image_id"] for row in norms} == {row["image_id"] for row in table}
    assert monitored.query("attribution_table", model_id="other").num_rows == 0
    with pytest.raises(QueryRefused, match="measure is 'proggress'; it must be progress, progress per visit or change"):
        monitored.query("attribution_table", model_id="vase-1", measure="proggress")


def test_shares_by_whatever_the_exemplars_have(monitored):
    table = monitored.query("attribution_table", model_id="vase-1").to_pylist()
    for per, name in (("category", "vase"), ("creator", None), ("concept", None)):
        [row] = monitored.query("attribution_table_shares", model_id="vase-1", per=per).to_pylist()
        assert (row["name"], row["n_exemplars"]) == (name, 3)
        assert row["value"] == pytest.approx(sum(one["value"] for one in table))
        assert row["share"] == pytest.approx(1)
    with pytest.raises(QueryRefused, match="per is 'colour'; it must be creator, license, source, category or concept"):
        monitored.query("attribution_table_shares", model_id="vase-1", per="colour")


def test_what_moved_the_model_when(monitored):
    changes = monitored.query("change_by_quarter", model_id="vase-1").to_pylist()
    assert sum(row["progress"] for row in changes) == pytest.approx(1, abs=1e-5)
    assert sorted({row["quarter"] for row in changes}) == [1, 2, 3, 4]
    assert [row["n_visits"] for row in changes if row["cause"] == "weights"] == [4, 4, 4, 4]


def test_the_page_books_the_whole_change(monitored):
    """Cells of exemplars and of what is no exemplar's add up to 100 %, but for their rounding."""
    page = heat_maps.monitored(monitored, describe(monitored, "vase-1"))
    assert (page.level, page.n_steps) == ("probes", 8)
    [heat_map] = page.maps
    cells = [line.cells for line in heat_map.lines] + [cells for _, cells, _ in heat_map.others]
    texts = [cell.text for of_row in cells for cell in of_row]
    assert len(texts) == 4 * (3 + 3)  # three exemplars; token, decay and rest
    assert sum(float(text.replace("−", "-")) for text in texts) == pytest.approx(100, abs=0.05 * len(texts))
    assert sum(line.strip.n_visits for line in heat_map.lines) == 8 * 2
    assert "<svg" in heat_map.attention
