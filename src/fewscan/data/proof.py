"""Do peaks and tensors that nobody has proven fit the anatomy they lie in?

`fewscan tracts inputs` proves directions before it writes them, and its record says so. What a ``dataset.json`` merely
declares, or is handed to a model as it lies, is proven here from the channels themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data.findings import Finding
from fewscan.data.listing import RECORD, TENSOR_CHANNELS, read_json, recorded
from fewscan.errors import DataError
from fewscan.space import orientation
from fewscan.space.directions import PLACE, usual_size
from fewscan.space.geometry import Geometry
from fewscan.space.orientation import LEAST_WEIGHT, Orientation
from fewscan.space.volume import Kind

DIAGONAL = (0, 3, 5)  # places of Dxx, Dyy, Dzz
OTHER_ORDERS = {
    (0, 1, 2): "Dxx, Dyy, Dzz, Dxy, Dxz, Dyz, as MRtrix writes them",
    (0, 2, 5): "Dxx, Dxy, Dyy, Dxz, Dyz, Dzz, the lower triangle of NIfTI's symmetric matrices",
}
LEAST_DIAGONAL = 0.01  # of a voxel's largest component: no tissue hinders diffusion that much in one direction
MOST_BELOW = 0.05  # share of the voxels that hold anything, above which the components are of another order

SIMULATED = "simulated"
"""Source of scans that were computed from known directions: there is nothing to prove."""

Floats = NDArray[np.float32]


def proven(image: Path) -> bool:
    """Whether the record beside an image says that its directions fit the anatomy.

    Parameters
    ----------
    image : Path
        Peaks or a tensor.
    """
    with contextlib.suppress(DataError):  # a record of another program, or a damaged one, says nothing
        if recorded(image) is not None:
            record = read_json(image.parent / RECORD)
            found = record.get("orientation")
            return record.get("source") == SIMULATED or (isinstance(found, dict) and found.get("verdict") == "right")
    return False


def prove(data: NDArray[Any], geometry: Geometry, *, kind: Kind) -> Orientation:
    """`orientation.prove` for the channels of a file.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Peaks or a tensor in the RAS+ world, RAS-ordered; NaN counts as nothing.
    geometry : Geometry
        Their grid.
    kind : {"peaks", "tensor"}
        Which of them.
    """
    values: Floats = np.nan_to_num(data.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    vectors, weight = _strongest(values) if kind == "peaks" else _principal(values)
    return orientation.prove(vectors, weight, geometry=geometry)


def examine(
    data: NDArray[Any], geometry: Geometry, *, images: Sequence[Path], kind: Kind, case: str = ""
) -> list[Finding]:
    """What is to be said of directions: an error where they are proven wrong, a warning where chance may be why.

    An error, too, where six components cannot be those of a tensor in our order. A note where nothing is proven either
    way. Nothing of intensities, and nothing where the record beside the file says that they fit.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Channels, RAS-ordered.
    geometry : Geometry
        Their grid.
    images : sequence of Path
        Files of the scan.
    kind : {"scalar", "peaks", "tensor"}
        What they hold.
    case : str
        Id.
    """
    if kind == "scalar" or proven(images[0]):
        return []
    path = str(images[0])
    if kind == "tensor" and (disordered := _disordered(data, case, path)):
        return disordered
    found = prove(data, geometry, kind=kind)
    if found.verdict == "right":
        return []
    look, fit = (
        "look at the directions over the anatomy, in a viewer that draws them",
        _remedy(found, data, images, kind),
    )
    if found.verdict == "wrong":
        message = orientation.misfit(found, fix=found.axes, what="components")
        return [Finding("directions-wrong", "error", case, path, message, fit)]
    message = orientation.said(found).split(";")[0]
    if found.doubted:
        return [Finding("directions-doubtful", "warning", case, path, message, f"{look}; if they do not fit: {fit}")]
    return [Finding("directions-unsure", "note", case, path, message, look)]


def _disordered(data: NDArray[Any], case: str, path: str) -> list[Finding]:
    """An error where components on the diagonal, which diffusion makes positive, are not; nothing where they are."""
    values: Floats = np.nan_to_num(data.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).reshape(len(data), -1)
    values = values[:, values.any(0)]
    low = LEAST_DIAGONAL * np.abs(values).max(0)
    below = [float(np.mean(row < low)) if row.size else 0.0 for row in values]
    worst = max(DIAGONAL, key=lambda place: below[place])
    if below[worst] <= MOST_BELOW:
        return []
    likely = [said for places, said in OTHER_ORDERS.items() if max(below[i] for i in places) <= MOST_BELOW]
    message = (
        f"{TENSOR_CHANNELS[worst]} is negative or about zero in {below[worst]:.0%} of the voxels that hold anything: "
        f"the components are not {', '.join(TENSOR_CHANNELS)}" + "".join(f", but seem to be {said}" for said in likely)
    )
    remedy = f"write them as {', '.join(TENSOR_CHANNELS)}, and zero outside the brain"
    return [Finding("tensor-order", "error", case, path, message, remedy)]


def _remedy(found: Orientation, data: NDArray[Any], images: Sequence[Path], kind: Kind) -> str:
    """How to come to directions that fit."""
    if kind == "tensor":
        return f"estimate the tensor again with the gradients, in the world, taken as {found.axes}"
    if len(images) == 1 and len(data) == 9:
        return f"fewscan tracts inputs {images[0].name} --axes={found.axes} -o FOLDER writes peaks that fit"
    return f"write the components of each peak as {found.axes}"


def _strongest(values: Floats) -> tuple[Floats, Floats]:
    """Unit direction of each voxel's longest peak (3, X, Y, Z), and its length in units of a long one, at most 1."""
    peaks = values.reshape(-1, 3, *values.shape[1:])
    lengths: Floats = np.linalg.norm(peaks, axis=1)
    longest = lengths.argmax(0)[None]
    length = np.take_along_axis(lengths, longest, axis=0)
    vectors = np.take_along_axis(peaks, longest[:, None], axis=0)[0]
    long = np.float32(usual_size(values, "peaks"))
    return vectors / np.maximum(length, np.float32(1e-12)), np.clip(length[0] / long, 0, 1)


def _principal(values: Floats) -> tuple[Floats, Floats]:
    """Unit direction of the largest diffusion (3, X, Y, Z) where it is clear enough to count, and the anisotropy."""
    xx, xy, xz, yy, yz, zz = values
    whole = xx**2 + yy**2 + zz**2 + 2 * (xy**2 + xz**2 + yz**2)
    apart = whole - (xx + yy + zz) ** 2 / 3
    anisotropy: Floats = np.sqrt(np.clip(1.5 * apart / np.maximum(whole, np.float32(1e-30)), 0, 1)).astype(np.float32)
    clear = anisotropy > LEAST_WEIGHT / 2
    vectors = np.zeros((3, *anisotropy.shape), np.float32)
    matrices = values[:, clear].T[:, np.array(PLACE)].astype(np.float64)
    vectors[:, clear] = np.linalg.eigh(matrices)[1][:, :, 2].T
    return vectors, np.where(whole > 0, np.maximum(anisotropy, np.float32(1e-6)), 0)  # 0 only outside the brain
