"""Which scans to label next: outliers and doubt first, no two alike, patients in turn, always the same order."""

import numpy as np
import pytest

from fewscan.judge.acquisition import Candidate, doubts_of, rank
from fewscan.judge.looks import Look

SURE, TORN = {"sharp": 0.95, "steady": 0.95}, {"sharp": 0.7, "steady": 0.5}


def look(name, place, *, patient=None, features=True):
    """A scan whose features lie around a place in the plane, all spread alike."""
    spread = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    points = spread + np.array(place, float) if features else np.zeros((0, 0))
    return Look(id=name, patient=patient or name, numbers={}, quantiles=np.array([place], float), features=points)


def candidate(name, place, *, signs=None, patient=None, features=True):
    found = {"liver": SURE} if signs is None else signs
    return Candidate(look=look(name, place, patient=patient, features=features), signs=found)


LABELLED = [look("a", (0, 0)), look("b", (1, 0)), look("c", (0, 1))]


def order(candidates, labelled=LABELLED):
    return [one.id for one in rank(candidates, labelled)]


def test_the_outlier_comes_first_where_all_are_equally_sure():
    found = rank([candidate("near", (0.5, 0.5)), candidate("far", (9, 9)), candidate("mid", (2, 2))], LABELLED)
    assert [one.id for one in found] == ["far", "mid", "near"]
    assert found[0].reason.startswith("very unlike every labelled scan:")
    some = rank([candidate("far", (9, 9))], LABELLED, every=False)
    assert some[0].reason.startswith("very unlike every labelled scan that was looked at:")
    assert found[0].unlike > 4 > found[2].unlike


def test_the_doubted_one_comes_first_where_all_are_equally_far():
    found = rank([candidate("sure", (-0.8, 0)), candidate("torn", (1.8, 0), signs={"liver": TORN})], LABELLED)
    assert [one.id for one in found] == ["torn", "sure"]
    assert found[0].unsure == pytest.approx(0.4)
    assert (found[0].label, found[0].reason) == ("liver", "unsure in liver")
    assert found[1].reason == "nothing stands out"


def test_of_two_near_duplicates_one_drops_to_the_end():
    twins = [candidate("twin1", (6, 6)), candidate("twin2", (6.01, 6))]
    found = rank([*twins, candidate("other", (0, 3)), candidate("plain", (0.5, 0.5))], LABELLED)
    assert {found[0].id, found[-1].id} == {"twin1", "twin2"}
    assert f"much like {found[0].id}" in found[-1].reason
    assert found[-1].nearest == found[0].id


def test_what_is_labelled_already_is_not_asked_for_again():
    assert order([candidate("copy", (1, 0), signs={"liver": TORN}), candidate("new", (0.5, 0.5))])[0] == "new"


def test_no_patient_comes_twice_before_every_other_has_come_once():
    far = [candidate(f"ann_{side}", (9, y), patient="ann") for side, y in (("l", 9), ("r", -9), ("t1", 0))]
    near = [candidate("bob", (0.4, 0.4)), candidate("eve", (0.6, 0.4))]
    found = [one.patient for one in rank([*far, *near], LABELLED)]
    assert sorted(found[:3]) == ["ann", "bob", "eve"]
    assert found[3:] == ["ann", "ann"]


def test_a_label_that_most_show_is_missed_where_it_is_not_found():
    every = {"liver": SURE, "spleen": SURE}
    scans = [candidate(f"s{i}", (0.5, 0.1 * i), signs=every) for i in range(4)]
    found = rank([*scans, candidate("cut", (0.5, 0.2), signs={"liver": SURE})], LABELLED)
    assert found[0].id == "cut"
    assert found[0].reason == "no spleen was found, which most scans show"
    rare = [{"liver": SURE, "tumour": TORN}, {"liver": SURE}, {"liver": SURE}]
    assert [set(row) for row in doubts_of(rare)] == [{"liver", "tumour"}, {"liver"}, {"liver"}]


def test_a_scan_without_any_label_is_the_most_doubted():
    found = rank([candidate("blank", (0.5, 0.5), signs={}), candidate("torn", (0.5, 0.5), signs={"x": TORN})], LABELLED)
    assert (found[0].id, found[0].unsure, found[0].reason) == ("blank", 1.0, "no label was found")


def test_without_labelled_scans_doubt_begins_and_distance_goes_on():
    scans = [candidate("torn", (0, 0), signs={"x": TORN}), candidate("near", (0.1, 0)), candidate("far", (5, 5))]
    found = rank([*scans, candidate("x", (0, 0.1))], [])
    assert [one.id for one in found][:2] == ["torn", "far"]
    assert found[0].nearest == ""
    assert np.isnan(found[0].unlike)
    assert "labelled" not in " ".join(one.reason for one in found)


def test_the_order_does_not_depend_on_the_order_of_reading():
    rng = np.random.default_rng(0)
    scans = [candidate(f"s{i}", rng.normal(0, 2, 2), signs={"x": TORN if i % 3 else SURE}) for i in range(12)]
    scans.append(candidate("s99", scans[0].look.features.mean(0), signs=scans[0].signs))  # a tie
    assert order(scans) == order(scans[::-1], LABELLED[::-1])


def test_one_scan_with_one_labelled_scan_is_ranked():
    assert order([candidate("only", (3, 3))], LABELLED[:1]) == ["only"]
    assert order([candidate("only", (3, 3))], []) == ["only"]


def test_intensities_take_over_where_features_are_missing():
    scans = [candidate("near", (0.5, 0.5)), candidate("far", (9, 9), features=False)]
    assert order(scans) == ["far", "near"]
