"""Digests of scans and label maps: what they see, and what must have no say."""

import hashlib

import numpy as np
from series import write_series

from fewscan.data import contents, io
from fewscan.data.contents import content_of
from fewscan.data.io import write_image
from fewscan.space.geometry import Geometry

GRID = Geometry((20, 18, 40), np.eye(4))
NOISE = np.random.default_rng(0).normal(0, 100, GRID.shape).astype(np.int16)


def test_only_slices_have_a_say_in_a_series(tmp_path):
    series = write_series(tmp_path / "p1", NOISE, GRID)
    told = content_of(series), content_of(series, whole=True)
    (series / ".DS_Store").write_bytes(b"window")
    (series / "Thumbs.db").write_bytes(b"pictures")
    series.rename(tmp_path / "p2")
    assert (content_of(tmp_path / "p2"), content_of(tmp_path / "p2", whole=True)) == told
    assert content_of(write_series(tmp_path / "p3", NOISE + 1, GRID)) != told[0]


def test_a_correction_of_one_voxel_is_seen_where_every_byte_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "PIECE", 64)
    paths = [tmp_path / f"{name}.nii" for name in "ab"]
    for path, data in zip(paths, (NOISE, NOISE.copy()), strict=True):
        if path.stem == "b":
            data[3, 3, 3] += 1
        write_image(data[None], path, native=GRID)
    assert content_of(paths[0], whole=True) != content_of(paths[1], whole=True)
    assert content_of(paths[0]) == content_of(paths[1]) != ""  # which a sample cannot


def test_a_file_of_many_blocks_is_read_whole_on_every_python(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "BLOCK", 1000)
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # there from Python 3.11 on only
    write_image(NOISE[None], tmp_path / "a.nii", native=GRID)
    alone = hashlib.sha256((tmp_path / "a.nii").read_bytes()).hexdigest()
    assert content_of(tmp_path / "a.nii", whole=True) == hashlib.sha256(alone.encode()).hexdigest()[:32]


def test_the_voxels_of_a_detached_header_count(tmp_path):
    path = tmp_path / "a.mhd"
    write_image(NOISE[None], tmp_path / "a.nii.gz", native=GRID)
    header = "ObjectType = Image\nNDims = 3\nDimSize = 20 18 40\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    path.write_text(header + "ElementDataFile = a.raw\n")
    (tmp_path / "a.raw").write_bytes(NOISE.tobytes("F"))
    before = content_of(path, whole=True)
    assert before
    (tmp_path / "a.raw").write_bytes((NOISE + 1).tobytes("F"))
    assert content_of(path, whole=True) != before


def test_labels_that_are_no_images_are_known_by_their_bytes(tmp_path):
    labels = tmp_path / "p1.dcm"  # as a segmentation or outlines in DICOM
    labels.write_bytes(b"outlines")
    before = content_of(labels, whole=True)
    labels.write_bytes(b"outlined")
    assert content_of(labels, whole=True) != before != ""


def test_masks_of_a_folder_count_and_what_hides_there_does_not(tmp_path):
    folder = tmp_path / "bundles"
    write_image(NOISE[None], folder / "cst.nii.gz", native=GRID)
    before = content_of(folder, whole=True)
    (folder / ".DS_Store").write_bytes(b"window")
    assert content_of(folder, whole=True) == before != ""
    assert content_of(tmp_path / "nothing.nii.gz") == ""


def test_masks_that_exchange_their_names_are_another_label(tmp_path):
    for name, data in (("left", NOISE), ("right", NOISE + 1)):
        write_image(data[None], tmp_path / "a" / f"{name}.nii.gz", native=GRID)
        write_image(data[None], tmp_path / "b" / f"{'right' if name == 'left' else 'left'}.nii.gz", native=GRID)
        write_image(data[None], tmp_path / "c" / f"{name}.nii.gz", native=GRID)
    a, b, c = (content_of(tmp_path / name, whole=True) for name in "abc")
    assert a == c != b
