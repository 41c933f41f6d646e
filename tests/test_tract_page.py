"""The page of ``benchmarks/tracts.py``: losses of twins, what comes back, intervals over people, controls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tract_page as page
import tract_statistics as stats

from fewscan.tracts.bundles import TARGETS

PEOPLE = 12


def moved(person: int) -> np.ndarray:
    """True displacement of each bundle, mm: much for even people, hardly anything for the others."""
    return (4.0 if person % 2 == 0 else 0.2) * np.linspace(0.2, 2, len(TARGETS))


def people(systematic: float, slope: float, *, level: float = 0.85, seed: int = 0) -> dict[str, Any]:
    """Twins as a row stores them: B costs ``systematic``, a tumour ``slope`` per mm of displacement."""
    found = {}
    for person in range(PEOPLE):
        rng = np.random.default_rng([seed, person])
        own = level + rng.normal(0, 0.02) + rng.normal(0, 0.005, len(TARGETS))
        tumour = slope * moved(person)
        scan = systematic + rng.normal(0, 0.005)
        twins = {"A_healthy": own, "A_tumour": own - tumour, "B_healthy": own - scan, "B_tumour": own - scan - tumour}
        found[f"p{person:03d}"] = {name: " ".join(f"{v:.6f}" for v in values) for name, values in twins.items()}
    return found


def row(task: str, kind: str = "peaks", mode: str = "none", *, k: int = 0, draw: int = 0, **values: Any) -> Any:
    return {"key": {"task": task, "input": kind, "mode": mode, "k": k, "draw": draw}, **values}


def truth() -> dict[str, Any]:
    return {
        f"p{p:03d}": {
            "radius_mm": 12.0, "target": TARGETS[0], "kind": "near" if p % 2 == 0 else "far",
            "displacement_mm": " ".join(f"{mm:.3f}" for mm in moved(p)),
            "from_core_mm": " ".join(["5.0" if p % 2 == 0 else "40.0"] * len(TARGETS)),
        }
        for p in range(PEOPLE)
    }  # fmt: skip


BEFORE = row("bundles", subjects=people(0.10, 0.02))
AFTER = row("bundles", mode="all", k=8, subjects=people(0.03, 0.018))
SCRATCH = row("bundles", mode="scratch", k=8, subjects=people(0.03, 0.02, level=0.6))
ROWS = [BEFORE, AFTER, SCRATCH, row("cohort", "", "", truth=truth())]


def test_the_loss_is_split_as_it_was_put_together() -> None:
    assert stats.lost([BEFORE], "systematic").value == pytest.approx(0.10, abs=0.005)
    wanted = 0.02 * np.mean([moved(p).mean() for p in range(PEOPLE)])
    assert stats.lost([BEFORE], "tumour").value == pytest.approx(wanted, abs=1e-4)
    assert stats.lost([BEFORE], "interaction").value == pytest.approx(0, abs=1e-5)
    parts = sum(stats.lost([BEFORE], part).value for part in ("systematic", "tumour"))
    assert stats.lost([BEFORE], "total").value == pytest.approx(parts)


def test_the_interaction_is_what_a_tumour_costs_more_under_the_first_protocol() -> None:
    twins = {"A_healthy": 0.9, "A_tumour": 0.6, "B_healthy": 0.7, "B_tumour": 0.6}
    assert stats.loss(twins, "interaction") == pytest.approx(0.2)


def test_what_comes_back_is_a_share_of_what_was_lost() -> None:
    share = stats.recovered([AFTER], [BEFORE], kind="systematic")
    assert share.value == pytest.approx(0.7, abs=0.05)
    assert share.low < share.value < share.high
    share = stats.recovered([AFTER], [BEFORE], kind="tumour")
    assert share.value == pytest.approx(0.1, abs=0.01)
    worse = row("bundles", mode="all", subjects=people(0.2, 0.03))
    assert stats.recovered([worse], [BEFORE], kind="systematic").value < 0
    assert stats.recovered([worse], [BEFORE], kind="tumour").value == pytest.approx(-0.5, abs=0.01)


def test_where_nothing_was_lost_nothing_can_come_back() -> None:
    none = row("bundles", subjects=people(0.0, 0.0))
    assert math.isnan(stats.recovered([AFTER], [none], kind="tumour").value)
    doubtful = stats.ratio([0.1, 0.1, 0.1, 0.1], [0.4, -0.1, -0.1, 0.1])
    assert doubtful.value == pytest.approx(4 / 3)
    assert math.isnan(doubtful.low)


def test_intervals_are_over_people_not_over_their_bundles() -> None:
    gained, lost = [0.1, 0.0, 0.3, 0.2], [0.4, 0.4, 0.4, 0.4]
    one = stats.ratio(gained, lost)
    names = [name for name in "abcd" for _ in range(10)]
    ten = stats.ratio([g for g in gained for _ in range(10)], [d for d in lost for _ in range(10)], groups=names)
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))
    naive = stats.ratio([g for g in gained for _ in range(10)], [d for d in lost for _ in range(10)])
    assert naive.high - naive.low < 0.6 * (one.high - one.low)


def test_the_interval_of_a_paired_difference_covers_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        rows = [row("bundles", subjects=people(s, 0.01, seed=100 * seed + n)) for n, s in enumerate((0.05, 0.10))]
        paired = stats.against([rows[0]], [rows[1]], twin="B_healthy")
        held += paired.low <= 0.05 <= paired.high
    assert 50 <= held <= 60


def test_draws_are_averaged_before_people_are_resampled() -> None:
    draws = [row("bundles", mode="all", k=8, draw=d, subjects=people(s, 0.02)) for d, s in enumerate((0.02, 0.06))]
    mean = stats.subjects(draws)
    one, two = (stats.subjects([draw]) for draw in draws)
    for person, twins in mean.items():
        assert twins["B_healthy"] == pytest.approx((one[person]["B_healthy"] + two[person]["B_healthy"]) / 2)
    assert len(mean) == PEOPLE


def test_an_empty_bundle_enters_no_mean() -> None:
    subjects = {"p000": dict.fromkeys(stats.TWINS, "0.5 - 0.7")}
    assert stats.subjects([row("bundles", subjects=subjects)])["p000"]["A_healthy"] == pytest.approx(0.6)
    gone = truth() | {"p000": truth()["p000"] | {"displacement_mm": " ".join(["-"] * len(TARGETS))}}
    assert {t.person for t in stats.tracts([BEFORE], [AFTER], gone)} == {f"p{p:03d}" for p in range(1, PEOPLE)}


def test_tumour_loss_is_set_against_the_true_displacement() -> None:
    found = stats.tracts([BEFORE], [AFTER], truth())
    assert len(found) == PEOPLE * len(TARGETS)
    for tract in found:
        assert tract.before == pytest.approx(0.02 * tract.displacement_mm, abs=1e-5)
    bins = stats.binned(found)
    assert [low for low, _, _ in bins] == [0, 1, 3, 6]
    assert sum(len(inside) for _, _, inside in bins) == len(found)
    assert page.rank(found, "before") == pytest.approx(1, abs=1e-3)


def test_controls_that_must_vanish_do_and_are_not_taken_for_zero_otherwise() -> None:
    same = row("null", mode="B=A", subjects=people(0.0, 0.02) | {})
    for twins in same["subjects"].values():
        twins["B_healthy"], twins["B_tumour"] = twins["A_healthy"], twins["A_tumour"]
    assert stats.lost([same], "systematic").value == 0
    assert stats.lost([same], "tumour").value > 0.02
    none = row("null", mode="radius 0", subjects=people(0.1, 0.0))
    assert stats.lost([none], "tumour").value == 0
    assert stats.lost([none], "systematic").value > 0.08
    far, near = stats.far_target([BEFORE], truth(), TARGETS), moved(0)[0] * 0.02
    assert abs(far.value) < 0.1 * near
    lines = page.controls([same, none, *ROWS])
    assert any("B=A: systematic loss +0.0 [+0.0, +0.0]" in line for line in lines)
    assert any("radius 0: tumour loss +0.0 [+0.0, +0.0]" in line for line in lines)


def test_the_findings_hold_where_they_were_put_in_and_only_there() -> None:
    said = "\n".join(page.summary(ROWS))
    assert "a significant drop: shown" in said
    assert "at least 50 % of it: shown" in said
    assert "(3) peaks, k=8, reported: 10 %" in said
    flat = [row("bundles", subjects=people(0.0, 0.0)), row("bundles", mode="all", k=8, subjects=people(0.0, 0.0))]
    said = "\n".join(page.summary([*flat, SCRATCH]))
    assert "a significant drop: not shown" in said
    assert "at least 50 % of it: not shown" in said


def test_no_minus_stands_before_a_zero() -> None:
    assert page.points(stats.Estimate(value=-0.0001, low=-0.0002, high=0.01)) == "+0.0 [+0.0, +1.0]"
    assert page.percent(stats.Estimate(value=-0.001, low=math.nan, high=math.nan)) == "0 %"


def test_without_rows_of_networks_nothing_is_claimed() -> None:
    assert page.summary([row("inputs", "", "", seconds=20.0)]) == []


def limited(found: Any, **limits: str) -> Any:
    """The row as networks of these limits gave it."""
    return found | {"key": found["key"] | limits}


def test_rows_that_differ_in_more_than_their_draw_are_no_draws_of_one_network() -> None:
    bad = people(0.3, 0.05)
    usual = [limited(BEFORE, source="10 min"), limited(SCRATCH, adapt="2 min")]
    usual += [limited(AFTER | {"key": AFTER["key"] | {"draw": d}}, source="10 min", adapt="2 min") for d in range(2)]
    others = [limited(BEFORE | {"subjects": bad}, source="9 min"), limited(AFTER, source="10 min", adapt="1 min")]
    others += [
        limited(BEFORE | {"subjects": bad}, source="10 min", people="1 1 8 2"),
        limited(AFTER, source="400 steps"),
    ]
    rows = [*others, *usual, ROWS[-1]]
    assert page.runs(rows, "peaks", "none") == usual[:1]
    assert page.runs(rows, "peaks", "all") == usual[2:]
    assert page.runs(rows, "peaks", "scratch") == usual[1:2]
    assert (
        page.summary(rows)[0] == "Figures are of rows with source 10 min, adapt 2 min; 4 others are in the table alone."
    )
    assert page.summary(rows)[2:] == page.summary([*usual, ROWS[-1]])
    even = [limited(BEFORE, source="10 min"), limited(BEFORE, source="9 min")]
    assert page.runs(even[::-1], "peaks", "none") == even[:1]  # of as many the largest


def test_where_nothing_is_left_of_any_bundle_displacement_is_left_out(tmp_path: Path) -> None:
    none = " ".join(["-"] * len(TARGETS))
    gone = {p: told | {"displacement_mm": none, "from_core_mm": none} for p, told in truth().items()}
    rows = [*ROWS[:-1], row("cohort", "", "", truth=gone)]
    assert math.isnan(page.rank([], "before"))
    assert page.displaced(rows) == []
    assert page.controls(rows) == []
    page.plot(rows, tmp_path / "a.svg")


def test_a_far_tumour_that_is_not_far_from_its_target_is_no_control() -> None:
    told = truth()
    told["p001"]["from_core_mm"] = " ".join(["12.0"] * len(TARGETS))  # a small brain: as far as it goes
    told["p003"]["from_core_mm"] = " ".join(["-"] * len(TARGETS))
    hurt = json.loads(json.dumps(BEFORE))
    for person in ("p001", "p003"):
        hurt["subjects"][person]["B_tumour"] = " ".join(["0.1"] * len(TARGETS))
    without = {p: t for p, t in told.items() if p not in ("p001", "p003")}
    assert stats.far_target([hurt], told, TARGETS) == stats.far_target([BEFORE], without, TARGETS)


def test_the_figure_is_drawn_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        page.plot(ROWS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size > 10_000
    page.plot([BEFORE], tmp_path / "c.svg")
