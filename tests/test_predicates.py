"""Predicates from outside: what Lance would take for something else, panic at or not survive is refused."""

import subprocess
import sys

import lance
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from attrdb.cli import main
from attrdb.errors import InvalidValue
from attrdb.store.predicates import FUNCTIONS, MAX_CONDITIONS, MAX_WORDS, among_parts, fault_of

GOOD = [
    "role <> 'sample'",
    "`role` = 'exemplar' AND width IS NULL",
    "ROLE = 'it''s \"quoted\", $1, ? and -- no comment'",
    "image_id IN ('a', 'b') OR NOT (seed BETWEEN 1 AND 1.5e3)",
    "image_id IN('a')",
    "image_id LIKE'a%' AND creator NOT ILIKE 'b\\'",
    "width IN (-1, 2, - 3)",
    "width::string = '5' OR CAST(width AS string) = '5'",
    "lower(creator) = 'ada' AND starts_with(image_id, 'p')",
    "to_timestamp(prompt) > timestamp '2020-01-01' OR date'2020-01-01' < to_date(prompt)",
    "role IS DISTINCT FROM 'sample'",
    "toy_2[1] > 0.5 AND array_length(toy_2) = 2",
    "role || '-' || split == 'sample-é'",
    "role = 'a\x00b'",
    "true",
]
BAD = [
    ("\"role\" <> 'exemplar'", "double quote"),
    ('role = "exemplar"', "double quote"),
    ('"images"."role" = \'x\'', "double quote"),
    ("role = 'a' OR \"split\" = 'test", "double quote"),
    ("role = $1", r"parameter \(\$1\)"),
    ("role = $$a$$", "parameter"),
    ("role = ?", "parameter"),
    ("role = :x", "parameter"),
    ("role = @x", "parameter"),
    ("role = N'exemplar'", "without a prefix"),
    ("role = b'1' OR true", "without a prefix"),
    ("role = R'a'", "without a prefix"),
    ("role = U&'a'", "no SQL"),
    ("repeat('x', 2000000000) = ''", r"calls repeat\(\)"),
    ("lpad (role, 2000000000) = ''", r"calls lpad\(\)"),
    ("replace(replace(role, 'a', 'aaaa'), 'a', 'aaaa') = ''", r"calls replace\(\)"),
    ("`repeat`('x', 2000000000) = ''", "without quotes"),
    ("random() > 0.5", r"calls random\(\)"),
    ("count(*) > 1", r"calls count\(\)"),
    ("role IN (SELECT role FROM images)", "not supported"),
    ("role = 'a' -- more", "comment"),
    ("role = 'a' /* more */", "comment"),
    ("role = 'a') OR (true", r"a \) that nothing opens"),
    ("toy_2[(1])] > 0", r"a \] that nothing opens"),
    ("(role = 'a'", r"it lacks a \)"),
    ("role = 'a", "' that is not closed"),
    ("`role = 'a'", "` that is not closed"),
    ("role = ’a’", "no SQL"),
    ("width = 0x1F", "no number"),
    ("role", "does not return a boolean"),
    ("", "boolean|expression"),
    ("role = '\ud800'", "surrogates"),
]


def test_parts_of_a_list_keep_what_the_whole_list_keeps():
    assert list(among_parts("image_id", ["a", "it's", "c"], 2)) == ["image_id IN ('a', 'it''s')", "image_id IN ('c')"]
    assert list(among_parts("image_id", [], 2)) == []


@pytest.mark.parametrize("predicate", GOOD)
def test_a_good_predicate_is_taken(toy, predicate):
    assert fault_of(predicate) is None
    toy.snapshot.check_predicate("where", predicate)


@pytest.mark.parametrize(("predicate", "says"), BAD)
def test_a_bad_predicate_is_refused_and_nothing_panics(toy, predicate, says, capfd):
    with pytest.raises(InvalidValue, match=says) as refused:
        toy.attribute("m/0/1", candidates=predicate)
    assert "candidates is" in str(refused.value)
    assert "panicked" not in capfd.readouterr().err


def test_double_quotes_are_refused_wherever_a_predicate_is_given(toy):
    quoted = "\"role\" <> 'exemplar'"
    for words in (
        ["attribute", toy.path, "m/0/1", "--candidates", quoted],
        ["attribute", toy.path, "--samples", quoted],
        ["remove", toy.path, "--where", quoted, "--dry-run"],
        ["sql", toy.path, "SELECT * FROM attribute('m/0/1', candidates := '\"role\" <> ''exemplar''')"],
        ["sql", toy.path, "SELECT * FROM nearest([1, 0]::FLOAT[], candidates := '\"role\" <> ''exemplar''')"],
        ["query", toy.path, "influence", "-p", "image_id=m/0/1", "-p", f"candidates={quoted}"],
    ):
        result = CliRunner().invoke(main, [*map(str, words)])
        assert result.exit_code == 1, words
        assert "it has a double quote" in result.output, words


CHAINS = {
    "+": lambda n: "+".join(["width"] * n) + " = 1",
    "||": lambda n: "||".join(["role"] * n) + " = role",
    "is not null": lambda n: "role" + " IS NOT NULL" * n,
    "brackets": lambda n: "role = 'a' AND " + "(1 + " * n + "1" + ")" * n + " > 0",
    "calls": lambda n: "abs(width + " * n + "1" + ")" * n + " > 0",
    "or": lambda n: " OR ".join(["role = 'a'"] * n * 100),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_that_would_end_the_process_is_refused(toy, chain):
    with pytest.raises(InvalidValue, match=r"write column IN \('a', 'b', \.\.\.\)"):
        toy.snapshot.check_predicate("where", CHAINS[chain](1000))


@pytest.mark.parametrize("chain", ["+", "||", "is not null", "or"])
def test_the_longest_chain_that_is_taken_does_not_end_the_process(toy, chain):
    longest = CHAINS[chain](MAX_CONDITIONS // 100 if chain == "or" else MAX_WORDS // 3)
    assert fault_of(longest) is None
    program = "import sys, attrdb, threading; threading.stack_size(512 * 1024); db = attrdb.open(sys.argv[1])\n"
    program += (
        "thread = threading.Thread(target=lambda: print(db.attribute('m/0/1', candidates=sys.argv[2]).num_rows))\n"
    )
    program += "thread.start(); thread.join()"
    command = [sys.executable, "-c", program, str(toy.path), longest]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_many_ids_are_taken_and_an_error_shows_few(toy):
    ids = ", ".join(f"'id-{number}'" for number in range(50_000))
    assert toy.attribute("m/0/1", candidates=f"image_id IN ('p10', {ids})")["image_id"].to_pylist() == ["p10"]
    for wrong in (f"image_ids IN ({ids})", f"image_id IN ({ids}", f"image_id IN ({ids}, 1 AND)"):
        with pytest.raises(InvalidValue) as refused:
            toy.attribute("m/0/1", candidates=wrong)
        assert len(str(refused.value)) < 1000
        assert "characters)" in str(refused.value)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_of_the_list_is_one_of_lance(tmp_path, name):
    table = pa.table({"n": pa.array([1.0]), "t": ["a"], "l": pa.array([np.ones(2).tolist()])})
    dataset = lance.write_dataset(table, str(tmp_path / "t.lance"))
    special = {"cast": "cast(n as int)", "try_cast": "try_cast(n as int)", "arrow_cast": "arrow_cast(n, 'Int32')"}
    arguments = [
        "n",
        "t",
        "l",
        "n, n",
        "t, t",
        "l, n",
        "l, l",
        "t, n",
        "t, t, t",
        "t, 1",
        "l, 1",
        "t, t, 1",
        "'day', to_timestamp(t)",
        "t, t, n",
    ]
    for call in [special[name]] if name in special else [f"{name}({some})" for some in arguments]:
        try:
            dataset.scanner(columns=["n"], filter=f"{call} IS NOT NULL").explain_plan()
        except (OSError, ValueError):
            continue
        return
    pytest.fail(f"Lance knows no {name}")


def test_limits_of_a_predicate():
    assert fault_of(" OR ".join(["role = 'a'"] * (MAX_CONDITIONS + 1))) is None
    assert fault_of(" OR ".join(["role = 'a'"] * (MAX_CONDITIONS + 2)))
    assert fault_of("-".join(["width"] * (MAX_WORDS // 2)) + " = 1") is None
