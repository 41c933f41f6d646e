"""The registration benchmark: which pairs it draws, how it goes on after an interruption, what it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benches
import nibabel as nib
import numpy as np
import pytest

from fewscan.data.dataset import CaseFiles
from fewscan.data.io import write_labelmap
from fewscan.space.geometry import Geometry

ROOT = Path(__file__).resolve().parent.parent
IDS = [f"case_{i}" for i in range(6)]
CUBE = Geometry((8, 8, 8), np.diag([-2.0, 1.0, 1.0, 1.0]))


registration = benches.load("registration")


def pairs_of(*names: str) -> list[Any]:
    cases = {n: CaseFiles(n, (Path(f"{n}.nii.gz"),), Path(f"{n}.nii.gz"), n) for n in names}
    return [registration.Pair(cases[a], cases[b]) for a, b in registration.draw(list(names), 99, 0)]


def test_pairs_are_drawn_by_seed_and_fewer_begin_more() -> None:
    assert registration.draw(IDS, 10, 0) == registration.draw(IDS, 10, 0)
    assert registration.draw(IDS, 4, 0) == registration.draw(IDS, 10, 0)[:4]
    assert registration.draw(IDS, 10, 0) != registration.draw(IDS, 10, 1)


def test_all_pairs_are_every_two_different_cases_once() -> None:
    assert sorted(registration.draw(IDS, 1000, 3)) == [(a, b) for a in IDS for b in IDS if a != b]


def test_an_interrupted_row_goes_on_with_the_next_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, seen = pairs_of("a", "b"), []

    def ours(system: str, pair: Any, out: Path, *, model: Any = None) -> dict[str, float]:
        seen.append(pair.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0, "register_seconds": 0.5, "folding": 0.0}

    monkeypatch.setattr(registration, "warm_up", lambda: None)
    monkeypatch.setattr(registration, "ours", ours)
    monkeypatch.setattr(registration, "judge", lambda out, fixed: {"dice": 0.5, "hd95_mm": 1.0, "missed": 0})
    with pytest.raises(KeyboardInterrupt):
        registration.measured("fewscan", pairs, tmp_path, python=None)
    found = registration.measured("fewscan", pairs, tmp_path, python=None)
    assert seen == [pairs[0].name, pairs[1].name, pairs[1].name]
    row = registration.figures(pairs, found)
    assert row["cases"] == {pair.name: 0.5 for pair in pairs}
    assert (row["dice"], row["dice_low"], row["seconds"]) == (0.5, None, 1.0)  # two patients give no interval


def test_a_label_that_the_warped_map_lacks_counts_as_zero(tmp_path: Path) -> None:
    want, got = np.zeros((2, *CUBE.shape), np.uint16)
    want[2:5, 2:5, 2:5], want[6:, 6:, 6:] = 1, 2
    got[2:5, 2:5, 2:5], got[:1] = 1, 3
    for name, data in (("want", want), ("got", got)):
        write_labelmap(data, tmp_path / f"{name}.nii.gz", native=CUBE)
    fixed = CaseFiles("want", (), tmp_path / "want.nii.gz", "want")
    found = registration.judge(tmp_path / "got.nii.gz", fixed)
    assert found == {"dice": 0.5, "hd95_mm": 0.0, "missed": 1, "labels": 2}


@pytest.mark.parametrize(("slope", "folding"), [(0.5, 0.0), (-0.5, 0.0), (-1.5, 1.0)])
def test_folding_is_read_off_a_field_in_millimetres(tmp_path: Path, slope: float, folding: float) -> None:
    mm = np.zeros((*CUBE.shape, 3), np.float32)
    mm[..., 0] = slope * CUBE.affine[0, 0] * np.arange(8)[:, None, None]
    nib.save(nib.Nifti1Image(mm, CUBE.affine), tmp_path / "field.nii")
    assert registration.folding_of(tmp_path / "field.nii") == folding


def test_claims_are_checked_once_every_row_is_there() -> None:
    row = {"dice": 0.7, "folding": 0.0, "seconds": 9.0}
    found = {name: dict(row) for name in ("ants_syn", "greedy", "greedy_wncc", "dipy_syn")}
    found["fewscan"] = {"dice": 0.696, "folding": 0.0, "seconds": 3.0}
    assert registration.misses(found) == []
    found["fewscan"] = {"dice": 0.69, "folding": 0.002, "seconds": 4.0}
    assert len(registration.misses(found)) == 3
    del found["greedy"]
    assert registration.misses(found) == []
