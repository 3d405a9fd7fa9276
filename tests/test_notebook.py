"""The package's front door: Database, with, what a notebook shows, and extras that ask for no more than is needed."""

import subprocess
import sys
import tomllib

import pyarrow as pa
import pytest
from conftest import ROOT, picture

import attrdb
from attrdb.formats.notebook import MAX_BYTES, picture_uri

NETWORKS = [
    "torch",
    "torchvision",
    "timm",
    "open_clip",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "peft",
]


def without(packages, *words):
    """A command of attrdb where some packages are not installed."""
    program = f"""
import sys
for name in {packages!r}:
    sys.modules[name] = None
sys.argv = ["attrdb", *{[str(word) for word in words]!r}]
from attrdb.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_database_is_imported_from_the_package(toy):
    from attrdb import Database

    with Database(toy.path, read_only=True) as db:
        assert db.sql("SELECT count(*) AS n FROM images")["n"][0].as_py() == 7
    with attrdb.open(toy.path) as db, pytest.raises(ZeroDivisionError):
        _ = 1 / (db.version - db.version)
    with pytest.raises(AttributeError, match="module 'attrdb' has no attribute 'Datenbank'"):
        _ = attrdb.Datenbank
    with pytest.raises(ImportError):
        from attrdb import nothing  # noqa: F401


def test_the_name_costs_no_import():
    program = "import sys, attrdb; print('lance' in sys.modules); attrdb.Database; print('lance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split() == [
        "False",
        "True",
    ]


def test_a_notebook_shows_rows_and_pictures(toy, tmp_path):
    encoded = picture(tmp_path / "x.png", (200, 30, 30)).read_bytes()
    ids = ["<script>alert(1)</script>", 'a" onerror="x', "broken"]
    toy.writer.append_images(
        pa.table({"image_id": ids, "role": ["pretraining"] * 3, "image": [encoded, encoded, b"no picture"]})
    )
    page = toy._repr_html_()
    assert "<th>exemplar</th><td>2</td>" in page
    assert "<th>pretraining</th><td>6</td>" in page
    assert "<td>toy_2</td>" in page
    assert page.count("<img ") == 2
    assert "<script" not in page
    assert 'onerror="' not in page
    assert 'alt="&lt;script&gt;alert(1)&lt;/script&gt;"' in page
    assert repr(toy) == f"<attrdb.Database {str(toy.path)!r}, version {toy.version}>"


def test_pictures_without_pillow(monkeypatch, tmp_path):
    encoded = picture(tmp_path / "x.png", (200, 30, 30)).read_bytes()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert picture_uri(encoded).startswith("data:image/png;base64,")
    assert picture_uri(b"\xff\xd8\xff\xe0 jpeg").startswith("data:image/jpeg;base64,")
    assert picture_uri(b"RIFF\0\0\0\0WEBPVP8 ").startswith("data:image/webp;base64,")
    assert picture_uri(b"<svg onload='x'>") is None
    assert picture_uri(b"\x89PNG" + b"\0" * MAX_BYTES) is None


# --- extras ----------------------------------------------------------------------------------------------------------


def test_pixels_need_no_networks(tmp_path):
    for number in range(5):
        picture(tmp_path / "pictures" / f"{number}.png", (40 * number, 20, 90))
    words = ("ingest", "corpus", tmp_path / "a.attrdb", tmp_path / "pictures", "--encoder", "pixels:8")
    done = without([*NETWORKS, "matplotlib", "jinja2"], *words)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 encoded" in without(NETWORKS, "status", tmp_path / "a.attrdb").stdout
    done = without(
        [*NETWORKS, "matplotlib", "jinja2"], "attribute", tmp_path / "a.attrdb", tmp_path / "pictures" / "1.png"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "words", "says"),
    [
        (
            ["PIL"],
            ["ingest", "corpus", "DB", "pictures", "--encoder", "pixels:8"],
            "needs PIL, .* 'attrdb\\[images\\]'",
        ),
        (["PIL"], ["report", "DB"], "needs PIL, .* 'attrdb\\[report\\]'"),
        (["jinja2"], ["report", "DB"], "needs jinja2, .* 'attrdb\\[report\\]'"),
        (
            ["jinja2"],
            ["models", "show", "DB", "m", "--html", "x.html"],
            "needs jinja2, .* 'attrdb\\[report\\]'",
        ),
        (["torch"], ["train", "DB"], "needs torch, .* 'attrdb\\[ml\\]'"),
        (["jinja2"], ["demo"], "needs jinja2, .* 'attrdb\\[ml\\]'"),
        (["PIL"], ["train", "DB"], "needs PIL, .* 'attrdb\\[ml\\]'"),
        (["torch"], ["ingest", "corpus", "DB", "pictures", "--encoder", "efficientnet-lite0"], "'attrdb\\[ml\\]'"),
    ],
)
def test_the_least_extra_is_named(toy, tmp_path, monkeypatch, missing, words, says):
    import re

    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "pictures" / "1.png", (40, 20, 90))
    done = without(missing, *(str(toy.path) if word == "DB" else word for word in words))
    assert done.returncode == 1, done.stdout
    assert re.search(says, done.stderr), done.stderr


def test_extras_hold_what_their_messages_promise():
    from attrdb.cli.common import EXTRAS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert list(EXTRAS) == ["images", "report", "ml"]
    assert [extra for extra in extras["report"] if extra.startswith("attrdb")] == ["attrdb[images]"]
    assert [extra for extra in extras["ml"] if extra.startswith("attrdb")] == ["attrdb[report]"]
    assert not any("torch" in line for line in extras["images"] + extras["report"])
