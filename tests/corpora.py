"""What the tests of importing share: encoded pictures, tar shards, and a short way to import and to look."""

import io
import json
import tarfile

from PIL import Image

from attrdb.ingest.read.corpus import ingest_corpus
from attrdb.ingest.read.discover import open_corpus
from attrdb.ingest.read.pictures import webp

FIELDS = {"url": "http://a.example/1.jpg", "status": "success", "LICENSE": "CC0", "width": 32, "NSFW": "UNLIKELY"}


def encoded(shade=9):
    return webp(Image.new("RGB", (32, 32), (shade, 99, 199)))


def shard(path, *members):
    """A tar of (name, bytes or text or an object as JSON), or of ready TarInfo."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            if isinstance(content, dict):
                content = json.dumps(content)
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, shade=9, **fields):
    return (f"{key}.jpg", encoded(shade)), (f"{key}.txt", f"picture {key}"), (f"{key}.json", FIELDS | fields)


def ingest(db, path, encoder, **choices):
    return ingest_corpus(db, open_corpus(path, **choices), [encoder])


def stored(db, *columns):
    """The ids of the images, or their ids with columns, in order."""
    rows = db.sql(f"SELECT image_id{''.join(f', {column}' for column in columns)} FROM images ORDER BY 1").to_pylist()
    return [tuple(row.values()) if columns else row["image_id"] for row in rows]
