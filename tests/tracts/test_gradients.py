"""Gradient tables: FSL's handedness, files that cannot be used, words for axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewscan.errors import ConfigError, DataError
from fewscan.space.geometry import Geometry, from_ras, ras_geometry
from fewscan.space.orientation import axes_text, parse_axes, signed_permutations
from fewscan.tracts.gradients import (
    Gradients,
    determine_tensor,
    distinct,
    fsl_to_world,
    read_gradients,
    spread_directions,
)

TABLE = spread_directions(12, seed=3)


def write(folder: Path, bvecs: np.ndarray, bvals: list[float] | None = None) -> tuple[Path, Path]:
    np.savetxt(folder / "bvals", np.array(bvals or [0.0] + [1000.0] * (bvecs.shape[1] - 1))[None])
    np.savetxt(folder / "bvecs", bvecs)
    return folder / "bvals", folder / "bvecs"


def geometry(matrix: np.ndarray) -> Geometry:
    return Geometry((4, 5, 6), np.block([[matrix, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]))


def turn(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@pytest.mark.parametrize("flip", [-1.0, 1.0])
def test_the_same_world_direction_comes_back_from_either_handedness(tmp_path: Path, flip: float) -> None:
    """A scan stored left-handed and its mirror-ordered copy have bvecs files that differ; the world does not."""
    native = geometry(turn(0.3) @ np.diag([flip * 2.0, 2.0, 3.0]))
    voxel = np.linalg.inv(native.affine[:3, :3] / np.array(native.spacing)) @ TABLE.T
    if flip > 0:  # FSL's rule for a positive determinant, written out
        voxel[0] = -voxel[0]
    found = read_gradients(*write(tmp_path, np.c_[np.zeros(3), voxel]), native=native)
    np.testing.assert_allclose(found.directions[1:], TABLE, atol=1e-6)


def test_a_reoriented_file_gives_the_same_world_directions(tmp_path: Path) -> None:
    """What fslreorient does to the voxels is undone by the affine; the bvecs of each file belong to its own axes."""
    las, ras = geometry(np.diag([-2.0, 2.0, 2.0])), geometry(np.diag([2.0, 2.0, 2.0]))
    bvecs = np.c_[np.zeros(3), TABLE.T]
    one = read_gradients(*write(tmp_path, bvecs), native=las)
    other = read_gradients(*write(tmp_path, bvecs), native=ras)  # FSL shows and counts both as left-handed
    np.testing.assert_allclose(one.directions, other.directions, atol=1e-12)
    np.testing.assert_allclose(one.directions[1:], TABLE * [-1, 1, 1], atol=1e-6)


@given(angle=st.floats(-3, 3), flip=st.sampled_from([-1.0, 1.0]), shear=st.floats(-0.2, 0.2))
def test_the_map_to_the_world_is_orthonormal_and_left_handed(angle: float, flip: float, shear: float) -> None:
    matrix = turn(angle) @ np.diag([flip * 1.5, 2.0, 4.0])
    matrix[0, 1] += shear
    found = fsl_to_world(geometry(matrix))
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found) < 0


def test_columns_or_rows_and_axes_are_understood(tmp_path: Path) -> None:
    native = geometry(np.diag([-2.0, 2.0, 2.0]))
    bvecs = np.c_[np.zeros(3), TABLE.T]
    rows = read_gradients(*write(tmp_path, bvecs), native=native)
    columns = read_gradients(*write(tmp_path, bvecs.T, [0.0] + [1000.0] * 12), native=native)
    np.testing.assert_array_equal(rows.directions, columns.directions)
    swapped = read_gradients(*write(tmp_path, bvecs[[1, 0, 2]]), native=native, axes=parse_axes("y,x,z"))
    np.testing.assert_array_equal(rows.directions, swapped.directions)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b, v: (b[:-1], v), "13 numbers for 12 b-values|3 x 13 numbers for 12 b-values"),
        (lambda b, v: (b, 3 * v), "has length 3, unit vectors are needed"),
        (lambda b, v: ([1000.0] * 13, np.c_[TABLE[:1].T, TABLE.T]), "no volume with b <= 50"),
        (lambda b, v: ([0.0] * 9 + [1000.0] * 4, v), "4 diffusion-weighted volumes, at least 6"),
        (lambda b, v: ([-1.0, *b[1:]], v), "not negative"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    bvals, bvecs = change([0.0] + [1000.0] * 12, np.c_[np.zeros(3), TABLE.T])
    np.savetxt(tmp_path / "bvals", np.array(bvals)[None])
    np.savetxt(tmp_path / "bvecs", bvecs)
    with pytest.raises(DataError, match=sentence):
        read_gradients(tmp_path / "bvals", tmp_path / "bvecs", native=geometry(np.eye(3)))


def test_words_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bvals").write_text("zero one")
    for name, sentence in (("bvals", "not a table of numbers"), ("none", "no such file")):
        with pytest.raises(DataError, match=sentence):
            read_gradients(tmp_path / name, tmp_path / name, native=geometry(np.eye(3)))


@pytest.mark.parametrize("words", ["x,y", "x,x,z", "x,y,w", "x y z", "--x,y,z", ""])
def test_axes_that_cannot_be_meant_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="x, y and z once each"):
        parse_axes(words)


def test_of_48_ways_24_are_distinct_and_words_name_them() -> None:
    ways = signed_permutations()
    words = {axes_text(way) for way in ways}
    assert (len(ways), len(words)) == (48, 24)
    for way in ways:
        same = parse_axes(axes_text(way))
        assert np.array_equal(same, way) or np.array_equal(same, -way)


def test_shells_are_told_apart() -> None:
    bvals = np.array([0, 5, 995, 1000, 1005, 2000, 2010, 990.0])
    found = Gradients(bvals, np.tile([1.0, 0, 0], (8, 1)))
    assert [round(b) for b in found.shells] == [998, 2005]
    assert found.shell(1000).sum() == 4


def test_directions_stored_twice_count_once() -> None:
    three, six = spread_directions(3), spread_directions(6)
    turned = six @ turn(0.01).T  # as the correction of motion leaves a second run
    assert [distinct(d) for d in (np.r_[three, three], np.r_[six, -six], np.r_[six, turned])] == [3, 6, 6]
    assert not determine_tensor(np.r_[three, three])
    assert determine_tensor(np.r_[six, turned])
    flat = np.stack([np.cos(np.arange(8)), np.sin(np.arange(8)), np.zeros(8)], 1)
    assert distinct(flat) == 8
    assert not determine_tensor(flat)  # eight directions of one plane tell nothing of the third


def test_directions_are_spread() -> None:
    found = spread_directions(30)
    cosine = np.abs(found @ found.T) - np.eye(30)
    assert np.degrees(np.arccos(cosine.max())) > 20  # random ones come within a few degrees


def test_from_ras_keeps_world_vectors_apart_from_axes() -> None:
    """Vectors are world vectors: bringing a file's voxels into RAS order must not touch their components."""
    native = geometry(np.diag([-2.0, 2.0, 2.0]))
    vectors = np.random.default_rng(0).normal(size=(3, *ras_geometry(native).shape))
    there = from_ras(vectors, native)
    np.testing.assert_array_equal(there[:, ::-1], vectors)
