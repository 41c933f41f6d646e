"""What is measured on one scan, to hold populations against each other: intensities, detail, grid, features.

Everything but the grid is measured in tissue away from a lesion, where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import edt
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fewscan.learn.channels import entry, to_look_at
from fewscan.learn.checkpoint import Model
from fewscan.learn.windows import starts, window_shape
from fewscan.space import directions
from fewscan.space.volume import Volume, resample

AWAY_MM = 10.0  # tissue nearer than this to a lesion does not count
ENOUGH = 1000  # voxels of tissue away from a lesion that scans are compared by
FEATURES = 256  # of a scan, at most
WINDOWS = 4  # of a scan, at most
QUANTILES = np.linspace(0.01, 0.99, 99)
FEWEST_CROSSINGS = 0.005  # share of voxels with a second fibre below which there is next to none

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Look:
    """What is kept of one scan.

    Parameters
    ----------
    id, patient : str
        Who it is.
    numbers : mapping of str to (N,) float
        For each kind of `shift.FLOORS`, its numbers: one per channel, or one per axis for the geometric ones;
        logarithms but for the contrast.
    quantiles : (C, Q) float
        Of the normalised intensities in the tissue, at `QUANTILES`.
    features : (M, D) float
        Of the model's encoder, at places in the tissue; none without a model that has an encoder.
    near : bool
        Whether tissue near a lesion counted after all, because too little is left away from it.
    """

    id: str
    patient: str
    numbers: dict[str, Array]
    quantiles: Array
    features: Array
    near: bool = False


def tissue(image: NDArray[Any], *, away: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Voxels that are no background and not near a lesion; near it, too, where less than `ENOUGH` are away from it.

    Parameters
    ----------
    image : (X, Y, Z) number
        First channel.
    away : (X, Y, Z) bool, optional
        False near a lesion.
    """
    low, high = np.quantile(image[:: max(1, image.shape[0] // 64)], [0.01, 0.99])
    mask: NDArray[np.bool_] = image > low + 0.1 * (high - low)
    if away is not None and (mask & away).sum() >= ENOUGH:
        mask &= away
    return mask if mask.sum() >= 100 else np.ones(image.shape, bool)


def distance_mm(lesion: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float32]:
    """Distance of each voxel to a lesion, 0 inside it.

    Parameters
    ----------
    lesion : (X, Y, Z) bool
        Not empty.
    spacing : (3,) float
        Voxel size, mm.
    """
    found: NDArray[np.float32] = edt.edt(
        np.ascontiguousarray(~lesion), anisotropy=tuple(spacing), black_border=False, parallel=1
    )
    return found


def look(image: Volume, model: Model, *, case: str, patient: str = "", lesion: NDArray[np.bool_] | None = None) -> Look:
    """Measure one scan; of directions the longest peak or the trace stands for the intensity.

    Parameters
    ----------
    image : Volume
        With the model's channels.
    model : Model
        Whose normalisation and encoder count.
    case, patient : str
        Who it is; the case when no patient is given.
    lesion : (X, Y, Z) bool, optional
        On the image's grid; tissue near it does not count.

    Raises
    ------
    DataError
        If the scan holds channels of another kind than the model takes.
    """
    geometry, spacing = image.geometry, image.geometry.spacing
    away = None if lesion is None or not lesion.any() else distance_mm(lesion, spacing) > AWAY_MM
    channels = image.data if image.kind == "scalar" else to_look_at(image).data[:1]
    mask = tissue(channels[0], away=away)
    seen = entry(image, model.plan)(image.data)
    unit = directions.guide(seen, image.kind)[: len(channels)].numpy()
    raw = [np.quantile(channel[mask].astype(np.float64), [0.05, 0.5, 0.95]) for channel in channels]
    ranges = np.array([max(high - low, 1e-9) for low, _, high in raw])
    numbers = {
        "intensity scale": np.log(ranges),
        "contrast": np.array([(middle - low) / r for (low, middle, _), r in zip(raw, ranges, strict=True)]),
        "fine detail": np.array(
            [np.log(max(detail(c, mask), 1e-6 * r) / r) for c, r in zip(channels, ranges, strict=True)]
        ),
        "voxel size": np.log(spacing),
        "field of view": np.log(np.array(geometry.shape) * spacing),
    }
    if image.kind != "scalar":
        numbers |= _of_directions(image, mask)
    quantiles = np.stack([np.quantile(channel[mask].astype(np.float64), QUANTILES) for channel in unit])
    found = features(seen, mask, model=model, spacing=spacing)
    near = away is not None and bool((mask & ~away).any())
    return Look(id=case, patient=patient or case, numbers=numbers, quantiles=quantiles, features=found, near=near)


def _of_directions(image: Volume, mask: NDArray[np.bool_]) -> dict[str, Array]:
    """How much neighbours differ in direction, and of peaks how often fibres cross, as logarithms."""
    found = {"disorder of directions": np.array([np.log(max(disorder(image, mask), 1e-6))])}
    if image.kind == "peaks" and len(image.data) > 3:
        second = np.square(image.data[3:6], dtype=np.float64).sum(0) > 0
        found["crossing fibres"] = np.array([np.log(max(float(second[mask].mean()), FEWEST_CROSSINGS))])
    return found


def disorder(image: Volume, mask: NDArray[np.bool_]) -> float:
    """Mean squared sine of the angle between the main directions of voxels that touch: noise turns each by itself.

    Parameters
    ----------
    image : Volume
        Peaks or a tensor.
    mask : (X, Y, Z) bool
        Where to look.

    Examples
    --------
    >>> from fewscan.space.geometry import Geometry
    >>> grid, ones = Geometry((4, 4, 4), np.eye(4)), np.ones((4, 4, 4))
    >>> along = np.stack([ones, 0 * ones, 0 * ones])
    >>> along[:, ::2] *= -1  # a direction and its opposite are the same
    >>> disorder(Volume(along, grid, grid, ("x", "y", "z"), "peaks"), ones > 0)
    0.0
    """
    data = image.data.astype(np.float64)
    if image.kind == "tensor":
        matrices = data[[0, 1, 2, 1, 3, 4, 2, 4, 5]][:, mask].T.reshape(-1, 3, 3)
        main = np.zeros((3, *mask.shape))
        main[:, mask] = np.linalg.eigh(matrices)[1][:, :, -1].T
    else:
        main = data[:3] / np.maximum(np.linalg.norm(data[:3], axis=0), 1e-9)
    total, count = 0.0, 0
    for axis in range(3):
        near, far = [slice(None)] * 3, [slice(None)] * 3
        near[axis], far[axis] = slice(1, None), slice(None, -1)
        a, b = tuple(near), tuple(far)
        both = mask[a] & mask[b]
        total += float((1 - np.square((main[(slice(None), *a)] * main[(slice(None), *b)]).sum(0)))[both].sum())
        count += int(both.sum())
    return total / max(count, 1)


def detail(channel: NDArray[Any], mask: NDArray[np.bool_]) -> float:
    """Standard deviation of the finest detail, of which noise is most and blurring leaves little.

    Differences along all three axes at once, their median magnitude scaled to a deviation (Donoho 1995, doi
    10.1109/18.382009; there on the diagonal wavelet coefficients of a plane).

    Parameters
    ----------
    channel : (X, Y, Z) number
        Raw intensities.
    mask : (X, Y, Z) bool
        Where to look.

    Examples
    --------
    >>> noise = np.random.default_rng(0).normal(0, 3, (32, 32, 32))
    >>> round(detail(noise, np.ones(noise.shape, bool)), 1)
    3.0
    """
    d, inside = channel.astype(np.float64), mask
    axes = [axis for axis in range(3) if channel.shape[axis] > 1]
    for axis in axes:
        d = np.diff(d, axis=axis)
        near, far = [slice(None)] * 3, [slice(None)] * 3
        near[axis], far[axis] = slice(1, None), slice(None, -1)
        inside = inside[tuple(near)] & inside[tuple(far)]
    values = d[inside] if inside.sum() >= 50 else d.reshape(-1)
    return float(np.median(np.abs(values)) / 0.67449 / 2 ** (len(axes) / 2)) if values.size else 0.0


@torch.inference_mode()
def features(seen: Tensor, mask: NDArray[np.bool_], *, model: Model, spacing: Sequence[float]) -> Array:
    """Features of the model's encoder in the tissue, (M, D), drawn evenly; none where the network has no encoder.

    Parameters
    ----------
    seen : (C, X, Y, Z) float
        What the network sees of a scan, on its grid.
    mask : (X, Y, Z) bool
        Tissue.
    model : Model
        Its network runs where it is.
    spacing : (3,) float
        Of the scan, mm.
    """
    encode = getattr(model.segmenter, "encode", None)
    if encode is None:
        return np.zeros((0, 0))
    plan, parameter = model.plan, next(model.segmenter.parameters())
    x, y, z = (max(1, round(n * s / w)) for n, s, w in zip(mask.shape, spacing, plan.spacing, strict=True))
    image = resample(seen, (x, y, z))
    inside = resample(torch.from_numpy(mask.astype(np.float32))[None], (x, y, z))
    window = window_shape((x, y, z), plan)
    pad = [side for n, w in zip((z, y, x), reversed(window), strict=True) for side in (0, max(0, w - n))]
    image, inside = F.pad(image[None], pad, mode="replicate"), F.pad(inside[None], pad)
    places = [(a, b, c) for a in starts(image.shape[2], window[0]) for b in starts(image.shape[3], window[1])
              for c in starts(image.shape[4], window[2])]  # fmt: skip
    rows = []
    for place in places[:: -(-len(places) // WINDOWS)]:
        box = (slice(None), slice(None), *(slice(p, p + w) for p, w in zip(place, window, strict=True)))
        answer = encode(image[box].to(parameter)).float().cpu()
        there = F.adaptive_avg_pool3d(inside[box], answer.shape[2:])[0, 0] > 0.5
        rows.append(answer[0][:, there].T.double().numpy())
    found = np.concatenate(rows)
    return np.asarray(found[:: max(1, -(-len(found) // FEATURES))], np.float64)
