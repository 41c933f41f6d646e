"""Inputs of a network from a diffusion scan, or from peaks that another program made; each proven against the anatomy.

Vectors are in the RAS+ world whatever the axis order of the files, as MRtrix and TractSeg keep them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data.io import read_labels, read_raw, write_image, write_labelmap
from fewscan.data.layouts import TRACT_IMAGES
from fewscan.data.listing import RECORD, TENSOR_CHANNELS, read_json
from fewscan.errors import ConfigError, DataError
from fewscan.learn.checkpoint import USE, versions, write_json
from fewscan.learn.hardware import memory_told
from fewscan.space.geometry import Array, Geometry, check_same, ras_geometry, to_ras
from fewscan.space.orientation import Orientation, axes_text, parse_axes, prove, refuse_wrong, said
from fewscan.tracts import estimate
from fewscan.tracts.estimate import PEAK_CHANNELS, SCALAR_CHANNELS
from fewscan.tracts.gradients import Gradients, fsl_to_world, read_gradients

PEAKS, TENSOR, SCALARS = (TRACT_IMAGES[kind] for kind in ("peaks", "tensor", "scalar"))
FA, MASK = "fa.nii.gz", "mask.nii.gz"
FILES = (PEAKS, TENSOR, SCALARS, FA, MASK)
CHANNELS: Mapping[str, tuple[str, ...]] = {PEAKS: PEAK_CHANNELS, TENSOR: TENSOR_CHANNELS, SCALARS: SCALAR_CHANNELS}

Floats = NDArray[np.float32]
Tell = Callable[[str], None]
Show = Callable[[Orientation, Floats, Floats, Geometry], None]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a network may look at, on one grid, RAS-ordered.

    Parameters
    ----------
    images : mapping of str to (C, X, Y, Z) float32
        By file name; channels as in `CHANNELS`; 0 outside the mask.
    mask : (X, Y, Z) bool
        Brain.
    principal : (3, X, Y, Z) float32
        Unit direction of the clearest fibre.
    clearness : (X, Y, Z) float32
        Fractional anisotropy, or length of the first peak; 0 outside the mask.
    full_length : float
        Amplitude of a peak of length 1.
    """

    images: Mapping[str, Floats]
    mask: NDArray[np.bool_]
    principal: Floats
    clearness: Floats
    full_length: float


def estimate_inputs(dwi: Floats, gradients: Gradients, *, mask: NDArray[np.bool_]) -> Inputs:
    """Peaks, tensors and scalars of a diffusion scan.

    Parameters
    ----------
    dwi : (V, X, Y, Z) float32
        Scan, RAS-ordered.
    gradients : Gradients
        Of its volumes, in the world.
    mask : (X, Y, Z) bool
        Brain.

    Raises
    ------
    FewscanError
        If dipy is missing or the scan cannot be fitted.
    """
    signal = np.ascontiguousarray(dwi[:, mask].T)
    return _estimated(signal, gradients, mask=mask, tensors=estimate.fit_tensors(signal, gradients))


def _estimated(signal: Floats, gradients: Gradients, *, mask: NDArray[np.bool_], tensors: estimate.Tensors) -> Inputs:
    """Inputs of the signals (N, V) of a mask's voxels, once their tensors are fitted."""
    amplitudes = estimate.csd_peaks(signal, gradients, tensors=tensors, mask=mask)
    peaks, full = estimate.unit_length(amplitudes)
    s0 = tensors.s0 / max(float(np.median(tensors.s0)), 1e-6)
    scalars = np.stack([tensors.fa, tensors.md, s0], 1)
    return Inputs(
        images={PEAKS: fill(peaks, mask), TENSOR: fill(tensors.values, mask), SCALARS: fill(scalars, mask)},
        mask=mask,
        principal=fill(tensors.principal, mask),
        clearness=fill(tensors.fa[:, None], mask)[0],
        full_length=full,
    )


@memory_told(fix="crop the scan to the head, or take fewer of its volumes with their b-values and directions")
def make_inputs(
    source: Path, out: Path, *, tables: tuple[Path, Path] | None = None, mask: Path | None = None,
    lesion: Path | None = None, axes: str | None = None, tell: Tell | None = None, show: Show | None = None,
) -> tuple[Inputs, Orientation]:  # fmt: skip
    """Write what a network may look at; refuse directions that do not fit the anatomy.

    Parameters
    ----------
    source : Path
        Diffusion scan, 4D; or peaks of MRtrix or TractSeg: 9 volumes in the world frame, NaN where there is none.
    out : Path
        Folder for `FILES` (of peaks only the first and the mask) and `RECORD`.
    tables : (Path, Path), optional
        FSL's bvals and bvecs; None says that the source holds peaks.
    mask : Path, optional
        Brain, on the source's grid; by a threshold of the scan, or where there is a peak, when left out.
    lesion : Path, optional
        Tumour, on the source's grid, kept out of the proof.
    axes : str, optional
        How to take the rows of the bvecs file, or the components of the peaks, such as ``x,-y,z``.
    tell : callable, optional
        Gets a line for each step.
    show : callable, optional
        Gets what the proof found, principal directions, how clear they are and their grid, before anything is refused.

    Raises
    ------
    FewscanError
        If files cannot be used, dipy is missing, the directions are proven wrong, or memory runs out.
    """
    begin, tell = time.perf_counter(), tell or (lambda line: None)
    claim(out, [path for path in (source, *(tables or ()), mask, lesion) if path is not None])
    turn = np.eye(3) if axes is None else parse_axes(axes)
    opened = _open_peaks(source, mask, turn) if tables is None else _open_scan(source, tables, mask, turn)
    tell(opened.line)
    found = prove(
        opened.principal, opened.clearness, geometry=opened.geometry, frame=opened.frame,
        exclude=None if lesion is None else read_mask(lesion, opened.geometry),
    )  # fmt: skip
    if show is not None:
        show(found, opened.principal, opened.clearness, opened.geometry)
    refuse_wrong(
        found, source if tables is None else tables[1], turn=turn, what="components" if tables is None else "rows"
    )
    tell(said(found))
    inputs = opened.finish()
    record = opened.record | {"orientation": found.to_json() | {"applied": axes_text(turn)}}
    record |= {"source": source.name, "seconds": round(time.perf_counter() - begin, 1)}
    write_inputs(inputs, out, native=opened.native, record=record)
    return inputs, found


@dataclass(frozen=True, eq=False)
class _Opened:
    """A source read and fitted as far as the proof needs it."""

    principal: Floats
    clearness: Floats
    frame: Array
    geometry: Geometry
    native: Geometry
    record: dict[str, Any]
    line: str
    finish: Callable[[], Inputs]


def _open_scan(dwi: Path, tables: tuple[Path, Path], mask: Path | None, turn: Array) -> _Opened:
    data, native = read_raw(dwi)
    gradients = read_gradients(*tables, native=native, axes=turn)
    if len(data) != len(gradients.bvals):
        raise DataError(f"{dwi}: {len(data)} volumes for {len(gradients.bvals)} b-values; give the files of this scan")
    if not all(np.isfinite(volume).all() for volume in data):  # a mask of all volumes would be as large as they are
        raise DataError(f"{dwi}: voxels are NaN or infinite; export the scan again")
    scan: NDArray[Any]
    scan, geometry = to_ras(data, native)
    del data
    brain = estimate.brain_mask(scan, gradients) if mask is None else read_mask(mask, geometry)
    brain = brain & (scan.max(0) > 0)
    signal = np.stack([volume[brain] for volume in scan], 1, dtype=np.float32)
    del scan  # what is fitted is the brain's alone, and a scan may take as much as the machine has
    tensors = estimate.fit_tensors(signal, gradients)
    directions = sum(map(gradients.apart, gradients.shells))
    biased = f"; no lower shell: tensors of b = {max(tensors.shells):.0f} s/mm2 are biased" if tensors.biased else ""
    return _Opened(
        principal=fill(tensors.principal, brain),
        clearness=fill(tensors.fa[:, None], brain)[0],
        frame=fsl_to_world(native) @ turn,
        geometry=geometry,
        native=native,
        record={
            "bvals": [round(b) for b in gradients.shells],
            "directions": directions,
            "mask": "median Otsu threshold" if mask is None else "given",
            "tensor_bvals": [round(b) for b in tensors.shells],
        },
        line=f"{int(brain.sum())} voxels of brain, {directions} directions, {len(gradients.shells)} shells{biased}",
        finish=lambda: _estimated(signal, gradients, mask=brain, tensors=tensors),
    )


def _open_peaks(peaks: Path, mask: Path | None, turn: Array) -> _Opened:
    values, geometry, native = read_peaks(peaks, axes=turn)
    brain = np.abs(values).sum(0) > 0
    if mask is not None:
        brain = brain & read_mask(mask, geometry)
    inputs = inputs_of_peaks(values, mask=brain)
    return _Opened(
        principal=inputs.principal, clearness=inputs.clearness, frame=turn, geometry=geometry, native=native,
        record={}, line=f"{int(brain.sum())} voxels with a peak", finish=lambda: inputs,
    )  # fmt: skip


def inputs_of_peaks(values: Floats, *, mask: NDArray[np.bool_]) -> Inputs:
    """Peaks of another program as inputs: cut to the mask, lengths in units of a long first peak.

    Parameters
    ----------
    values : (9, X, Y, Z) float32
        Longest peak first, RAS+ world.
    mask : (X, Y, Z) bool
        Brain.

    Raises
    ------
    DataError
        If there is no peak in the mask.
    """
    unit, full = estimate.unit_length(np.ascontiguousarray(values[:, mask].T))
    length = np.linalg.norm(unit[:, :3], axis=1, keepdims=True)
    return Inputs(
        images={PEAKS: fill(unit, mask)},
        mask=mask,
        principal=fill(unit[:, :3] / np.maximum(length, 1e-9), mask),
        clearness=fill(np.clip(length, 0, 1), mask)[0],
        full_length=full,
    )


def read_peaks(path: Path, *, axes: Array | None = None) -> tuple[Floats, Geometry, Geometry]:
    """Peaks (9, X, Y, Z) in RAS order, longest first, 0 for none; their grid, and the file's own.

    Parameters
    ----------
    path : Path
        4D image of 9 volumes in the world frame; NaN counts as no peak.
    axes : (3, 3) float, optional
        Signed permutation of the components.

    Raises
    ------
    DataError
        If it does not hold 9 volumes.
    """
    data, native = read_raw(path)
    if len(data) != 9:
        raise DataError(f"{path}: {len(data)} volumes, three peaks of three components have 9; is it a peaks file?")
    values, geometry = to_ras(np.nan_to_num(data.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0), native)
    vectors: Floats = values.astype(np.float32).reshape(3, 3, *geometry.shape)
    if axes is not None:
        vectors = np.tensordot(axes.astype(np.float32), vectors, axes=(1, 1)).swapaxes(0, 1)
    order = np.argsort(-np.linalg.norm(vectors, axis=1), axis=0, kind="stable")
    vectors = np.take_along_axis(vectors, order[:, None], axis=0)
    return np.ascontiguousarray(vectors.reshape(9, *geometry.shape)), geometry, native


def read_mask(path: Path, geometry: Geometry) -> NDArray[np.bool_]:
    """Voxels above 0 of a label map that lies on a grid.

    Parameters
    ----------
    path : Path
        Label map.
    geometry : Geometry
        Where it must lie, RAS-ordered.

    Raises
    ------
    DataError
        If it is empty.
    GeometryError
        If it lies elsewhere.
    """
    label = read_labels(path)
    check_same(label.geometry, geometry, what=f"{path} and the scan")
    inside: NDArray[np.bool_] = label.data > 0
    if not inside.any():
        raise DataError(f"{path}: the mask is empty; draw it or leave it out")
    return inside


def write_inputs(inputs: Inputs, out: Path, *, native: Geometry, record: Mapping[str, Any]) -> None:
    """Write images, the first of the scalars alone too for programs that take one map, mask and, last, the record.

    What an earlier run wrote and this one does not goes: the record would no longer speak for it.

    Parameters
    ----------
    inputs : Inputs
        On ``ras_geometry(native)``.
    out : Path
        Folder.
    native : Geometry
        Grid to write on.
    record : mapping
        What else to tell.

    Raises
    ------
    DataError
        If a file cannot be written.
    """
    grid, before = ras_geometry(native), written_before(out)
    for name, image in inputs.images.items():
        write_image(image.astype(np.float32), out / name, native=native)
    if SCALARS in inputs.images:
        write_image(inputs.images[SCALARS][0].astype(np.float32), out / FA, native=native)
    write_labelmap(inputs.mask.astype(np.uint8), out / MASK, native=native)
    written = {*inputs.images, *([FA] if SCALARS in inputs.images else [])}
    for name in before - written:
        (out / name).unlink(missing_ok=True)
    told = {
        "format": "fewscan tract inputs 1",
        "kind": {name: list(names) for name, names in (*CHANNELS.items(), (FA, ("FA",))) if name in written},
        "frame": "RAS+ world",
        "peak_length_1": inputs.full_length,
        "spacing_mm": list(grid.spacing),
    }
    write_json(told | dict(record) | {"versions": versions(), "use": USE}, out / RECORD)


def claim(out: Path, sources: list[Path]) -> None:
    """Refuse a folder that holds what fewscan did not write.

    Parameters
    ----------
    out : Path
        Folder to write.
    sources : list of Path
        Files read.

    Raises
    ------
    ConfigError
        If something is in the way.
    DataError
        If the record of an earlier run is damaged.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    for source in sources:
        if source.resolve() in [(out / name).resolve() for name in FILES]:
            raise ConfigError(f"{source} would be overwritten; give another -o")
    written_before(out)
    there = [name for name in FILES if (out / name).exists()]
    if there and not (out / RECORD).is_file():
        raise ConfigError(f"{out / there[0]} exists and was not written by fewscan; give another -o")


def written_before(out: Path) -> set[str]:
    """Images that the record of an earlier run lists; none without one.

    Parameters
    ----------
    out : Path
        Folder.

    Raises
    ------
    DataError
        If the record is damaged.
    """
    listed = read_json(out / RECORD).get("kind") if (out / RECORD).is_file() else None
    return set(listed) & set(FILES) if isinstance(listed, dict) else set()


def fill(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Values of a mask's voxels as an image, 0 elsewhere.

    Parameters
    ----------
    values : (N, C) float32
        In the order of ``mask.nonzero()``.
    mask : (X, Y, Z) bool
        With N voxels.

    Examples
    --------
    >>> fill(np.array([[3.0]], np.float32), np.array([[[False, True]]])).tolist()
    [[[[0.0, 3.0]]]]
    """
    image = np.zeros((values.shape[1], *mask.shape), np.float32)
    image[:, mask] = values.T
    return image
