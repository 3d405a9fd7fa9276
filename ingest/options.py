"""The options of customized models. Each is declared once, as a field of a dataclass.

The options of the command line, the keys of a specs file, the checks of values and the table in docs/importing.md all come
from these declarations. This module imports no torch, so that `attrdb --help` stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from attrdb.errors import InvalidValue

CONCEPT_KINDS = ("object", "style")
KINDS = (*CONCEPT_KINDS, "mixed", "concepts")
PRECISIONS = ("auto", "float32", "bf16")
PRIORS = ("caption", "image", "generated")
PROFILES = ("paper",)
MONITOR_LEVELS = ("off", "steps", "changes", "probes")
LEAVES = ("image", "concept", "creator", "half")
DRAWS = ("fixed", "redrawn")

LARGEST = 2**63  # beyond it, no column and no random generator takes a whole number
REQUIRED = object()  # the default of an option that has none
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


@dataclass(frozen=True)
class Option:
    """An option: its permitted values and its description.

    name:         name of the field and key in a specs file; on the command line it has dashes
    default:      REQUIRED if a value must be given
    default_text: description of the default, if the value does not show it
    of_machine:   the option decides how this machine makes a model, not what the model is
    unless:       name of the option that stands in for this one, which is then not required
    by_scheme:    in a specs file the value may be an object, with one for each prompt scheme
    """

    help: str
    name: str = ""
    type: type = str
    default: Any = REQUIRED
    at_least: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str | None = None
    of_machine: bool = False
    unless: str | None = None
    by_scheme: bool = False

    @property
    def required(self) -> bool:
        """Whether a value must be given, whatever else is."""
        return self.default is REQUIRED and self.unless is None

    @property
    def default_shown(self) -> str | None:
        """The default in words; None if there is none."""
        if self.default_text or self.default in (REQUIRED, None):
            return self.default_text
        if self.type is bool:
            return "true" if self.default else "false"
        return f"{self.default:g}" if self.type is float else str(self.default)

    @property
    def bound(self) -> str | None:
        """The least value, in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return None if self.above is None else f"above {self.above:g}"

    def check(self, value: object, shown: str | None = None) -> None:
        """shown: the value as its source writes it

        raises: InvalidValue for a value of another type, below the bound, or not among the choices
        """
        if self.by_scheme and isinstance(value, dict):
            for scheme, number in value.items():
                if needed := self._violation(number):
                    raise InvalidValue(f"{self.name} is {number!r} for {scheme!r}; it must be {needed}")
        elif needed := self._violation(value):
            raise InvalidValue(f"{self.name} is {shown or repr(value)}; it must be {needed}")

    def _violation(self, value: object) -> str | None:
        """The requirement that a value does not meet."""
        accepted = (int, float) if self.type is float else self.type
        if not isinstance(value, accepted) or isinstance(value, bool) != (self.type is bool):
            return TYPE_NAMES[self.type]
        if self.choices and value not in self.choices:
            return one_of(self.choices)
        if isinstance(value, (int, float)):
            if isinstance(value, int) and not -LARGEST <= value < LARGEST:
                return "below 2^63 in size"
            if not math.isfinite(value):
                return "a finite number"
            if self.at_least is not None and value < self.at_least:
                return self.bound
            if self.above is not None and value <= self.above:
                return self.bound
        return None


def one_of(values: Sequence[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))


def option(help: str, default: Any = REQUIRED, **rules: Any) -> Any:
    """A dataclass field that is an option; rules: further fields of `Option`."""
    metadata = {"option": Option(help, default=default, **rules)}
    return field(metadata=metadata) if default is REQUIRED else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CustomizeSettings:
    """Settings of training.

    steps and lr are those of Custom Diffusion for Stable Diffusion 1.x; other methods and base models have their own.
    """

    steps: int = option("Training steps.", 250, at_least=1, default_text="the method's")
    batch: int = option("Training batch size.", 8, at_least=1)
    lr: float = option("Learning rate.", 8e-5, above=0, default_text="the method's")
    seed: int = option("Seed of training, prompts and samples.", 0)
    augment: str = option(
        "Augmentation of the exemplars: none, mirrored (mild), mirrored and scaled (strong), or mirrored, made smaller and "
        "placed, as the prompt then says (placed).",
        "none",
        choices=("none", "mild", "strong", "placed"),
    )
    prior: str = option(
        "Where regularization images come from: the corpus, by caption or by image, or the base model (generated).",
        "caption",
        choices=PRIORS,
    )
    prior_images: int = option("Number of regularization images.", 0, at_least=0)
    prior_weight: float = option("Weight of their loss, relative to that of the exemplars.", 1.0, above=0)
    token_from: str = option("Words whose mean embedding each new token starts from.", "", default_text="the category")

    def like(self, category: str | None) -> str:
        """The words that the new token starts from."""
        return self.token_from or category or ""


@dataclass(frozen=True)
class SynthesizeSettings:
    """Settings of sampling."""

    samples_per_prompt: int = option("Samples per prompt.", 4, at_least=1)
    solver_steps: int = option("Sampling steps.", 25, at_least=1)
    guidance: float = option("Classifier-free guidance.", 6.0, at_least=1)
    sample_batch: int = option("Samples generated at a time; fewer take less memory.", 16, at_least=1)
    seed: int = 0  # its option is that of CustomizeSettings


@dataclass(frozen=True)
class Concept:
    """One of the several concepts that a model is customized on. Its checks are those of CONCEPT_OPTIONS."""

    token: str
    kind: str
    category: str


CONCEPT_OPTIONS = (
    Option("Token that names the concept in prompts.", "token", default=None, default_text="V1*, V2*, ... by order"),
    Option("What its exemplars have in common: an object or a style.", "kind", choices=CONCEPT_KINDS),
    Option("What its exemplars show, such as cat; for a style, its name.", "category"),
    Option("Folder of its training images, or a list of image files.", "exemplars", Path),
)


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides a customized model and its samples. concepts: of a model of kind `concepts`, else none"""

    kind: str = option(
        "What the exemplars have in common: an object, a style, or nothing (mixed: each has a caption of its own); concepts: "
        "several of these, see concepts.",
        choices=KINDS,
        unless="concepts",
    )
    category: str = option(
        "What the exemplars show, such as cat; for a style, its name; for mixed, any label. Of several concepts by default "
        "their categories.",
        unless="concepts",
    )
    base_model: str = option(
        "Stable Diffusion 1.x/2.x: icon-sd, a pipeline folder or a hub id.", default_text="--base-model"
    )
    split: str | None = option("Split of the model, such as train, val or test.", None)
    prompts: str = option(
        "A prompt bank (photo, icon), a folder of one, or a text file, one prompt with a token such as V* per line.",
        "photo",
    )
    prompts_per_scheme: int | dict[str, int] = option(  # noqa: RUF009 (a frozen dataclass; the default is a number)
        "Prompts per scheme; in a specs file also an object with a number for each.", 4, at_least=1, by_scheme=True
    )
    train_prompt: str | None = option(
        "Prompt that exemplars are trained with; {category} is the category, {caption} the exemplar's caption, or "
        "{caption|a picture} with words for exemplars without captions.",
        None,
        default_text="by kind",
    )
    method: str = option(
        "Method of customization: custom-diffusion, dreambooth-lora, textual-inversion, or one that a package adds.",
        "custom-diffusion",
    )
    precision: str = option(
        "Number format of the U-Net; auto is bf16 on hardware that supports it.", "auto", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(
        "Train with less memory, but more slowly. The model is the same.", False, of_machine=True
    )
    monitor: str = option(
        "What to note of the training images while the model is customized: nothing, which were drawn when (steps), also "
        "what each changed, and also how the model answers fixed probes. The model is the same.",
        "off",
        choices=MONITOR_LEVELS,
        of_machine=True,
    )
    customize: CustomizeSettings = field(default_factory=CustomizeSettings)
    synthesize: SynthesizeSettings = field(default_factory=SynthesizeSettings)
    concepts: tuple[Concept, ...] = ()  # its option is beside that of the exemplars, which it stands in for


@dataclass(frozen=True)
class QueueSettings:
    """How a queue of models is worked off. They belong to the machine: models do not depend on them."""

    workers: int = option("Processes that share the work.", 1, at_least=1, of_machine=True)
    retries: int = option(
        "Further attempts at a model after an error that may not come again.", 1, at_least=0, of_machine=True
    )
    lease_minutes: float = option(
        "Minutes without a sign of life after which a worker counts as stuck.", 10, above=0, of_machine=True
    )


@dataclass(frozen=True)
class TruthSettings:
    """How models are trained again without some of their exemplars."""

    halves: int = option("Random halves of a model's exemplars to leave out.", 32, at_least=1)
    draws: str = option(
        "Steps and noises of the training: those of the model's own (fixed), or new ones (redrawn).",
        "fixed",
        choices=DRAWS,
    )
    seed: int = option("Seed of redrawn training.", 1, at_least=0)


def options_of(settings: type, nested: bool = True) -> Iterator[Option]:
    """The options that a dataclass declares, and, if nested, those of the dataclasses within it."""
    types = get_type_hints(settings)
    for member in fields(settings):
        type_ = next(iter(get_args(types[member.name])), types[member.name])  # of `int | None` the int
        if "option" in member.metadata:
            yield replace(member.metadata["option"], name=member.name, type=type_)
        elif nested and isinstance(type_, type) and is_dataclass(type_):
            yield from options_of(type_)


def check_options(settings: Any) -> None:
    """raises: InvalidValue, as `Option.check`, for a value of a dataclass or of one within it; None is no value"""
    for declared in options_of(type(settings), nested=False):
        value = getattr(settings, declared.name)
        if not (value is None and declared.default is None):
            declared.check(value)
    for member in fields(settings):
        if is_dataclass(nested := getattr(settings, member.name)):
            check_options(nested)


TRUTH_OPTIONS = tuple(options_of(TruthSettings))
QUEUE_OPTIONS = tuple(options_of(QueueSettings))
MODEL_OPTIONS = tuple(
    sorted(
        [
            Option(
                "Folder of the training images; in a specs file also a list of image files.",
                "exemplars",
                Path,
                unless="concepts",
            ),
            Option(
                "JSON file with a list of concepts, each with token, kind, category and exemplars; in a specs file the list.",
                "concepts",
                Path,
                default=None,
            ),
            Option(
                "Id of the model.", "model_id", default=None, default_text="the category and a hash of the exemplars"
            ),
            Option("As many prompts and samples as in the paper's Table 1.", "profile", default=None, choices=PROFILES),
            *options_of(ModelSettings),
        ],
        key=lambda declared: declared.default is not REQUIRED,
    )
)
