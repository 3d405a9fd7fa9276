"""The rate of encoding: from encoded bytes through the stream, against the bare network on preloaded batches.

    python benchmarks/encoding.py --images 512 --json encoding.json

Weights are random where no package has them; the time does not depend on them. Each round runs every way once, so that other
work on the machine affects all of them.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from machine import describe
from PIL import Image

from attrdb.bundled import sprite_rows
from attrdb.ingest.encode import Encoder, load_encoder
from attrdb.ingest.encode.stream import LARGE_BATCH, SMALL_BATCH, ahead, encode_stream
from attrdb.ingest.read.pictures import read_picture

JPEG_SIDE = 512
ARCHITECTURES = {
    "efficientnet-lite0": "icons",
    "open_clip:ViT-B-32": "photos",
    "timm:vit_base_patch16_224": "photos",
}


def icons(n: int, seed: int) -> list[bytes]:
    """Bundled sprites on white, 64 x 64 WebP."""
    stored = [row["image"] for row in sprite_rows()]
    chosen = np.random.default_rng(seed).choice(len(stored), n, replace=n > len(stored))
    return [stored[number] for number in chosen]


def photos(n: int, seed: int) -> list[bytes]:
    """JPEGs of 512 x 512 pixels: enlarged icons with noise, so that they have as many bytes as photos."""
    rng = np.random.default_rng(seed)
    pictures = []
    for encoded in icons(n, seed):
        large = np.asarray(
            read_picture("icon", encoded).image.resize((JPEG_SIDE, JPEG_SIDE), Image.BICUBIC), np.float32
        )
        noise = rng.normal(0, 12, (JPEG_SIDE // 2, JPEG_SIDE // 2, 3)).repeat(2, axis=0).repeat(2, axis=1)
        file = io.BytesIO()
        Image.fromarray((large + noise).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    return pictures


def load(name: str, folder: Path) -> Encoder:
    """The encoder; with random weights if no package has its weights."""
    kind, _, arch = name.partition(":")
    if not arch:
        return load_encoder(name)
    torch.manual_seed(0)
    if kind == "open_clip":
        import open_clip

        network = open_clip.create_model(arch, load_weights=False)
    else:
        import timm

        network = timm.create_model(arch)
    torch.save(network.state_dict(), folder / f"{arch}.pt")
    return load_encoder(f"{name}/{folder / arch}.pt")


def read(encoded: bytes) -> tuple[str, Image.Image]:
    """The digest that ingestion stores, and the picture."""
    picture = read_picture("picture", encoded)
    return picture.sha256, picture.image


def ways(encoder: Encoder, pictures: list[bytes]) -> dict[str, Callable[[], int]]:
    """The bare network, in the two ways that torch can run it, and the whole stream; each returns the number of images."""
    prepared = np.stack([encoder.prepare(read(picture)[1]) for picture in pictures])
    small = [prepared[start : start + SMALL_BATCH] for start in range(0, len(prepared), SMALL_BATCH)]
    threads = torch.get_num_threads()

    def bare_a_batch_a_thread() -> int:
        with closing(ahead(small, encoder.features, threads, 2 * threads, partial(torch.set_num_threads, 1))) as done:
            encoded = sum(map(len, done))
        torch.set_num_threads(threads)
        return encoded

    def bare_one_batch() -> int:
        return len(encoder.features(prepared[:LARGE_BATCH]))

    def stream() -> int:
        return sum(item.error is None for item in encode_stream([encoder], pictures, read))

    return {"bare": bare_a_batch_a_thread, "bare_one_batch": bare_one_batch, "stream": stream}


def measure(name: str, encoder: Encoder, pictures: list[bytes], rounds: int) -> dict:
    """Images per second of every way, its processor time, and the processor time of a picture before the network.

    Processor time excludes other processes, so it varies less on a busy machine.
    """
    each = ways(encoder, pictures)
    rates: dict[str, list[float]] = {way: [] for way in each}
    used: dict[str, list[float]] = {way: [] for way in each}
    for done in range(rounds + 1):
        for way, run in each.items():
            start, start_used = time.perf_counter(), time.process_time()
            encoded = run()
            if done:  # the first round warms up
                rates[way].append(encoded / (time.perf_counter() - start))
                used[way].append(1000 * (time.process_time() - start_used) / encoded)
    start_used = time.process_time()
    for picture in pictures:
        encoder.prepare(read(picture)[1])
    before = 1000 * (time.process_time() - start_used) / len(pictures)
    spreads = {way: {"min": min(r), "median": median(r), "max": max(r)} for way, r in rates.items()}
    ratios = [s / b for s, b in zip(rates["stream"], rates["bare"], strict=True)]
    processor = {way: median(values) for way, values in used.items()}
    return {
        "encoder": name,
        "images": len(pictures),
        "bytes_a_picture": sum(map(len, pictures)) / len(pictures),
        "images_a_second": spreads,
        "ratio": {"min": min(ratios), "median": median(ratios), "max": max(ratios)},
        "processor_ms_a_picture": {**processor, "before_the_network": before},
        "processor_ratio": processor["bare"] / processor["stream"],
        # On a CPU, reading and the network share the cores, so no schedule is faster than the sum of both.
        "bound_on_cpu": processor["bare"] / (processor["bare"] + before),
    }


@click.command()
@click.option("--images", type=click.IntRange(16), default=256, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--encoders", "names", multiple=True, type=click.Choice(list(ARCHITECTURES)), help="Repeatable; default: all."
)
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there too.")
def main(images: int, rounds: int, seed: int, names: tuple[str, ...], out: Path | None) -> None:
    """Compare the stream with the bare network."""
    sources = {"icons": icons, "photos": photos}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or ARCHITECTURES:
            pictures = sources[ARCHITECTURES[name]](images, seed)
            result = measure(name, load(name, Path(folder)), pictures, rounds)
            results.append(result)
            rates = result["images_a_second"]
            for way, rate in rates.items():
                click.echo(f"{name:28} {way:16} " + "  ".join(f"{name} {value:7.1f}" for name, value in rate.items()))
            ratio = "  ".join(f"{name} {value:7.3f}" for name, value in result["ratio"].items())
            click.echo(f"{name:28} {'ratio':16} {ratio}")
            times = "  ".join(f"{name} {value:.2f}" for name, value in result["processor_ms_a_picture"].items())
            shares = f"ratio {result['processor_ratio']:.3f}  bound {result['bound_on_cpu']:.3f}"
            click.echo(f"{name:28} {'processor ms':16} {times}  {shares}")
    machine = describe("torch", "timm", "open_clip_torch")
    if out:
        report = {"machine": machine, "seed": seed, "rounds": rounds, "jpeg_side": JPEG_SIDE, "results": results}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
