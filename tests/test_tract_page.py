"""The page of ``benchmarks/tracts.py``: losses of twins, what comes back, intervals over people, controls; its rows."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tract_page as page
import tract_statistics as stats

from fewscan.data.bundles import write_bundles
from fewscan.data.io import write_image, write_labelmap
from fewscan.space.geometry import Geometry
from fewscan.tracts.bundles import TARGETS

ROOT = Path(__file__).resolve().parent.parent
CUBE = Geometry((6, 6, 6), np.diag([2.5, 2.5, 2.5, 1.0]))
PEOPLE = 12


def load(name: str) -> ModuleType:
    """A benchmark with its neighbours in reach, as when it is run."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


cohort = load("bundle_cohort")
baselines = load("tract_baselines")
bench = load("tracts")


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


def test_the_figure_is_drawn_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        page.plot(ROWS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").stat().st_size > 10_000
    page.plot([BEFORE], tmp_path / "c.svg")


def test_rows_come_in_the_order_of_their_worth_and_none_twice() -> None:
    limits = bench.Limits(source=10, adapt=2)
    keys = bench.wanted(limits, {})
    networks = [(k["input"], k["k"], k["mode"], k["draw"]) for k in keys if k["task"] == "bundles"]
    assert networks[:3] == [("peaks", 0, "none", 0), ("peaks", 8, "all", 0), ("peaks", 8, "scratch", 0)]
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert {(k, m) for i, k, m, _ in networks if i == "tensor"} == {
        (0, "none"), *((k, m) for k in (1, 2, 4, 8) for m in ("all", "scratch")),
    }  # fmt: skip
    assert {m for i, _, m, _ in networks if i == "peaks"} == set(bench.MODES)
    assert {d for *_, d in networks} == {0, 1, 2}
    only = bench.wanted(limits, {"input": "peaks", "k": "8", "mode": "all", "draw": "0"})
    assert [(k["task"], k["adapt"]) for k in only] == [("bundles", "2 min")]


def test_a_smaller_draw_is_part_of_a_larger_one() -> None:
    pool = [Path(f"p{n}") for n in range(8)]
    for draw in range(3):
        assert set(bench.drawn(pool, 2, draw)) < set(bench.drawn(pool, 4, draw)) < set(bench.drawn(pool, 8, draw))
    assert bench.drawn(pool, 2, 0) != bench.drawn(pool, 2, 1)


def test_masks_are_judged_by_bundle_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    masks = {name: np.zeros(CUBE.shape, bool) for name in TARGETS}
    for i, name in enumerate(TARGETS[:-1]):
        masks[name][: 1 + i % 4] = True
    case = tmp_path / "cohort" / "p030_B_tumour"
    write_bundles(masks, case, native=CUBE)
    guess = {name: mask.copy() for name, mask in masks.items()}
    guess[TARGETS[0]][1:3] = True
    write_bundles(guess, tmp_path / "out" / case.name, native=CUBE)
    scores = cohort.judge(tmp_path / "out", [case])
    assert scores["p030"]["B_tumour"][:2] == pytest.approx([0.5, 1.0])
    assert math.isnan(scores["p030"]["B_tumour"][-1])
    assert stats.numbers(cohort.stored(scores)["p030"]["B_tumour"])[0] == 0.5
    assert cohort.stored(scores)["p030"]["B_tumour"].endswith(" -")
    (tmp_path / "out" / case.name / "bundle_segmentations" / "UF_left.nii.gz").unlink()
    with pytest.raises(SystemExit, match="no mask of UF_left"):
        cohort.judge(tmp_path / "out", [case])


def test_a_view_takes_one_input_and_exchanged_names_never_keep_a_bundle(tmp_path: Path) -> None:
    cases = []
    for number in range(11):
        case = tmp_path / "cohort" / f"p{number:03d}_A_healthy"
        write_bundles({name: np.ones(CUBE.shape, bool) for name in TARGETS}, case, native=CUBE)
        for name in ("peaks", "tensor", "scalars"):
            write_labelmap(np.zeros(CUBE.shape, np.uint8), case / f"{name}.nii.gz", native=CUBE)
        (case / "inputs.json").write_text("{}")
        cases.append(case)
    view = cohort.view(cases, tmp_path / "view", kind="tensor", names=cohort.exchanged())
    assert json.loads((view / "dataset.json").read_text()) == {"channel_kind": "tensor"}
    assert {p.name for p in (view / cases[0].name).iterdir()} == {
        "tensor.nii.gz",
        "inputs.json",
        "bundle_segmentations",
    }
    for case in cases:
        links = {p.name: p.resolve().name for p in (view / case.name / "bundle_segmentations").iterdir()}
        assert len(links) == len(set(links.values())) == len(TARGETS)
        assert not [name for name, target in links.items() if name == target]


def people_on_disk(root: Path) -> Path:
    """A cohort with masks alone: two patients in the pool, two test people with two of their twins."""
    cases = [("pool", f"p00{n}_B_tumour") for n in (1, 2)]
    cases += [("test", f"p00{n}_{twin}") for n in (3, 4) for twin in ("A_healthy", "B_tumour")]
    for number, (split, name) in enumerate(cases):
        mask = np.zeros(CUBE.shape, bool)
        mask[: 1 + number % 3] = True
        write_bundles(dict.fromkeys(TARGETS, mask), root / split / name, native=CUBE)
        (root / split / name / "case.json").write_text("{}")
    return root


class Model:
    """Stands in for a trained one, and knows what it learnt from."""

    def __init__(self, learnt: str, cases: list[Path]) -> None:
        self.learnt, self.cases = learnt, [case.name for case in cases]
        self.provenance = {"steps": 7, "transfer": {"kept": "adapted"} if learnt == "adapted" else None}


@pytest.mark.parametrize(("mode", "learnt"), [("none", "source"), ("all", "adapted"), ("scratch", "trained")])
def test_each_mode_learns_from_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, learnt: str
) -> None:
    seen: list[Model] = []

    def predicted(model: Model, cases: list[Path], out: Path, *, kind: str) -> Path:
        seen.append(model)
        return cases[0].parent  # the truth

    monkeypatch.setattr(bench, "source_model", lambda place, **how: Model("source", []))
    monkeypatch.setattr(bench, "trained", lambda cases, out, **how: Model("trained", cases))
    monkeypatch.setattr(bench, "adapted", lambda base, cases, out, **how: Model("adapted", cases))
    monkeypatch.setattr(bench, "predicted", predicted)
    folder = people_on_disk(tmp_path)
    monkeypatch.setattr(cohort.Place, "cohort", lambda self, *name, **how: folder)
    place = cohort.Place(real=None, data=tmp_path, work=tmp_path / "work", config=None, jobs=1)
    key = {"task": "bundles", "input": "peaks", "k": 0 if mode == "none" else 2, "mode": mode, "draw": 0}
    found = bench.bundles(place, key, bench.Limits(source=1, adapt=1))
    assert seen[0].learnt == learnt
    assert seen[0].cases == ([] if mode == "none" else ["p001_B_tumour", "p002_B_tumour"])
    assert found["steps"] == 7
    assert ("kept" in found) == (learnt == "adapted")
    assert (found["A_healthy"], found["B_tumour"], "B_healthy" in found) == (1.0, 1.0, False)
    assert stats.subjects([row("bundles", subjects=found["subjects"])])["p003"] == {"A_healthy": 1.0, "B_tumour": 1.0}


def test_rows_are_written_once_and_none_is_begun_after_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(bench, "read_anatomy", lambda path: None)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(bench.MEASURE, "null", lambda place, key, limits: measured.append(key["mode"]) or {"dice": 0.5})
    words = ["tracts.py", "--data", str(tmp_path), "--result", str(tmp_path / "rows.json"), "--only", "task=null"]
    monkeypatch.setattr(sys, "argv", [*words, "--rows-budget", "0"])
    bench.main()
    assert measured == []
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        bench.main()
    assert measured == ["chance", "B=A", "radius 0", "shuffled"]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


def test_chance_is_the_overlap_of_different_bundles(tmp_path: Path) -> None:
    masks = {name: np.zeros(CUBE.shape, bool) for name in TARGETS}
    for name in TARGETS[:2]:
        masks[name][:2] = True
    for i, name in enumerate(TARGETS[2:]):
        masks[name][3, i % 6, i // 6] = True
    write_bundles(masks, tmp_path / "p000_A_healthy", native=CUBE)
    assert baselines.chance([tmp_path / "p000_A_healthy"]) == pytest.approx(1 / 45, abs=1e-4)


def test_a_probability_map_is_the_mean_of_aligned_masks_and_its_threshold_the_best_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = []
    for number, depth in enumerate((2, 2, 4)):
        mask = np.zeros(CUBE.shape, bool)
        mask[:depth] = True
        cases.append(tmp_path / f"p{number:03d}_A_healthy")
        write_bundles(dict.fromkeys(TARGETS, mask), cases[-1], native=CUBE)
        write_image(np.zeros((3, *CUBE.shape), np.float32), cases[-1] / "scalars.nii.gz", native=CUBE)
    monkeypatch.setattr(baselines, "aligned", lambda fixed, moving: np.eye(4))
    maps = baselines.probability_maps(cases, cases[0])
    assert maps[TARGETS[0]][:, 0, 0].tolist() == pytest.approx([1, 1, 1 / 3, 1 / 3, 0, 0], abs=1e-5)
    assert baselines.best_level(maps, [cases[2]], cases[0]) < 1 / 3 < baselines.best_level(maps, [cases[0]], cases[0])
