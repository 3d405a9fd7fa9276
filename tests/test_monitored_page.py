"""What the page of a monitored model shows: which image moved it when."""

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import TOY, angle
from PIL import Image

from attrdb import models
from attrdb.cli import main
from attrdb.ingest.read.pictures import webp
from attrdb.pages import model_page
from attrdb.pages.monitored import Cell, monitored
from attrdb.store.schema import TABLES, feature_array

EVIL = '"><script>alert("vase")</script>'
CONCEPT = "vase-1/V*"


class Page(HTMLParser):
    """The tags of a page, its addresses, and its text without styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.images = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += data if self.tags and self.tags[-1] != "style" else ""


def append(db, table, rows):
    rows = [{"model_id": "vase-1"} | row for row in rows]
    db.writer.append_rows(table, pa.Table.from_pylist(rows, schema=TABLES[table]), db.snapshot)
    db.refresh()


def add_model(db, names, kind="object", concepts=("V*",), caption="a vase"):
    """A model with exemplars of these names, shared out among its concepts; the last one's picture is not stored."""
    if not db.snapshot.encoders:
        db.writer.add_encoder(**TOY)
    pictures = [webp(Image.new("RGB", (32, 32), (number % 250, 0, 0))) for number in range(len(names) - 1)]
    columns = {
        "image_id": [f"vase-1/{name}" for name in names],
        "role": ["exemplar"] * len(names),
        "model_id": ["vase-1"] * len(names),
        "concept_id": [f"vase-1/{concepts[number % len(concepts)]}" for number in range(len(names))],
        "image": [*pictures, None],
        "prompt": [caption] * len(names),
        "creator": ["Ann & Co"] * len(names),
        "license": ["CC0"] * len(names),
        "toy_2": feature_array(np.array([angle(number) for number in range(len(names))])),
    }
    of_concept = {"model_id": "vase-1", "kind": "object", "train_prompt": "photo of V* vase"}
    rows = [{"concept_id": f"vase-1/{token}", "token": token} | of_concept for token in concepts]
    db.writer.append_model(pa.table(columns), {"model_id": "vase-1", "kind": kind}, concepts=rows)
    db.refresh()


def rated(name, value, share=0.0, concept_id=CONCEPT, measure="progress"):
    named = {"image_id": f"vase-1/{name}", "concept_id": concept_id, "measure": measure}
    return named | {"value": value, "share": share, "n_visits": 1}


def changed(quarter, progress, name=None, cause="weights", concept_id=CONCEPT):
    image_id = name and f"vase-1/{name}"
    return {
        "concept_id": concept_id,
        "quarter": quarter,
        "cause": cause,
        "image_id": image_id,
        "progress": progress,
    }


def drawn(step, name, loss, slot=0, is_exemplar=True):
    placed = {"step": step, "slot": slot, "view": 0, "timestep": 1}
    return placed | {"image_id": f"vase-1/{name}", "is_exemplar": is_exemplar, "loss": loss}


def read(db):
    return monitored(db, models.describe(db, "vase-1"))


@pytest.fixture
def vases(empty):
    """Three exemplars: `b` moved the model most, `a` pulled away, `c` was drawn once; eight steps."""
    add_model(empty, ["a", "b", "c"])
    append(empty, "monitor_steps", [drawn(0, "a", 0.1), drawn(0, "b", 0.5, 1), drawn(1, "b", 0.3), drawn(7, "c", 0.2)])
    append(
        empty,
        "monitor_changes",
        [
            changed(1, 0.4, "b"),
            changed(2, 0.5, "b"),
            changed(4, 0.0, "b"),
            changed(1, -0.25, "a"),
            changed(4, 0.2, "c"),
            changed(1, 0.149, cause="token"),
            changed(2, 0.001, cause="token"),
            changed(4, -1e-9, cause="rest"),
        ],
    )
    values = [rated("a", -0.25), rated("b", 0.9, 0.818), rated("c", 0.2, 0.182), rated("a", 7.0, measure="change norm")]
    append(empty, "attribution_tables", values)
    return empty


def test_a_heat_map_by_hand(vases):
    shown = read(vases)
    assert (shown.level, shown.n_steps, shown.n_bins, shown.binned) == ("changes", 8, 8, False)
    assert shown.quarters == ["1–2", "3–4", "5–6", "7–8"]
    [heat_map] = shown.maps
    assert (heat_map.title, heat_map.n_left_out, heat_map.attention) == (None, 0, None)
    assert [(line.title.split("/")[-1], line.value, line.share) for line in heat_map.lines] == [
        ("b", "90.0", "81.8"),
        ("c", "20.0", "18.2"),
        ("a", "−25.0", "0.0"),
    ]
    dash = Cell("–")
    assert [line.cells for line in heat_map.lines] == [
        [Cell("40.0", False, 0.8), Cell("50.0", False, 1.0), dash, Cell("0.0")],
        [dash, dash, dash, Cell("20.0", False, 0.4)],
        [Cell("−25.0", True, 0.5), dash, dash, dash],
    ]
    assert heat_map.others == [
        ("token", [Cell("14.9", False, 0.3), Cell("0.1"), dash, dash], Cell("15.0", False, 0.3)),
        ("rest", [dash, dash, dash, Cell("0.0", True)], Cell("0.0", True)),
    ]


def test_strips_by_hand(vases):
    b, c, a = (line.strip for line in read(vases).maps[0].lines)
    assert b.paths == {3: "M1 0h1v1h-1z", 4: "M0 0h1v1h-1z"}  # losses 0.1, 0.2, 0.3, 0.5 have shades 1 to 4
    assert (c.paths, a.paths) == ({2: "M7 0h1v1h-1z"}, {1: "M0 0h1v1h-1z"})
    assert b.label == "drawn 2 times, in 2 of 8 steps; mean loss 0.4"


def test_a_long_run_is_binned_and_regularization_images_have_no_strip(empty):
    add_model(empty, ["a", "b"])
    steps = [drawn(step, "a", 1.0) for step in range(600)]
    append(empty, "monitor_steps", [*steps, drawn(599, "b", 1.0, 1), drawn(599, "x", 9.0, 2, is_exemplar=False)])
    shown = read(empty)
    assert (shown.level, shown.n_steps, shown.n_bins, shown.binned) == ("steps", 600, 300, True)
    [heat_map] = shown.maps
    a, b = heat_map.lines  # drawn most often first
    assert a.strip.label == "drawn 600 times, in 300 of 300 spans of steps; mean loss 1"
    assert b.strip.paths == {1: "M299 0h1v1h-1z"}
    assert (a.cells, a.value, a.share, heat_map.others) == ([], None, None, [])
    page = Page(model_page.render(empty, "vase-1"))
    for words in ("Which image was drawn when", "one of 300 spans of steps", "600 times", "steps 1–600"):
        assert words in page.text
    assert "causal" not in page.text


@pytest.mark.parametrize("n_steps", [1, 3, 4, 10, 301])
def test_quarters_are_those_of_the_monitor(empty, n_steps):
    add_model(empty, ["a"])
    append(empty, "monitor_steps", [drawn(step, "a", 1.0) for step in range(n_steps)])
    of_quarters = [[step + 1 for step in range(n_steps) if step * 4 // n_steps == quarter] for quarter in range(4)]
    for words, steps in zip(read(empty).quarters, of_quarters, strict=True):
        assert words == ("–" if not steps else f"{steps[0]}–{steps[-1]}" if len(steps) > 1 else str(steps[0]))


def test_of_many_exemplars_the_largest_are_shown(empty):
    names = [f"{number:02}" for number in range(70)]
    add_model(empty, names)
    values = {name: 0.001 * number for number, name in enumerate(names)} | {"00": -0.5}
    append(empty, "attribution_tables", [rated(name, value) for name, value in values.items()])
    append(empty, "monitor_changes", [changed(1, value, name) for name, value in values.items()])
    [heat_map] = read(empty).maps
    left_out = {f"{number:02}" for number in range(1, 7)}
    assert [line.title[-2:] for line in heat_map.lines] == [*sorted(set(names) - left_out - {"00"}, reverse=True), "00"]
    assert heat_map.n_left_out == 6
    assert "6 exemplars are left out: those of the smallest progress" in Page(model_page.render(empty, "vase-1")).text


def test_a_heat_map_for_each_concept(empty):
    add_model(empty, ["a", "b"], "concepts", ("W*", "V*"))
    both = [(f"vase-1/{token}", name, 0.1 + (token[0] == "W")) for token in ("V*", "W*") for name in ("a", "b")]
    append(empty, "attribution_tables", [rated(name, value, concept_id=concept) for concept, name, value in both])
    append(empty, "monitor_changes", [changed(1, value, name, concept_id=concept) for concept, name, value in both])
    append(empty, "monitor_probes", probes("vase-1/W*"))
    shown = {heat_map.title: heat_map for heat_map in read(empty).maps}
    assert {title: [line.of_concept for line in heat_map.lines] for title, heat_map in shown.items()} == {
        "V*": ["W*", None],
        "W*": [None, "V*"],
    }
    assert [line.value for line in shown["W*"].lines] == ["110.0", "110.0"]
    assert shown["V*"].attention is None
    assert "<svg" in shown["W*"].attention


def probes(concept_id, attention=lambda step, layer: 0.1 * step + 0.02 * layer):
    return [
        {
            "concept_id": concept_id,
            "step": step,
            "timestep": timestep,
            "seed": 0,
            "vector": [1.0],
            "attention": attention and [attention(step, layer) for layer in (0, 1)],
        }
        for step in (0, 4, 8)
        for timestep in (1, 2)
    ]


def test_attention_is_drawn_by_step(vases):
    append(vases, "monitor_probes", probes(CONCEPT))
    assert read(vases).level == "probes"
    path = re.search(r'<g id="attention">\s*<path d="([^"]*)"', read(vases).maps[0].attention)[1]
    line = np.array([[float(number) for number in point.split()] for point in re.findall(r"[ML] ([^MLz]*)", path)])
    x, y = (line - line[0]).T
    np.testing.assert_allclose(x / x[2], [0, 1 / 2, 1], atol=1e-4)
    np.testing.assert_allclose(y / y[2], [0, 1 / 2, 1], atol=1e-4)
    assert "Attention to the token by step" in model_page.render(vases, "vase-1")


def test_no_plot_of_a_model_without_a_token(vases):
    append(vases, "monitor_probes", probes(CONCEPT, attention=None))
    assert read(vases).maps[0].attention is None


def test_captions_are_escaped_and_nothing_is_loaded(empty):
    add_model(empty, ["a", "b"], caption=EVIL)
    append(empty, "attribution_tables", [rated("a", 0.7, 0.7), rated("b", 0.3, 0.3)])
    append(empty, "monitor_changes", [changed(1, 0.7, "a"), changed(2, 0.3, "b"), changed(1, 0.0, cause="decay")])
    append(empty, "monitor_probes", probes(CONCEPT))
    text = model_page.render(empty, "vase-1")
    page = Page(text)
    assert EVIL not in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.images[-1]["alt"] == f"{EVIL}, Ann & Co, CC0"
    assert page.images[-1]["title"] == f"{EVIL}, Ann & Co, CC0, vase-1/a"
    assert len(page.images) == 2  # above and in the heat map; b's is not stored
    assert 'CC0, not stored"' in text
    for words in ("70.0 %", "share 30.0 %", "not a causal share", "What is no exemplar's", "decay"):
        assert words in page.text


def test_nothing_about_a_model_that_was_not_monitored(empty):
    add_model(empty, ["a", "b"])
    assert read(empty) is None
    text = model_page.render(empty, "vase-1")
    assert "Which image" not in text
    assert ".heat" not in text
    assert "monitored" not in CliRunner().invoke(main, ["models", "show", str(empty.path), "vase-1"]).output


def test_a_model_whose_exemplars_were_all_taken_out(empty):
    add_model(empty, ["a"])
    append(empty, "monitor_changes", [changed(1, 0.1, cause="decay")])
    [heat_map] = read(empty).maps
    assert (heat_map.lines, heat_map.others[0][2]) == ([], Cell("10.00"))
    assert "10.00 %" in Page(model_page.render(empty, "vase-1")).text


def test_one_line_as_text(vases):
    said = CliRunner().invoke(main, ["models", "show", str(vases.path), "vase-1"]).output
    assert "  monitored: changes; greatest progress: vase-1/b 90 %, vase-1/c 20 %, vase-1/a -25 %\n" in said
    values = [rated("b", 0.1, concept_id="vase-1/W*")]
    append(vases, "attribution_tables", values)
    said = models.monitoring_in_words(vases, "vase-1")
    assert said.endswith("vase-1/a -25 %; greatest progress of vase-1/W*: vase-1/b 10 %")
