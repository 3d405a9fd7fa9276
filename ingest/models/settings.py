"""What a customized model is to be: its exemplars, its settings and the prompts that it is sampled with, all checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.base_model import base_model_folder, read_profile
from attrdb.ingest.customize import CustomizeSettings
from attrdb.ingest.customizers import DEFAULT_METHOD, load_customizer
from attrdb.ingest.devices import resolved_precision
from attrdb.ingest.prompts import BANKS, TOKEN, Prompt, choose_prompts, paper_counts
from attrdb.ingest.read.pictures import Picture, image_files, read_picture_file, read_text
from attrdb.ingest.regularization import check_prior
from attrdb.ingest.synthesize import SynthesizeSettings
from attrdb.ingest.views import VIEWS
from attrdb.store.ids import LONGEST, check_id
from attrdb.store.schema import KINDS

PROFILES = ("paper",)


@dataclass(frozen=True)
class Exemplar:
    picture: Picture
    fields: dict = field(default_factory=dict)  # source, creator, license, uri, prompt ... where known


@dataclass(frozen=True)
class ModelSettings:
    """All that decides a customized model and its samples.

    method:    of customization, see `attrdb.ingest.customizers`
    precision: what the U-Net computes in, see `devices.resolved_precision`
    """

    kind: str
    category: str
    base_model: str
    split: str | None = None
    prompts: str = "photo"
    prompts_per_scheme: int | dict[str, int] = 4  # of every scheme alike, or by scheme
    method: str = DEFAULT_METHOD
    precision: str = "auto"
    gradient_checkpointing: bool = False
    customize: CustomizeSettings = field(default_factory=CustomizeSettings)
    synthesize: SynthesizeSettings = field(default_factory=SynthesizeSettings)


def read_exemplars(folder: Path) -> list[Exemplar]:
    """The images of a folder, in the order of their names; a `.txt` of the same name is the caption.

    raises: NotFound if there is no such folder, InvalidValue if it has no image, or one that cannot be used
    """
    files = list(image_files(folder))
    if not files:
        raise InvalidValue(f"exemplar folder {folder} has no image; put PNG, JPEG, WebP, BMP or GIF files into it")
    return [read_exemplar(path, folder.name) for path in files]


def read_exemplar(path: Path, source: str) -> Exemplar:
    """raises: InvalidValue for an image, or a caption beside it, that cannot be used"""
    caption = path.with_suffix(".txt")
    fields = {"source": source, "uri": path.resolve().as_uri()}
    if caption.is_file() and (text := " ".join(read_text(caption).split())):
        fields["prompt"] = text
    return Exemplar(read_picture_file(path), fields)


def settings_for(
    base_model: str,
    kind: str,
    category: str,
    given: dict | None = None,
    split: str | None = None,
    profile: str | None = None,
) -> ModelSettings:
    """What is given (None: not given), over the base model's own profile, over the method's and attrdb's defaults.

    profile: 'paper' for the numbers of prompts and samples of the paper's Table 1, before what the base model says
    Of the profile, steps and lr are for the default method; what suits another stands in it under "methods", by its name.
    raises: InvalidValue for an unknown kind, method or setting, NotFound or InvalidValue for the base model or the prompts
    """
    if kind not in KINDS:
        raise InvalidValue(f"kind is {kind!r}; it must be {' or '.join(KINDS)}")
    if not category.strip() or TOKEN in category:
        raise InvalidValue(f"category is {category!r}; it must say what is shown, without the modifier token {TOKEN}")
    if profile not in (None, *PROFILES):
        raise InvalidValue(f"profile is {profile!r}; it must be {' or '.join(PROFILES)}")
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    if profile == "paper":
        per_scheme, samples = paper_counts(kind, split)
        chosen = {"prompts_per_scheme": per_scheme, "samples_per_prompt": samples} | chosen
    wanted = _wanted(base_model, chosen)
    customize_names, synthesize_names = (
        {one.name for one in fields(part)} for part in (CustomizeSettings, SynthesizeSettings)
    )
    own_names = {"prompts", "prompts_per_scheme", "method", "precision", "gradient_checkpointing"}
    unknown = wanted.keys() - customize_names - synthesize_names - own_names
    if unknown:
        raise InvalidValue(f"unknown settings for base model {base_model}: {', '.join(sorted(unknown))}")

    def only(names: set[str]) -> dict:
        return {name: value for name, value in wanted.items() if name in names}

    settings = ModelSettings(
        kind,
        category,
        base_model,
        split,
        customize=CustomizeSettings(**only(customize_names)),
        synthesize=SynthesizeSettings(**only(synthesize_names)),
        **only(own_names),
    )
    _check(settings)
    return settings


def _wanted(base_model: str, given: dict) -> dict:
    """All settings by name, those at attrdb's defaults left out."""
    profile = dict(read_profile(base_model_folder(base_model)))
    methods = profile.pop("methods", {})
    method = given.get("method") or profile.get("method") or DEFAULT_METHOD
    customizer = load_customizer(method)
    wanted = {"steps": customizer.steps, "lr": customizer.lr}
    wanted |= {name: value for name, value in profile.items() if method == DEFAULT_METHOD or name not in wanted}
    return wanted | methods.get(method, {}) | given


def _check(settings: ModelSettings) -> None:
    """raises: InvalidValue or NotFound for settings that cannot be used, before anything is read or loaded"""
    resolved_precision(settings.precision)
    check_prior(settings.customize)
    if TOKEN in settings.customize.token_from:
        raise InvalidValue(
            f"token_from is {settings.customize.token_from!r}; it must be words that the base model knows"
        )
    if settings.customize.augment not in VIEWS:
        raise InvalidValue(f"augment is {settings.customize.augment!r}; it must be {' or '.join(VIEWS)}")
    if settings.kind == "mixed" and settings.method == "textual-inversion":
        raise InvalidValue(
            f"method {settings.method!r} trains a token alone, and models of kind 'mixed' have none; choose another method"
        )
    if settings.kind != "mixed" or settings.prompts not in BANKS:
        prompts_of(settings, [])


def prompts_of(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> list[Prompt]:
    """The prompts that a model with these settings is sampled with.

    Of kind `mixed`: every line of the prompt file, or every caption of the exemplars where none is given.
    raises: InvalidValue for an exemplar of kind `mixed` without a caption; as `choose_prompts`
    """
    if settings.kind == "mixed":
        if settings.prompts in BANKS:
            return [Prompt(n, "caption", text) for n, text in enumerate(dict.fromkeys(captions(exemplars)))]
        return _plain_prompts(Path(settings.prompts))
    return choose_prompts(
        settings.kind,
        settings.category,
        settings.prompts,
        settings.prompts_per_scheme,
        settings.synthesize.seed,
        settings.split,
    )


def _plain_prompts(path: Path) -> list[Prompt]:
    """The lines of a file of prompts without a modifier token."""
    if not path.is_file():
        raise NotFound(f"no prompt file {path}; give a text file with one prompt a line")
    lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").splitlines()]
    for number, line in enumerate(lines, 1):
        if TOKEN in line:
            raise InvalidValue(f"{path} line {number} has {TOKEN}, and models of kind 'mixed' have no token: {line!r}")
    found = [line for line in lines if line]
    if not found:
        raise InvalidValue(f"{path} has no prompt in it; write one a line")
    return [Prompt(n, "user", line) for n, line in enumerate(found)]


def captions(exemplars: Sequence[Exemplar]) -> list[str]:
    """The exemplars' captions, which a model of kind `mixed` is trained with.

    raises: InvalidValue if one has none, or names a modifier token
    """
    for exemplar in exemplars:
        name, caption = exemplar.picture.name, exemplar.fields.get("prompt")
        if not caption:
            raise InvalidValue(
                f"exemplar {name} has no caption, which kind 'mixed' needs; write one into a .txt file beside it, or choose "
                "another kind"
            )
        if TOKEN in caption:
            raise InvalidValue(
                f"the caption of {name} has {TOKEN}, and models of kind 'mixed' have no token: {caption!r}"
            )
    return [exemplar.fields["prompt"] for exemplar in exemplars]


def default_model_id(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> str:
    """`<category>-<hash of the exemplars>`: the same exemplars make the same model."""
    digest = hashlib.sha256("".join(sorted(exemplar.picture.sha256 for exemplar in exemplars)).encode())
    name = re.sub(r"[^a-z0-9]+", "-", settings.category.lower()).strip("-")[: LONGEST - 9] or settings.kind
    return f"{name}-{digest.hexdigest()[:8]}"


def check_model(settings: ModelSettings, exemplars: Sequence[Exemplar], model_id: str | None) -> str:
    """The model's id, the given one or one made from category and exemplars.

    raises: InvalidValue for an unusable id, no exemplar, the same exemplar twice, or, of kind `mixed`, without a caption
    """
    if not exemplars:
        raise InvalidValue("a model needs at least one exemplar")
    model_id = default_model_id(settings, exemplars) if model_id is None else model_id
    check_id("model", model_id)
    first_of: dict[str, str] = {}
    for picture in (exemplar.picture for exemplar in exemplars):
        if first_of.setdefault(picture.sha256, picture.name) != picture.name:
            raise InvalidValue(f"exemplars {first_of[picture.sha256]} and {picture.name} are the same file; keep one")
    if settings.kind == "mixed":
        captions(exemplars)
    return model_id
