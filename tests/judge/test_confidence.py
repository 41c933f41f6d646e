"""Expected Dice from signs of doubt."""

import json

import numpy as np
import pytest

from fewscan.errors import DataError
from fewscan.judge.confidence import Judged, calibrate, calibration_from


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
            held.append(np.mean(gaps) <= found.half)
    assert found.level == 0.9
    assert 0.84 < np.mean(held) < 0.97


@pytest.mark.parametrize(("patients", "level"), [(3, 3 / 4), (5, 5 / 6), (8, 8 / 9), (9, 0.9), (30, 0.9)])
def test_no_level_is_promised_that_so_few_patients_cannot_give(patients, level):
    assert calibrate(made(patients)).level == pytest.approx(level)


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
