"""A slice of the campaign that `make torture` runs whole: see tests/torture."""

import pytest
from torture.comparing import differences, half_visible, tables
from torture.crowd import crowd
from torture.disks import NotPermitted
from torture.full_disk import full_disk
from torture.kills import kills
from torture.workloads import CUSTOMIZE, WORKLOADS

KILLED = ("new database", "append models", "remove", "upgrade")


def problems(trials):
    return "\n".join(str(trial) for trial in trials if trial.problems)


def test_jobs_that_get_a_signal_at_a_random_moment_and_are_given_again(tmp_path):
    some = tuple(workload for workload in WORKLOADS if workload.name in KILLED)
    trials = list(kills(len(some), seed=0, folder=tmp_path, workloads=some))
    assert len(trials) == len(KILLED)
    assert not problems(trials)
    assert sum(trial.inside for trial in trials) >= len(trials) / 2


def test_a_crowd_of_writers_and_readers(tmp_path):
    trials = list(crowd(4, tmp_path))
    assert [trial.group for trial in trials] == ["writer"] * 8 + ["reader"] * 4 + ["stored"]
    assert not problems(trials)


def test_a_disk_that_is_full_in_the_midst_of_an_append(tmp_path):
    try:
        trials = list(full_disk(tmp_path, every=40))
    except NotPermitted as error:
        pytest.skip(str(error))
    assert len(trials) > 1
    assert not problems(trials)


@pytest.mark.slow
def test_a_customization_that_gets_signals(tmp_path):
    trials = list(kills(8, seed=1, folder=tmp_path, workloads=(CUSTOMIZE,)))
    assert not problems(trials)
    assert sum(trial.inside for trial in trials) >= 4


# --- the comparison can fail -----------------------------------------------------------------------------------------


def test_a_row_lost_changed_or_more_is_told(toy):
    wanted = tables(toy.path)
    assert list(differences(tables(toy.path), wanted)) == []
    found = tables(toy.path)
    found["images"]["new"] = found["images"].pop("p10")
    found["models"]["m"]["kind"] = "object"
    lost, changed = differences(found, wanted)
    assert lost == "images: lost ['p10'], more than it should have ['new']"
    assert changed.startswith("models: m is {")


def test_what_is_visible_half_way_is_told(toy):
    before = tables(toy.path)
    assert list(half_visible(before, before, before)) == []
    seen = tables(toy.path)
    del seen["images"]["m/0/2"]
    seen["images"]["p10"]["source"] = "elsewhere"
    del seen["encoders"]["toy_2"]
    gone, changed, encoder, model = half_visible(seen, before, before)
    assert gone == "images: ['m/0/2'] were stored before and are gone"
    assert changed.startswith("images: p10 is {")
    assert encoder == "encoders: ['toy_2'] were stored before and are gone"
    assert model == "model m is shown with {'n_exemplars': 2, 'n_samples': 1}"
    seen = tables(toy.path)
    del seen["models"]["m"]
    assert "images of ['m'] are shown, which have no row in models" in half_visible(seen, before, before)
