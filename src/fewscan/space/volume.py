"""Images, label maps and cases on their grids.

Arrays are numpy here, at the boundary, so that a large scan keeps its file's integer type; the hot loops of ``learn``
turn pieces of them into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.space.combinations import mask_of
from fewscan.space.geometry import Geometry, Shape

Kind = Literal["scalar", "peaks", "tensor"]
"""What channels hold: intensities; three components of a direction each, in the RAS+ world; six entries of a tensor."""

KINDS: tuple[Kind, ...] = ("scalar", "peaks", "tensor")
IGNORE = 65535
"""Label value that means "not looked at": the loss does not see it. Readers map a file's own ignore value to it."""


@dataclass(frozen=True, eq=False)
class Volume:
    """An image of one or more channels, voxel axes in RAS+ order.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Intensities in the file's own type.
    geometry : Geometry
        Grid of ``data``.
    native : Geometry
        Grid of the file it came from, before its axes were put in RAS+ order; what is predicted goes back there.
    channels : tuple of str
        Name of each channel.
    kind : {"scalar", "peaks", "tensor"}
        What the channels hold; directions are in the RAS+ world, however the voxels are ordered.

    Raises
    ------
    GeometryError
        If data, geometry and channels do not fit.
    """

    data: NDArray[Any]
    geometry: Geometry
    native: Geometry
    channels: tuple[str, ...] = ("image",)
    kind: Kind = "scalar"

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or self.data.shape[1:] != self.geometry.shape:
            raise GeometryError(f"an image must be (C, {self.geometry.shape}), got {self.data.shape}")
        if len(self.channels) != self.data.shape[0]:
            raise GeometryError(f"{self.data.shape[0]} channels need as many names, got {self.channels}")


@dataclass(frozen=True, eq=False)
class Labelmap:
    """One label per voxel, or one combination of labels that overlap; voxel axes in RAS+ order.

    Parameters
    ----------
    data : (X, Y, Z) uint16
        0 background, `IGNORE` not looked at, anything else a label, or a combination of labels.
    geometry : Geometry
        Grid of ``data``.
    names : mapping of int to str
        Label value to name, without background and `IGNORE`.
    table : (N, L) bool, optional
        Of combinations: for each one the labels that it holds, in the order of the names (`space.combinations`).

    Raises
    ------
    GeometryError
        If data and geometry do not fit.
    """

    data: NDArray[np.uint16]
    geometry: Geometry
    names: Mapping[int, str]
    table: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.data.shape != self.geometry.shape:
            raise GeometryError(f"a label map must be {self.geometry.shape}, got {self.data.shape}")
        if self.table is not None and self.table.shape[1:] != (len(self.names),):
            raise GeometryError(f"a table of {len(self.names)} labels needs as many columns, got {self.table.shape}")

    def mask(self, value: int) -> NDArray[np.bool_]:
        """Voxels of a label, alone or among others.

        Parameters
        ----------
        value : int
            A key of ``names``.
        """
        if self.table is None:
            return np.asarray(self.data == value)
        return mask_of(self.data, self.table[:, list(self.names).index(value)])


@dataclass(frozen=True, eq=False)
class Case:
    """One patient's scan, loaded, with its label map where there is one.

    Parameters
    ----------
    id : str
        Unique within its data set.
    image : Volume
        The scan.
    label : Labelmap, optional
        On the image's grid.
    drawn : frozenset of int, optional
        Labels that whoever annotated this case looked for; None means all of them.
    meta : mapping
        Where it came from; never a patient's name.
    """

    id: str
    image: Volume
    label: Labelmap | None = None
    drawn: frozenset[int] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def axis_weights(old: int, new: int) -> Tensor | None:
    """Weights of linear resampling along one axis over the same extent, edge to edge; None when nothing changes.

    Shrinking widens the triangle by the factor of the shrinkage, so that fine detail does not alias.

    Parameters
    ----------
    old, new : int
        Number of voxels before and after.

    Examples
    --------
    >>> axis_weights(2, 4).tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    if old == new:
        return None
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    reach = max(1.0, old / new)
    inside = centre.clamp(0, old - 1) if reach == 1 else centre  # beyond the outer voxels' centres: repeat them
    distance = (torch.arange(old, dtype=torch.float64)[None] - inside[:, None]).abs()
    weights = (1 - distance / reach).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()


def resample(data: Tensor, shape: Shape) -> Tensor:
    """Linear resampling onto another number of voxels over the same block of space, edge to edge.

    Parameters
    ----------
    data : (C, X, Y, Z) float
        Image, or one-hot label map.
    shape : (X, Y, Z) int
        Wanted shape.

    Examples
    --------
    >>> resample(torch.arange(2.0).reshape(1, 2, 1, 1), (4, 1, 1))[0, :, 0, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    return resample_by(data, [axis_weights(n, m) for n, m in zip(data.shape[1:], shape, strict=True)])


def resample_by(data: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """Apply one matrix of weights along each axis; None leaves an axis alone.

    Parameters
    ----------
    data : (C, X, Y, Z) float
        Image, or one-hot label map.
    weights : sequence of (new, old) float or None
        From `axis_weights`, or rows and columns of it.
    """
    wx, wy, wz = weights
    if wx is not None:
        data = torch.tensordot(wx.to(data), data, dims=([1], [1])).transpose(0, 1)
    if wy is not None:
        data = wy.to(data) @ data
    if wz is not None:
        data = data @ wz.to(data).T
    return data


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Label indices to one channel per class; `IGNORE` becomes all zeros.

    Parameters
    ----------
    label : (B, X, Y, Z) int
        Class indices 0 to ``classes - 1``, or `IGNORE`.
    classes : int
        Number of channels, background included.

    Examples
    --------
    >>> one_hot(torch.tensor([[[[0, 1, 65535]]]]), 2)[0, :, 0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    index = torch.arange(classes, device=label.device).view(1, -1, 1, 1, 1)
    return (label[:, None].long() == index).float()


def bounding_box(mask: NDArray[np.bool_], *, margin: int = 0) -> tuple[slice, slice, slice]:
    """Smallest box around the true voxels; the whole grid when there are none.

    Parameters
    ----------
    mask : (X, Y, Z) bool
        Voxels to enclose.
    margin : int
        Voxels to add on each side, as far as the grid goes.

    Examples
    --------
    >>> bounding_box(np.eye(3, dtype=bool)[:, :, None])
    (slice(0, 3, None), slice(0, 3, None), slice(0, 1, None))
    """
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, mask.shape[axis])
        box.append(slice(max(0, low - margin), min(mask.shape[axis], high + margin)))
    return box[0], box[1], box[2]
