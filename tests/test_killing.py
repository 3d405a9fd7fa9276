"""Jobs killed at random points end, given again, in the same rows; in between nothing is visible half-way."""

import pytest
from killing import CUSTOMIZE, WORKLOADS, differences, half_visible, kill_at_random, tables


def told(points):
    return "\n".join(map(str, points))


def test_killed_at_random_points_and_given_again(tmp_path):
    points = kill_at_random(12, seed=0, folder=tmp_path)
    assert len(points) == 12
    assert [point for point in points if point.problems] == [], told(points)
    assert sum(point.inside for point in points) >= 6, told(points)


@pytest.mark.slow
def test_killed_at_sixty_random_points(tmp_path):
    points = kill_at_random(60, seed=1, folder=tmp_path, workloads=(*WORKLOADS, CUSTOMIZE))
    assert len(points) == 60
    assert [point for point in points if point.problems] == [], told(points)
    assert sum(point.inside for point in points) >= 30, told(points)


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
