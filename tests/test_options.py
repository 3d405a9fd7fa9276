"""Options of models: one declaration feeds the command line, the keys of a specs file, the checks and the documentation."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.ingest import options
from attrdb.ingest.customize.augmentation import VIEWS
from attrdb.ingest.customize.customizers import DEFAULT_METHOD
from attrdb.ingest.models import ingest_one
from attrdb.ingest.models.exemplars import Exemplar
from attrdb.ingest.models.settings import settings_for
from attrdb.ingest.models.specs import KEYS, read_specs
from attrdb.ingest.models.stages import comparable_settings, settings_hash
from attrdb.ingest.options import (
    MODEL_OPTIONS,
    QUEUE_OPTIONS,
    CustomizeSettings,
    ModelSettings,
    Option,
    QueueSettings,
    SynthesizeSettings,
    check_options,
)
from attrdb.ingest.prompts import BANKS, Prompt
from attrdb.store.leases import LEASE_MINUTES

DOCS = Path(__file__).parents[1] / "docs"
BOUNDED = [option for option in (*MODEL_OPTIONS, *QUEUE_OPTIONS) if option.bound]
BELOW = -1e-9  # that is refused where 0 is the bound


def command(name):
    return main.commands["ingest"].commands[name]


def parameters(name):
    return {parameter.name: parameter for parameter in command(name).params}


# --- settings of stored models ----------------------------------------------------------------------------------------

ALL_SET = ModelSettings(
    "style",
    "ink",
    "icon-sd",
    "test",
    prompts="icon",
    prompts_per_scheme={"gpt": 2, "procedural": 3},
    method="dreambooth-lora",
    precision="float32",
    gradient_checkpointing=True,
    customize=CustomizeSettings(
        steps=9,
        batch=3,
        lr=0.01,
        seed=4,
        augment="strong",
        prior="image",
        prior_images=5,
        prior_weight=0.5,
        token_from="flat art",
    ),
    synthesize=SynthesizeSettings(samples_per_prompt=2, solver_steps=7, guidance=2.5, sample_batch=3, seed=4),
)


def record_of(monkeypatch, settings):
    monkeypatch.setattr(ingest_one, "weights_hash", lambda folder: "b" * 64)
    exemplar = Exemplar(SimpleNamespace(sha256="e" * 64, name="a.png"), {"prompt": "a red vase"})
    return ingest_one._record(settings, [exemplar], [Prompt(0, "gpt", "a V* vase")])


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        (
            ModelSettings("object", "vase", "icon-sd"),
            "eee7810af5321bc1cb2b212d176937be0ed383cf75e1d8f3af726d610e323e0e",
        ),
        (ALL_SET, "8927eea816c82330b1dde7c80afc2e750a357b8977f7a583faf699d8d5ad484b"),
        (ModelSettings("mixed", "any", "icon-sd"), "ef87a9cce6a843ff4e95e77d4f7c7e04308f6c9ceb77f0b814c719830ec6a547"),
    ],
    ids=["defaults", "all set", "mixed"],
)
def test_the_hash_of_settings_is_that_of_stored_models(monkeypatch, settings, stored):
    """Computed before options were declared here: another hash would refuse every model that is stored."""
    assert settings_hash(record_of(monkeypatch, settings)) == stored


def test_an_option_of_the_machine_is_not_compared(monkeypatch):
    machine = {option.name for option in MODEL_OPTIONS if option.of_machine}
    assert machine == {"gradient_checkpointing", "monitor"}
    record = record_of(monkeypatch, ALL_SET)
    other = {"gradient_checkpointing": False, "monitor": "off"}
    assert settings_hash(record | other) == settings_hash(record)
    assert settings_hash(record | {"precision": "bf16"}) != settings_hash(record)
    assert machine.isdisjoint(comparable_settings(record))


# --- one declaration --------------------------------------------------------------------------------------------------


def test_the_command_and_the_file_have_the_same_options():
    names = [option.name for option in MODEL_OPTIONS]
    assert list(KEYS) == names
    assert len(set(names)) == len(names)
    assert [name for name in parameters("model") if name not in ("db", "encoders", "quiet")] == names
    assert {option.name for option in MODEL_OPTIONS if option.required} == {
        name for name in names if parameters("model")[name].required
    }
    assert {"workers", "retries", "lease_minutes"} == {option.name for option in QUEUE_OPTIONS}
    for option in QUEUE_OPTIONS:
        assert parameters("models")[option.name].default == option.default == getattr(QueueSettings(), option.name)


def test_an_option_of_a_model_that_is_left_out_is_no_value():
    """A default here would win over the base model's profile."""
    words = ["x.attrdb", "--exemplars", "x", "--category", "vase", "--kind", "object", "--base-model", "icon-sd"]
    context = command("model").make_context("model", words, parent=click.Context(main, **main.context_settings))
    optional = [option.name for option in MODEL_OPTIONS if option.default is not options.REQUIRED]
    assert {name: context.params[name] for name in optional} == dict.fromkeys(optional)


def test_every_option_has_help_that_ends_as_a_sentence():
    for option in (*MODEL_OPTIONS, *QUEUE_OPTIONS):
        assert option.help.endswith("."), option.name
        shown = parameters("models" if option in QUEUE_OPTIONS else "model")[option.name].help
        assert shown.startswith(option.help)


@pytest.mark.parametrize("option", BOUNDED, ids=lambda option: option.name)
def test_the_command_and_the_checks_have_the_same_bound(option):
    if option.at_least is not None:
        allowed, refused = option.at_least, option.at_least - 1 if option.type is int else option.at_least + BELOW
    else:
        allowed, refused = 1e-9, option.above
    type_ = parameters("models" if option in QUEUE_OPTIONS else "model")[option.name].type
    option.check(option.type(allowed))
    assert type_.convert(option.type(allowed), None, None) == allowed
    with pytest.raises(InvalidValue, match=f"{option.name} is .*; it must be {option.bound}"):
        option.check(option.type(refused))
    with pytest.raises(click.BadParameter):
        type_.convert(option.type(refused), None, None)
    if option.type is float:
        for value in (float("inf"), float("nan")):
            with pytest.raises(InvalidValue, match="it must be a finite number"):
                option.check(value)


@pytest.mark.parametrize(
    "option", [option for option in MODEL_OPTIONS if option.choices], ids=lambda option: option.name
)
def test_the_command_and_the_checks_have_the_same_choices(option):
    assert tuple(parameters("model")[option.name].type.choices) == option.choices
    for choice in option.choices:
        option.check(choice)
    with pytest.raises(InvalidValue, match=f"{option.name} is 'other'; it must be {options.one_of(option.choices)}"):
        option.check("other")


@pytest.mark.parametrize(("values", "text"), [("a", "a"), ("ab", "a or b"), ("abc", "a, b or c")])
def test_choices_in_words(values, text):
    assert options.one_of(tuple(values)) == text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"solver_steps": 0}, "solver_steps is 0; it must be at least 1"),
        ({"prompts_per_scheme": {"gpt": 0}}, "prompts_per_scheme is 0 for 'gpt'; it must be at least 1"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1; it must be true or false"),
    ],
)
def test_settings_from_python_and_from_a_profile_are_checked_too(tiny_base, tmp_path, settings, problem):
    with pytest.raises(InvalidValue, match=problem):
        settings_for(str(tiny_base), "object", "vase", settings)
    folder = tmp_path / "base"
    folder.mkdir()
    for part in tiny_base.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "customize.json").unlink()
    (folder / "customize.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidValue, match=problem):
        settings_for(str(folder), "object", "vase")


def test_a_setting_without_a_default_must_have_a_value():
    check_options(ALL_SET)
    check_options(replace(ALL_SET, split=None))
    with pytest.raises(InvalidValue, match="category is None; it must be text"):
        check_options(replace(ALL_SET, category=None))


def test_what_other_modules_know_of_the_options():
    """They import torch, or are imported where these declarations cannot be."""
    by_name = {option.name: option for option in MODEL_OPTIONS}
    assert by_name["augment"].choices == tuple(VIEWS)
    assert by_name["method"].default == DEFAULT_METHOD
    assert by_name["prompts"].default in BANKS
    assert QueueSettings().lease_minutes == LEASE_MINUTES
    assert CustomizeSettings().seed == SynthesizeSettings().seed


def test_the_declarations_import_nothing_heavy():
    program = (
        "import sys, attrdb.ingest.options; print({'torch', 'numpy', 'pyarrow', 'lance', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- documentation ----------------------------------------------------------------------------------------------------


def options_page():
    spec = importlib.util.spec_from_file_location("options_page", DOCS / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_keys_is_what_the_program_writes(monkeypatch):
    module = options_page()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "stale: run make docs"
    for option in MODEL_OPTIONS:
        assert f"\n| `{option.name}` | " in module.table()
        assert len(re.findall(r"(?<!\\)\|", module.row(option))) == 5, option.name  # four cells
    monkeypatch.setattr(module, "MODEL_OPTIONS", (*MODEL_OPTIONS, Option("An option that is new.", "new")))
    assert module.PAGE.read_text(encoding="utf-8") != module.page()


def test_the_lines_that_the_documentation_shows_have_known_keys(tmp_path):
    text = (DOCS / "importing.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith('    {"exemplars"')]
    assert len(lines) == 2
    (tmp_path / "models.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidValue) as caught:  # the folders are not there, which is found out last
        read_specs(tmp_path / "models.jsonl", "icon-sd")
    assert "line 1: no folder " in str(caught.value)
    assert "line 2: image " in str(caught.value)
