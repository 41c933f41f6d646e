"""Layouts are found without renaming; patients stay together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewscan.data.dataset import CaseFiles, Dataset, find, folds, load, patient_of, select
from fewscan.data.sample import sample_path
from fewscan.errors import DataError, GeometryError
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE


def put(root: Path, name: str, content: object) -> None:
    (root / name).write_text(json.dumps(content))


def ids(cases: tuple[CaseFiles, ...]) -> list[str]:
    return [c.id for c in cases]


def test_images_and_labels(scans: Any) -> None:
    root = scans.pairs(2, unlabelled=1)
    put(root, "labels.json", {"1": "liver", "2": "never drawn"})
    data = find(root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["case_a", "case_b"], ["case_c"])
    assert data.names == {1: "liver"}
    assert data.layout == "images/ + labels/"
    case = load(data.cases[0], data)
    assert case.label is not None
    assert case.label.names == {1: "liver"}


def test_names_may_be_missing(scans: Any) -> None:
    assert find(scans.pairs(1, values=(2, 5))).names == {2: "label 2", 5: "label 5"}


def test_nnunet_raw(scans: Any) -> None:
    for case in ("p_01", "p_02", "p_0003"):
        for channel in range(2):
            scans.write_image(f"imagesTr/{case}_{channel:04d}.nii.gz", seed=channel)
        if case != "p_02":
            scans.write_label(f"labelsTr/{case}.nii.gz")
    scans.write_image("imagesTs/p_09_0000.nii.gz")
    scans.write_image("imagesTs/p_09_0001.nii.gz")
    listing = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "liver": 1, "ignore": 2}}
    put(scans.root, "dataset.json", listing)
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled), ids(data.test)) == (["p_0003", "p_01"], ["p_02"], ["p_09"])
    assert (data.channels, data.modality, data.ignore, data.names) == (("T1", "FLAIR"), "mr", 2, {1: "liver"})
    assert load(data.cases[0], data).image.channels == ("T1", "FLAIR")


def test_channels_are_in_the_order_of_their_numbers_however_they_are_listed(scans: Any) -> None:
    for channel in range(11):
        scans.write_image(f"imagesTr/p_{channel:04d}.nii.gz", seed=channel)
    scans.write_label("labelsTr/p.nii.gz")
    listed = {str(k): f"echo {k}" for k in sorted(range(11), key=str)}  # 0, 1, 10, 2, ...
    put(scans.root, "dataset.json", {"channel_names": listed, "labels": {"background": 0, "liver": 1}})
    assert find(scans.root).channels == tuple(f"echo {k}" for k in range(11))


def test_msd_with_channels_in_one_file(scans: Any) -> None:
    both = np.stack([scans.image(0), scans.image(1)])
    scans.write_image("imagesTr/brats_001.nii.gz", both)
    scans.write_label("labelsTr/brats_001.nii.gz")
    put(
        scans.root,
        "dataset.json",
        {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"}},
    )
    data = find(scans.root)
    np.testing.assert_array_equal(load(data.cases[0], data).image.data, both)


def test_four_digit_case_names_are_no_channels(scans: Any) -> None:
    for case in ("case_0000", "case_0001"):
        scans.write_image(f"images/{case}.nii.gz")
        scans.write_label(f"labels/{case}.nii.gz")
    assert ids(find(scans.root).labelled) == ["case_0000", "case_0001"]


def test_bids(scans: Any) -> None:
    for subject in ("01", "02"):
        scans.write_image(f"sub-{subject}/ses-1/anat/sub-{subject}_ses-1_T1w.nii.gz")
    scans.write_image("sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz")
    scans.write_label("derivatives/manual/sub-01/sub-01_ses-1_space-orig_dseg.nii.gz")
    (scans.root / "derivatives" / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tputamen\n")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["sub-01_ses-1"], ["sub-02_ses-1"])
    assert (data.names, data.modality, data.cases[0].patient) == ({1: "putamen"}, "mr", "sub-01")


@pytest.mark.parametrize("tail", ["_seg", "_label", "_mask", "-label", ".seg", "_gt"])
def test_flat_folder(scans: Any, tail: str) -> None:
    scans.write_image("a.nii.gz")
    scans.write_image("b.nrrd")
    scans.write_label(f"a{tail}.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["a"], ["b"])


@pytest.mark.parametrize("folders", [("images", "labels", "test/images"), ("imagesTr", "labelsTr", "imagesTs")])
def test_unlabelled_channels_stay_together_without_a_listing(scans: Any, folders: tuple[str, str, str]) -> None:
    images, labels, held = folders
    for name in (f"{images}/a", f"{images}/b", f"{held}/c"):
        for channel in range(2):
            scans.write_image(f"{name}_{channel:04d}.nii.gz", seed=channel)
    scans.write_label(f"{labels}/a.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled), ids(data.test)) == (["a"], ["b"], ["c"])
    assert {len(c.images) for c in (*data.cases, *data.test)} == {2}


def test_labels_json_does_not_hide_what_dataset_json_says(scans: Any) -> None:
    for channel in range(2):
        scans.write_image(f"images/a_{channel:04d}.nii.gz", seed=channel)
    scans.write_label("labels/a.nii.gz")
    put(scans.root, "labels.json", {"1": "tumour"})
    listing = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "x": 1, "ignore": 9}}
    put(scans.root, "dataset.json", listing)
    data = find(scans.root)
    assert (data.names, data.channels, data.modality, data.ignore) == ({1: "tumour"}, ("T1", "FLAIR"), "mr", 9)


def test_bids_counts_subjects_and_takes_the_label_of_the_contrast(scans: Any) -> None:
    for subject in ("01", "02"):
        scans.write_image(f"sub-{subject}/anat/sub-{subject}_T2w.nii.gz")
    for run in range(3):
        scans.write_image(f"sub-01/anat/sub-01_run-{run}_FLAIR.nii.gz")
    for contrast in ("FLAIR", "T2w"):
        scans.write_label(f"derivatives/m/sub-01/sub-01_{contrast}_dseg.nii.gz")
    data = find(scans.root)
    assert ids(data.cases) == ["sub-01", "sub-02"]
    assert data.cases[0].label is not None
    assert data.cases[0].label.name == "sub-01_T2w_dseg.nii.gz"


def test_one_folder_per_case_with_contrasts_in_the_names(scans: Any) -> None:
    for case in ("BraTS_1", "BraTS_2"):
        for contrast in ("t1", "flair"):
            scans.write_image(f"{case}/{case}_{contrast}.nii.gz")
    scans.write_label("BraTS_1/BraTS_1_seg.nii.gz")
    data = find(scans.root)
    assert (ids(data.labelled), ids(data.unlabelled)) == (["BraTS_1"], ["BraTS_2"])
    assert data.channels == ("flair", "t1")


def test_one_folder_per_case_with_the_same_names_in_each(scans: Any) -> None:
    for case in ("p1", "p2"):
        scans.write_image(f"{case}/scan.nii.gz")
        scans.write_label(f"{case}/label.nii.gz")
    assert ids(find(scans.root).labelled) == ["p1", "p2"]


def test_dicom_series_as_images(slices: Callable[..., Path], scans: Any) -> None:
    slices("images/p1")
    slices("images/p2")
    data = find(scans.root)
    assert (ids(data.unlabelled), data.modality) == (["p1", "p2"], "other")
    assert load(data.cases[0], data).image.data.shape == (1, 4, 5, 6)
    assert ids(find(scans.root / "images").cases) == ["p1", "p2"]
    assert ids(find(scans.root / "images" / "p1").cases) == ["p1"]


def test_nested_dicom_series_and_the_index_of_a_disc(slices: Callable[..., Path], scans: Any) -> None:
    for name in ("p1/study/s1", "p1/study/s2", "p2/study/s1"):
        slices(name)
    (scans.root / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    data = find(scans.root)
    assert ids(data.cases) == ["p1_ses-study_s1", "p1_ses-study_s2", "p2"]
    assert [c.patient for c in data.cases] == ["p1", "p1", "p2"]


def test_ct_stored_unsigned_is_told_by_its_air(scans: Any) -> None:
    import nibabel as nib

    stored = scans.image().astype(np.uint16) * 5 + 1024
    stored[:, :4] = 24
    image = nib.Nifti1Image(stored, scans.geometry.affine)
    image.header.set_slope_inter(1, -1024)
    (scans.root / "images").mkdir()
    nib.save(image, scans.root / "images/a.nii.gz")
    assert find(scans.root).modality == "ct"


def test_ct_is_told_by_its_air(scans: Any) -> None:
    data = scans.image().astype(np.int16) * 5
    data[:, :4] = -1000
    scans.write_image("images/a.nii.gz", data)
    assert find(scans.root).modality == "ct"


def test_nothing_usable_names_what_was_seen(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no scans found; understood are images/ \+ labels/.*seen were: notes.txt"):
        find(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "one JSON object"),
        ("{", "not readable as JSON"),
        ('{"1": {"a": 1}}', "a name is needed"),
        ('{"a": [1]}', "is a region"),
        ('{"x": "y"}', "whole number"),
        ('{"1": "liver", "2": "liver"}', "values 1 and 2 are both called 'liver'"),
        ('{"liver": 1, "spleen": 1}', "'liver' and 'spleen' both have the value 1"),
    ],
)
def test_a_wrong_listing_is_refused(scans: Any, content: str, message: str) -> None:
    scans.pairs(1)
    (scans.root / "labels.json").write_text(content)
    with pytest.raises(DataError, match=message):
        find(scans.root)


def test_one_broken_file_does_not_stop_the_search(scans: Any) -> None:
    scans.pairs(3)
    (scans.root / "labels/case_b.nii.gz").write_bytes(b"broken")
    (scans.root / "images/case_c.nii.gz").write_bytes(b"broken")
    data = find(scans.root)
    assert len(data.labelled) == 3
    with pytest.raises(DataError, match="case_b"):
        load(data.cases[1], data)


def test_a_label_on_another_grid_is_refused_but_a_hair_is_not(scans: Any) -> None:
    scans.pairs(2)
    for case, shift in (("a", 0.04), ("b", 0.5)):
        affine = scans.geometry.affine.copy()
        affine[0, 3] += shift
        scans.write_label(f"labels/case_{case}.nii.gz", grid=Geometry(scans.shape, affine))
    data = find(scans.root)
    first = load(data.cases[0], data)
    assert first.label is not None
    assert first.label.geometry is first.image.geometry
    with pytest.raises(GeometryError, match=r"case case_b.*--fix.*affines differ by up to 0\.5 mm"):
        load(data.cases[1], data)


def test_blank_slices_and_labels_not_drawn_are_marked(scans: Any) -> None:
    scans.pairs(4, values=(1, 2))
    sparse = np.zeros(scans.shape, np.uint16)
    sparse[2:7, 3:6, ::4] = 1
    scans.write_label("labels/case_d.nii.gz", sparse)
    data = find(scans.root)
    case = load(data.cases[3], data)
    assert case.drawn == {1}
    assert case.label is not None
    assert (case.label.data[:, :, 1] == IGNORE).all()
    assert (case.label.data[:, :, 4] < 2).all()
    put(scans.root, "drawn.json", {"case_d": ["label 1", "label 2"], "case_a": ["label 2"]})
    assert [c.drawn for c in find(scans.root).cases] == [{2}, None, None, {1, 2}]
    put(scans.root, "drawn.json", {"case_x": []})
    with pytest.raises(DataError, match=r"no case 'case_x'; did you mean"):
        find(scans.root)


def bare(names: list[str]) -> Dataset:
    cases = tuple(CaseFiles(n, (Path(n),), Path(n), patient_of(n)) for n in names)
    return Dataset(Path("data"), "test", cases, {1: "a"})


@given(patients=st.integers(2, 9), frames=st.integers(1, 3), k=st.integers(2, 9), seed=st.integers(0, 5))
def test_folds_never_split_a_patient(patients: int, frames: int, k: int, seed: int) -> None:
    data = bare([f"patient{p}_frame{f:02d}" for p in range(patients) for f in range(frames)])
    if k > patients:
        with pytest.raises(DataError, match=f"{patients} labelled patients cannot be split into {k} folds"):
            folds(data, k, seed=seed)
        return
    made = folds(data, k, seed=seed)
    assert sorted(i for _, test in made for i in test) == sorted(ids(data.cases))
    for train, test in made:
        assert not {patient_of(i) for i in train} & {patient_of(i) for i in test}
        assert sorted(train + test) == sorted(ids(data.cases))
    assert len(folds(data, "loo")) == patients
    assert made == folds(data, k, seed=seed)


def test_patients_are_recognised_by_the_start_of_their_ids() -> None:
    names = ["p1_L", "p1_right", "p1_frame03", "p1_t2", "p1_ED", "sub-7_ses-a_run-1", "p1_time10_left", "left", "1000"]
    assert [patient_of(n) for n in names] == ["p1"] * 5 + ["sub-7", "p1", "left", "1000"]
    twins = [f"p038_{protocol}_{state}" for protocol in "AB" for state in ("healthy", "tumour")]
    assert {patient_of(n) for n in twins} == {"p038"}


def test_select_takes_labels_away(scans: Any) -> None:
    data = find(scans.pairs(3, unlabelled=1))
    chosen = select(data, labelled=["case_b"], unlabelled=["case_a", "case_d"])
    assert (ids(chosen.labelled), ids(chosen.unlabelled)) == (["case_b"], ["case_a", "case_d"])
    for wrong, message in ((["case_q"], "did you mean"), (["case_a", "case_a"], "twice"), (["case_d"], "no label map")):
        with pytest.raises(DataError, match=message):
            select(data, labelled=wrong)


def test_the_embedded_sample_is_complete() -> None:
    data = find(sample_path())
    assert (len(data.labelled), len(data.unlabelled), len(data.test)) == (5, 13, 12)
    assert all(c.label is not None for c in data.test)
    assert not {c.id for c in data.cases} & {c.id for c in data.test}
    assert data.names == {1: "anterior hippocampus", 2: "posterior hippocampus"}
    assert sum(f.stat().st_size for f in sample_path().rglob("*") if f.is_file()) < 2.5e6
    assert "CC BY-SA 4.0" in (sample_path() / "ATTRIBUTION.md").read_text()
