"""Inputs of a network: known fibres come back, in the world, whatever the grid; wrong directions are refused."""

from __future__ import annotations

import builtins
import json
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dipy.data import default_sphere
from dipy.direction import peaks_from_model
from phantoms import fibres, grid, scan, table
from typer.testing import CliRunner

from fewscan import cli, white_matter
from fewscan.data.io import read_image, read_labels, read_raw, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError, ResourceError
from fewscan.space import orientation
from fewscan.space.geometry import Geometry, ras_geometry, to_ras
from fewscan.space.orientation import axes_text, parse_axes, prove, signed_permutations
from fewscan.tracts import estimate
from fewscan.tracts.estimate import SCALAR_CHANNELS
from fewscan.tracts.gradients import Gradients, fsl_to_world
from fewscan.tracts.inputs import (
    FA,
    MASK,
    PEAKS,
    SCALARS,
    TENSOR,
    Inputs,
    estimate_inputs,
    inputs_of_peaks,
    read_peaks,
    write_inputs,
)


@pytest.fixture(scope="module")
def estimated() -> tuple[Inputs, Geometry]:
    geometry = grid()
    dwi, brain = scan(geometry, table())
    return estimate_inputs(dwi, table(), mask=brain), geometry


def files(
    folder: Path, native: Geometry, *, gradients: Gradients | None = None, seed: int = 0
) -> tuple[Path, Path, Path, Path]:
    """A scan of the phantom as a scanner would write it: voxels and bvecs along the file's own axes."""
    geometry, gradients = ras_geometry(native), gradients or table()
    dwi, brain = scan(geometry, gradients, seed=seed)
    write_image(dwi, folder / "dwi.nii.gz", native=native)
    write_labelmap(brain.astype(np.uint8), folder / "mask.nii.gz", native=native)
    np.savetxt(folder / "bvals", gradients.bvals[None])
    np.savetxt(folder / "bvecs", fsl_to_world(native).T @ gradients.directions.T)
    return folder / "dwi.nii.gz", folder / "bvals", folder / "bvecs", folder / "mask.nii.gz"


def angles(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Degrees between directions along the last axis, sign ignored."""
    a, b = (v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9) for v in (found, truth))
    return np.degrees(np.arccos(np.clip(np.abs((a * b).sum(-1)), 0, 1)))


def test_single_and_crossing_fibres_come_back(estimated: tuple[Inputs, Geometry]) -> None:
    inputs, geometry = estimated
    fractions, directions, _ = fibres(geometry)
    peaks = inputs.images[PEAKS].reshape(3, 3, *geometry.shape).transpose(2, 3, 4, 0, 1)
    count = (fractions > 0).sum(-1)
    one = (count == 1) & (fractions[..., 0] > 0)
    assert np.median(angles(peaks[one][:, 0], directions[one][:, 0])) < 8
    assert np.median(angles(inputs.principal.transpose(1, 2, 3, 0)[one], directions[one][:, 0])) < 5
    both = (fractions[..., 0] > 0) & (fractions[..., 1] > 0) & (count == 2)
    nearest = np.min([angles(peaks[both][:, n], directions[both][:, 1]) for n in range(3)], axis=0)
    assert both.sum() > 30
    assert np.median(nearest) < 25


def test_peaks_are_to_the_bit_those_that_dipy_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    dwi, brain = scan(grid(), table())
    brain = brain & (np.arange(len(brain)) % 3 == 0)[:, None, None] & (np.arange(brain.shape[2]) > 8)
    signal = np.ascontiguousarray(dwi[:, brain].T)
    tensors, models = estimate.fit_tensors(signal, table()), []
    bare = estimate._peaks
    monkeypatch.setattr(estimate, "_peaks", lambda model, rows: models.append((model, rows)) or bare(model, rows))
    monkeypatch.setattr(estimate, "single_fibres", lambda tensors, mask: np.argsort(-tensors.fa)[:100])
    found = estimate.csd_peaks(signal, table(), tensors=tensors, mask=brain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peaks_from_model(
            *models[0], default_sphere, relative_peak_threshold=estimate.LEAST_PEAK,
            min_separation_angle=estimate.LEAST_ANGLE_DEG, npeaks=3, return_sh=False,
        )  # fmt: skip
    vectors = theirs.peak_dirs * np.maximum(theirs.peak_values, 0)[..., None]
    assert (np.linalg.norm(vectors, axis=-1) > 0).sum(1).max() == 3
    np.testing.assert_array_equal(found, vectors.reshape(-1, 9).astype(np.float32))


def test_peaks_need_enough_directions_with_one_b_value() -> None:
    dwi, brain = scan(grid(), table())
    signal, spread = np.ascontiguousarray(dwi[:, brain].T)[:, :9], table().directions[:9]
    few = Gradients(np.array([0.0, *[700.0] * 4, *[1200.0] * 4]), spread)
    tensors = estimate.fit_tensors(signal, few)
    with pytest.raises(DataError, match=r"the largest shell, b = 1200 s/mm2, has 4 directions, peaks need 6 .*; take"):
        estimate.csd_peaks(signal, few, tensors=tensors, mask=brain)


def test_directions_that_are_stored_again_determine_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(estimate, "order_of", lambda count: counted.append(count) or 2)
    monkeypatch.setattr(estimate, "_peaks", lambda model, rows: rows)
    monkeypatch.setattr(estimate, "single_fibres", lambda tensors, mask: np.arange(5))
    signal = np.random.default_rng(0).uniform(100, 900, (20, 25)).astype(np.float32)
    spread = table(12).directions[1:]
    again = Gradients(np.array([0.0, *[1000.0] * 24]), np.concatenate([np.zeros((1, 3)), spread, -spread]))
    tensors = estimate.fit_tensors(signal, again)
    estimate.csd_peaks(signal, again, tensors=tensors, mask=np.ones((20, 1, 1), bool))
    assert counted == [12]
    three = Gradients(np.array([0.0, *[1000.0] * 6]), np.concatenate([np.zeros((1, 3)), spread[:3], spread[:3]]))
    with pytest.raises(DataError, match=r"directions: 3 with b = 1000 s/mm2, each counted once .* a tensor needs 6"):
        estimate.fit_tensors(signal[:, :7], three)


def test_the_scan_is_let_go_before_the_fit_and_memory_that_runs_out_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dwi, bvals, bvecs, mask = files(tmp_path, grid())
    held: list[int] = []

    def exhausted(signal: np.ndarray, gradients: Gradients) -> None:
        held.append(tracemalloc.get_traced_memory()[0] - signal.nbytes)
        raise MemoryError

    monkeypatch.setattr(estimate, "fit_tensors", exhausted)
    tracemalloc.start()
    try:
        with pytest.raises(ResourceError, match="crop the scan to the head"):
            white_matter.inputs(dwi, tmp_path / "out", bvals=bvals, bvecs=bvecs, mask=mask)
    finally:
        tracemalloc.stop()
    assert held[0] < 4 * 31 * np.prod(grid().shape) / 4  # the scan in float32 is four times that


def test_channels_are_what_they_say(estimated: tuple[Inputs, Geometry]) -> None:
    inputs, _ = estimated
    assert {name: len(image) for name, image in inputs.images.items()} == {PEAKS: 9, TENSOR: 6, SCALARS: 3}
    tensor, (fa, md, s0) = inputs.images[TENSOR], inputs.images[SCALARS]
    np.testing.assert_allclose((tensor[0] + tensor[3] + tensor[5]) / 3, md, atol=1e-4)
    assert 0.5 < np.median(md[inputs.mask]) < 1.5  # um2/ms; the ball has 1.4, each stick a third of it
    assert np.median(s0[inputs.mask]) == pytest.approx(1)
    assert 0 <= fa.min() <= fa.max() <= 1
    lengths = np.linalg.norm(inputs.images[PEAKS].reshape(3, 3, *fa.shape), axis=1)
    assert (np.diff(lengths, axis=0) <= 1e-6).all()
    assert np.percentile(lengths[0][inputs.mask], 99) == pytest.approx(1, rel=0.1)
    assert not any(image[:, ~inputs.mask].any() for image in inputs.images.values())


def test_world_directions_do_not_depend_on_the_axes_of_the_file(tmp_path: Path) -> None:
    native = grid(np.array([[0, 0, 1.0], [-1, 0, 0], [0, 1, 0]]))
    dwi, bvals, bvecs, mask = files(tmp_path, native)
    found = white_matter.inputs(dwi, tmp_path / "out", bvals=bvals, bvecs=bvecs, mask=mask)
    assert found.verdict == "right"
    data, back = read_raw(tmp_path / "out" / PEAKS)
    peaks, geometry = to_ras(data, back)
    fractions, directions, _ = fibres(geometry)
    one = (fractions > 0).sum(-1) == 1
    strongest = np.take_along_axis(directions, fractions.argmax(-1)[..., None, None], -2)[..., 0, :]
    assert np.median(angles(peaks[:3].transpose(1, 2, 3, 0)[one], strongest[one])) < 8
    np.testing.assert_array_equal(
        read_image(tmp_path / "out" / FA).data[0],
        read_image(tmp_path / "out" / SCALARS, channels=SCALAR_CHANNELS).data[0],
    )
    record = json.loads((tmp_path / "out" / "inputs.json").read_text())
    assert record["orientation"]["verdict"] == "right"
    assert len(record["orientation"]["coherence"]) == 24
    assert (tmp_path / "out" / white_matter.PICTURE).stat().st_size > 10_000


def test_every_wrong_axis_is_named_with_its_remedy(estimated: tuple[Inputs, Geometry]) -> None:
    (inputs, geometry), verdicts = estimated, []
    for way in signed_permutations():
        turned = np.tensordot(way, inputs.principal, axes=(1, 0)).astype(np.float32)
        found = prove(turned, inputs.clearness, geometry=geometry)
        assert found.axes == axes_text(way.T)
        assert (found.verdict == "right") == (axes_text(way) == "x,y,z")
        assert found.verdict != "unsure" or found.doubted
        verdicts.append(found.verdict)
    assert verdicts.count("wrong") >= 44  # of 46: this little of a brain leaves room for chance


def test_a_wrong_table_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    dwi, bvals, bvecs, mask = files(tmp_path, grid(np.diag([-1.0, 1, 1])))
    good = np.loadtxt(bvecs)
    np.savetxt(bvecs, parse_axes("y,-x,z") @ good)
    with pytest.raises(DataError, match=r"bvecs: .*rows are taken as (\S+) .*give --axes=") as refused:
        white_matter.inputs(dwi, tmp_path / "out", bvals=bvals, bvecs=bvecs, mask=mask)
    assert (tmp_path / "out" / white_matter.PICTURE).exists()
    assert not (tmp_path / "out" / PEAKS).exists()
    axes = str(refused.value).partition("--axes=")[2]
    assert np.allclose(np.abs(parse_axes(axes) @ parse_axes("y,-x,z")), np.eye(3))
    assert white_matter.inputs(
        dwi, tmp_path / "out", bvals=bvals, bvecs=bvecs, mask=mask, axes=axes
    ).verdict == "right"  # fmt: skip


def test_permuted_rows_are_refused_by_the_verb_whatever_the_noise(tmp_path: Path) -> None:
    dwi, bvals, bvecs, mask = files(tmp_path, grid(), seed=1)
    np.savetxt(bvecs, parse_axes("z,x,y") @ np.loadtxt(bvecs))
    words = ["tracts", "inputs", str(dwi), "--bvals", str(bvals), "--bvecs", str(bvecs), "--mask", str(mask)]
    refused = CliRunner().invoke(cli.app, [*words, "-o", str(tmp_path / "out")])
    assert isinstance(refused.exception, DataError)
    axes = str(refused.exception).partition("--axes=")[2]
    assert np.allclose(np.abs(parse_axes(axes) @ parse_axes("z,x,y")), np.eye(3))
    done = CliRunner().invoke(cli.app, [*words, "-o", str(tmp_path / "out"), f"--axes={axes}", "--json", "-"])
    assert json.loads(done.stdout)["verdict"] == "right", done.output


def test_a_tumour_is_kept_out_of_the_proof(estimated: tuple[Inputs, Geometry], tmp_path: Path) -> None:
    inputs, geometry = estimated
    peaks, lesion = inputs.images[PEAKS].copy(), np.zeros(geometry.shape, bool)
    lesion[:, :, 12:] = True
    peaks[:, lesion] = peaks[[1, 0, 2, 4, 3, 5, 7, 6, 8]][:, lesion]  # clear fibres, as if x and y were exchanged
    write_image(peaks, tmp_path / "peaks.nii.gz", native=geometry)
    write_labelmap(lesion.astype(np.uint8), tmp_path / "lesion.nii.gz", native=geometry)
    words = ["tracts", "inputs", str(tmp_path / "peaks.nii.gz"), "-o"]
    fooled = CliRunner().invoke(cli.app, [*words, str(tmp_path / "a"), "--json", "-"])
    assert fooled.exception is not None or json.loads(fooled.stdout)["verdict"] != "right"
    words += [str(tmp_path / "b"), "--lesion", str(tmp_path / "lesion.nii.gz"), "--json", "-"]
    done = CliRunner().invoke(cli.app, words)
    assert json.loads(done.stdout)["verdict"] == "right", done.output
    assert not (read_labels(tmp_path / "b" / "mask.nii.gz").data[lesion] == 0).all()  # only the proof leaves it out


def test_a_single_high_shell_gives_inputs_and_says_that_its_tensors_are_biased(tmp_path: Path) -> None:
    dwi, bvals, bvecs, mask = files(tmp_path, grid(), gradients=table(b=3000.0))
    lines: list[str] = []
    found = white_matter.inputs(dwi, tmp_path / "out", bvals=bvals, bvecs=bvecs, mask=mask, tell=lines.append)
    assert found.verdict == "right"
    assert json.loads((tmp_path / "out" / "inputs.json").read_text())["tensor_bvals"] == [3000]
    assert "tensors of b = 3000 s/mm2 are biased" in lines[0]
    peaks, geometry, _ = read_peaks(tmp_path / "out" / PEAKS)
    fractions, directions, _ = fibres(geometry)
    one = ((fractions > 0).sum(-1) == 1) & (fractions[..., 0] > 0)
    assert np.median(angles(peaks[:3].transpose(1, 2, 3, 0)[one], directions[one][:, 0])) < 8


def test_tensors_take_the_lowest_shell_that_determines_one() -> None:
    dwi, brain = scan(grid(), table())
    signal, spread = np.ascontiguousarray(dwi[:, brain].T)[:50], table().directions

    def fitted(*bvals: float) -> estimate.Tensors:
        return estimate.fit_tensors(signal, Gradients(np.array([0.0, *bvals]), spread))

    low = fitted(*[1000.0] * 10, *[2000.0] * 10, *[3000.0] * 10)
    assert (low.shells, low.biased) == ((1000.0,), False)
    high = fitted(*[1000.0] * 5, *[2000.0] * 10, *[3000.0] * 15)
    assert (high.shells, high.biased) == ((2000.0,), True)
    with pytest.raises(DataError, match=r"directions: 5 with b = 1000, 5 with b = 2000.* a tensor needs 6"):
        estimate.fit_tensors(signal[:, :11], Gradients(np.array([0.0, *[1000.0] * 5, *[2000.0] * 5]), spread[:11]))


def test_peaks_of_other_programs_are_read_nan_and_all(estimated: tuple[Inputs, Geometry], tmp_path: Path) -> None:
    inputs, _ = estimated
    native = grid(np.diag([-1.0, 1, 1]))
    peaks = 0.37 * inputs.images[PEAKS].copy()  # as another program scales them, ...
    peaks[:, ~inputs.mask] = np.nan
    write_image(peaks[[3, 4, 5, 0, 1, 2, 6, 7, 8]], tmp_path / "mrtrix.nii.gz", native=native)  # ... in another order
    values, geometry, _ = read_peaks(tmp_path / "mrtrix.nii.gz")
    assert geometry.shape == inputs.mask.shape
    found = inputs_of_peaks(values, mask=inputs.mask)
    np.testing.assert_allclose(found.images[PEAKS], inputs.images[PEAKS] / _full(inputs), atol=1e-5)
    assert white_matter.inputs(tmp_path / "mrtrix.nii.gz", tmp_path / "out").verdict == "right"
    write_image(peaks * np.tile([-1, 1, 1], 3)[:, None, None, None].astype(np.float32), tmp_path / "fsl.nii.gz",
                native=native)  # fmt: skip
    with pytest.raises(DataError, match=r"fsl.nii.gz: .*components are taken as -x,y,z"):
        white_matter.inputs(tmp_path / "fsl.nii.gz", tmp_path / "out2")


def _full(inputs: Inputs) -> float:
    lengths = np.linalg.norm(inputs.images[PEAKS][:3], axis=0)[inputs.mask]
    return float(np.percentile(lengths[lengths > 0], 99))


def test_thick_slices_make_no_voxel_its_own_neighbour() -> None:
    """A fibre through the slices among others: a step of 2.5 mm of 6 ends where it began, which tells nothing."""
    thick = Geometry((12, 12, 12), np.diag([2.0, 2.0, 6.0, 1.0]))
    vectors, weight = np.zeros((3, *thick.shape), np.float32), np.ones(thick.shape, np.float32)
    place = np.array([[6, 6, 6]])

    def likeness() -> float:
        return float(orientation._likeness(vectors, weight, place, geometry=thick, turn=np.eye(3))[0])

    vectors[0], vectors[:, 6, 6, 6] = 1.0, (0.0, 0.0, 1.0)
    assert likeness() == 0.0
    vectors[0], vectors[2] = 0.0, 1.0
    assert likeness() == 1.0


def test_noise_is_called_neither_right_nor_wrong() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 30, 30, 30)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=0)
    found = prove(vectors, np.full((30, 30, 30), 0.5, np.float32), geometry=Geometry((30, 30, 30), np.eye(4)))
    assert found.verdict == "unsure"
    few = prove(vectors, np.zeros((30, 30, 30), np.float32), geometry=Geometry((30, 30, 30), np.eye(4)))
    assert (few.verdict, few.voxels) == ("unsure", 0)


def test_without_dipy_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("dipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r'pip install "dipy>='):
        estimate.fit_tensors(np.ones((4, 31), np.float32), table())


@pytest.mark.parametrize(
    ("files_given", "sentence"),
    [
        ({"bvals": Path("b")}, "both --bvals and --bvecs"),
        ({"axes": "x,y"}, "x, y and z once each"),
        ({}, "31 volumes, three peaks of three components have 9"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path: Path, files_given: dict[str, Any], sentence: str) -> None:
    write_image(np.ones((31, 4, 4, 4), np.float32), tmp_path / "dwi.nii.gz", native=Geometry((4, 4, 4), np.eye(4)))
    with pytest.raises((ConfigError, DataError), match=sentence):
        white_matter.inputs(tmp_path / "dwi.nii.gz", tmp_path / "out", **files_given)


def test_the_format_of_mrtrix_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "peaks.mif").write_bytes(b"mrtrix image\n")
    with pytest.raises(
        DataError, match=r"peaks\.mif: .* not read; convert it: mrconvert peaks\.mif dwi\.nii\.gz -export"
    ):
        white_matter.inputs(tmp_path / "peaks.mif", tmp_path / "out")


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    write_image(np.ones((9, 4, 4, 4), np.float32), tmp_path / PEAKS, native=Geometry((4, 4, 4), np.eye(4)))
    with pytest.raises(ConfigError, match="would be overwritten"):
        white_matter.inputs(tmp_path / PEAKS, tmp_path)
    write_labelmap(np.ones((4, 4, 4), np.uint8), tmp_path / "case" / MASK, native=Geometry((4, 4, 4), np.eye(4)))
    (tmp_path / "case" / "inputs.json").write_text("{}")  # of an earlier run, whose mask was corrected by hand
    for name in ("mask", "lesion"):
        with pytest.raises(ConfigError, match=r"mask\.nii\.gz would be overwritten; give another -o"):
            white_matter.inputs(tmp_path / PEAKS, tmp_path / "case", **{name: tmp_path / "case" / MASK})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / TENSOR).write_bytes(b"")
    with pytest.raises(ConfigError, match="not written by fewscan"):
        white_matter.inputs(tmp_path / PEAKS, tmp_path / "other")


def test_what_an_earlier_run_made_and_this_one_does_not_goes(
    estimated: tuple[Inputs, Geometry], tmp_path: Path
) -> None:
    inputs, geometry = estimated
    out = tmp_path / "case"
    write_inputs(inputs, out, native=geometry, record={})
    write_image(inputs.images[PEAKS], tmp_path / "peaks.nii.gz", native=geometry)
    (out / "notes.txt").write_text("the user's own")
    white_matter.inputs(tmp_path / "peaks.nii.gz", out)
    listed = {PEAKS, MASK, "inputs.json", white_matter.PICTURE, "notes.txt"}
    assert {path.name for path in out.iterdir()} == listed
    write_image(inputs.images[TENSOR], out / TENSOR, native=geometry)  # of another program: not in our record
    white_matter.inputs(tmp_path / "peaks.nii.gz", out)
    assert (out / TENSOR).is_file()
    (out / "inputs.json").write_text("{")
    with pytest.raises(DataError, match=r"inputs\.json: not readable as JSON"):
        white_matter.inputs(tmp_path / "peaks.nii.gz", out)
