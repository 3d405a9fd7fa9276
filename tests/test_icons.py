"""The icon build on a miniature collection, and what the bundled file promises."""

import io
import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from attrdb import demo
from attrdb.bundled import EXEMPLARS, SPRITES, sprite_rows, write_corpus
from attrdb.training.icon_sd import icons, lookalikes


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


def test_curated_exemplars_show_common_things_and_look_like_no_sprite():
    rng = np.random.default_rng(0)

    def row(source, number, category, creator="someone"):
        picture = Image.fromarray(rng.integers(0, 200, (16, 16, 3), np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", lossless=True)
        return {"name": f"{source}/{number}", "source": source, "category": category, "creator": creator} | {
            "image": encoded.getvalue()
        }

    sprites = [row("noto", number, "bell") for number in range(icons.COMMON)] + [row("noto", 99, "rare")]
    rows = [row(source, n, f"{source} {n}") for source in icons.STYLE_SETS for n in range(icons.STYLE_SIZE + 3)]
    rows += [row("openclipart", n, "a work", "Ann") for n in range(3 * icons.STYLE_SIZE)]
    rows += [row("openclipart", 100 + n, "a work", "unknown") for n in range(3 * icons.STYLE_SIZE)]
    rows += [row("fxemoji", "bell", "bell"), row("fxemoji", "rare", "rare"), row("streamline-emojis", "bell", "bell")]
    rows[-3] |= {"image": sprites[0]["image"]}  # so the bell of the other set is chosen
    chosen = icons.curate(rows, sprites)
    assert chosen == icons.curate(rows[::-1], sprites)
    by_concept = defaultdict(list)
    for one in chosen:
        by_concept[json.loads(one["metadata"])["concept"]].append(one["name"])
    assert by_concept.pop("bell-by-streamline-emojis") == ["streamline-emojis/bell"]
    assert by_concept.keys() == {*icons.STYLE_SETS, "openclipart-ann"}
    assert {len(names) for names in by_concept.values()} == {icons.STYLE_SIZE}
    assert "fxemoji/bell" not in by_concept["fxemoji"]
    assert "streamline-emojis/bell" not in by_concept["streamline-emojis"]


# --- the bundled file ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled():
    return pq.read_table(EXEMPLARS).to_pylist()


def test_bundled_exemplars_are_few_licensed_and_credited(bundled):
    assert EXEMPLARS.stat().st_size <= 2**20
    assert {row["license"] for row in bundled} <= icons.FREE | {"CC-PDDC"}
    notice = (Path(__file__).parent.parent / "NOTICE").read_text()
    for source in {row["source"] for row in bundled}:
        assert source in notice
    for creator in {row["creator"] for row in bundled if row["source"] == "openclipart"}:
        assert creator in re.sub(r"\s+", " ", notice)
    assert all(row["creator"] for row in bundled)


def test_bundled_exemplars_neither_are_nor_look_like_sprites(bundled):
    sprites = list(sprite_rows())
    assert not {row["name"] for row in bundled} & {row["name"] for row in sprites}
    assert len({row["name"] for row in bundled}) == len(bundled)
    assert lookalikes.unlike(bundled, sprites) == bundled
    assert lookalikes.unlike(sprites[:3], sprites[:3]) == []


def test_bundled_concepts_are_objects_of_one_and_styles_of_eight(bundled):
    drawn = Counter(pq.read_table(SPRITES, columns=["thing"])["thing"].to_pylist())
    concepts = Counter()
    for row in bundled:
        metadata = json.loads(row["metadata"])
        concepts[metadata["kind"], metadata["concept"]] += 1
        if metadata["kind"] == "object":
            assert drawn[row["category"]] >= icons.COMMON
    sizes = defaultdict(set)
    for (kind, _), n in concepts.items():
        sizes[kind].add(n)
    assert sizes == {"object": {1}, "style": {icons.STYLE_SIZE}}
    assert set(demo.CONCEPTS) <= {concept for _, concept in concepts}


def test_sprites_are_stored_as_pictures_on_white(tmp_path):
    file = write_corpus(tmp_path / "few.parquet", 5)
    rows = pq.read_table(file).to_pylist()
    assert rows == list(islice(sprite_rows(), 5))
    assert write_corpus(file, 9).stat().st_mtime == file.stat().st_mtime
    [first] = pq.read_table(SPRITES).slice(0, 1).to_pylist()
    assert (rows[0]["name"], rows[0]["category"], rows[0]["creator"]) == (
        first["name"],
        first["thing"],
        first["creator"],
    )
    corner = Image.open(io.BytesIO(rows[0]["image"])).convert("RGB").getpixel((0, 0))
    assert min(corner) > 250


def test_every_set_under_the_mit_licence_has_its_copyright_line():
    root = Path(__file__).parent.parent
    notice = (root / "NOTICE").read_text()
    lines = re.findall(r"^  Copyright \(c\) .* \((.+)\)$", notice, re.MULTILINE)
    named = {name for line in lines for name in line.split(", ")}
    files = (EXEMPLARS, SPRITES, root / "benchmarks" / "iconabc" / "images.parquet")
    for file in files:
        rows = pq.read_table(file, columns=["source", "license"]).to_pylist()
        assert {row["source"] for row in rows if row["license"] == "MIT"} <= named, file
