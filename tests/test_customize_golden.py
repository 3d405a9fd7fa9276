"""Customization gives the numbers that it gave before: losses and trained weights, for each method and setting.

The numbers are in fixtures/customize_golden.json. After a change that is meant to alter them, write the file anew:
python tests/test_customize_golden.py
"""

import json
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_base
from PIL import Image

from attrdb.ingest.customize import customize, customizers
from attrdb.ingest.customize.base_model import BaseModel, load_base_model

TOLERANCE = 1e-4  # relative; without vector instructions torch differs from the file by 2e-5
GOLDEN = Path(__file__).parent / "fixtures" / "customize_golden.json"
STEPS = 3
MAX_TOKENS = 32  # of the base model
RAMP = Image.linear_gradient("L").rotate(90)  # so that no exemplar is its own mirror image
EXEMPLARS = [RAMP.convert("RGB"), Image.merge("RGB", [RAMP.rotate(45), RAMP.rotate(90), RAMP])]
PRIOR = [Image.radial_gradient("L").convert("RGB"), Image.new("RGB", (32, 32), (20, 180, 20))]


@dataclass(frozen=True)
class Case:
    """One way to customize. prompts: 'shared' by both exemplars, or one 'each'."""

    method: str
    augment: str
    prior: bool
    token: bool
    prompts: str

    @property
    def name(self) -> str:
        prior, token = ("prior" if self.prior else "no prior"), ("token" if self.token else "no token")
        return f"{self.method}, {self.augment}, {prior}, {token}, {self.prompts}"

    def customize(self, base: BaseModel, **options) -> tuple[customize.Delta, list[float]]:
        """The delta and the loss of each step; the base model is left as it was."""
        token = "V*" if self.token else None
        words = "V*" if self.token else "a"
        prompts = f"{words} vase" if self.prompts == "shared" else [f"{words} vase", f"a picture of {words} art"]
        settings = customize.CustomizeSettings(
            steps=STEPS, batch=3, lr=0.01, seed=5, augment=self.augment, prior_images=2 * self.prior, prior_weight=0.5
        )
        prior = customize.Regularization(PRIOR, ["a vase", "art"], ["p0", "p1"]) if self.prior else None
        delta, figures = customize.customize(
            base, EXEMPLARS, prompts, token, "vase", settings, method=self.method, regularization=prior, **options
        )
        base.restore()
        return delta, figures["losses"]


CASES = [
    case
    for case in (
        Case(method, augment, prior, token, prompts)
        for method, (augment, prompts), prior, token in product(
            customizers.BUILT_IN,
            (("none", "shared"), ("mild", "each"), ("strong", "shared")),
            (False, True),
            (False, True),
        )
    )
    if case.token or case.method != "textual-inversion"  # which trains the token alone
]


def numbers(delta: customize.Delta, losses: list[float]) -> dict:
    """The loss of each step, and the length of all trained weights as one vector."""
    return {"losses": losses, "norm": torch.cat([weight.flatten() for weight in delta.values()]).norm().item()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base_model(str(make_tiny_base(tmp_path_factory.mktemp("base"), MAX_TOKENS)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers_are_those_of_before(base, case):
    golden = json.loads(GOLDEN.read_text())[case.name]
    found = numbers(*case.customize(base))
    assert found["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)
    assert found["norm"] == pytest.approx(golden["norm"], rel=TOLERANCE)


def test_each_case_has_numbers_of_its_own():
    golden = json.loads(GOLDEN.read_text())
    assert list(golden) == [case.name for case in CASES]
    assert len({json.dumps(found) for found in golden.values()}) == len(CASES)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fresh = load_base_model(str(make_tiny_base(Path(folder), MAX_TOKENS)))
        lines = [f"{json.dumps(case.name)}: {json.dumps(numbers(*case.customize(fresh)))}" for case in CASES]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
