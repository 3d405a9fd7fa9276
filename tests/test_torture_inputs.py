"""A slice of the campaign: shortages, odd command lines, flipped bits. A file of its own, to run beside test_torture."""

from test_torture import problems
from torture.bit_flips import bit_flips
from torture.command_lines import command_lines
from torture.shortages import run_all


def test_commands_that_lack_what_they_need(tmp_path):
    trials = list(run_all(tmp_path, every=150))
    assert len({trial.group for trial in trials}) > 1
    assert not problems(trials)


def test_odd_command_lines(tmp_path):
    trials = list(command_lines(8, seed=2, folder=tmp_path))
    assert len(trials) == 8
    assert not problems(trials)


def test_flipped_bits(tmp_path):
    trials = list(bit_flips(10, seed=3, folder=tmp_path))
    assert not problems(trials)
    assert sum(trial.group.endswith(", found") for trial in trials) > 2
