"""From the channels of a file to those that a network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import DataError
from fewscan.learn.intensity import normalise, scan_statistics
from fewscan.learn.plan import Plan
from fewscan.space import directions
from fewscan.space.volume import Volume


def entry(image: Volume, plan: Plan) -> Callable[[NDArray[Any]], Tensor]:
    """How pieces of a scan, its data or rows of it, become what a network sees, on the same voxels.

    Intensities are normalised one channel at a time. Directions become matrices (`space.directions`) along the axes of
    the voxels, all divided by one number: the length of a long peak, or a large trace.

    Parameters
    ----------
    image : Volume
        The whole scan, for its statistics and the way its axes run.
    plan : Plan
        Kind of the channels, and their normalisation.

    Raises
    ------
    DataError
        If the scan holds channels of another kind than the model takes.
    """
    if image.kind != plan.kind:
        raise DataError(f"the scan holds {said(image.kind)}, the model takes {said(plan.kind)}; give such a scan")
    if image.kind == "scalar":
        statistics = scan_statistics(image.data, plan.scaling)
        return lambda piece: torch.from_numpy(normalise(piece, plan.scaling, statistics=statistics))
    kind, axes = image.kind, directions.axes_of(image.geometry)
    long = directions.usual_size(image.data, kind)
    return lambda piece: (
        directions.matrices(torch.from_numpy(np.ascontiguousarray(piece, np.float32)), kind, axes=axes) / long
    )


def said(kind: str) -> str:
    """A kind of channels in words.

    Parameters
    ----------
    kind : {"scalar", "peaks", "tensor"}
        The kind.
    """
    return {"scalar": "intensities", "peaks": "peaks of fibres", "tensor": "a diffusion tensor"}[kind]


def laid(overlapping: bool) -> str:
    """In words, whether labels may overlap.

    Parameters
    ----------
    overlapping : bool
        Whether they do.
    """
    return "labels that overlap" if overlapping else "one label a voxel"


def to_look_at(image: Volume) -> Volume:
    """A scan of intensities: itself, or the lengths or traces of its directions, for what must not turn anything.

    Parameters
    ----------
    image : Volume
        Of any kind.
    """
    if image.kind == "scalar":
        return image
    values = directions.raw_sizes(image.data, image.kind)
    return Volume(values, image.geometry, image.native, tuple(f"size {i + 1}" for i in range(len(values))))
