"""One real brain as sticks in a ball, and made-up people from it: warps and tumours.

An anatomy is what a diffusion scan can be computed from: in each voxel up to three fibre populations with fractions and
directions, the diffusivity and the unweighted signal; and the bundles that were drawn on it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fewscan.errors import DataError
from fewscan.space import field as fields
from fewscan.space.field import Field
from fewscan.space.geometry import Array, Geometry, to_ras
from fewscan.tracts.bundles import mirrored

KEYS = ("mask", "S0", "d", "f", "v", "bundle_names", "bundles_ref", "affine")

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A brain from which diffusion scans can be computed; RAS-ordered.

    Parameters
    ----------
    geometry : Geometry
        Grid.
    mask : (X, Y, Z) bool
        Brain.
    s0 : (X, Y, Z) float32
        Signal without diffusion weighting.
    d : (X, Y, Z) float32
        Diffusivity, mm2/s.
    f : (3, X, Y, Z) float32
        Fraction of each fibre population.
    v : (9, X, Y, Z) float32
        Their unit directions in the RAS+ world.
    bundles : mapping of str to (X, Y, Z) bool
        Masks; they overlap.
    """

    geometry: Geometry
    mask: Mask
    s0: Floats
    d: Floats
    f: Floats
    v: Floats
    bundles: Mapping[str, Mask]


def read_anatomy(path: Path) -> Anatomy:
    """Read an anatomy from arrays on disk.

    Parameters
    ----------
    path : Path
        ``.npz`` with mask, S0, d (mm2/s), f (X, Y, Z, 3), v (X, Y, Z, 3, 3) in the RAS+ world, affine (voxel to RAS+
        mm), bundle_names and bundles_ref (masks packed along their first axis).

    Raises
    ------
    DataError
        If it cannot be read, or an array is missing, does not fit or is not finite.
    """
    arrays = _arrays(path)
    names = [str(name) for name in arrays["bundle_names"]]
    shape = arrays["mask"].shape
    native = Geometry(shape, arrays["affine"])
    masks = np.unpackbits(arrays["bundles_ref"], axis=0)[: len(names)].astype(bool)

    def turned(data: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.ascontiguousarray(to_ras(data, native)[0])

    sticks = turned(arrays["v"].reshape(*shape, 9).transpose(3, 0, 1, 2).astype(np.float32))
    return Anatomy(
        geometry=to_ras(arrays["mask"], native)[1],
        mask=turned(arrays["mask"]).astype(bool),
        s0=turned(arrays["S0"]).astype(np.float32),
        d=turned(arrays["d"]).astype(np.float32),
        f=turned(arrays["f"].transpose(3, 0, 1, 2)).astype(np.float32),
        v=sticks.astype(np.float32),
        bundles=dict(zip(names, turned(masks).astype(bool), strict=True)),
    )


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What the file holds, each array of the shape that the mask calls for."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if lacking := [key for key in KEYS if key not in stored]:
                raise DataError(f"{path}: holds no {', '.join(lacking)}; an anatomy needs {', '.join(KEYS)}")
            arrays = {key: stored[key] for key in KEYS}
    except DataError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an anatomy ({error}); give a .npz file") from None
    shape, count = arrays["mask"].shape, arrays["bundle_names"].size
    fits = {
        "S0": shape, "d": shape, "f": (*shape, 3), "v": (*shape, 3, 3), "affine": (4, 4), "bundle_names": (count,),
        "bundles_ref": (-(-count // 8), *shape),
    }  # fmt: skip
    if len(shape) != 3:
        raise DataError(f"{path}: mask is {shape}, three axes expected; save it as (X, Y, Z)")
    for key, wanted in fits.items():
        if arrays[key].shape != wanted:
            raise DataError(f"{path}: {key} is {arrays[key].shape}, {wanted} expected")
    if arrays["bundles_ref"].dtype != np.uint8:
        raise DataError(
            f"{path}: bundles_ref is {arrays['bundles_ref'].dtype}; pack the masks with np.packbits(axis=0)"
        )
    for key in ("S0", "d", "f", "v", "affine"):
        if not (np.issubdtype(arrays[key].dtype, np.number) and np.isfinite(arrays[key]).all()):
            raise DataError(f"{path}: {key} holds NaN, infinite values or no numbers; write 0 where nothing is known")
    return arrays


def warped(anatomy: Anatomy, field: Field, *, mirror: bool = False) -> Anatomy:
    """The anatomy through a field: nearest sticks and bundles, linear signal and diffusivity, directions turned along.

    Parameters
    ----------
    anatomy : Anatomy
        Whose grid is the field's moving grid.
    field : Field
        From the new anatomy's grid to the old one's.
    mirror : bool
        Whether the field exchanges left and right, so that bundles change sides in name.
    """
    own, grid = anatomy.geometry, field.fixed
    index = np.arange(1, np.prod(own.shape) + 1, dtype=np.int64).reshape(own.shape)
    place = fields.warp_nearest(index, own, field=field)
    inside, flat = place > 0, np.maximum(place - 1, 0)

    def nearest(data: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.where(inside, data.reshape(*data.shape[:-3], -1)[..., flat], 0).astype(data.dtype)

    world = torch.from_numpy(grid.affine[:3, :3].astype(np.float32))
    turned = fields.reorient(
        torch.from_numpy(np.asarray(nearest(anatomy.v), np.float32))[None], torch.from_numpy(field.u)[None], world=world
    )
    smooth = fields.warp_array(np.stack([anatomy.s0, anatomy.d]), own, field=field)
    mask = np.asarray(nearest(anatomy.mask), bool)
    return Anatomy(
        geometry=grid,
        mask=mask,
        s0=smooth[0] * mask,
        d=smooth[1] * mask,
        f=np.asarray(nearest(anatomy.f), np.float32) * mask,
        v=turned[0].numpy(),
        bundles={mirrored(n) if mirror else n: np.asarray(nearest(m), bool) & mask for n, m in anatomy.bundles.items()},
    )


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How much made-up people differ.

    Parameters
    ----------
    affine : float
        Largest change of a length, as a share; half of it for shears.
    sigma_mm : float
        Smoothness of the velocity.
    rms_mm : float
        Root mean square displacement of the velocity within the brain.
    fraction, diffusivity : float
        Largest change of fibre fractions and of diffusivity, as a share.
    """

    affine: float = 0.08
    sigma_mm: float = 15.0
    rms_mm: float = 6.0
    fraction: float = 0.10
    diffusivity: float = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Person:
    """A made-up person, as what sets them apart from the real one.

    Parameters
    ----------
    field : Field
        From the person's grid to the real one's.
    mirror : bool
        Whether left and right were exchanged.
    fraction : (3,) float
        Factor of each fibre fraction.
    diffusivity : float
        Factor of the diffusivity.
    """

    field: Field
    mirror: bool
    fraction: tuple[float, float, float]
    diffusivity: float


def made_up(real: Anatomy, rng: np.random.Generator, *, variation: Variation) -> Person:
    """Another person: mirrored or not, stretched, warped by a stationary velocity, fractions and diffusivity jittered.

    Parameters
    ----------
    real : Anatomy
        Whom all are made from.
    rng : Generator
        Decides.
    variation : Variation
        How much.
    """
    grid = real.geometry
    mirror = bool(rng.random() < 0.5)
    stretch = rng.uniform(-1, 1, (3, 3)) * variation.affine * (0.5 + 0.5 * np.eye(3))
    v = smooth_noise(grid, rng, sigma_mm=variation.sigma_mm, channels=3)
    scale = np.sqrt((v[:, real.mask] ** 2).sum(0).mean())
    spacing = np.array(grid.spacing).reshape(3, 1, 1, 1)
    velocity = torch.from_numpy((v * (variation.rms_mm / scale) / spacing).astype(np.float32))[None]
    matrix = about_middle((np.eye(3) + stretch) @ np.diag([-1.0 if mirror else 1.0, 1.0, 1.0]), grid)
    one, two, three = (1 + variation.fraction * rng.uniform(-1, 1, 3)).tolist()
    return Person(
        field=fields.then(fields.integrate(velocity)[0].numpy(), matrix, fixed=grid),
        mirror=mirror,
        fraction=(one, two, three),
        diffusivity=float(1 + variation.diffusivity * rng.uniform(-1, 1)),
    )


def about_middle(linear: Array, geometry: Geometry) -> Array:
    """World map (4, 4) with a linear part that leaves the middle of a grid where it is.

    Parameters
    ----------
    linear : (3, 3) float
        In RAS+ mm.
    geometry : Geometry
        The grid.
    """
    middle = (geometry.affine @ [*((np.array(geometry.shape) - 1) / 2), 1.0])[:3]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, middle - linear @ middle
    return matrix


@dataclass(frozen=True, kw_only=True)
class Tumour:
    """A ball of tumour with oedema around it that pushes its surroundings away.

    Parameters
    ----------
    centre_mm : (3,) float
        RAS+ mm, in the person's space.
    radius_mm : float
        Of the core; 0 is no tumour.
    oedema_mm : float
        Width of the shell around it.
    """

    centre_mm: tuple[float, float, float]
    radius_mm: float
    oedema_mm: float = 9.0


PUSH = 0.85  # of the radius: how far tissue at the core's surface has moved outward
REACH_MM = 18.0  # over which the push falls to a third
SURFACE_MM = 8.0  # over which it fades towards the brain's surface
CORE_FRACTION, OEDEMA_FRACTION = 0.15, 0.6


def push(tumour: Tumour, mask: Mask, *, geometry: Geometry) -> Field:
    """True displacement by a tumour: radial, decaying exponentially, nothing at the brain's surface.

    The field points from each voxel of the patient to where its tissue was before. It does not fold: along a radius
    what is read moves on monotonically for a push below one radius.

    Parameters
    ----------
    tumour : Tumour
        A radius of 0 moves nothing.
    mask : (X, Y, Z) bool
        Brain.
    geometry : Geometry
        Its grid.
    """
    r, outward = _radius(tumour, geometry)
    if tumour.radius_mm <= 0:
        return Field(np.zeros((3, *geometry.shape), np.float32), geometry)
    amount = PUSH * tumour.radius_mm
    inside = r < tumour.radius_mm
    length = amount * np.where(inside, r / tumour.radius_mm, np.exp(-(r - tumour.radius_mm) / REACH_MM))
    depth = ndimage.distance_transform_edt(mask, sampling=geometry.spacing)
    length *= np.clip(depth / SURFACE_MM, 0, 1)
    inverse = np.linalg.inv(geometry.affine[:3, :3])
    u = np.einsum("ij,jxyz->ixyz", inverse, -length * outward)
    return Field(u.astype(np.float32), geometry)


def portrayed(
    real: Anatomy, person: Person, *, pose: Array | None = None, tumour: Tumour | None = None
) -> tuple[Anatomy, Field, NDArray[np.uint8]]:
    """The person's anatomy, in one interpolation: posed, surroundings of a tumour pushed, its fibres thinned.

    Fibre fractions fall in core and oedema; bundles are absent from the core.

    Parameters
    ----------
    real : Anatomy
        Whom all are made from.
    person : Person
        Who.
    pose : (4, 4) float, optional
        Rigid world map from the posed head to the person's space.
    tumour : Tumour, optional
        In the person's space.

    Returns
    -------
    Anatomy, Field, (X, Y, Z) uint8
        The anatomy, the true displacement by the tumour alone, and where core (1) and oedema (2) are.
    """
    grid = person.field.fixed
    u = torch.from_numpy(person.field.u)[None]
    if pose is not None:
        u = fields.compose(u, torch.from_numpy(fields.from_matrix(pose, grid).u)[None])
    lesion = np.zeros(grid.shape, np.uint8)
    still = Field(np.zeros((3, *grid.shape), np.float32), grid)
    if tumour is None or tumour.radius_mm <= 0:
        moved = warped(real, Field(u[0].numpy(), grid), mirror=person.mirror)
        return _jittered(moved, person), still, lesion
    if pose is not None:
        centre = np.linalg.inv(pose) @ [*tumour.centre_mm, 1.0]
        tumour = replace(tumour, centre_mm=(float(centre[0]), float(centre[1]), float(centre[2])))
    mask = fields.warp_nearest(real.mask.astype(np.uint8), real.geometry, field=Field(u[0].numpy(), grid)) > 0
    displacement = push(tumour, mask, geometry=grid)
    total = fields.compose(u, torch.from_numpy(displacement.u)[None])
    moved = _jittered(warped(real, Field(total[0].numpy(), grid), mirror=person.mirror), person)
    r, _ = _radius(tumour, grid)
    lesion[(r < tumour.radius_mm + tumour.oedema_mm) & moved.mask] = 2
    lesion[(r < tumour.radius_mm) & moved.mask] = 1
    factor = np.choose(lesion, (1.0, CORE_FRACTION, OEDEMA_FRACTION)).astype(np.float32)
    bundles = {name: inside & (lesion != 1) for name, inside in moved.bundles.items()}
    return replace(moved, f=moved.f * factor, bundles=bundles), displacement, lesion


def _jittered(anatomy: Anatomy, person: Person) -> Anatomy:
    f = anatomy.f * np.array(person.fraction, np.float32).reshape(3, 1, 1, 1)
    return replace(anatomy, f=f / np.maximum(1.0, f.sum(0)), d=anatomy.d * np.float32(person.diffusivity))


def smooth_noise(geometry: Geometry, rng: np.random.Generator, *, sigma_mm: float, channels: int) -> Array:
    """Smoothed white noise, (channels, X, Y, Z), without unit.

    Parameters
    ----------
    geometry : Geometry
        Grid.
    rng : Generator
        Decides.
    sigma_mm : float
        Of the Gaussian.
    channels : int
        How many.
    """
    noise = rng.normal(size=(channels, *geometry.shape))
    sigmas = [sigma_mm / s for s in geometry.spacing]
    smooth: Array = np.stack([ndimage.gaussian_filter(channel, sigmas, mode="nearest") for channel in noise])
    return smooth


def _radius(tumour: Tumour, geometry: Geometry) -> tuple[Array, Array]:
    """Distance of each voxel from the centre in mm, and the unit vector away from it, (3, X, Y, Z)."""
    index = np.indices(geometry.shape).reshape(3, -1)
    places = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    away = (places - np.array(tumour.centre_mm)[:, None]).reshape(3, *geometry.shape)
    r = np.linalg.norm(away, axis=0)
    return r, away / np.maximum(r, 1e-9)
