"""Webdataset shards: what img2dataset writes, and what a damaged or malicious shard may hold."""

import json
import tarfile

import pytest
from corpora import FIELDS, encoded, sample, shard

import attrdb
from attrdb.errors import InvalidValue
from attrdb.ingest.read import webdataset
from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus


def told(path, source="laion", **columns):
    """What every item of the shards says: its row, or why it cannot be used."""
    said = {}
    for item in open_corpus(path, source, columns).items():
        try:
            picture = item.read()
        except InvalidValue as error:
            said.setdefault(item.image_id, []).append(str(error))
        else:
            said.setdefault(item.image_id, []).append(item.fields() | {"sha256": picture.sha256, "uri": item.uri})
    return said


def test_a_sample_is_a_row(tmp_path):
    path = shard(tmp_path / "00000.tar", *sample("000000001", caption="another", similarity=float("nan")))
    ((row,),) = told(path).values()
    assert row.pop("sha256")
    assert json.loads(row.pop("metadata")) == {
        "NSFW": "UNLIKELY",
        "caption": "another",
        "similarity": None,
        "status": "success",
        "width": 32,
    }
    assert row == {
        "source": "laion",
        "prompt": "picture 000000001",
        "uri": "http://a.example/1.jpg",
        "license": "CC0",
    }


def test_an_image_alone_is_a_sample_and_its_address_is_in_the_shard(tmp_path):
    path = shard(tmp_path / "a b.tar", ("deep.er/1.webp", encoded()), ("deep.er/2.WEBP", encoded()), ("2.txt", ""))
    said = told(path)
    assert set(said) == {"laion/deep.er/1", "laion/deep.er/2", "laion/2"}
    (row,) = said["laion/deep.er/1"]
    assert row["uri"].endswith("a%20b.tar#deep.er/1.webp")
    assert row["uri"].startswith("file:///")
    assert row["metadata"] is None
    assert "sample '2' has no image" in said["laion/2"][0]


def test_a_folder_of_shards_in_order_and_what_else_is_in_them(tmp_path):
    shard(tmp_path / "b" / "00001.tar", *sample("1"), ("._1.jpg", "leavings"), ("1.cls", "7"))
    shard(tmp_path / "b" / "00000.tar", tarfile.TarInfo("./"), *sample("./0"))
    (tmp_path / "b" / "00000.parquet").write_bytes(b"not looked at")
    assert list(told(tmp_path / "b")) == ["laion/0", "laion/1"]


def test_the_total_is_known_where_the_counts_are(tmp_path):
    for number in range(2):
        shard(tmp_path / "b" / f"0000{number}.tar", *sample(str(number)))
        assert open_corpus(tmp_path / "b").n_items is None
        stats = tmp_path / "b" / f"0000{number}_stats.json"
        stats.write_text(json.dumps({"count": 9, "successes": 5 + number}))
    assert open_corpus(tmp_path / "b").n_items == 11
    assert open_corpus(tmp_path / "b" / "00001.tar").n_items == 6
    stats.write_text("{}")
    assert open_corpus(tmp_path / "b").n_items is None


def test_paths_that_hold_no_image(tmp_path):
    with pytest.raises(InvalidValue, match="has no image in it"):
        open_corpus(tmp_path)
    with pytest.raises(InvalidValue, match=r"00000\.tar has no image in it"):
        open_corpus(shard(tmp_path / "00000.tar", ("1.txt", "words")))
    (tmp_path / "00000.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InvalidValue, match=r"00000\.tar is damaged or cut off after the beginning"):
        open_corpus(tmp_path / "00000.tar")


def test_items_are_read_only_when_asked_for(tmp_path, monkeypatch):
    path = shard(tmp_path / "00000.tar", *sample("1"), *sample("2"))
    monkeypatch.setattr(webdataset, "read_picture", lambda *_: 1 / 0)
    assert [item.uri for item in open_corpus(path, "laion").items()] == ["http://a.example/1.jpg"] * 2


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg"])
def test_names_that_point_outside_are_refused_and_nothing_else_is_lost(tmp_path, name):
    path = shard(tmp_path / "in" / "00000.tar", *sample("1"), (name, encoded()), *sample("2"))
    before = sorted(tmp_path.rglob("*"))
    said = told(path)
    assert isinstance(said["laion/1"][0], dict)
    assert isinstance(said["laion/2"][0], dict)
    (reason,) = said[f"laion/00000.tar/{name!r}"]
    assert f"00000.tar member {name!r} is refused: its name points outside the shard" in reason
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_devices_and_sparse_files_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("1.jpg")
    info.type, info.linkname = kind, "/etc/hostname"
    said = told(shard(tmp_path / "00000.tar", info, ("1.txt", "words"), *sample("2")))
    assert "00000.tar sample '1': member '1.jpg' is a link, a device or sparse" in said["laion/1"][0]
    assert isinstance(said["laion/2"][0], dict)


def test_sizes_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 100)
    monkeypatch.setattr(webdataset, "MAX_TEXT", 10)
    path = shard(tmp_path / "00000.tar", ("1.jpg", b"x" * 101), ("2.jpg", b"x"), ("2.txt", "x" * 11))
    said = told(path)
    assert "member '1.jpg' has 101 bytes, more than 100" in said["laion/1"][0]
    assert "member '2.txt' has 11 bytes, more than 10" in said["laion/2"][0]


def test_a_negative_size_does_not_lead_back(tmp_path):
    path = shard(tmp_path / "00000.tar", *sample("1"), *sample("2"))
    data = bytearray(path.read_bytes())
    at = data.index(b"2.txt\0")
    header = tarfile.TarInfo("2.txt")
    header.size = -1024
    data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    said = told(path)
    assert isinstance(said["laion/1"][0], dict)
    assert "cut off after sample '1' (member '2.txt' claims -1024 bytes)" in said["laion/00000.tar"][0]


@pytest.mark.parametrize("kept", ["data", "header", "marker"])
def test_a_shard_that_is_cut_off_keeps_what_stands_before(tmp_path, kept):
    path = shard(tmp_path / "b" / "00000.tar", *sample("1"), *sample("2"))
    shard(tmp_path / "b" / "00001.tar", *sample("3"))
    whole = path.read_bytes()
    second, last = whole.index(b"2.jpg\0"), whole.index(b"2.txt\0")
    path.write_bytes(whole[: {"data": second + 600, "header": last + 100, "marker": last}[kept]])
    said = told(tmp_path / "b")
    assert set(said) == {"laion/1", "laion/00000.tar", "laion/3"}
    assert "00000.tar is damaged or cut off after sample '1'" in said["laion/00000.tar"][0]
    assert "fetch it again and rerun" in said["laion/00000.tar"][0]
    assert isinstance(said["laion/3"][0], dict)
    path.write_bytes(whole)
    assert set(told(tmp_path / "b")) == {"laion/1", "laion/2", "laion/3"}


def test_a_header_damaged_in_the_middle_is_no_end(tmp_path):
    path = shard(tmp_path / "00000.tar", *sample("1"), *sample("2"), *sample("3"))
    data = bytearray(path.read_bytes())
    data[data.index(b"2.txt\0") + 150] ^= 1  # in the checksum
    path.write_bytes(data)
    said = told(path)
    assert set(said) == {"laion/1", "laion/00000.tar"}
    assert "damaged or cut off after sample '1' (no end marker)" in said["laion/00000.tar"][0]


def test_a_name_that_is_no_text(tmp_path):
    path = shard(tmp_path / "00000.tar", ("\udcff.jpg", encoded()), *sample("2"))
    said = told(path)
    assert "is refused: its name is not UTF-8" in said[r"laion/00000.tar/'\udcff.jpg'"][0]
    assert isinstance(said["laion/2"][0], dict)


def test_samples_that_cannot_be_used_say_why(tmp_path):
    path = shard(
        tmp_path / "00000.tar",
        ("1.json", FIELDS | {"status": "failed_to_download", "error_message": "HTTP Error 404"}),
        ("2.jpg", encoded()),
        ("2.json", "{"),
        ("3.jpg", encoded()),
        ("3.json", "[]"),
        ("4.jpg", encoded()),
        ("4.txt", b"\xff"),
        ("5.jpg", encoded()),
        ("5.jpg", encoded()),
        ("6.jpg", encoded()),
        ("6.png", encoded()),
        ("7.jpg", b"no image"),
        *sample("8"),
    )
    said = {key.removeprefix("laion/"): reasons[0] for key, reasons in told(path).items()}
    assert "sample '1' was not fetched: failed_to_download, HTTP Error 404" in said["1"]
    assert "sample '2': its .json is not JSON" in said["2"]
    assert "sample '3': its .json must be a JSON object, found list" in said["3"]
    assert "sample '4': its .txt is not UTF-8 text" in said["4"]
    assert "sample '5': member '5.jpg' is a second one of its kind under this key" in said["5"]
    assert "sample '6' has several images: jpg, png; which is meant? Choose one with --column image=jpg" in said["6"]
    assert "00000.tar member '7.jpg' cannot be decoded" in said["7"]
    assert isinstance(said["8"], dict)


def test_a_key_that_comes_twice_is_reported(tmp_path):
    shard(tmp_path / "b" / "00000.tar", *sample("1", shade=1), *sample("2"))
    shard(tmp_path / "b" / "00001.tar", *sample("1", shade=200), *sample("3"))
    said = told(tmp_path / "b")
    assert isinstance(said["laion/1"][0], dict)
    (reason,) = said["laion/00001.tar/1"]
    assert "00001.tar sample '1': " in reason
    assert "00000.tar has this key already, and the first is kept" in reason
    assert set(said) == {"laion/1", "laion/2", "laion/00001.tar/1", "laion/3"}


def test_members_of_a_key_that_lie_apart_are_reported(tmp_path):
    path = shard(tmp_path / "00000.tar", ("1.jpg", encoded()), ("2.jpg", encoded()), ("1.txt", "a caption"))
    assert "the members of a key must stand together" in told(path)["laion/00000.tar/1"][0]


def test_text_that_is_half_a_character_becomes_a_whole_one(tmp_path):
    path = shard(tmp_path / "00000.tar", ("1.jpg", encoded()), ("1.json", '{"caption": "a \\ud83d cat"}'))
    assert told(path)["laion/1"][0]["prompt"] == "a ? cat"


def test_a_shard_that_goes_away_between_walk_and_read(tmp_path):
    path = shard(tmp_path / "00000.tar", *sample("1"))
    (item,) = open_corpus(path, "laion").items()
    path.unlink()
    with pytest.raises(InvalidValue, match=r"00000\.tar member '1\.jpg' cannot be read: No such file"):
        item.read()


# --- names of fields, and side fields that are odd -------------------------------------------------------------------


def test_a_key_ends_at_the_first_point_and_a_field_may_have_more(tmp_path):
    path = shard(
        tmp_path / "00000.tar",
        ("22.05.png", encoded(1)),
        ("2.image.jpg", encoded(2)),
        ("2.text.txt", "a cat"),
        ("2.meta.json", {"url": "u"}),
        ("deep.er/3.JPG", encoded(3)),
        ("3.cls", "7"),
        ("3.jpg", encoded(4)),
    )
    said = {key.removeprefix("laion/"): rows[0] for key, rows in told(path).items()}
    assert set(said) == {"22", "2", "deep.er/3", "3"}
    assert (said["2"]["prompt"], said["2"]["uri"]) == ("a cat", "u")
    assert said["22"]["uri"].endswith("00000.tar#22.05.png")
    assert json.loads(said["3"]["metadata"]) == {"cls": "7"}


def test_of_several_pictures_one_is_chosen(tmp_path):
    path = shard(tmp_path / "00000.tar", ("0.left.png", encoded(1)), ("0.right.png", encoded(2)), ("1.png", encoded(3)))
    said = told(path)
    assert "sample '0' has several images: left.png, right.png; which is meant?" in said["laion/0"][0]
    assert isinstance(said["laion/1"][0], dict)
    said = told(path, image="right.png")
    assert said["laion/0"][0]["uri"].endswith("#0.right.png")
    assert isinstance(said["laion/1"][0], dict)
    # One that is called plainly goes before masks and views.
    path = shard(tmp_path / "00001.tar", ("0.mask.png", encoded(1)), ("0.jpg", encoded(2)))
    assert told(path)["laion/0"][0]["uri"].endswith("#0.jpg")


def test_a_sample_without_a_picture_says_what_it_has(tmp_path):
    path = shard(tmp_path / "00000.tar", ("0.npy", b"x"), ("0.txt", "words"), ("1.jpg", encoded()))
    assert "sample '0' has no image; it has: npy" in told(path)["laion/0"][0]


@pytest.mark.parametrize(
    ("fields", "columns", "metadata"),
    [
        ({"license": 4}, {"license": "4"}, None),
        ({"caption": ["a cat", "a dog"]}, {"prompt": "a cat"}, {"caption": ["a cat", "a dog"]}),
        ({"caption": [], "url": None}, {}, {"caption": [], "url": None}),
        ({"creator": {"name": "Ann"}}, {}, {"creator": {"name": "Ann"}}),
        ({"status": 200}, {}, {"status": 200}),
        ({"status": "ok", "license": True}, {"license": "true"}, {"status": "ok"}),
        ({"url": float("inf"), "author": "Ann\0\x1b[1m"}, {"creator": "Ann"}, {"url": None}),
        ({"CAPTION": "big", "caption": "small"}, {"prompt": "big"}, {"caption": "small"}),
    ],
)
def test_side_fields_of_any_type_lose_no_picture(tmp_path, fields, columns, metadata):
    path = shard(tmp_path / "00000.tar", ("0.jpg", encoded()), ("0.json", fields))
    ((row,),) = told(path).values()
    assert {name: row.get(name) for name in ("prompt", "license", "creator")} == {
        "prompt": None,
        "license": None,
        "creator": None,
        **columns,
    }
    assert (row["metadata"] and json.loads(row["metadata"])) == metadata


def test_a_picture_whose_fetch_has_failed_stays_out(tmp_path):
    path = shard(tmp_path / "00000.tar", ("0.jpg", encoded()), ("0.json", {"status": "failed_to_resize"}))
    assert "was not fetched: failed_to_resize" in told(path)["laion/0"][0]


def test_text_beside_a_picture_is_made_clean(tmp_path):
    path = shard(
        tmp_path / "00000.tar", ("0.jpg", encoded()), ("0.txt", b"\xef\xbb\xbfa\0 cat\r\n"), ("1.jpg", encoded(2))
    )
    assert told(path)["laion/0"][0]["prompt"] == "a cat"


# --- as a corpus ------------------------------------------------------------------------------------------------------


def stored(db):
    return db.sql("SELECT * FROM images ORDER BY image_id").to_pylist()


def test_run_twice_is_run_once(empty, tmp_path, toy_encoder):
    shard(tmp_path / "laion" / "00000.tar", *sample("1"), ("2.txt", "no image"))
    shard(tmp_path / "laion" / "00001.tar", *sample("3"), ("../4.jpg", encoded()))
    result = ingest_corpus(empty, open_corpus(tmp_path / "laion"), [toy_encoder])
    assert (result.n_done, result.n_stored, len(result.failures)) == (2, 0, 2)
    before, version = stored(empty), empty.version
    assert [(row["image_id"], row["role"], row["prompt"], row["license"]) for row in before] == [
        ("laion/1", "pretraining", "picture 1", "CC0"),
        ("laion/3", "pretraining", "picture 3", "CC0"),
    ]
    result = ingest_corpus(empty, open_corpus(tmp_path / "laion"), [toy_encoder])
    assert (result.n_done, result.n_stored, len(result.failures)) == (0, 2, 2)
    assert (stored(empty), empty.version) == (before, version)


def test_a_shard_fetched_again_completes_the_corpus(tmp_path, toy_encoder):
    path = shard(tmp_path / "laion" / "00000.tar", *sample("1"), *sample("2", url="http://a.example/2.jpg"))
    whole, broken = (attrdb.create(tmp_path / f"{name}.attrdb") for name in ("whole", "broken"))
    ingest_corpus(whole, open_corpus(path.parent), [toy_encoder])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"2.txt\0")])
    result = ingest_corpus(broken, open_corpus(path.parent), [toy_encoder])
    assert (result.n_done, len(result.failures)) == (1, 1)
    path.write_bytes(data)
    result = ingest_corpus(broken, open_corpus(path.parent), [toy_encoder])
    assert (result.n_done, result.n_stored) == (1, 1)
    assert stored(broken) == stored(whole)


def test_a_key_that_came_before_is_reported_although_its_address_is_the_same(empty, tmp_path, toy_encoder):
    path = shard(tmp_path / "laion" / "00000.tar", *sample("1"), *sample("2"), *sample("1"))
    result = ingest_corpus(empty, open_corpus(path.parent), [toy_encoder])
    assert (result.n_done, result.n_stored, len(result.failures)) == (2, 0, 1)
