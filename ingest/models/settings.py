"""The settings of a customized model, its exemplars and the prompts that it is sampled with, all checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from attrdb.errors import InvalidValue, NotFound
from attrdb.ingest.blends import check_blend
from attrdb.ingest.customize.base_model import base_model_folder, read_profile
from attrdb.ingest.customize.customizers import DEFAULT_METHOD, load_customizer
from attrdb.ingest.models.concepts import check_category, check_concepts, joined_categories
from attrdb.ingest.models.exemplars import Exemplar
from attrdb.ingest.options import (
    KINDS,
    PROFILES,
    Concept,
    CustomizeSettings,
    ModelSettings,
    SynthesizeSettings,
    check_options,
    one_of,
    options_of,
)
from attrdb.ingest.prompts import (
    BANKS,
    CAPTION,
    CAPTION_OR_WORDS,
    TOKEN,
    TRAIN_PROMPTS,
    Prompt,
    choose_concept_prompts,
    choose_prompts,
    paper_counts,
)
from attrdb.ingest.read.text import read_text
from attrdb.store.ids import LONGEST, check_id


def settings_for(
    base_model: str,
    kind: str | None,
    category: str | None,
    options: dict | None = None,
    split: str | None = None,
    profile: str | None = None,
    concepts: Sequence[Concept] = (),
) -> ModelSettings:
    """Settings from options, over the base model's own profile, over the method's and attrdb's defaults.

    kind:     of the model; None: `concepts`, if there are any
    category: of the model; None: those of the concepts
    options:  settings by name; None means the default
    profile:  'paper' for the numbers of prompts and samples of the paper's Table 1, before those of the base model's profile
    concepts: of a model of several
    The base model's profile may have settings for one kind under "kinds" and for one method under "methods"; all its other
    values of steps and lr are for the default method.
    raises: InvalidValue for an unknown kind, method or setting, NotFound or InvalidValue for the base model or the prompts
    """
    if concepts:
        kind, category = kind or "concepts", category or joined_categories(concepts)
    if kind is None or category is None:
        raise InvalidValue(f"{'kind' if kind is None else 'category'} is missing; give exemplars, kind and category")
    if profile not in (None, *PROFILES):
        raise InvalidValue(f"profile is {profile!r}; it must be {one_of(PROFILES)}")
    chosen = {name: value for name, value in (options or {}).items() if value is not None}
    if profile == "paper":
        per_scheme, samples = paper_counts(kind, split)
        chosen = {"prompts_per_scheme": per_scheme, "samples_per_prompt": samples} | chosen
    values = _with_profile(base_model, kind, chosen)
    unknown = values.keys() - {option.name for option in options_of(ModelSettings)}
    if unknown:
        raise InvalidValue(f"unknown settings for base model {base_model}: {', '.join(sorted(unknown))}")

    def values_of(settings: type) -> dict:
        return {declared.name: values[declared.name] for declared in fields(settings) if declared.name in values}

    # A folder is stored with its whole path, so that it is found from any other folder; a link keeps its name.
    path = str(Path(base_model).absolute()) if Path(base_model).is_dir() else base_model
    named = {"kind": kind, "category": category, "base_model": path, "split": split, "concepts": tuple(concepts)}
    settings = ModelSettings(
        **values_of(ModelSettings) | named,
        customize=CustomizeSettings(**values_of(CustomizeSettings)),
        synthesize=SynthesizeSettings(**values_of(SynthesizeSettings)),
    )
    _check(settings)
    return settings


def _with_profile(base_model: str, kind: str, options: dict) -> dict:
    """Settings by name, without those at attrdb's defaults."""
    profile = read_profile(base_model_folder(base_model))
    kinds, methods = (_by_name(profile, part, base_model) for part in ("kinds", "methods"))
    if unknown := kinds.keys() - set(KINDS):
        raise InvalidValue(
            f'"kinds" in customize.json of base model {base_model} has {", ".join(map(repr, sorted(unknown)))}; a kind is '
            f"{one_of(KINDS)}"
        )
    plain = {name: value for name, value in profile.items() if name not in ("kinds", "methods")}
    of_kind = plain | kinds.get(kind, {})
    method = options.get("method") or of_kind.get("method") or DEFAULT_METHOD
    customizer = load_customizer(method)
    values = {"steps": customizer.steps, "lr": customizer.lr}
    values |= {name: value for name, value in of_kind.items() if method == DEFAULT_METHOD or name not in values}
    return values | methods.get(method, {}) | options


def _by_name(profile: dict, part: str, base_model: str) -> dict[str, dict]:
    """A part of a profile: settings by name.

    raises: InvalidValue if it is anything else
    """
    found = profile.get(part, {})
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise InvalidValue(
            f'"{part}" in customize.json of base model {base_model} is {found!r}; it must be an object whose values are '
            "objects of settings"
        )
    return found


def _check(settings: ModelSettings) -> None:
    """raises: InvalidValue or NotFound for settings that cannot be used, before any picture is read or weights are loaded"""
    check_options(settings)
    tokens = [concept.token for concept in settings.concepts] or [TOKEN]
    if settings.concepts or settings.kind == "concepts":
        check_concepts(settings.concepts)
        if settings.kind != "concepts":
            raise InvalidValue(
                f"kind is {settings.kind!r}, and there are concepts; leave kind out, each concept has its own"
            )
    check_category(settings.category, tokens)
    if any(token in settings.customize.token_from for token in tokens):
        raise InvalidValue(
            f"token_from is {settings.customize.token_from!r}; it must be words that the base model knows"
        )
    if settings.train_prompt is not None:
        if settings.kind not in TRAIN_PROMPTS:
            raise InvalidValue(
                f"train_prompt is given for a model of kind {settings.kind!r}; it is for {one_of(list(TRAIN_PROMPTS))}"
            )
        if TOKEN not in CAPTION_OR_WORDS.sub(CAPTION, settings.train_prompt):
            raise InvalidValue(f"train_prompt is {settings.train_prompt!r}; it must contain {TOKEN}")
    if settings.kind == "mixed" and settings.method == "textual-inversion":
        raise InvalidValue(
            f"method {settings.method!r} trains a token alone, and models of kind 'mixed' have none; choose another method"
        )
    if settings.kind != "mixed" or settings.prompts not in BANKS:
        prompts_of(settings, [])


def prompts_of(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> list[Prompt]:
    """The prompts that a model with these settings is sampled with.

    Kind `mixed` takes every line of the prompt file, or without one every caption of the exemplars.
    raises: InvalidValue for an exemplar of kind `mixed` without a caption; as `choose_prompts`
    """
    if settings.kind == "mixed":
        if settings.prompts in BANKS:
            return [Prompt(n, "caption", text) for n, text in enumerate(dict.fromkeys(captions(exemplars, settings)))]
        return _plain_prompts(Path(settings.prompts))
    if settings.kind == "concepts":
        return choose_concept_prompts(
            settings.concepts,
            settings.prompts,
            settings.prompts_per_scheme,
            settings.synthesize.seed,
            settings.split,
        )
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
        raise NotFound(f"no prompt file {path}; name a text file with one prompt per line")
    lines = [line.strip() for line in read_text(path).splitlines()]
    for number, line in enumerate(lines, 1):
        check_blend(line)
        if TOKEN in line:
            raise InvalidValue(f"{path} line {number} has {TOKEN}, and models of kind 'mixed' have no token: {line!r}")
    prompts = [line for line in lines if line]
    if not prompts:
        raise InvalidValue(f"{path} has no prompt in it; write one per line")
    return [Prompt(n, "user", prompt) for n, prompt in enumerate(prompts)]


def captions(exemplars: Sequence[Exemplar], settings: ModelSettings) -> list[str]:
    """The exemplars' captions, which a model of kind `mixed` is trained with, and any whose training prompt has CAPTION.

    raises: InvalidValue if an exemplar has none, or a caption contains the modifier token
    """
    of_kind = settings.kind == "mixed"
    needed_by, instead = ("kind 'mixed'", "kind") if of_kind else (f"train_prompt {settings.train_prompt!r}", "prompt")
    for exemplar in exemplars:
        name, caption = exemplar.picture.name, exemplar.fields.get("prompt")
        if not caption:
            raise InvalidValue(
                f"exemplar {name} has no caption, which {needed_by} needs; write one into a .txt file beside it, or choose "
                f"another {instead}"
            )
        if TOKEN in caption:
            why = "models of kind 'mixed' have no token" if of_kind else "the training prompt names the token"
            raise InvalidValue(f"the caption of {name} has {TOKEN}, and {why}: {caption!r}")
    return [exemplar.fields["prompt"] for exemplar in exemplars]


def filled_prompt(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> str | None:
    """The training prompt: "{caption|words}" becomes CAPTION, or the words if an exemplar has no caption."""
    if settings.train_prompt is None:
        return None
    are_captioned = all(exemplar.fields.get("prompt") for exemplar in exemplars)
    return CAPTION_OR_WORDS.sub(CAPTION if are_captioned else r"\1", settings.train_prompt)


def default_model_id(settings: ModelSettings, exemplars: Sequence[Exemplar]) -> str:
    """`<category>-<hash of the exemplars>`: the same exemplars make the same model."""
    digest = hashlib.sha256("".join(sorted(exemplar.picture.sha256 for exemplar in exemplars)).encode())
    name = re.sub(r"[^a-z0-9]+", "-", settings.category.lower()).strip("-")[: LONGEST - 9] or settings.kind
    return f"{name}-{digest.hexdigest()[:8]}"


def check_model(settings: ModelSettings, exemplars: Sequence[Exemplar], model_id: str | None) -> str:
    """The model's id; None: one made from the category and the exemplars.

    raises: InvalidValue for an unusable id, no exemplar, the same exemplar twice, a missing caption, or a concept without
            exemplars
    """
    if not exemplars:
        raise InvalidValue("a model needs at least one exemplar")
    model_id = default_model_id(settings, exemplars) if model_id is None else model_id
    check_id("model", model_id)
    first_of: dict[str, Exemplar] = {}
    for exemplar in exemplars:
        first = first_of.setdefault(exemplar.picture.sha256, exemplar)
        names = f"{first.picture.name} and {exemplar.picture.name}"
        if first.token != exemplar.token:
            raise InvalidValue(
                f"exemplars {names} of concepts {first.token} and {exemplar.token} are the same image; keep one of them"
            )
        if first.picture.name != exemplar.picture.name:
            raise InvalidValue(f"exemplars {names} are the same file; keep one")
    if settings.kind == "mixed" or CAPTION in (filled_prompt(settings, exemplars) or ""):
        captions(exemplars, settings)
    if settings.concepts:
        tokens = [exemplar.token for exemplar in exemplars]
        for concept in settings.concepts:
            if concept.token not in tokens:
                raise InvalidValue(f"concept {concept.token} has no exemplar; give it one or more images")
        if strange := [token for token in tokens if token not in {concept.token for concept in settings.concepts}]:
            raise InvalidValue(f"an exemplar is of concept {strange[0]}, and the model has none of that token")
    return model_id
