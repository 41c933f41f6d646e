"""Intensities: how they are normalised, from a scan's own numbers or from those of the training cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How one channel's intensities are normalised.

    Parameters
    ----------
    kind : {"scan", "ct", "length"}
        "scan": clip to the scan's own 0.5 and 99.5 percentiles, then to mean 0 and deviation 1; "ct": the same with
        the four numbers fixed from the labelled structures of the training cases, as Hounsfield units mean something;
        "length": not by channel, see `learn.channels`.
    low, high, mean, std : float
        Used by "ct".
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0


def scan_statistics(data: NDArray[Any], scaling: Sequence[Scaling]) -> list[Scaling]:
    """The four numbers by which each channel of a scan is normalised.

    Voxels of the background constant (a fifth of the scan or more at its minimum, as after skull stripping) do not
    count. At most two million voxels are looked at.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Raw intensities.
    scaling : sequence of Scaling
        Of the plan; for "ct" channels its numbers are the answer.

    Raises
    ------
    DataError
        If channels hold directions, whose components must not be changed one by one.
    """
    if any(given.kind == "length" for given in scaling):
        raise DataError("these channels hold directions, which cannot be normalised one by one: not possible here yet")
    answer = []
    for channel, given in zip(data, scaling, strict=True):
        if given.kind == "ct":
            answer.append(given)
            continue
        values = some(channel.reshape(-1), most=2_000_000)
        floor = values.min()
        if 0.2 <= float((values == floor).mean()) < 0.98:
            values = values[values != floor]
        low, high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
        values = values.clip(low, high)
        answer.append(
            Scaling(kind="scan", low=low, high=high, mean=float(values.mean()), std=max(float(values.std()), 1e-6))
        )
    return answer


def normalise(
    data: NDArray[Any], scaling: Sequence[Scaling] | None = None, *, statistics: Sequence[Scaling] | None = None
) -> NDArray[np.float32]:
    """Intensities to mean 0 and deviation 1.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Raw intensities, or a piece of a scan if the statistics of the whole are given.
    scaling : sequence of Scaling, optional
        Of the plan; by the scan's own numbers when None.
    statistics : sequence of Scaling, optional
        From `scan_statistics`.
    """
    out = data.astype(np.float32)
    scaling = scaling or [Scaling(kind="scan")] * len(data)
    for channel, s in zip(out, statistics or scan_statistics(data, scaling), strict=True):
        np.clip(channel, s.low, s.high, out=channel)
        channel -= s.mean
        channel /= s.std
    return out


def scaling_of(tissue: Sequence[NDArray[np.float64]], *, is_ct: bool) -> Scaling:
    """Normalisation of one channel from the intensities inside the structures of all cases.

    Parameters
    ----------
    tissue : sequence of (N,) float
        One per case.
    is_ct : bool
        Whether the numbers mean something beyond this scanner.
    """
    values = np.concatenate(tissue)
    if not is_ct or values.size == 0:
        return Scaling(kind="scan")
    low, high = (float(q) for q in np.quantile(values, [0.005, 0.995]))
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)  # neighbours of the structures keep some contrast
    values = values.clip(low, high)
    return Scaling(kind="ct", low=low, high=high, mean=float(values.mean()), std=max(float(values.std()), 1e-6))


def some(values: NDArray[Any], most: int = 200_000) -> NDArray[np.float64]:
    """An even sample of the values.

    Parameters
    ----------
    values : (N,) number
        To choose from.
    most : int
        Largest number to keep.
    """
    return values[:: max(1, -(-values.size // most))].astype(np.float64)
