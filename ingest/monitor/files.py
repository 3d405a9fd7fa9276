"""What a monitored customization leaves for the later stages of its job, and beside the model's weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from attrdb.errors import InvalidValue
from attrdb.ingest.customize.observer import Tensors
from attrdb.ingest.monitor.monitor import Monitor, Names
from attrdb.store.files import write_whole
from attrdb.store.ids import files_beside, stored_file

PREFIX = "monitored-"  # of the files of rows in a job's folder
LARGEST = ".largest"  # after a weight's name: each image's scale, (n,) float32


def write(monitor: Monitor, names: Names, job: Path, weights: Path) -> None:
    """Keep the rows in the job's folder, and the sums of gradients, if there are any, beside the weights."""
    for table, rows in monitor.tables(names).items():
        write_whole(job / f"{PREFIX}{table}.parquet", partial(pq.write_table, rows))
    if (sums := monitor.gradient_sums) is not None:
        # A single entry, as in `save_delta`.
        metadata = {"attrdb": json.dumps({"exemplars": list(names.exemplars)})}
        write_whole(files_beside(weights)[1], lambda part: save_file(_packed(sums), part, metadata))


def clear(job: Path, weights: Path) -> None:
    """Delete what an earlier training has left, before another one."""
    for file in (files_beside(weights)[1], *job.glob(f"{PREFIX}*.parquet")):
        file.unlink(missing_ok=True)


def read_rows(job: Path) -> dict[str, pa.Table]:
    """The rows of a job's folder by table; none for a model that was not monitored."""
    files = sorted(job.glob(f"{PREFIX}*.parquet"))
    return {file.stem.removeprefix(PREFIX): pq.read_table(file) for file in files}


@dataclass(frozen=True)
class GradientSums:
    """Gradients summed over all steps of a customization.

    exemplars: image_id of each
    sums:      (n_exemplars, *shape) float32 by trained weight
    """

    exemplars: list[str]
    sums: Tensors


def read_gradients(database: Path, weights_path: str) -> GradientSums:
    """Of a model whose row names these weights.

    raises: InvalidValue if there are none that can be read, or they lie outside of the database
    """
    weights = database / weights_path
    file = stored_file(database, str(files_beside(PurePath(weights_path))[1]))
    if not file.is_file():
        raise InvalidValue(
            f"there are no gradients beside {weights}; they are kept for models made with --monitor changes, of at most 64 "
            "exemplars and as many as 1 GiB holds, until one of these is taken out"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            exemplars = json.loads(opened.metadata()["attrdb"])["exemplars"]
        packed = load_file(file)
        names = [name for name in packed if not name.endswith(LARGEST)]
        sums = {
            name: packed[name].float() * packed[name + LARGEST].view(-1, *[1] * (packed[name].ndim - 1))
            for name in names
        }
        if any(len(of_images) != len(exemplars) for of_images in sums.values()):
            raise ValueError(f"it has {len(exemplars)} exemplars, and not as many gradients")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidValue(f"the gradients {file} cannot be read: {error}") from error
    return GradientSums(exemplars, sums)


def _packed(sums: Tensors) -> Tensors:
    """Each image's sums as parts of their largest, in half the bytes: three digits."""
    packed = {}
    for name, of_images in sums.items():
        largest = of_images.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        packed[name] = (of_images / largest.view(-1, *[1] * (of_images.ndim - 1))).half().cpu()
        packed[name + LARGEST] = largest.cpu()
    return packed
