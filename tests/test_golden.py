"""Results do not change: what golden.py asks is answered as it was before the tables had methods (tests/golden.json)."""

import json

import golden
import pytest


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return golden.answers(golden.database(tmp_path_factory.mktemp("golden") / "golden.attrdb"))


BEFORE = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", BEFORE)
def test_the_answer_is_what_it_was(answers, name):
    assert golden.difference(BEFORE[name], answers[name]) is None


def test_a_changed_digit_is_seen():
    before = {"rows": [{"a": 0.25, "b": 1}]}
    assert golden.difference(before, {"rows": [{"a": 0.25, "b": 1, "c": "new"}]}) is None
    assert golden.difference(before, {"rows": [{"a": 0.2500001, "b": 1}]}) == "/rows/0/a: 0.25 before, 0.2500001 now"
    assert golden.difference(before, {"rows": [{"a": 0.25}]}) == "/rows/0/b is gone"
    assert golden.difference(before, {"rows": []}) == "/rows: [{'a': 0.25, 'b': 1}] before, [] now"
