"""What atlases that were left out say of a vote on another scan."""

import pytest

from fewscan.methods.evidence import ALONE, AT_HOME, Known

KNOWN = Known((0.80, 0.84, 0.76), (0.7, 0.8, 0.6))  # a worth of 0.80 with a deviation of 0.04, a likeness of 0.7


@pytest.mark.parametrize(
    ("agreement", "share"), [(0.4, 1.0), (0.80, 1.0), (0.84, 0.75), (0.88, AT_HOME), (0.95, AT_HOME)]
)
def test_half_of_the_change_is_made_where_the_vote_says_nothing_against_the_first_mask(agreement, share):
    assert KNOWN.strength(agreement) == pytest.approx(share)


def test_alike_atlases_do_not_make_the_smallest_excess_count():
    assert Known((0.8, 0.8), (0.7, 0.7)).strength(0.81) > 0.8
    assert Known((), ()).strength(0.99) == 1


def test_a_vote_is_worth_less_where_its_atlases_fit_worse_than_usual():
    assert [KNOWN.worth_at(0.9), KNOWN.worth_at(0.7)] == pytest.approx([0.8, 0.8])
    assert KNOWN.worth_at(0.35) == pytest.approx(0.4)
    assert KNOWN.worth_at(-0.2) == 0
    assert Known((), ()).worth_at(0.1) == ALONE
