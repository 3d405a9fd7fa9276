"""The report: figures that are those of the queries, plots, and a page that needs nothing beside it."""

import re
import shutil
from html.parser import HTMLParser

import jinja2
import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import ROOT, rows
from learnable import table
from test_train import QUICK

import attrdb
from attrdb.cli import main
from attrdb.errors import NotFound
from attrdb.pages import plots
from attrdb.pages.report import case_name, figures, render, render_plots
from attrdb.store.schema import feature_array
from attrdb.text import fixed
from attrdb.training.calibrate import calibrate
from attrdb.training.evaluate import evaluate
from attrdb.training.train import train


@pytest.fixture(scope="module")
def db(learnable, tmp_path_factory):
    """A database with everything that a report shows but mixed models: ranks, a mapper, a calibration."""
    db = attrdb.open(shutil.copytree(learnable.path, tmp_path_factory.mktemp("report") / "some.attrdb"))
    train(db, settings=QUICK, mapper_id="tuned")
    [row] = db.sql("SELECT * FROM mappers").to_pylist()
    db.writer.upsert("mappers", [{**row, "mapper_id": "tuned<b>"}])  # as an earlier attrdb took it
    db.writer.delete("mappers", "mapper_id = 'tuned'")
    calibrate(db, "tuned<b>")
    for mapper_id in (None, "tuned<b>"):
        evaluate(db, mapper_id)
    return db


@pytest.fixture(scope="module")
def found(db):
    return figures(db)


@pytest.fixture(scope="module")
def page(db, found):
    return render(db, found)


def page_of(db):
    return render(db, figures(db))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def test_figures_are_those_of_the_queries(db, found):
    for k in (5, 10, 100):
        wanted = {
            tuple(row[name] for name in ("mapper_id", "kind", "split", "prompt_scheme")): row["recall_at_k"]
            for row in db.query("recall_at_k", k=k).to_pylist()
        }
        mine = {
            (row["mapper_id"], row["kind"], row["split"], row["prompt_scheme"]): row[f"recall_{k}"][0]
            for row in found["cases"]
        }
        assert mine == pytest.approx(wanted)
    assert all(low <= mean <= high for row in found["cases"] for mean, low, high in [row["recall_10"], row["map"]])
    point = next(row for row in found["curves"] if (row["kind"], row["split"], row["k"]) == ("style", "test", 10))
    both = [
        row["recall_10"][0]
        for row in found["cases"]
        if (row["kind"], row["split"], row["mapper_id"]) == ("style", "test", point["mapper_id"])
    ]
    assert len(both) == 2
    assert point["recall"] == pytest.approx(sum(both) / 2)
    assert {row["mapper_id"] for row in found["gains"]} == {"tuned<b>"}
    style = next(row for row in found["cases"] if (row["kind"], row["split"]) == ("style", "test"))
    assert (style["ceiling_5"], style["ceiling_100"], style["n_unranked"]) == (1.0, 1.0, 0)
    assert style["chance_5"] == pytest.approx(5 / 203)


def test_page_needs_nothing_beside_it(page):
    parsed = Page(page)
    assert page.count("<svg") == 3
    assert not [source for source in parsed.sources if not source.startswith(("data:", "#"))]
    assert "script" not in parsed.tags
    assert "<b>estimate</b>" in page
    assert "tuned&lt;b&gt;" in page
    assert "tuned<b>" not in page


def test_queries_of_the_page_are_test_samples(page):
    shown = set(re.findall(r"(?:object|style) · (\w+) · m\d\d", page))
    assert shown == {"test"}


def test_plots_are_the_same_for_the_same_figures(found):
    assert render_plots(found) == render_plots(found)
    assert set(render_plots(found)) == {"curves", "gains", "reliability"}


def test_sets_are_plotted_against_exemplars():
    points = [{"case": "sets of 10", "method": name, "x": n / 4, "y": n / 8} for n, name in enumerate("abc")]
    text = plots.general(points)
    assert all(
        f">{word}<" in text for word in ("sets of 10", "Recall@10 on exemplars", "Recall@size on sets", "a", "b", "c")
    )


def test_command_writes_the_page(db, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", str(db.path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stderr == f"wrote {out}\n"
    assert out.read_text().rstrip().endswith("</html>")


def test_a_report_of_nothing_says_what_to_do(tmp_path, db):
    empty = attrdb.create(tmp_path / "empty.attrdb")
    with pytest.raises(NotFound, match=r"has no ranks on gallery 'own'; fill them with: attrdb evaluate"):
        figures(empty)
    with pytest.raises(NotFound, match="gallery 'all'"):
        figures(db, "all")


def test_ranks_that_a_grown_database_lacks_are_told(db, page, tmp_path):
    assert "never ranked" not in page
    grown = attrdb.open(shutil.copytree(db.path, tmp_path / "grown.attrdb"))
    names = ["new/e", "new/0/0"]
    matrix = np.eye(12, dtype=np.float32)[:2]
    both = [
        table([name], role, matrix[n : n + 1], "new", ["gpt"])
        for n, (name, role) in enumerate(zip(names, ("exemplar", "sample"), strict=True))
    ]
    grown.writer.append_model(pa.concat_tables(both), {"model_id": "new", "kind": "object"})
    grown.refresh()
    assert "2 pairs of sample and exemplar were never ranked" in page_of(grown)


def test_a_mapper_without_metrics_and_an_encoder_without_features(db, tmp_path):
    other = attrdb.open(shutil.copytree(db.path, tmp_path / "other.attrdb"))
    row = other.sql("SELECT * FROM mappers").to_pylist()[0]
    other.writer.upsert("mappers", [row | {"metrics": None, "mapper_id": "foreign"}])
    other.refresh()
    assert "foreign" in page_of(other)


def test_the_gallery_shows_every_encoder_and_the_best_mapper(db, tmp_path):
    other = attrdb.open(shutil.copytree(db.path, tmp_path / "two.attrdb"))
    other.writer.add_encoder("toy:3", 3, {}, "none")
    images = other.images("true", ["image_id", "toy_12"])
    first_three = np.array(images["toy_12"].to_pylist())[:, :3]
    features = pa.table({"image_id": images["image_id"], "toy_3": feature_array(first_three)})
    lance.dataset(other.path / "images.lance").merge_insert("image_id").when_matched_update_all().execute(features)
    other.refresh()
    evaluate(other, "toy_3")
    other.refresh()
    page = page_of(other)
    answers = re.findall(r'<div class="features">(toy_3|toy_12|tuned&lt;b&gt;)</div>', page)
    n_queries = page.count('class="query"')
    assert answers == ["toy_12", "toy_3", "tuned&lt;b&gt;"] * n_queries


def test_models_without_split_or_mapper_have_a_page(tmp_path):
    db = attrdb.create(tmp_path / "some.attrdb")
    db.writer.add_encoder("toy:2", 2, {}, "none")
    db.writer.append_images(rows([("p", "pretraining", None, 90.0)]))
    db.writer.append_model(
        rows([("n/e", "exemplar", "n", 0.0), ("n/0/0", "sample", "n", 5.0)]),
        {"model_id": "n", "kind": "object", "split": "test"},
    )
    entries = [("m/e", "exemplar", "m", 0.0), ("m/0/0", "sample", "m", 5.0)]
    db.writer.append_model(rows(entries, prompt_scheme=pa.array([None, "gpt"])), {"model_id": "m", "kind": "object"})
    evaluate(db)
    text = page_of(db)
    assert "1 object test, 1 object of no split." in text
    assert "None" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)


def test_the_contents_lead_somewhere(page):
    targets = re.findall(r'<a href="#([^"]+)"', page)
    assert {"queries", "methods", "retrieval", "mappers", "calibration"} <= set(targets)
    assert all(f'id="{target}"' in page for target in targets)


@pytest.mark.parametrize("name", ["report.html", "demo.html", "model.html"])
def test_a_page_is_for_dark_screens_and_for_readers_who_hear_it(name):
    template = (ROOT / "attrdb" / "pages" / "templates" / name).read_text()
    assert "prefers-color-scheme: dark" in template
    assert re.search(r"@media \(max-width: \d+px\)", template)
    alts = re.findall(r'<img [^>]*?alt="([^"]*)"', template)
    assert len(alts) == template.count("<img ")
    assert all("{{" in alt for alt in alts)  # each says what its picture is


@pytest.mark.parametrize("name", ["report.html", "demo.html"])
def test_a_page_can_be_printed(name):
    assert "@media print" in (ROOT / "attrdb" / "pages" / "templates" / name).read_text()


def test_candidates_without_influence_do_not_fill_a_row(page):
    shown = re.findall(r'<figure class="(\w*)".*?(\d+\.\d) %', page, re.DOTALL)
    assert shown
    assert not [figure for figure in shown if figure == ("", "0.0")]


def test_a_case_of_one_model_has_no_interval():
    template = (ROOT / "attrdb" / "pages" / "templates" / "report.html").read_text()
    macro = template.partition("{% endmacro %}")[0] + "{% endmacro %}"
    environment = jinja2.Environment(autoescape=True)
    environment.filters["fixed"] = fixed
    value = environment.from_string(macro).module.value
    assert value([0.8125, 0.8125, 0.8125], 1).strip() == "0.813"
    assert "0.700 to 0.901" in value([0.8125, 0.7, 0.9005], 2)


def test_a_case_without_a_split_says_so():
    assert case_name({"kind": "object", "split": None, "prompt_scheme": "gpt"}) == "object · no split · gpt"
    assert case_name({"kind": "object", "split": "test", "prompt_scheme": "gpt"}) == "object · test · gpt"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.8125, 3, "0.813"), (0.0625, 3, "0.063"), (1, 1, "1.0"), (2.675, 2, "2.68")],
)
def test_halves_are_rounded_up_on_every_page(value, digits, text):
    assert fixed(value, digits) == text
