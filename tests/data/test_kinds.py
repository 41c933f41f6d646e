"""What channels hold is said, never guessed, and reading a file turns none of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fibres import GRID, NAMES, SHAPE, clumps, write_fibres

from fewscan.data import dataset, doctor, kinds, repair
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.data.listing import RECORD, REGISTERED, TENSOR_CHANNELS, peak_channels
from fewscan.deliver.datasets import write_nnunet
from fewscan.errors import DataError
from fewscan.learn.inputs import find_scans
from fewscan.space.geometry import Geometry
from fewscan.tracts.inputs import Inputs, write_inputs


def test_peaks_and_tensors_are_what_dataset_json_says(tmp_path: Path) -> None:
    peaks = dataset.find(write_fibres(tmp_path / "p"))
    assert (peaks.kind, peaks.channels) == ("peaks", peak_channels(3))
    tensor = dataset.find(write_fibres(tmp_path / "t", kind="tensor", content="tensor"))
    assert (tensor.kind, tensor.channels) == ("tensor", TENSOR_CHANNELS)
    loaded = dataset.load(peaks.cases[0], peaks)
    assert loaded.image.kind == "peaks"
    np.testing.assert_array_equal(loaded.image.data, clumps(0)[0])


@pytest.mark.parametrize("content", ["peaks", "tensor"])
def test_as_many_channels_as_directions_have_must_be_declared(tmp_path: Path, content: str) -> None:
    root = write_fibres(tmp_path, kind=None, content=content)
    with pytest.raises(DataError, match=r'may be directions or not; write "channel_kind": "peaks", "tensor" or "scal'):
        dataset.find(root)
    stated = json.loads((root / "dataset.json").read_text()) | {"channel_kind": "scalar"}
    names = [f"c{i}" for i in range(9 if content == "peaks" else 6)]
    (root / "dataset.json").write_text(json.dumps(stated | {"channel_names": dict(enumerate(names))}))
    assert dataset.find(root).kind == "scalar"


def test_a_kind_that_does_not_exist_or_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"channel_kind is 'vectors', it must be one of scalar, peaks, tensor"):
        dataset.find(write_fibres(tmp_path / "a", kind="vectors"))
    with pytest.raises(DataError, match="tensor have six channels, this has 9"):
        dataset.find(write_fibres(tmp_path / "b", kind="tensor"))


def inputs_folder(root: Path, name: str, seed: int) -> Path:
    """A case as `fewscan tracts inputs` leaves it, with a label map put beside."""
    mask = np.ones(SHAPE, bool)
    images = {"peaks.nii.gz": clumps(seed)[0], "tensor.nii.gz": clumps(seed, kind="tensor")[0]}
    images["scalars.nii.gz"] = clumps(seed)[0][:3]
    made = Inputs(images, mask, clumps(seed)[0][:3], mask.astype(np.float32), 1.0)
    write_inputs(made, root / name, native=GRID, record={"source": "made up"})
    write_labelmap(clumps(seed)[1], root / name / "labels.nii.gz", native=GRID)
    return root / name


def test_the_folders_of_tract_inputs_are_a_data_set(tmp_path: Path) -> None:
    for i in range(2):
        inputs_folder(tmp_path, f"case_{i}", i)
    (tmp_path / "labels.json").write_text(json.dumps({str(v): n for v, n in NAMES.items()}))
    found = dataset.find(tmp_path)
    assert (found.kind, found.channels, len(found.labelled)) == ("peaks", peak_channels(3), 2)
    assert {case.images[0].name for case in found.cases} == {"peaks.nii.gz"}
    assert found.names == NAMES
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "tensor"}))
    found = dataset.find(tmp_path)
    assert (found.kind, found.channels) == ("tensor", TENSOR_CHANNELS)
    assert {case.images[0].name for case in found.cases} == {"tensor.nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    found = dataset.find(tmp_path)
    assert (found.kind, found.channels) == ("scalar", ("FA", "MD", "S0"))
    assert dataset.load(found.cases[0], found).image.data.shape == (3, *SHAPE)


def test_a_record_that_contradicts_what_is_stated_is_refused(tmp_path: Path) -> None:
    root = write_fibres(tmp_path)
    listed = {"case_00.nii.gz": list(TENSOR_CHANNELS)}
    (root / "images" / RECORD).write_text(json.dumps({"kind": listed}))
    with pytest.raises(DataError, match=r"its inputs\.json says tensor, .*dataset\.json says peaks"):
        dataset.find(root)


def test_the_file_that_contradicts_is_named_whichever_it_is(tmp_path: Path) -> None:
    root = write_fibres(tmp_path, kind=None)
    (root / "images" / RECORD).write_text(json.dumps({"kind": {"case_00.nii.gz": list(peak_channels(3))}}))
    listed = {"case_01.nii.gz": list(TENSOR_CHANNELS)}
    (root / "images" / REGISTERED).write_text(json.dumps({"use": "research use only", "kind": listed}))
    with pytest.raises(DataError, match=r"its registration\.json says tensor, .*inputs\.json says peaks"):
        dataset.find(root)


@pytest.mark.parametrize("text", ["[3]", "{", '{"kind": 3}', json.dumps({"kind": {"case_00.nii.gz": ["a", "b"]}})])
def test_a_registration_record_that_is_damaged_or_of_another_program_says_nothing(tmp_path: Path, text: str) -> None:
    root = write_fibres(tmp_path)
    (root / "images" / REGISTERED).write_text(text)
    assert dataset.find(root).kind == "peaks"


def test_the_kind_of_a_single_scan(tmp_path: Path) -> None:
    folder = inputs_folder(tmp_path, "case", 0)
    assert kinds.kind_of_scan([folder / "peaks.nii.gz"], wanted="scalar") == "peaks"
    assert kinds.kind_of_scan([folder / "tensor.nii.gz"], wanted="scalar") == "tensor"
    root = write_fibres(tmp_path / "data")
    assert kinds.kind_of_scan([root / "images" / "case_00.nii.gz"], wanted="scalar") == "peaks"
    assert kinds.kind_of_scan([tmp_path / "alone.nii.gz"], wanted="peaks") == "peaks"


def test_a_repaired_copy_says_the_same(tmp_path: Path) -> None:
    data = dataset.find(write_fibres(tmp_path / "data"))
    repair.fix(data, doctor.examine(data), out=tmp_path / "copy")
    again = dataset.find(tmp_path / "copy")
    assert (again.kind, again.channels) == ("peaks", data.channels)
    assert replace(again, root=data.root).names == data.names


@pytest.mark.parametrize("codes", [np.diag([-1.0, -1.0, 1.0]), np.eye(3)[[2, 0, 1]], np.eye(3)[[1, 0, 2]] * -1])
def test_reading_orders_voxels_and_leaves_components_alone(tmp_path: Path, codes: np.ndarray) -> None:
    """Components are in the RAS+ world, whatever the order of the voxels: a file in another order is the same scan."""
    affine = np.eye(4)
    affine[:3, :3] = codes
    native = Geometry(tuple(int(n) for n in np.abs(np.linalg.inv(codes)) @ SHAPE), affine)  # type: ignore[arg-type]
    write_image(clumps(0)[0], tmp_path / "other.nii.gz", native=native)
    read = read_image(tmp_path / "other.nii.gz", channels=peak_channels(3))
    np.testing.assert_array_equal(read.data, clumps(0)[0])
    assert read.geometry.axis_codes == "RAS"


def test_of_a_folder_of_tract_inputs_a_model_takes_its_own_image(tmp_path: Path) -> None:
    for i in range(2):
        inputs_folder(tmp_path, f"case_{i}", i)
    for given in ([tmp_path], [tmp_path / "case_0", tmp_path / "case_1"]):
        scans = find_scans(given, channels=peak_channels(3), kind="peaks")
        assert [(scan.id, scan.images[0].name) for scan in scans] == [
            ("case_0", "peaks.nii.gz"),
            ("case_1", "peaks.nii.gz"),
        ]
    [scan] = find_scans([tmp_path / "case_0"], channels=TENSOR_CHANNELS, kind="tensor")
    assert (scan.id, scan.images[0].name) == ("case_0", "tensor.nii.gz")


def test_nnunet_is_told_what_it_cannot_do(tmp_path: Path) -> None:
    data = dataset.find(write_fibres(tmp_path / "data"))
    (tmp_path / "out").mkdir()
    notes = write_nnunet(data, tmp_path / "out")
    assert notes == ["the channels hold peaks of fibres, which nnU-Net moves without turning them"]
    again = dataset.find(tmp_path / "out")
    assert (again.kind, again.channels, len(again.cases[0].images)) == ("peaks", data.channels, 9)


def test_voxels_without_a_peak_are_repaired_to_zero_not_to_the_lowest_component(tmp_path: Path) -> None:
    root = write_fibres(tmp_path / "data")
    found = dataset.find(root)
    image = found.cases[0].images[0]
    data = read_image(image, channels=found.channels).data.astype(np.float32)
    data[:, :2] = np.nan  # as MRtrix writes them
    write_image(data, image, native=GRID)
    checkup = doctor.examine(dataset.find(root))
    faults = [f for f in checkup.findings if f.code == "not-finite"]
    assert [f.remedy for f in faults] == ["--fix writes a copy with zero in their place"]
    repair.fix(dataset.find(root), checkup, out=tmp_path / "fixed")
    fixed = dataset.find(tmp_path / "fixed")
    assert fixed.kind == "peaks"
    np.testing.assert_array_equal(dataset.load(fixed.cases[0], fixed).image.data, np.nan_to_num(data))
