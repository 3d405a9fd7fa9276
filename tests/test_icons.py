"""The icon build on a miniature collection, and what the bundled file promises."""

import io
import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from attrdb.training.icon_sd import icons

ASSETS = Path(str(files("attrdb"))) / "assets"


def icon_set(folder: Path, prefix: str, spdx: str, bodies: dict[str, str], **extra) -> None:
    collections = folder / "collections.json"
    known = json.loads(collections.read_text()) if collections.exists() else {}
    known[prefix] = {"license": {"spdx": spdx}, "author": {"name": f"{prefix} authors"}}
    (folder / "json").mkdir(parents=True, exist_ok=True)
    collections.write_text(json.dumps(known))
    data = {"icons": {name: {"body": body} for name, body in bodies.items()}, "width": 16, "height": 16, **extra}
    (folder / "json" / f"{prefix}.json").write_text(json.dumps(data))


def box(colour: str, x: int = 2) -> str:
    return f'<rect x="{x}" y="2" width="9" height="12" fill="{colour}"/>'


@pytest.fixture
def built(tmp_path):
    pytest.importorskip("resvg_py")
    iconify, clipart = tmp_path / "iconify", tmp_path / "clipart" / "tools"
    bodies = {"RedBox": box("red"), "red-copy": box("red"), "ink": box("currentColor", 5), "blank": "", "torn": "<rect"}
    icon_set(iconify, "free", "MIT", bodies, categories={"Shapes": ["RedBox"]})
    icon_set(iconify, "shared-alike", "CC-BY-SA-4.0", {"box": box("blue")})
    clipart.mkdir(parents=True)
    (clipart / "hammer.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
        'xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" width="20" height="10">'
        "<metadata><rdf:RDF><cc:Work><dc:title>Claw Hammer</dc:title><dc:creator><cc:Agent><dc:title>Ann</dc:title>"
        '</cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata><circle cx="10" cy="5" r="5" fill="green"/></svg>'
    )
    (clipart / "torn.svg").write_text("<svg")
    out = tmp_path / "icons.parquet"
    words = ["build", "--iconify", str(iconify), "--openclipart", str(tmp_path / "clipart"), "--out", str(out)]
    done = CliRunner().invoke(icons.main, [*words, "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "written: 3" in done.output
    assert "duplicate: 1" in done.output
    return pq.read_table(out).to_pylist()


def test_build_keeps_free_icons_once(built):
    assert [(row["name"], row["category"], row["creator"], row["license"]) for row in built] == [
        ("free/RedBox", "red box", "free authors", "MIT"),
        ("free/ink", "ink", "free authors", "MIT"),
        ("openclipart/tools/hammer", "claw hammer", "Ann", "CC-PDDC"),
    ]
    assert json.loads(built[0]["metadata"]) == {"group": "Shapes"}


def test_build_renders_on_a_white_square(built):
    images = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in built]
    assert {image.size for image in images} == {(64, 64)}
    assert images[0].getpixel((30, 30)) == (255, 0, 0)
    assert images[1].getpixel((36, 30)) == (0, 0, 0)
    assert images[2].getpixel((32, 3)) == (255, 255, 255)
    assert images[2].getpixel((32, 32)) == (0, 128, 0)


def test_a_drawing_has_one_name_wherever_the_package_was_unpacked(tmp_path):
    """Or the same drawing would be in a gallery twice."""
    inner = tmp_path / "usr" / "share" / "openclipart"
    (inner / "svg").mkdir(parents=True)
    (inner / "svg" / "cat.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    for folder in (tmp_path, inner):
        assert [drawing.name for drawing in icons.openclipart_drawings(folder)] == ["openclipart/svg/cat"]


# --- the bundled file ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return pq.read_table(ASSETS / "icons.parquet").to_pylist()


def test_bundled_file_is_small_licensed_and_credited(bundled):
    assert (ASSETS / "icons.parquet").stat().st_size <= 8 * 2**20
    assert {row["license"] for row in bundled} <= icons.FREE | {"CC-PDDC"}
    notice = (Path(__file__).parent.parent / "NOTICE").read_text()
    for source in {row["source"] for row in bundled}:
        assert source in notice
    assert all(row["creator"] for row in bundled)


def test_bundled_corpus_and_exemplars_do_not_overlap(bundled):
    by_role = defaultdict(list)
    for row in bundled:
        by_role[row["role"]].append(row)
    assert len(by_role["pretraining"]) > 4000
    assert not {row["source"] for row in by_role["pretraining"]} & {row["source"] for row in by_role["exemplar"]}
    assert len({row["name"] for row in bundled}) == len(bundled)


def test_bundled_concepts_are_objects_of_one_and_styles_of_five_to_twelve(bundled):
    known = {row["category"] for row in bundled if row["role"] == "pretraining"}
    concepts = Counter()
    for row in bundled:
        if row["role"] == "exemplar":
            metadata = json.loads(row["metadata"])
            concepts[metadata["kind"], metadata["concept"]] += 1
            if metadata["kind"] == "object":
                assert row["category"] in known
    sizes = defaultdict(set)
    for (kind, _), n in concepts.items():
        sizes[kind].add(n)
    assert sizes["object"] == {1}
    assert all(5 <= n <= 12 for n in sizes["style"])


def test_every_set_under_the_mit_licence_has_its_copyright_line():
    root = Path(__file__).parent.parent
    notice = (root / "NOTICE").read_text()
    lines = re.findall(r"^  Copyright \(c\) .* \((.+)\)$", notice, re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    files = (ASSETS / "icons.parquet", ASSETS / "sprites.parquet", root / "benchmarks" / "iconabc" / "images.parquet")
    for file in files:
        rows = pq.read_table(file, columns=["source", "license"]).to_pylist()
        assert {row["source"] for row in rows if row["license"] == "MIT"} <= named, file
