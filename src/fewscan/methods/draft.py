"""Draft labels for unlabelled scans from one or more labelled ones by registration: multi-atlas segmentation.

Each atlas is deformed to the scan and votes with its labels; votes count locally by how alike the deformed atlas is
there (locally weighted voting: Artaechevarria et al. 2009, IEEE TMI 28(8), doi 10.1109/TMI.2009.2014372) or jointly, so
that atlases which err together share one voice (joint label fusion: Wang et al. 2013, IEEE TPAMI 35(3), doi
10.1109/TPAMI.2012.143). Atlases whose deformation folds are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import DataError
from fewscan.learn import augment
from fewscan.learn.config import AugmentConfig
from fewscan.learn.intensity import Scaling, normalise
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import kernels
from fewscan.space.volume import Case, Volume, resample

MOST_FOLDING = 0.01  # share of folded voxels from which an atlas is dropped
PATCH = 2  # half width of the window in which deformed atlas and scan are compared
SHARPNESS = 2.0  # of locally weighted voting: weight = mean squared difference to the power of minus this
JOINT_BETA = 2.0
JOINT_ALPHA = 0.1

Fusion = Literal["local", "joint", "majority"]


@dataclass(frozen=True, eq=False)
class Draft:
    """Labels proposed for one scan.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        On the scan's grid.
    sure : (X, Y, Z) float32
        Share of the vote that the winning label has.
    atlases : mapping of str to dict
        Each atlas: similarity, folding, and whether it voted.
    """

    label: NDArray[np.uint16]
    sure: NDArray[np.float32]
    atlases: Mapping[str, dict[str, float | bool]]


def draft(
    scan: Volume, atlases: Sequence[Case], *, config: RegisterConfig, fusion: Fusion = "joint", device: torch.device
) -> Draft:
    """Propose labels for a scan.

    Parameters
    ----------
    scan : Volume
        Without labels.
    atlases : sequence of Case
        Labelled.
    config : RegisterConfig
        Of each registration.
    fusion : {"local", "joint", "majority"}
        How votes are weighted.
    device : torch.device
        Where to deform.

    Raises
    ------
    DataError
        If there is no atlas, or all of them fold.
    """
    if not atlases:
        raise DataError("no labelled case to draft from; put a label map beside at least one image")
    record: dict[str, dict[str, float | bool]] = {}
    images, labels = [], []
    for atlas in atlases:
        assert atlas.label is not None
        found = pairwise.register(scan, atlas.image, config=config, device=device)
        folding, likeness = found.report["folding"], found.report["similarity"]["after"]
        fine = folding <= MOST_FOLDING
        record[atlas.id] = {"similarity": likeness, "folding": folding, "voted": fine}
        if fine:
            images.append(_unit(pairwise.apply(found, atlas.image)[:1]))
            labels.append(pairwise.apply_labels(found, atlas.label))
    if not images:
        raise DataError(f"all {len(atlases)} atlases fold on this scan; is it of the same body part as they are?")
    weights = vote_weights(_unit(scan.data[:1]), torch.cat(images), fusion=fusion)
    values = sorted({int(v) for label in labels for v in np.unique(label)} | {0})
    best = torch.full(scan.geometry.shape, -1.0)
    winner = torch.zeros(scan.geometry.shape, dtype=torch.int32)
    for value in values:  # one label at a time, so that many do not need much memory
        share = sum(w * torch.from_numpy(label == value) for w, label in zip(weights, labels, strict=True))
        assert isinstance(share, Tensor)
        winner = torch.where(share > best, torch.full_like(winner, value), winner)
        best = torch.maximum(best, share)
    return Draft(winner.numpy().astype(np.uint16), best.numpy(), record)


def vote_weights(scan: Tensor, atlases: Tensor, *, fusion: Fusion) -> Tensor:
    """Weight (N, X, Y, Z) of each atlas at each voxel; they sum to one.

    Parameters
    ----------
    scan : (1, X, Y, Z) float
        Normalised.
    atlases : (N, X, Y, Z) float
        Deformed to it, normalised.
    fusion : {"local", "joint", "majority"}
        How.
    """
    count = len(atlases)
    if fusion == "majority" or count == 1:
        return torch.full_like(atlases, 1 / count)
    difference = (atlases - scan).abs()
    if fusion == "local":
        raw = _mean(difference.square()).clamp(min=1e-4) ** -SHARPNESS
        return raw / raw.sum(0)
    shape = scan.shape[1:]
    matrix = torch.empty(*shape, count, count)
    for i in range(count):
        for j in range(i, count):
            matrix[..., i, j] = matrix[..., j, i] = _mean((difference[i] * difference[j])[None])[0]
    matrix = matrix**JOINT_BETA  # chance that two atlases err together (Wang et al., eq. 11)
    matrix = matrix + JOINT_ALPHA * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(count)
    matrix = matrix + 1e-6 * torch.eye(count)
    solved = torch.linalg.solve(matrix, torch.ones(*shape, count, 1))[..., 0]
    solved = solved.clamp(min=0)
    weights: Tensor = solved / solved.sum(-1, keepdim=True).clamp(min=1e-9)
    return weights.permute(3, 0, 1, 2)


def vote(scan: Tensor, atlases: Sequence[Whole], *, registrar: Registrar, most: int, classes: int) -> Tensor:
    """Share of the vote of each class (K, X, Y, Z), from a trained registrar on its own grid.

    Parameters
    ----------
    scan : (C, X, Y, Z) float
        On the registrar's grid.
    atlases : sequence of Whole
        Labelled, on the same grid.
    registrar : Registrar
        Trained.
    most : int
        Atlases that vote: those most like the scan after registration.
    classes : int
        Background included.
    """
    device = next(registrar.parameters()).device
    fixed = scan[None].to(device)
    rows: list[tuple[float, Tensor, Tensor, Whole]] = []
    with torch.no_grad():
        for atlas in atlases:
            moving = atlas.image[None].to(device)
            u = registrar(moving, fixed)
            warped = kernels.sample(moving, u)
            rows.append((float(kernels.lncc(fixed, warped)), u, warped[:, 0], atlas))
        chosen = sorted(rows, key=lambda row: -row[0])[:most]
        weights = vote_weights(fixed[0, :1], torch.cat([row[2] for row in chosen]), fusion="local")
        total = torch.zeros(classes, *scan.shape[1:], device=device)
        for weight, (_, u, _, atlas) in zip(weights, chosen, strict=True):
            assert atlas.label is not None
            total += weight * _soft(atlas.label, u, classes)
    return (total / total.sum(0).clamp(min=1e-6)).cpu()


def _soft(label: NDArray[np.int16], u: Tensor, classes: int) -> Tensor:
    """Warped one-hot labels (K, X, Y, Z); where nobody looked all are 0."""
    index = torch.from_numpy(label.astype(np.int64))
    return torch.cat([kernels.sample((index == k).float()[None, None].to(u.device), u)[0] for k in range(classes)])


def resize_vote(share: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Shares of the vote on another number of voxels over the same block of space.

    Parameters
    ----------
    share : (K, X, Y, Z) float
        From `vote`.
    shape : (X, Y, Z) int
        Wanted shape.
    """
    return resample(share, shape)


def disturbed(image: Tensor, config: AugmentConfig, *, spacing: Sequence[float]) -> Tensor:
    """The same scan with other contrast, shading and noise, always the same way.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        Normalised.
    config : AugmentConfig
        Strengths.
    spacing : (3,) float
        mm.
    """
    rng = torch.Generator().manual_seed(0)
    shape = (image.shape[1], image.shape[2], image.shape[3])
    params = augment.sample(config, rng, batch=1, shape=shape, spacing=spacing, mirror=False)
    return augment.intensity(params, image[None])[0]


def _mean(values: Tensor) -> Tensor:
    return F.avg_pool3d(values[:, None], 2 * PATCH + 1, 1, PATCH, count_include_pad=False)[:, 0]


def _unit(data: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(normalise(np.asarray(data), [Scaling(kind="scan")] * len(data)))
