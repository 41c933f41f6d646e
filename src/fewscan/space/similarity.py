"""How alike two images on one grid are; every measure grows with likeness and is differentiable in ``warped``."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fewscan.errors import ConfigError
from fewscan.space import kernels

MI_BINS = 32
MIND_RADIUS = 1
LNCC_RADIUS = 2
WINDOWS = {"lncc": LNCC_RADIUS, "mind": 1 + MIND_RADIUS}  # voxels around each one that a measure looks at
LEAST_LEFT = 0.1  # of the weight, for windows that touch a voxel without any to be left out


class Similarity(Protocol):
    """Anything that measures likeness: (B, C, X, Y, Z) images and a weight to a scalar."""

    def __call__(self, fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor: ...


def mse(fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Minus the mean squared difference.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel; all alike when None.
    """
    return -_mean((fixed - warped) ** 2, weight)


def ncc(fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Squared correlation coefficient over the whole image.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel; all alike when None.
    """
    w = torch.ones_like(warped[:, :1]) if weight is None else weight
    w = w / w.sum((2, 3, 4), keepdim=True).clamp(min=1e-6)
    f = fixed - (fixed * w).sum((2, 3, 4), keepdim=True)
    g = warped - (warped * w).sum((2, 3, 4), keepdim=True)
    cross = (f * g * w).sum((2, 3, 4))
    return (cross * cross / ((f * f * w).sum((2, 3, 4)) * (g * g * w).sum((2, 3, 4)) + 1e-6)).mean()


def mi(fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Mutual information in nats, from a joint histogram with linear bins.

    Maes et al. 1997, IEEE TMI 16(2), doi 10.1109/42.563664; each value is shared between its two nearest bins, which
    makes it differentiable almost everywhere.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel; all alike when None.
    """
    total = warped.new_zeros(())
    count = fixed.shape[0] * fixed.shape[1]
    for b in range(fixed.shape[0]):
        w = None if weight is None else weight[b].reshape(-1)
        for c in range(fixed.shape[1]):
            total = total + _mi(fixed[b, c].reshape(-1), warped[b, c].reshape(-1), w)
    return total / count


def _mi(fixed: Tensor, warped: Tensor, weight: Tensor | None) -> Tensor:
    def bins(x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = x.detach().min(), x.detach().max()
        at = ((x - low) / (high - low).clamp(min=1e-6) * (MI_BINS - 1)).clamp(0, MI_BINS - 1)
        cell = at.detach().floor().clamp(max=MI_BINS - 2)
        return cell.long(), at - cell

    (i, a), (j, b) = bins(fixed.detach()), bins(warped)
    w = torch.ones_like(a) if weight is None else weight.to(a)
    joint = warped.new_zeros(MI_BINS * MI_BINS, dtype=torch.float64)  # millions of voxels may share a bin
    for di, share_i in ((0, 1 - a), (1, a)):
        for dj, share_j in ((0, 1 - b), (1, b)):
            joint = joint.index_add(0, (i + di) * MI_BINS + j + dj, (share_i * share_j * w).double())
    p = joint.view(MI_BINS, MI_BINS) / w.double().sum().clamp(min=1e-6)
    apart = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return (p * ((p + 1e-10) / (apart + 1e-10)).log()).sum().to(warped.dtype)


def mind(image: Tensor) -> Tensor:
    """Self-similarity descriptor: how much the neighbourhood of a voxel differs from those of its six neighbours.

    Heinrich et al. 2012, Medical Image Analysis 16(7), doi 10.1016/j.media.2012.05.008, eq. 4 and 5, with the six-voxel
    search region. Two images of different modality are compared by the mean squared difference of their descriptors.

    Parameters
    ----------
    image : (B, 1, X, Y, Z) float
        Any modality.

    Returns
    -------
    (B, 6, X, Y, Z) float
        Between 0 and 1.
    """
    padded = F.pad(image, [1] * 6, mode="replicate")
    x, y, z = image.shape[2:]
    rows = []
    for shift in ((0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)):
        other = padded[:, :, shift[0] : shift[0] + x, shift[1] : shift[1] + y, shift[2] : shift[2] + z]
        rows.append(kernels.window_mean((image - other) ** 2, radius=MIND_RADIUS))
    distance = torch.cat(rows, 1)
    variance = distance.mean(1, keepdim=True)
    middle = variance.mean((2, 3, 4), keepdim=True)
    variance = torch.minimum(torch.maximum(variance, 0.001 * middle), 1000 * middle).clamp(min=1e-12)
    answer = torch.exp(-distance / variance)
    return answer / answer.amax(1, keepdim=True).clamp(min=1e-6)


def lncc(fixed: Tensor, warped: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """`kernels.lncc` with its own window.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images with a standard deviation near 1.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel; all alike when None.
    """
    return kernels.lncc(fixed, warped, radius=LNCC_RADIUS, weight=weight)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)


SIMILARITIES: dict[str, Similarity] = {"lncc": lncc, "mi": mi, "mind": mse, "mse": mse}
"""By name; "mind" compares images that `features` has turned into descriptors first."""


def features(name: str, image: Tensor) -> Tensor:
    """What a similarity compares: the image itself, or its descriptor.

    Parameters
    ----------
    name : str
        Key of `SIMILARITIES`.
    image : (B, C, X, Y, Z) float
        Image.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in SIMILARITIES:
        raise ConfigError(f"unknown similarity {name!r}; known are {', '.join(sorted(SIMILARITIES))}")
    return torch.cat([mind(c[:, None]) for c in image.unbind(1)], 1) if name == "mind" else image


def counted(name: str, weight: Tensor | None) -> Tensor | None:
    """Weight of each place for a similarity: the least within the window that it looks at.

    So a voxel without weight, as in a lesion that the other image lacks, has no influence by way of its neighbours. A
    region too thin for the window keeps its weight as it is.

    Parameters
    ----------
    name : str
        Key of `SIMILARITIES`.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel.
    """
    if weight is None or name not in WINDOWS:
        return weight
    least = -weight
    for axis in range(3):
        size, pad = [1, 1, 1], [0, 0, 0]
        size[axis], pad[axis] = 2 * WINDOWS[name] + 1, WINDOWS[name]
        least = F.max_pool3d(least, size, 1, pad)
    axes = (1, 2, 3, 4)
    enough = (-least).sum(axes, keepdim=True) >= LEAST_LEFT * weight.sum(axes, keepdim=True)
    return torch.where(enough, -least, weight)
