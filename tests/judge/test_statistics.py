import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fewscan.judge.statistics import bootstrap_interval, paired_test, signed_rank_p


def test_interval_encloses_the_mean_and_narrows_with_more_cases():
    rng = np.random.default_rng(1)
    few, many = rng.normal(0.8, 0.1, 10), rng.normal(0.8, 0.1, 200)
    (a, b), (c, d) = bootstrap_interval(few.tolist()), bootstrap_interval(many.tolist())
    assert a < few.mean() < b
    assert d - c < b - a


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0, 1, 30).tolist(), resamples=500)
        hits += low <= 0 <= high
    assert 0.88 < hits / 200 < 0.99


def test_interval_leaves_nan_out_and_is_silent_below_three_values():
    assert bootstrap_interval([0.1, 0.5, 0.9, math.nan]) == bootstrap_interval([0.1, 0.5, 0.9])
    assert all(math.isnan(v) for v in bootstrap_interval([0.1, 0.5, math.nan]))


def test_copies_of_a_patient_do_not_narrow_the_interval():
    values = [0.5, 0.7, 0.8, 0.9]
    twice = [v for v in values for _ in range(2)]
    assert bootstrap_interval(twice, groups=[i // 2 for i in range(8)]) == bootstrap_interval(values)
    a, b = bootstrap_interval(values), bootstrap_interval(twice)
    assert b[1] - b[0] < a[1] - a[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-400, 400).filter(bool), min_size=1, max_size=25, unique_by=abs))
def test_signed_rank_equals_scipy_where_scipy_is_exact(values):
    assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3).filter(bool), min_size=1, max_size=9))
def test_signed_rank_with_ties_equals_trying_every_sign(values):
    rank = stats.rankdata(np.abs(values))
    seen = rank[np.array(values) > 0].sum()
    signs = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    sums = signs @ rank
    tail = min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean())
    assert signed_rank_p(values) == pytest.approx(min(1, 2 * tail))


def test_swapping_two_runs_swaps_wins_and_keeps_p():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.8, 0.1, 12).tolist(), rng.normal(0.7, 0.1, 12).tolist()
    there, back = paired_test(a, b), paired_test(b, a)
    assert (there.wins, there.losses, there.p) == (back.losses, back.wins, back.p)
    assert there.difference == pytest.approx(-back.difference)


def test_equal_runs_do_not_differ():
    found = paired_test([0.5] * 6, [0.5] * 6)
    assert (found.p, found.wins, found.losses, found.difference) == (1, 0, 0, 0)


def test_paired_test_refuses_two_lengths():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_test([1, 2], [1, 2, 3])
