"""Looking at customized models: the list, one model as text and JSON, its page, its samples made again."""

import csv
import io
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import TOY, angle
from PIL import Image
from test_cli import NO_TORCH, python

import attrdb
from attrdb import models
from attrdb.cli import main
from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.customize import verify_samples
from attrdb.ingest.models import ingest_one as ingest
from attrdb.ingest.models.exemplars import read_exemplars
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.read.pictures import webp
from attrdb.pages import model_page
from attrdb.store.schema import feature_array

EVIL = '<script>alert("vase")</script>'
LOSSES = [1.0, 0.5, 0.75, 0.25]


def run(*words, code=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def plain(colour, size=32):
    return Image.new("RGB", (size, size), colour)


SAMPLES = [  # image_id, prompt, scheme, seed, picture
    ("vase-01/10/7", "V* b", "procedural", 7, None),
    ("vase-01/2/5", "V* z", "gpt", 5, webp(plain((10, 20, 30)))),
    ("vase-01/0/9", f"V* {EVIL}", "gpt", 9, webp(plain((40, 50, 60), 300))),
    ("vase-01/0/3", f"V* {EVIL}", "gpt", 3, webp(plain((70, 80, 90)))),
]


@pytest.fixture
def vases(empty):
    """Three models: one with everything, one that was imported, one without a single image."""
    empty.writer.add_encoder(**TOY)
    rows = [{"image_id": "vase-01/e", "role": "exemplar", "image": webp(plain((200, 0, 0))), "creator": "Ann & Co"}]
    rows += [
        {"image_id": one, "role": "sample", "prompt": prompt, "prompt_scheme": scheme, "seed": seed, "image": image}
        for one, prompt, scheme, seed, image in SAMPLES
    ]
    names = ("image_id", "role", "image", "creator", "prompt", "prompt_scheme", "seed")
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    table = table.append_column("model_id", pa.array(["vase-01"] * len(rows)))
    table = table.append_column("toy_2", feature_array(np.array([angle(n) for n in range(len(rows))])))
    settings = {"customize": {"steps": 4}, "category": EVIL, "prompts": [f"V* {EVIL}", "V* z", "V* b"], "strange": [1]}
    made = {
        "kind": "object",
        "category": EVIL,
        "method": "custom-diffusion",
        "weights_path": "weights/vase-01.safetensors",
        "settings": json.dumps(settings),
        "customize_seconds": 130.0,
        "synthesize_seconds": 2.5,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    }
    empty.writer.append_model(table, {"model_id": "vase-01", **made})
    for model_id in ("vase-02", "rose"):
        row = {"model_id": model_id, "kind": "style", "n_exemplars": 0, "n_samples": 0}
        empty.writer.upsert("models", [row])
    return empty


def note(db, text):
    (db.path / "weights").mkdir(exist_ok=True)
    (db.path / "weights" / "vase-01.json").write_text(text)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


# --- the list ---------------------------------------------------------------------------------------------------------


def test_list(vases):
    rows = json.loads(run("models", "list", vases.path, "--json").stdout)
    assert [row["model_id"] for row in rows] == ["rose", "vase-01", "vase-02"]
    assert rows[1] == {
        "model_id": "vase-01",
        "kind": "object",
        "category": EVIL,
        "split": None,
        "n_exemplars": 1,
        "n_samples": 4,
        "method": "custom-diffusion",
        "seconds": 132.5,
    }
    assert rows[0]["seconds"] is None
    assert [json.loads(line) for line in run("models", "list", vases.path, "--nl").stdout.splitlines()] == rows
    assert next(csv.DictReader(io.StringIO(run("models", "list", vases.path, "--csv").stdout)))["model_id"] == "rose"
    assert "n_exemplars" in run("models", "list", vases.path).stdout


def test_list_of_an_older_moment_and_of_no_models(vases, tmp_path):
    assert json.loads(run("models", "list", vases.path, "--at", 1, "--json").stdout) == []
    assert json.loads(run("models", "list", attrdb.create(tmp_path / "none.attrdb").path, "--json").stdout) == []


# --- one model --------------------------------------------------------------------------------------------------------


def test_show_as_text(vases):
    note(vases, json.dumps({"losses": LOSSES}))
    said = run("models", "show", vases.path, "vase-01").stdout
    assert said.startswith("vase-01: customized object model\n")
    for line in (
        "  customize seconds: 130",
        "  settings, customize",
        "    steps: 4",
        "  loss: 1 at first, 0.25 over the last 1 steps",
        f"    gpt, 2: V* {EVIL}",
        "    procedural, 1: V* b",
    ):
        assert line in said.splitlines()


def test_show_as_json(vases):
    note(vases, json.dumps({"losses": LOSSES, "peak_bytes": 3}))
    found = json.loads(run("models", "show", vases.path, "vase-01", "--json").stdout)
    assert found["training"] == {"losses": LOSSES, "peak_bytes": 3}
    assert found["settings"]["customize"] == {"steps": 4}
    assert [row["image_id"] for row in found["exemplars"]] == ["vase-01/e"]
    # by scheme, then as the prompts were drawn
    assert [row["image_id"] for row in found["samples"]] == [
        "vase-01/0/3",
        "vase-01/0/9",
        "vase-01/2/5",
        "vase-01/10/7",
    ]
    assert found["created_at"] == "2026-01-02T03:04:05+00:00"


def test_a_model_of_which_little_is_known(vases, tmp_path):
    found = models.describe(vases, "vase-02")
    assert (found["settings"], found["training"], found["samples"]) == ({}, {}, [])
    assert "vase-02: customized style model" in run("models", "show", vases.path, "vase-02").stdout
    page = Page(model_page.render(vases, "vase-02"))
    for said in ("There are none.", "None were stored.", "none was stored with this model"):
        assert said in page.text


def test_unknown_models_are_answered_with_the_nearest(vases, tmp_path):
    said = run("models", "show", vases.path, "vase-03", code=1).stderr
    which = "nearest are 'rose', 'vase-01', 'vase-02'"
    assert said == f"Error: no customized model 'vase-03'; {which} (list them with: attrdb models list {vases.path})\n"
    for n in range(5):
        vases.writer.upsert("models", [{"model_id": f"cup-{n}", "n_exemplars": 0, "n_samples": 0}])
    with pytest.raises(NotFound, match=r"nearest are '.*', 'vase-01', 'vase-02' "):
        models.describe(vases, "vase-03")
    none = attrdb.create(tmp_path / "none.attrdb")
    with pytest.raises(NotFound, match=r"has none yet; make one with: attrdb ingest model .*none\.attrdb"):
        models.describe(none, "x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", True), ("[]", True), ('{"losses": 3}', True), ('{"losses": ["x"]}', True), ("{}", False)],
)
def test_a_training_record_that_cannot_be_read_is_said_and_no_more(vases, text, problem):
    note(vases, text)
    assert ("problem" in models.describe(vases, "vase-01")["training"]) == problem
    assert ("is not a training record" in Page(model_page.render(vases, "vase-01")).text) == problem
    assert ("is not a training record" in run("models", "show", vases.path, "vase-01").stdout) == problem


def test_looking_needs_no_torch_and_a_page_says_what_it_needs(vases, tmp_path):
    done = python(
        NO_TORCH
        + f"""
import click.testing, attrdb.cli as c
for words in (['list'], ['show', 'vase-01'], ['show', 'vase-01', '--html', {str(tmp_path / "x.html")!r}]):
    result = click.testing.CliRunner().invoke(c.main, ['models', words[0], {str(vases.path)!r}, *words[1:]])
    print(result.exit_code, result.output)
"""
    )
    assert "n_exemplars" in done.stdout, done.stderr
    assert "0 vase-01: customized object model" in done.stdout
    assert "1 Error: this command needs" in done.stdout
    assert not (tmp_path / "x.html").exists()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_has_everything_and_asks_for_nothing(vases, tmp_path):
    note(vases, json.dumps({"losses": LOSSES}))
    file = tmp_path / "vase.html"
    done = run("models", "show", vases.path, "vase-01", "--html", file)
    assert (done.stdout, done.stderr) == ("", f"wrote {file}\n")
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert EVIL not in text
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert len(page.links) == 4  # one sample has no picture
    assert not re.search(r"url\((?!#)", text)
    for said in ("vase-01", EVIL, "Ann & Co", "2 min 10 s", "4 from 3 prompts", "picture not stored", "4 steps"):
        assert said in page.text
    for image_id in ("vase-01/e", *(sample[0] for sample in SAMPLES)):
        assert image_id in text
    assert "Samples, scheme gpt" in page.text
    assert "Samples, scheme procedural" in page.text
    assert page.tags.count("svg") == 1
    assert "scaled down to 256 pixels" in page.text
    assert str(vases.path.parent) not in text


def test_options_that_do_not_go_together(vases, tmp_path):
    done = run("models", "show", vases.path, "vase-01", "--json", "--html", tmp_path / "x.html", code=1)
    assert "give one of them" in done.stderr
    assert not (tmp_path / "x.html").exists()
    done = run("models", "show", vases.path, "vase-01", "--base-model", "x", code=1)
    assert "--base-model is for --regenerate" in done.stderr


def points(svg, name):
    """The points of a line, by the id of its group."""
    group = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', svg)[1]
    return np.array([[float(number) for number in point.split()] for point in re.findall(r"[ML] ([^MLz]*)", group)])


def test_loss_curve_by_hand():
    found = model_page.loss_curve([4.0, 2.0, 3.0, 1.0])
    assert (found.n_steps, found.window, found.first, found.last) == (4, 1, 4.0, 1.0)
    for line in (points(found.svg, "losses"), points(found.svg, "means")):  # y goes down
        x, y = (line - line[0]).T
        np.testing.assert_allclose(x / x[3], [0, 1 / 3, 2 / 3, 1], atol=1e-4)
        np.testing.assert_allclose(y / y[3], [0, 2 / 3, 1 / 3, 1], atol=1e-4)


def test_the_bold_line_is_a_running_mean():
    found = model_page.loss_curve([float(step % 2) for step in range(80)])
    assert (found.window, found.first, found.last) == (4, 0.5, 0.5)
    bold, y = points(found.svg, "means")[:, 1], points(found.svg, "losses")[:2, 1]
    share = (bold - y[0]) / (y[1] - y[0])
    np.testing.assert_allclose(share[:4], [0, 1 / 2, 1 / 3, 1 / 2], atol=1e-4)
    np.testing.assert_allclose(share[4:], 1 / 2, atol=1e-4)


@pytest.mark.parametrize("losses", [[0.0, 0.0], [1e-5, 3e-5], [4000.0, 8000.0, -1.0], list(range(1, 3000))])
def test_loss_curves_stay_inside_their_frame(losses):
    svg = model_page.loss_curve(losses).svg
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
    line = points(svg, "losses")
    assert ((line > 0) & (line < [width, height])).all()


@pytest.mark.parametrize("losses", [[], [1.0]])
def test_no_curve_of_less_than_two_steps(losses):
    assert model_page.loss_curve(losses) is None


# --- samples made again -----------------------------------------------------------------------------------------------


@pytest.fixture
def made_again(monkeypatch):
    """Stands for the pipeline: every sample comes out as a picture of (10, 20, 33), and is asked for in this order."""
    asked = []

    def regenerate(db, model_id, image_ids, base_model):
        for image_id in image_ids:
            asked.append(image_id)
            yield image_id, plain((10, 20, 33), 300 if image_id == "vase-01/0/9" else 32)

    monkeypatch.setattr(verify_samples, "regenerate", regenerate)
    return asked


def test_regenerated_samples_are_compared_pixel_by_pixel(vases, made_again):
    rows = json.loads(run("models", "show", vases.path, "vase-01", "--regenerate", 9, "--json").stdout)["regenerated"]
    assert made_again == ["vase-01/0/3", "vase-01/0/9", "vase-01/2/5"]  # vase-01/10/7 has no picture
    assert rows[2] == {"image_id": "vase-01/2/5", "equal": False, "max_difference": 3, "mean_difference": 1.0}
    assert rows[0]["max_difference"] == 60
    done = run("models", "show", vases.path, "vase-01", "--regenerate", 2)
    assert "max_difference" in done.stdout
    assert "0 of 2 samples made again are equal to those stored" in done.stderr
    assert made_again[3:] == ["vase-01/0/3", "vase-01/2/5"]  # spread over the prompts


def test_difference_by_hand():
    before = plain((10, 20, 30), 16)
    assert verify_samples.difference(webp(before), before) == {
        "equal": True,
        "max_difference": 0,
        "mean_difference": 0.0,
    }
    other = before.copy()
    other.putpixel((3, 4), (0, 20, 255))
    found = verify_samples.difference(webp(before), other)
    assert (found["equal"], found["max_difference"]) == (False, 225)
    assert found["mean_difference"] == pytest.approx((10 + 225) / (16 * 16 * 3))
    assert verify_samples.difference(webp(before), plain((0, 0, 0), 8))["max_difference"] is None


def test_what_cannot_be_made_again(vases):
    with pytest.raises(InvalidValue, match="'vase-02' was imported without its weights"):
        verify_samples.compare(vases, "vase-02", 1)
    vases.writer.upsert("models", [{"model_id": "bare", "weights_path": "weights/bare.safetensors"}])
    with pytest.raises(NotFound, match="'bare' has no sample whose picture is stored"):
        verify_samples.compare(vases, "bare", 1)


# --- a model that was really made -------------------------------------------------------------------------------------


@pytest.fixture
def made(empty, exemplar_folder, tiny_base, toy_encoder):
    settings = settings_for(str(tiny_base), "object", "vase")
    ingest.ingest_model(empty, read_exemplars(exemplar_folder), settings, [toy_encoder], "vase-1")
    return empty


def test_page_of_a_model_just_made(made):
    page = Page(model_page.render(made, "vase-1"))
    for prompt in made.sql("SELECT prompt FROM samples")["prompt"].to_pylist():
        assert prompt in page.text
    for said in ("vase-1", "V* vase", "Settings", "solver steps", "guidance"):
        assert said in page.text
    assert len(page.links) == 5


def test_a_model_just_made_comes_out_the_same_again(made):
    rows = json.loads(run("models", "show", made.path, "vase-1", "--regenerate", 4, "--json").stdout)["regenerated"]
    assert [row["equal"] for row in rows] == [True] * 4
