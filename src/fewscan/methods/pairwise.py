"""Registration of one pair of scans, without training: headers, then affine, then a diffeomorphism.

`register` works on images in memory; `deliver` and the command line write what it answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import ConfigError, DataError
from fewscan.learn.channels import said, to_look_at
from fewscan.learn.intensity import Scaling, normalise
from fewscan.space import affine, directions, kernels
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.field import Field
from fewscan.space.geometry import Array, Geometry, with_at_most, with_spacing
from fewscan.space.similarity import SIMILARITIES, counted, features, mi, ncc
from fewscan.space.volume import Labelmap, Volume, resample

MOST_VOXELS = 12_000_000  # of the working grid; larger scans are deformed on a coarser one
ACROSS_MODALITIES = ("mi", "mind")

Transform = Literal["rigid", "affine", "deformable"]
Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """What kind of map to look for, and how.

    Parameters
    ----------
    transform : {"rigid", "affine", "deformable"}
        The richest map allowed; a deformable one starts with the affine.
    spacing_mm : float
        Voxel size of the grid to deform on, 0 takes the fixed scan's own; coarser beyond `MOST_VOXELS`.
    deform : DeformConfig
        The deformable part, and the similarity of all parts.
    turned : bool
        Whether one of the scans may lie tilted or on another side than its header says.

    Raises
    ------
    ConfigError
        If the transform is unknown or the spacing negative.
    """

    transform: Transform = "deformable"
    spacing_mm: float = 0.0
    deform: DeformConfig = field(default_factory=DeformConfig)
    turned: bool = False

    def __post_init__(self) -> None:
        if self.transform not in ("rigid", "affine", "deformable"):
            raise ConfigError(f"transform must be rigid, affine or deformable, got {self.transform!r}")
        if self.spacing_mm < 0:
            raise ConfigError(f"the grid spacing must not be negative, got {self.spacing_mm:g} mm")


@dataclass(frozen=True, eq=False)
class Registration:
    """What a registration found.

    Parameters
    ----------
    field : Field
        From fixed to moving, the affine part in it.
    matrix : (4, 4) float
        The affine part alone, fixed to moving RAS+ mm.
    report : mapping
        Similarity before, after the affine part and at the end; folding; seconds.
    """

    field: Field
    matrix: Array
    report: dict[str, Any]


def register(
    fixed: Volume,
    moving: Volume,
    *,
    config: RegisterConfig | None = None,
    weight: NDArray[np.bool_] | None = None,
    start: Callable[[Tensor, Tensor], Tensor] | None = None,
    scaling: Sequence[Scaling] | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Registration:
    """Find the map that brings ``moving`` onto ``fixed``.

    Parameters
    ----------
    fixed, moving : Volume
        Any grids; of one kind, and as many channels each. Of directions the lengths or traces are compared. One channel
        that is constant in both tells nothing and is left out; of directions one that is constant in either, such as
        the length of a third peak that one scan has nowhere, if it is not the first.
    config : RegisterConfig, optional
        The preset when None.
    weight : (X, Y, Z) bool, optional
        On the fixed grid: where likeness counts. A lesion that the moving scan lacks is left out here.
    start : callable, optional
        Fixed and affinely aligned moving image to a first displacement in their voxels: a trained network's answer.
    scaling : sequence of Scaling, optional
        How intensities are normalised, one per channel: as the network that gives the start learnt them; by each
        scan's own numbers when None.
    device : torch.device, optional
        Where the deformable part runs; the CPU when None.
    progress : callable, optional
        Gets the share that is done and the name of the part.

    Raises
    ------
    DataError
        If channels or kinds differ, one that counts is constant in one scan, all are in both, or the weight is empty,
        also where the moving scan has voxels.
    GeometryError
        If the scans do not overlap in any way.
    """
    config, begin = config or RegisterConfig(), time.monotonic()
    kind, (fixed, moving) = fixed.kind, _compared(fixed, moving)
    seen = _telling(fixed, moving, lengths=kind != "scalar")
    tell = progress or (lambda share, part: None)
    if weight is not None and not weight.any():
        raise DataError("the mask of where likeness counts is empty; leave it out, or draw it on the fixed scan")
    grid = working_grid(fixed.geometry, config.spacing_mm)
    still, other = (torch.from_numpy(normalise(scan.data, scaling)) for scan in (fixed, moving))
    looked = None if weight is None else torch.from_numpy(weight.astype(np.float32))[None]
    name = config.deform.similarity
    tell(0.0, "affine")
    matrix = affine.fit(
        still[seen[:1]], other[seen[:1]], grids=(fixed.geometry, moving.geometry), rigid=config.transform == "rigid",
        turned=config.turned, measure=mi if name in ACROSS_MODALITIES else ncc, weight=looked,
    )  # fmt: skip
    mask = _weight(looked, affine.within(moving.geometry, grid=grid, matrix=matrix))
    before = affine.onto(other[seen], moving.geometry, grid=grid, matrix=np.eye(4))
    every = resample(still, grid.shape), affine.onto(other, moving.geometry, grid=grid, matrix=matrix)
    target, aligned = (image[seen] for image in every)
    likeness = {"before": _likeness(name, target, before, mask), "affine": _likeness(name, target, aligned, mask)}
    tell(0.15, "deformable")
    u = torch.zeros(1, 3, *grid.shape)
    if config.transform == "deformable":
        place = device or torch.device("cpu")
        first = None if start is None else start(*every).to(place)  # a network takes as many as it has learnt
        u = deform(
            target[None].to(place), aligned[None].to(place), config=config.deform, start=first,
            weight=None if mask is None else mask.to(place),
            progress=lambda share: tell(0.15 + 0.8 * share, "deformable"),
        ).cpu()  # fmt: skip
        likeness["after"] = _likeness(name, target, kernels.sample(aligned[None], u)[0], mask)
    else:
        likeness["after"] = likeness["affine"]
    det = fields.determinant(u)
    whole = fields.resize(u, fixed.geometry.shape)[0].numpy()
    report = {
        "transform": config.transform,
        "settings": asdict(config),
        "similarity": {"name": name, **{k: round(v, 6) for k, v in likeness.items()}},
        "folding": float((det <= 0).float().mean()),
        "volume_change": {"smallest": float(det.min()), "largest": float(det.max())},
        "displacement_mm": _lengths(u, grid),
        "matrix": matrix.tolist(),
        "grid": {"shape": list(grid.shape), "spacing_mm": list(grid.spacing)},
        "kernels": kernels.path(device or "cpu"),
        "seconds": round(time.monotonic() - begin, 2),
    }
    return Registration(fields.then(whole, matrix, fixed=fixed.geometry), matrix, report)


def working_grid(fixed: Geometry, spacing_mm: float) -> Geometry:
    """Grid on which to deform.

    Parameters
    ----------
    fixed : Geometry
        Of the fixed scan.
    spacing_mm : float
        As in `RegisterConfig`.
    """
    if spacing_mm > 0:
        x, y, z = (max(s, spacing_mm) for s in fixed.spacing)
        fixed = with_spacing(fixed, (x, y, z))
    return with_at_most(fixed, MOST_VOXELS)


def apply(found: Registration, moving: Volume) -> NDArray[np.float32]:
    """The moving scan on the fixed grid, (C, X, Y, Z); its lowest value where it does not reach.

    Directions turn along with the anatomy, see `space.directions.follow`, and there are none where it does not reach.

    Parameters
    ----------
    found : Registration
        From `register`.
    moving : Volume
        As it was registered, or another channel of it.
    """
    if moving.kind != "scalar":
        values = torch.from_numpy(np.ascontiguousarray(moving.data, np.float32))
        still = directions.matrices(values, moving.kind, axes=np.eye(3)).numpy()  # along the axes of the world
        warped = torch.from_numpy(fields.warp_array(still, moving.geometry, field=found.field))[None]
        u = torch.from_numpy(found.field.u)[None]
        turned = directions.reorient_world(warped, u, kind=moving.kind, grid=found.field.fixed)[0]
        return (turned if moving.kind == "tensor" else directions.peaks_of(turned)).numpy()
    low = float(moving.data.min())
    return fields.warp_array(moving.data, moving.geometry, field=found.field, background=low)


def apply_labels(found: Registration, label: Labelmap) -> NDArray[np.uint16]:
    """Labels of the moving scan on the fixed grid; their own grid may differ from the moving scan's.

    Parameters
    ----------
    found : Registration
        From `register`.
    label : Labelmap
        In the moving scan's world.
    """
    return fields.warp_labels(label.data, label.geometry, field=found.field)


def _compared(fixed: Volume, moving: Volume) -> tuple[Volume, Volume]:
    """What is looked at in each scan."""
    if fixed.kind != moving.kind:
        raise DataError(
            f"the fixed scan holds {said(fixed.kind)}, the moving one {said(moving.kind)}; give two of a kind"
        )
    return to_look_at(fixed), to_look_at(moving)


def _telling(fixed: Volume, moving: Volume, *, lengths: bool) -> list[int]:
    """Places of the channels that are constant in neither scan; those that are constant in both tell nothing.

    Of lengths one scan may have none of a later peak anywhere, as under a protocol that tells fewer fibres apart.
    """
    if len(fixed.data) != len(moving.data):
        raise DataError(
            f"the fixed scan has {len(fixed.data)} channel(s), the moving one {len(moving.data)}; give equal"
        )
    flat = {}
    for role, scan in (("fixed", fixed), ("moving", moving)):
        flat[role] = [bool(channel.min() == channel.max()) for channel in scan.data]
    either = [one or other for one, other in zip(*flat.values(), strict=True)]
    if lengths and not either[0]:
        return [c for c, constant in enumerate(either) if not constant]
    seen = [c for c in range(len(fixed.data)) if not (flat["fixed"][c] and flat["moving"][c])]
    for role, scan in (("fixed", fixed), ("moving", moving)):
        if alone := [scan.channels[c] for c in seen or range(len(scan.data)) if flat[role][c]]:
            raise DataError(
                f"the {role} scan is constant in channel {alone[0]!r}: nothing to register; give another file"
            )
    return seen


def _weight(looked: Tensor | None, within: Tensor) -> Tensor | None:
    """Of each voxel of the working grid, (1, 1, X, Y, Z): none beyond the moving scan; None where all count."""
    here = None if looked is None else resample(looked, (within.shape[1], within.shape[2], within.shape[3]))[None]
    if within.all():
        return here
    both = within[None] if here is None else here * within
    if not both.any():
        raise DataError("the moving scan shows nothing of where likeness counts; draw that mask elsewhere, or larger")
    return both


def _likeness(name: str, fixed: Tensor, warped: Tensor, weight: Tensor | None) -> float:
    pair = features(name, fixed[None]), features(name, warped[None])
    with torch.no_grad():
        return float(SIMILARITIES[name](*pair, weight=counted(name, weight)))


def _lengths(u: Tensor, grid: Geometry) -> dict[str, float]:
    mm = torch.einsum("ij,bjxyz->bixyz", torch.from_numpy(grid.affine[:3, :3].astype(np.float32)), u)
    length = mm.square().sum(1).sqrt()
    return {"mean": float(length.mean()), "largest": float(length.max())}
