"""Drawing a model's answers to prompts, as files that `files.read_answers` reads: NUMBER/SEED.png."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attrdb.errors import InvalidValue
from attrdb.ingest.customize.base_model import base_model_folder, load_base_model, weights_hash
from attrdb.ingest.customize.synthesize import SamplePlan, synthesize, use_fast_solver
from attrdb.ingest.options import SynthesizeSettings
from attrdb.ingest.prompts import Prompt
from attrdb.progress import Progress, no_progress
from attrdb.store.files import write_whole
from attrdb.store.locks import exclusive_lock

SETTINGS = "answers.json"  # in the folder: what it was drawn with


@dataclass(frozen=True)
class Drawn:
    n_done: int
    n_stored: int  # files that were there before


def draw_answers(
    model: str,
    prompts: Mapping[int, str],
    folder: Path,
    n_answers: int,
    settings: SynthesizeSettings,
    report: Progress = no_progress,
) -> Drawn:
    """Draw answers of a Stable Diffusion pipeline, and write each to a file; files that are there are kept.

    model:    a pipeline folder, a hub id, or icon-sd
    settings: `seed` decides the starting noises, with the model's weights and the prompt's number: models that began with the
              same noise would answer alike. `samples_per_prompt` is not used
    raises:   as `load_base_model`; InvalidValue for a folder of other answers, or a path that is a file; Busy if another
              process draws into it
    Numbers differ in their last digits with what is computed together, so a rerun after an interruption may draw pictures
    that differ a little from those that it would have drawn at once.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidValue(f"{folder} is a file; name a folder for the answers")
    weights = weights_hash(base_model_folder(model))
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / ".answers.lock", f"answers are being drawn into {folder}"):
        _check_settings(folder, _settings(weights, prompts, settings))
        wanted = dict(_files(f"{settings.seed}/{weights}", prompts, folder, n_answers))
        missing = {file: plan for file, plan in wanted.items() if not file.exists()}
        if missing:
            _draw(model, missing, settings, report)
    return Drawn(len(missing), len(wanted) - len(missing))


def _settings(weights: str, prompts: Mapping[int, str], settings: SynthesizeSettings) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(sorted(prompts.items())).encode()).hexdigest()
    drawn_by = {name: getattr(settings, name) for name in ("solver_steps", "guidance", "seed")}
    return {"weights": weights, "prompts": digest, **drawn_by}


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings with the answers; raises InvalidValue if the folder has answers of others."""
    file = folder / SETTINGS
    if file.is_file():
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        other = [name for name, value in settings.items() if not isinstance(stored, dict) or stored.get(name) != value]
        if other:
            raise InvalidValue(
                f"{folder} has answers of another model or drawn otherwise (other {', '.join(other)}); name another folder"
            )
    elif any(folder.glob("*/*.png")):
        raise InvalidValue(f"{folder} has pictures that attrdb has not drawn; name another folder")
    else:
        write_whole(file, lambda part: part.write_text(json.dumps(settings)))


def _files(seed: str, prompts: Mapping[int, str], folder: Path, n_answers: int) -> Iterator[tuple[Path, SamplePlan]]:
    for number, text in sorted(prompts.items()):
        draw = random.Random(f"{seed}/{number}")
        for noise in draw.sample(range(2**31), n_answers):
            yield (
                folder / str(number) / f"{noise}.png",
                SamplePlan(f"{number}/{noise}", Prompt(number, "", text), noise),
            )


def _draw(model: str, missing: Mapping[Path, SamplePlan], settings: SynthesizeSettings, report: Progress) -> None:
    base = load_base_model(model)
    use_fast_solver(base)
    files, encoded = list(missing), dict[str, Any]()
    for start in range(0, len(files), settings.sample_batch):
        part = files[start : start + settings.sample_batch]
        report("draw answers", start, len(files))
        pictures = synthesize(base, [missing[file] for file in part], settings, encoded=encoded)
        for file, picture in zip(part, pictures, strict=True):
            file.parent.mkdir(exist_ok=True)
            write_whole(file, partial(picture.save, format="PNG"))
    report("draw answers", len(files), len(files))
