"""The learning curve: a planted power law comes back, too little is refused, the interval is over patients."""

import math

import numpy as np
import pytest

from fewscan.judge.learning_curve import Observation, fit, learning_curve


def observed(sizes, law, *, scans=12, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    own = rng.normal(0, noise, scans)  # each patient is as hard at every size
    return [
        Observation(labels=k, case=f"c{i}", patient=f"p{i}", dice=1 - law(k) - own[i])
        for k in sizes
        for i in range(scans)
    ]


def power(floor, gain, rate):
    return lambda k: floor + gain * k**-rate


@pytest.mark.parametrize(("floor", "gain", "rate"), [(0.1, 0.5, 0.7), (0.0, 0.6, 0.4), (0.2, 0.3, 1.5)])
def test_a_planted_power_law_is_recovered(floor, gain, rate):
    law = power(floor, gain, rate)
    found = learning_curve(observed((1, 2, 4, 8, 16), law), now=20)
    assert [p.labels for p in found.expected] == [20, 40, 80]
    for point in found.expected:
        assert point.dice == pytest.approx(1 - law(point.labels), abs=0.004)
    assert found.rate == pytest.approx(rate, rel=0.05)


def test_the_interval_holds_what_comes_and_narrows_with_patients():
    law = power(0.1, 0.5, 0.7)
    inside = 0
    for seed in range(20):
        few = learning_curve(observed((1, 2, 4, 8), law, scans=10, noise=0.05, seed=seed), now=8, seed=seed).expected[1]
        inside += few.low <= 1 - law(16) <= few.high
    assert inside >= 16
    many = learning_curve(observed((1, 2, 4, 8), law, scans=80, noise=0.05), now=8).expected[1]
    assert many.high - many.low < few.high - few.low


def test_scans_of_one_patient_count_as_one():
    rows = [
        Observation(labels=k, case=f"c{i}", patient="one", dice=0.8 - 0.3 / k + 0.01 * i)
        for k in (1, 2, 4)
        for i in range(9)
    ]
    found = learning_curve(rows, now=4)
    assert all(math.isnan(p.low) for p in (*found.measured, *found.expected))
    assert "there is no interval" in found.sentence


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((), "none labelled"), ((4,), "1 size"), ((2, 4), "fewer than 3"), ((10, 11, 12), "too close")],
)
def test_too_few_or_too_close_sizes_say_nothing(sizes, said):
    found = learning_curve(observed(sizes, power(0.1, 0.5, 1)), now=5)
    assert said in found.sentence
    assert found.expected == ()
    assert math.isnan(found.floor)
    assert [p.labels for p in found.measured] == list(sizes)


def test_a_curve_that_does_not_fall_promises_nothing():
    found = learning_curve(observed((1, 2, 4, 8), lambda k: 0.3 + 0.001 * k), now=8)
    assert found.gain == 0
    assert found.expected[2].dice == pytest.approx(found.expected[0].dice)
    assert found.sentence.startswith("No gain")


def test_scans_without_a_dice_are_left_out_and_json_has_no_nan():
    rows = observed((1, 2, 4), power(0.1, 0.5, 1), scans=2)
    lost = Observation(labels=64, case="x", patient="x", dice=math.nan)
    found = learning_curve([*rows, lost], now=4).to_json()
    assert [row["labels"] for row in found["measured"]] == [1, 2, 4]
    assert found["expected"][0]["low"] is None


def test_the_fit_is_the_best_of_a_search_by_force():
    rng = np.random.default_rng(3)
    sizes = np.array([1.0, 2, 3, 6])
    for _ in range(5):
        errors = rng.uniform(0.05, 0.6, 4)
        floor, gain, rate = fit(sizes, errors[None], counts=np.ones((1, 4)))[0]
        cost = ((floor + gain * sizes**-rate - errors) ** 2).sum()
        a, b, c = np.meshgrid(np.linspace(0, 0.6, 61), np.linspace(0, 0.8, 81), np.geomspace(0.1, 2, 40), indexing="ij")
        other = sum((a + b * k**-c - e) ** 2 for k, e in zip(sizes, errors, strict=True))
        assert cost <= other.min() + 1e-9
        assert min(floor, gain) >= 0
