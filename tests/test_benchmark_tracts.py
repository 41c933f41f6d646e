"""The benchmark of bundles: its rows and their keys, which network learns from whom, how masks are judged."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import benches
import numpy as np
import pytest
import tract_statistics as stats

from fewscan.data.bundles import write_bundles
from fewscan.data.io import write_image, write_labelmap
from fewscan.space.geometry import Geometry
from fewscan.tracts.bundles import TARGETS

CUBE = Geometry((6, 6, 6), np.diag([2.5, 2.5, 2.5, 1.0]))


cohort = benches.load("bundle_cohort")
baselines = benches.load("tract_baselines")
bench = benches.load("tracts")
shifts = benches.load("tract_shift")


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


def test_keys_hold_the_numbers_of_people_only_where_these_are_not_the_usual_ones() -> None:
    limits = bench.Limits(source=10, adapt=2)
    usual, few = bench.wanted(limits, {}), bench.wanted(limits, {}, people=(1, 1, 8, 2))
    assert not any("people" in key for key in usual)
    assert [key | {"people": "1 1 8 2"} for key in usual] == few
    there = [row["key"] for row in json.loads((benches.FOLDER / "results" / "tracts.json").read_text())["rows"]]
    assert {frozenset(key) for key in there if "people" not in key} <= {frozenset(key) for key in usual}


@pytest.mark.parametrize("changed", ["nothing", "interrupted", "code", "cohort"])
def test_the_model_of_the_healthy_is_read_again_only_whole_and_of_the_same_code_and_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    made: list[Path] = []

    def trained(cases: list[Path], out: Path, **how: Any) -> Model:
        made.append(out)
        out.mkdir(exist_ok=True)
        (out / "model.json").write_text(json.dumps({"interrupted": changed == "interrupted"}))
        return bench.api.load(out)

    def loaded(folder: Path) -> Model:
        model = Model("source", [])
        model.provenance |= json.loads((folder / "model.json").read_text())
        return model

    monkeypatch.setattr(bench, "trained", trained)
    monkeypatch.setattr(bench.api, "load", loaded)
    monkeypatch.setattr(bench, "code_hash", lambda **how: f"code{len(made) if changed == 'code' else 0}")
    folder = people_on_disk(tmp_path / "cohort")
    monkeypatch.setattr(cohort.Place, "cohort", lambda self, *name, **how: folder)
    place = cohort.Place(real=None, data=tmp_path, work=tmp_path, config=None, jobs=1)
    for number in range(2):
        (folder / "cohort.json").write_text(json.dumps({"spec": f"plan{number if changed == 'cohort' else 0}"}))
        bench.source_model(place, kind="peaks", limits=bench.Limits(source=1, adapt=1))
    assert len(made) == (1 if changed == "nothing" else 2)
    assert len(set(made)) == (2 if changed in ("code", "cohort") else 1)


def test_the_row_of_the_shift_card_names_the_weights_that_it_looked_with(tmp_path: Path) -> None:
    keys = []
    for text in (b"one", b"other"):
        (tmp_path / "weights.safetensors").write_bytes(text)
        keys.append(shifts.key_of("peaks", tmp_path))
    assert keys[0] != keys[1]
    assert keys[0] | {"weights": ""} == keys[1] | {"weights": ""}
    assert len(keys[0]["weights"]) == 12


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
    assert stats.subjects([found])["p003"] == {"A_healthy": 1.0, "B_tumour": 1.0}


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
