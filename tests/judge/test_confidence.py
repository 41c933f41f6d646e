"""Expected Dice from signs of doubt."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewscan.errors import DataError
from fewscan.judge.confidence import Judged, calibrate, calibration_from, promise


def made(patients, *, seed=0, noise=0.1, labels=("liver", "spleen")):
    """Rows whose Dice follows one sign; another sign is noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(patients):
        for place, label in enumerate(labels):
            doubt = rng.normal()
            logit = 1.5 + doubt - 0.8 * place + noise * rng.normal()
            signs = {"steady": 1 / (1 + np.exp(-2 - doubt)), "idle": rng.uniform(0.2, 0.8)}
            rows.append(Judged(case=f"c{p}", patient=f"p{p}", label=label, signs=signs, dice=1 / (1 + np.exp(-logit))))
    return rows


def test_it_learns_what_goes_along_with_dice():
    found = calibrate(made(20))
    new = made(200, seed=1)
    gaps = [abs(found.expect(row.label, row.signs).dice - row.dice) for row in new]
    constant = np.mean([row.dice for row in made(20)])
    assert np.mean(gaps) < 0.03
    assert np.mean(gaps) < 0.4 * np.mean([abs(constant - row.dice) for row in new])
    assert dict(zip(found.signs, found.slopes, strict=True))["steady"] > 0.6
    assert found.expect("liver", new[0].signs).dice > found.expect("spleen", new[0].signs).dice


def test_ranges_hold_as_many_patients_as_they_say():
    held = []
    for seed in range(40):
        found = calibrate(made(12, seed=seed, noise=0.5))
        for patient in range(20):
            rows = made(1, seed=1000 + 50 * seed + patient, noise=0.5)
            gaps = [abs(found.expect(row.label, row.signs).dice - row.dice) for row in rows]
            held.append(max(gaps) <= found.widest.half)
    assert found.widest.level == 0.9
    assert 0.84 < np.mean(held) < 0.97


def test_the_range_of_a_label_holds_that_label_in_as_many_patients_as_it_says():
    """Not its mean with labels that are easier: a mean over labels is met more narrowly than each of them."""
    held = {"liver": [], "spleen": []}
    for seed in range(40):
        found = calibrate(made(12, seed=seed, noise=0.5))
        for row in made(20, seed=1000 + seed, noise=0.5):
            expected = found.expect(row.label, row.signs)
            held[row.label].append(expected.low <= row.dice <= expected.high)
            assert expected.level == 0.9
    assert all(0.84 < np.mean(rows) < 0.97 for rows in held.values()), {k: np.mean(v) for k, v in held.items()}


def test_a_label_of_too_few_patients_has_the_widest_range():
    rows = [*made(9), *(replace(row, label="cyst") for row in made(2) if row.label == "liver")]
    found = calibrate(rows)
    assert set(found.widths) == {"liver", "spleen"}
    assert found.widest.half >= max(width.half for width in found.widths.values())
    cyst = found.expect("cyst", rows[0].signs)
    assert cyst.high - cyst.low <= 2 * found.widest.half
    assert cyst.level == found.widest.level


def test_every_scan_of_a_patient_has_to_lie_in_the_range():
    one = made(9)
    twice = [*one, *(replace(row, case=row.case + "b", dice=max(0.0, row.dice - 0.3)) for row in one)]
    assert calibrate(twice).patients == 9
    gaps = [abs(a - b) for label, a, b in calibrate(twice).held_out if label == "liver"]
    assert calibrate(twice).widths["liver"].half == pytest.approx(max(gaps))


def test_a_missed_label_teaches_and_is_expected_to_be_worth_nothing():
    rows = made(9)
    missed = [*rows, Judged(case="m", patient="m", label="liver", signs=None, dice=0.0)]
    found = calibrate(missed)
    expected = found.expect("liver", None)
    assert (expected.dice, expected.low) == (0.0, 0.0)
    assert (found.patients, found.missed) == (9, 1)  # who has nothing found tells nothing of ranges
    assert len(found.held_out) == 18
    with pytest.raises(DataError, match="no label was found"):
        calibrate([replace(row, signs=None) for row in rows])
    with pytest.raises(DataError, match="found in 2 of the 9 patients left out"):
        calibrate([row if row.patient in ("p0", "p1") else replace(row, signs=None, dice=0.0) for row in rows])


def test_ranges_hold_what_was_found_however_much_was_missed():
    """Misses are met exactly, at 0; were they counted, ranges would shrink to nothing as more is missed."""
    held, errors = [], []
    for seed in range(40):
        rows = made(40, seed=seed, noise=0.5, labels=("liver",))
        missed = [replace(row, signs=None, dice=0.0) if i % 10 < 7 else row for i, row in enumerate(rows)]
        found = calibrate(missed)
        assert (found.patients, found.missed) == (12, 28)
        assert found.error == pytest.approx(np.mean([abs(a - b) for _, a, b in found.held_out]))
        for row in made(20, seed=1000 + seed, noise=0.5, labels=("liver",)):
            expected = found.expect(row.label, row.signs)
            held.append(expected.low <= row.dice <= expected.high)
            errors.append(abs(expected.dice - row.dice) - found.error)
    assert found.widths["liver"].level == 0.9
    assert 0.84 < np.mean(held) < 0.97
    assert abs(np.mean(errors)) < 0.02


def test_where_nothing_else_tells_what_doubt_means_a_missed_label_does():
    rng = np.random.default_rng(0)
    fine = [
        Judged(case=f"c{i}", patient=f"p{i}", label="a", signs={"steady": rng.uniform(0.8, 0.95)}, dice=d)
        for i, d in enumerate(rng.uniform(0.8, 0.95, 9))
    ]
    missed = [*fine, Judged(case="m", patient="m", label="a", signs=None, dice=0.0)]
    speck = {"steady": 0.05}
    assert calibrate(fine).expect("a", speck).dice > 0.5
    assert calibrate(missed).expect("a", speck).dice < 0.2


def test_a_model_of_another_task_is_refused_by_name():
    found = calibrate(made(4), labels=("liver", "spleen", "cyst"))
    found.check_labels(["spleen", "cyst", "liver"], where=Path("folds"))
    with pytest.raises(DataError, match=r"folds: calibrated on the labels cyst, liver, spleen, .* heart, liver;"):
        found.check_labels(["liver", "heart"], where=Path("folds"))


@pytest.mark.parametrize(("patients", "level"), [(3, 3 / 4), (5, 5 / 6), (8, 8 / 9), (9, 0.9), (30, 0.9)])
def test_no_level_is_promised_that_so_few_patients_cannot_give(patients, level):
    found = calibrate(made(patients))
    assert [width.level for width in (found.widest, *found.widths.values())] == pytest.approx([level] * 3)


def test_a_range_promises_no_law_that_leave_one_out_residuals_do_not_follow():
    told = promise(calibrate(made(5)).widest.level)
    assert told.startswith("83% on average. ")
    assert "how it was made and no test of it" in told
    assert "19 of 20" not in told


def test_an_older_calibration_is_read_without_its_third_figure():
    found = calibrate(made(8))
    older = json.loads(json.dumps(found.to_json()))
    older["widest"] = [*older["widest"], 0.4]
    older["widths"] = {label: [*width, 0.4] for label, width in older["widths"].items()}
    del older["recipe"], older["missed"]
    assert calibration_from(older) == found
    with pytest.raises(DataError, match="cross-validate again"):
        calibration_from(older | {"widest": [0.1]})


def test_more_doubt_never_means_a_better_answer():
    rows = [
        Judged(case=f"c{i}", patient=f"p{i}", label="a", signs={"steady": 0.5 + 0.04 * i}, dice=0.9 - 0.05 * i)
        for i in range(8)
    ]
    assert calibrate(rows).slopes == (0.0,)


def test_a_label_that_was_not_seen_takes_the_common_level():
    found = calibrate(made(10))
    low, other, high = (found.expect(label, made(1)[0].signs).dice for label in ("spleen", "heart", "liver"))
    assert low < other < high


def test_it_survives_a_file_and_says_what_is_no_calibration():
    found = calibrate(made(6))
    assert calibration_from(json.loads(json.dumps(found.to_json()))) == found
    for wrong in ({}, {"signs": 3}, found.to_json() | {"extra": 1}):
        with pytest.raises(DataError, match="cross-validate"):
            calibration_from(wrong)
    with pytest.raises(DataError, match="steady"):
        found.expect("liver", {"idle": 0.5})


def test_too_few_patients_and_mixed_signs_are_refused():
    with pytest.raises(DataError, match="2 patient"):
        calibrate(made(2))
    rows = made(4)
    rows[3] = Judged(case="c", patient="p9", label="liver", signs={"other": 0.5}, dice=0.5)
    with pytest.raises(DataError, match="different signs"):
        calibrate(rows)


def test_dice_of_nothing_and_of_all_can_be_learnt_from():
    rows = [*made(5), Judged(case="z", patient="z", label="liver", signs={"steady": 0.0, "idle": 1.0}, dice=0.0)]
    expected = calibrate(rows).expect("liver", {"steady": 0.0, "idle": 0.5})
    assert 0 <= expected.low <= expected.dice <= expected.high <= 1


def test_a_handful_of_scans_that_hardly_differ_leaves_steadiness_its_usual_slope():
    rows = [
        Judged(case=f"c{i}", patient=f"p{i}", label="a", signs={"steady": 0.9 + 0.005 * i}, dice=0.85) for i in range(4)
    ]
    assert 0.8 < calibrate(rows).slopes[0] <= 1
