"""What a displacement should be like, whatever the images say."""

from __future__ import annotations

import torch
from torch import Tensor

from fewscan.space import field


def diffusion(u: Tensor) -> Tensor:
    """Mean squared difference between neighbouring vectors.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement or velocity, voxels.
    """
    terms = [u.diff(dim=axis).square().mean() for axis in (2, 3, 4) if u.shape[axis] > 1]
    return torch.stack(terms).mean() if terms else u.sum() * 0


def bending(u: Tensor) -> Tensor:
    """Mean squared second derivative, which affine maps do not pay for.

    Rueckert et al. 1999, IEEE TMI 18(8), doi 10.1109/42.796284, eq. 6, by finite differences.

    Parameters
    ----------
    u : (B, 3, X, Y, Z) float
        Displacement or velocity, voxels.
    """
    terms = [u.diff(n=2, dim=axis).square().mean() for axis in (2, 3, 4) if u.shape[axis] > 2]
    for a, b in ((2, 3), (2, 4), (3, 4)):
        if u.shape[a] > 1 and u.shape[b] > 1:
            terms.append(2 * u.diff(dim=a).diff(dim=b).square().mean())
    return torch.stack(terms).sum() if terms else u.sum() * 0


def inconsistency(forth: Tensor, back: Tensor) -> Tensor:
    """Mean squared deviation from the identity of the Jacobian of one map after its supposed inverse.

    GradICON: Tian et al. 2023, CVPR, arXiv 2206.05897, eq. 5, by finite differences on the whole grid.

    Parameters
    ----------
    forth, back : (B, 3, X, Y, Z) float
        Displacements, voxels.
    """
    return diffusion(field.compose(forth, back))
