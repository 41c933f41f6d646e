"""Directions that nobody has proven are proven where they are used: wrong ones are named, right ones cost no word."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fibres import write_fibres
from numpy.typing import NDArray
from scipy import ndimage

from fewscan import api, training
from fewscan.data import dataset, doctor, kinds, proof
from fewscan.data.findings import Finding
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.data.listing import RECORD, TENSOR_CHANNELS, peak_channels
from fewscan.errors import DataError
from fewscan.learn import checkpoint
from fewscan.learn.config import Settings
from fewscan.learn.plan import Plan
from fewscan.space import orientation
from fewscan.space.geometry import Geometry
from fewscan.space.orientation import axes_text, parse_axes, signed_permutations

SHAPE = (28, 32, 26)
GRID = Geometry(SHAPE, np.diag([3.0, 3.0, 3.0, 1.0]))
SMALL = Geometry((20, 22, 18), np.diag([2.5, 2.5, 2.5, 1.0]))
DOUBTED = (36, 107, 265)  # seeds for which `meaningless` looks wrong by three standard errors and more
NAMES = {"peaks": peak_channels(3), "tensor": TENSOR_CHANNELS}

Floats = NDArray[np.float32]


def arches() -> tuple[Floats, NDArray[np.bool_]]:
    """Directions (3, X, Y, Z) of three bands of different planes: no exchange of axes leaves them as they are."""
    middle = (np.array(SHAPE) - 1) / 2
    x, y, z = 3.0 * (np.indices(SHAPE) - middle.reshape(3, 1, 1, 1))
    none = np.zeros(SHAPE)
    vectors = np.stack([none + 0.2, none + 1.0, none - 0.35])
    inside = np.hypot(x - 0.2 * y, z + 12 + 0.35 * y) < 9
    for band, along in (
        ((np.abs(np.hypot(x, z + 22) - 30) < 6) & (np.abs(y - 4) < 18), np.stack([z + 22, none, -x])),
        ((np.abs(np.hypot(y - 30, z - 8) - 34) < 6) & (np.abs(np.abs(x) - 18) < 7), np.stack([none, z - 8, 30 - y])),
    ):
        vectors, inside = np.where(band, along, vectors), inside | band
    vectors = np.where(inside, vectors / np.linalg.norm(vectors, axis=0), 0)
    return vectors.astype(np.float32), inside


def channels(kind: str, way: NDArray[np.float64]) -> Floats:
    """What a file holds whose axes were exchanged: peaks of any order, sign and unit, or a tensor in grey matter."""
    vectors, inside = arches()
    vectors = np.tensordot(way, vectors, axes=(1, 0))
    rng = np.random.default_rng(0)
    ball = np.linalg.norm(np.indices(SHAPE) - (np.array(SHAPE) - 1).reshape(3, 1, 1, 1) / 2, axis=0) < 14
    if kind == "peaks":
        small = 0.03 * rng.normal(size=(6, *SHAPE)) * (ball | inside)
        sign = rng.choice([-0.3, 0.3], SHAPE)
        return np.concatenate([small[:3], vectors * sign, small[3:] * 0.1]).astype(np.float32)
    full = np.eye(3)[:, :, None, None, None] * 0.4 * ball + np.einsum("ixyz,jxyz->ijxyz", vectors, vectors)
    return np.stack([full[i, j] for i in range(3) for j in range(i, 3)]).astype(np.float32)


def meaningless(seed: int) -> Floats:
    """Smooth directions in a place of any shape: they run along nothing, and no axes are better than others."""
    rng = np.random.default_rng(seed)
    vectors = np.stack([ndimage.gaussian_filter(rng.normal(size=SMALL.shape), 2.5) for _ in range(3)])
    place = ndimage.gaussian_filter(rng.normal(size=SMALL.shape), 2.5)
    vectors *= (place > np.quantile(place, 0.5)) / np.linalg.norm(vectors, axis=0)
    around = 0.1 * rng.normal(size=vectors.shape)  # what grey matter has
    return np.concatenate([np.where(vectors != 0, vectors, around), np.zeros((6, *SMALL.shape))]).astype(np.float32)


def write(root: Path, kind: str, axes: str, *, record: dict[str, object] | None = None) -> Path:
    """A case whose components are to be taken as ``axes``, declared by dataset.json or by a record."""
    folder = root / "case_0"
    write_image(channels(kind, parse_axes(axes).T), folder / f"{kind}.nii.gz", native=GRID)
    write_labelmap(arches()[1].astype(np.uint8), folder / "labels.nii.gz", native=GRID)
    (root / "labels.json").write_text(json.dumps({"1": "fibres"}))
    (root / "dataset.json").write_text(json.dumps({"channel_kind": kind}))
    (folder / RECORD).write_text(json.dumps({"kind": {f"{kind}.nii.gz": NAMES[kind]}, **(record or {})}))
    return root


def findings(root: Path) -> list[Finding]:
    return [f for f in doctor.examine(dataset.find(root)).findings if f.code.startswith("directions")]


@pytest.mark.parametrize("kind", ["peaks", "tensor"])
def test_every_wrong_way_is_named_and_the_right_one_passes(kind: str) -> None:
    for way in signed_permutations()[::3]:
        found = proof.prove(channels(kind, way), GRID, kind=kind)  # type: ignore[arg-type]
        assert found.axes == axes_text(way.T)
        assert found.verdict == ("right" if axes_text(way) == "x,y,z" else "wrong")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("peaks", "fewscan tracts inputs peaks.nii.gz --axes=y,-x,z -o FOLDER writes peaks that fit"),
        ("tensor", "estimate the tensor again with the gradients, in the world, taken as y,-x,z"),
    ],
)
def test_check_calls_wrong_axes_an_error_and_train_refuses_them(tmp_path: Path, kind: str, remedy: str) -> None:
    root = write(tmp_path / "wrong", kind, "y,-x,z")
    [found] = findings(root)
    assert (found.code, found.severity, found.case, found.remedy) == ("directions-wrong", "error", "case_0", remedy)
    assert "components are taken as y,-x,z" in found.message
    with pytest.raises(DataError, match=rf"{kind}\.nii\.gz: directions do not fit the anatomy.*y,-x,z"):
        training.usable(dataset.find(root))
    assert not findings(write(tmp_path / "right", kind, "x,y,z"))


@pytest.mark.parametrize(
    ("lead", "blocks", "kept", "verdict"),
    [
        (2.9, 300, True, "unsure"),
        (3.1, 8, True, "right"),
        (2.9, 300, False, "unsure"),
        (3.1, 8, False, "unsure"),  # of 23 others the best leads so far in every few scans
        (8.0, 8, False, "unsure"),
        (9.5, 8, False, "wrong"),
        (4.0, 30, False, "unsure"),
        (5.0, 30, False, "wrong"),
        (0.0, 1, False, "unsure"),
    ],
)
def test_the_less_fibre_there_is_the_more_it_takes_to_call_directions_wrong(
    lead: float, blocks: int, kept: bool, verdict: str
) -> None:
    assert orientation._verdict(lead, blocks=blocks, kept=kept, others=23) == verdict


def test_directions_that_tell_nothing_are_doubted_at_most(tmp_path: Path) -> None:
    found = {seed: proof.prove(meaningless(seed), SMALL, kind="peaks") for seed in DOUBTED}
    assert all(one.doubted and one.lead >= orientation.LEAST_LEAD for one in found.values())
    write_image(meaningless(DOUBTED[0]), tmp_path / "images" / "a.nii.gz", native=SMALL)
    write_labelmap(np.ones(SMALL.shape, np.uint8), tmp_path / "labels" / "a.nii.gz", native=SMALL)
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "peaks", "labels": {"all": 1}}))
    checkup = training.usable(dataset.find(tmp_path))  # nothing keeps them from training
    [one] = [f for f in checkup.findings if f.code.startswith("directions")]
    assert (one.code, one.severity) == ("directions-doubtful", "warning")
    assert "which chance may show among 23 other ways" in one.message
    assert f"if they do not fit: fewscan tracts inputs a.nii.gz --axes={found[DOUBTED[0]].axes}" in one.remedy


def test_nan_where_there_is_no_peak_changes_nothing() -> None:
    peaks = channels("peaks", np.eye(3))
    holes = np.where(np.abs(peaks).sum(0) > 0, peaks, np.nan)
    found, same = (proof.prove(data, GRID, kind="peaks") for data in (holes, peaks))
    assert found.scores == same.scores
    assert np.isnan(holes).any()  # what was given stays as it was


def test_what_the_record_says_was_proven_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, record, said in (
        ("proven", {"orientation": {"verdict": "right"}}, 0),
        ("simulated", {"source": "simulated"}, 0),
        ("unsure", {"orientation": {"verdict": "unsure"}}, 1),
        ("nothing", {"orientation": "right"}, 1),
    ):
        assert len(findings(write(tmp_path / name, "peaks", "z,y,x", record=record))) == said, name
    shutil.copy(tmp_path / "proven/case_0/peaks.nii.gz", tmp_path / "proven/case_0/other.nii.gz")
    assert not proof.proven(tmp_path / "proven/case_0/other.nii.gz")
    (tmp_path / "nothing/case_0" / RECORD).write_text("{")
    assert not proof.proven(tmp_path / "nothing/case_0/peaks.nii.gz")


def test_too_little_to_tell_is_a_note_that_keeps_nothing_from_training(tmp_path: Path) -> None:
    found = dataset.find(write_fibres(tmp_path))
    checkup = training.usable(found)
    notes = [f for f in checkup.findings if f.code == "directions-unsure"]
    assert [(f.severity, f.case) for f in notes] == [("note", "case_00"), ("note", "case_01")]
    assert all(f.message.startswith("orientation") for f in notes)
    scalar = replace(found, kind="scalar")
    assert not [f for f in doctor.examine(scalar).findings if f.code.startswith("directions")]


def test_channels_in_files_of_their_own_are_proven_together(tmp_path: Path) -> None:
    for i, channel in enumerate(channels("peaks", parse_axes("z,x,y").T)):
        write_image(channel, tmp_path / "imagesTr" / f"p_{i:04d}.nii.gz", native=GRID)
    write_labelmap(arches()[1].astype(np.uint8), tmp_path / "labelsTr" / "p.nii.gz", native=GRID)
    listed = {"channel_kind": "peaks", "labels": {"fibres": 1}, "channel_names": dict(enumerate(NAMES["peaks"]))}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    [found] = findings(tmp_path)
    assert found.remedy == "write the components of each peak as z,x,y"


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ((0, 3, 5, 1, 2, 4), "seem to be Dxx, Dyy, Dzz, Dxy, Dxz, Dyz, as M"),
        ((0, 1, 3, 2, 4, 5), "lower triangle"),
    ],
)
def test_components_of_a_tensor_in_another_order_are_an_error(order: tuple[int, ...], said: str) -> None:
    ours = channels("tensor", np.eye(3))
    files = [Path("tensor.nii.gz")]
    [found] = proof.examine(ours[list(order)], GRID, images=files, kind="tensor", case="case_0")
    assert (found.code, found.severity) == ("tensor-order", "error")
    assert "the components are not Dxx, Dxy, Dxz, Dyy, Dyz, Dzz" in found.message
    assert said in found.message
    assert not proof.examine(ours, GRID, images=files, kind="tensor")


def test_the_lower_triangle_of_a_symmetric_matrix_is_brought_into_order(tmp_path: Path) -> None:
    """As dipy and ITK write tensors: five axes, NIfTI's intent 1005."""
    root, ours = write(tmp_path, "tensor", "x,y,z"), channels("tensor", np.eye(3))
    file = root / "case_0" / "tensor.nii.gz"
    stored = nib.Nifti1Image(np.moveaxis(ours[[0, 1, 3, 2, 4, 5]], 0, -1)[:, :, :, None], GRID.affine)
    stored.header.set_intent(1005, (3,))
    nib.save(stored, file)
    found = dataset.find(root)
    np.testing.assert_array_equal(dataset.load(found.cases[0], found).image.data, ours)
    assert not findings(root)
    assert not [f for f in doctor.examine(found).findings if f.code == "tensor-order"]
    as_stored = read_image(file, channels=TENSOR_CHANNELS).data
    np.testing.assert_array_equal(kinds.in_order(as_stored, "scalar", file=file), ours[[0, 1, 3, 2, 4, 5]])


def test_predict_warns_of_wrong_axes_and_goes_on(tmp_path: Path) -> None:
    plan = Plan(
        names={1: "fibres"}, channels=NAMES["peaks"], scaling=(), spacing=(3.0, 3.0, 3.0), patch=(16, 16, 16), batch=1,
        widths=(4, 8), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1), (2, 2, 2)), mirror=False, pairs=(), sole=(),
        kind="peaks",
    )  # fmt: skip
    network = checkpoint.build_segmenter(plan, Settings(), seed=0)
    model = checkpoint.Model(segmenter=network, plan=plan, settings=Settings(), provenance={"method": "segment"})
    said: list[object] = []
    for name, axes, record in (
        ("wrong", "y,x,z", {}),
        ("right", "x,y,z", {}),
        ("proven", "y,x,z", {"orientation": {"verdict": "right"}}),
    ):
        scan = write(tmp_path / name, "peaks", axes, record=record) / "case_0/peaks.nii.gz"
        [done] = api.predict(model, scan, tmp_path / f"out_{name}", device="cpu", observe=said.append)
        assert done.path.is_file()
        assert (done.warning is not None) == (name == "wrong")
        stored = json.loads((tmp_path / f"out_{name}" / "predictions.json").read_text())["predictions"][0]
        assert stored.get("warning") == done.warning
    warnings = [line for line in said if isinstance(line, str) and line.startswith("warning")]
    assert len(warnings) == 1
    assert "--axes=y,x,z" in warnings[0]
    assert "directions do not fit the anatomy" in api.report(tmp_path / "out_wrong", tmp_path / "r.html").read_text()
