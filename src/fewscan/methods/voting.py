"""How atlases in the shape of a scan vote on its labels.

Votes count locally by how alike the deformed atlas is there (locally weighted voting: Artaechevarria et al. 2009, IEEE
TMI 28(8), doi 10.1109/TMI.2009.2014372) or jointly, so that atlases which err together share one voice (joint label
fusion: Wang et al. 2013, IEEE TPAMI 35(3), doi 10.1109/TPAMI.2012.143).

Labels that overlap lie in one map of combinations (decisions/014). It is deformed as a label map is, and unfolded where
votes are counted: each label has a vote of its own, and is there where more than half is for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.learn.answers import after_none
from fewscan.space import directions, kernels
from fewscan.space.volume import IGNORE, Kind

SLAB_VALUES = 20_000_000  # of the matrices of joint fusion held at a time
PATCH = 2  # half width of the window in which deformed atlas and scan are compared
SHARPNESS = 2.0  # of locally weighted voting: weight = mean squared difference to the power of minus this
JOINT_BETA = 2.0
JOINT_ALPHA = 0.1
EVERYWHERE = slice(None)

Fusion = Literal["local", "joint", "majority"]


class Voter(NamedTuple):
    """An atlas in the shape of a scan.

    Parameters
    ----------
    name : str
        Of the case.
    image : (C, X, Y, Z) float
        Deformed, normalised; directions turned along.
    label : (X, Y, Z) uint16
        Deformed; `IGNORE` where nobody looked.
    drawn : frozenset of int, optional
        Labels that were looked for, as ``label`` and ``table`` number them; all when None.
    kind : {"scalar", "peaks", "tensor"}
        Of the image.
    table : (N + 1, K) bool, optional
        Of labels that overlap: what the combinations in ``label`` stand for (`learn.overlap`).
    """

    name: str
    image: Tensor
    label: NDArray[np.uint16]
    drawn: frozenset[int] | None
    kind: Kind = "scalar"
    table: NDArray[np.bool_] | None = None

    @property
    def guide(self) -> Tensor:
        """By what it is compared with the scan."""
        return directions.guide(self.image, self.kind)

    def asked(self, value: int) -> bool:
        """Whether a label was looked for.

        Parameters
        ----------
        value : int
            Of the label; its class, where labels overlap.
        """
        return self.drawn is None or value in self.drawn

    def mask(self, value: int, planes: slice) -> Tensor:
        """Voxels of a label.

        Parameters
        ----------
        value : int
            As for `asked`.
        planes : slice
            Of the first axis.
        """
        label = self.label[planes]
        if self.table is None:
            return torch.from_numpy(label == value)
        return torch.from_numpy(self.table[:, value].take(label, mode="clip"))  # `IGNORE` finds the last row: nothing


def fuse(target: Tensor, voters: Sequence[Voter], *, fusion: Fusion) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Winning label at each voxel (X, Y, Z), and the share of the vote that it has.

    Of labels that overlap a mask each, (L, X, Y, Z) bool, and the share of the narrowest decision at each voxel.

    Parameters
    ----------
    target : (1, X, Y, Z) float
        The scan's guide, normalised.
    voters : sequence of Voter
        In its shape.
    fusion : {"local", "joint", "majority"}
        How votes are weighted.
    """
    shape = target.shape[1:]
    table, sure = voters[0].table, np.zeros(shape, np.float32)
    label = np.zeros(shape, np.uint16) if table is None else np.zeros((table.shape[1] - 1, *shape), np.bool_)
    count = _count if table is None else _count_each
    guides = [voter.guide[0] for voter in voters]
    step = max(1, SLAB_VALUES // (int(np.prod(shape[1:])) * len(voters) ** 2))
    for low in range(0, len(sure), step):  # planes at a time, with the neighbours that their windows see
        high, first, last = min(low + step, len(sure)), max(0, low - PATCH), min(len(sure), low + step + PATCH)
        pieces = torch.stack([guide[first:last] for guide in guides])
        weights = vote_weights(target[:, first:last], pieces, fusion=fusion)[:, low - first : high - first]
        label[..., low:high, :, :], sure[low:high] = count(weights, voters, slice(low, high))
    return label, sure


def shares(target: Tensor, voters: Sequence[Voter], *, classes: int) -> Tensor:
    """Share (K, X, Y, Z) of a locally weighted vote that each class has; background where no atlas reaches.

    A label has its part of the votes of those atlases that were asked for it. Labels that overlap share nothing.

    Parameters
    ----------
    target : (C, X, Y, Z) float
        The scan's guide, normalised.
    voters : sequence of Voter
        In its shape; their labels are class indices, or combinations of them.
    classes : int
        Background included.
    """
    weights = vote_weights(target[:1], torch.stack([voter.guide[0] for voter in voters]), fusion="local")
    if voters[0].table is not None:
        looked = _looked(weights, voters, EVERYWHERE)
        return after_none(torch.stack([_share(k, voters, looked, EVERYWHERE) for k in range(1, classes)]))
    if not all(voter.asked(k) for voter in voters for k in range(1, classes)):
        looked = _looked(weights, voters, EVERYWHERE)
        own = torch.stack([_share(k, voters, looked, EVERYWHERE) for k in range(1, classes)])
        found = torch.cat([(1 - own.sum(0, keepdim=True)).clamp(min=0), own])
        return found / found.sum(0)
    found = torch.zeros(classes, *target.shape[1:])
    for weight, voter in zip(weights, voters, strict=True):
        index = torch.from_numpy(voter.label.astype(np.int64))
        seen = index != IGNORE
        found.scatter_add_(0, torch.where(seen, index, 0)[None], (weight * seen)[None])
    heard = found.sum(0)
    found[0] += (heard <= 0).float()
    return found / heard.where(heard > 0, torch.ones_like(heard))


def asked_for(voters: Sequence[Voter], *, classes: int) -> Tensor:
    """Classes (K, 1, 1, 1) bool of which a vote tells something: those that some atlas was asked for.

    Parameters
    ----------
    voters : sequence of Voter
        In the shape of a scan; their labels are class indices, or combinations of them.
    classes : int
        Background included.
    """
    told = [any(voter.asked(k) for voter in voters) for k in range(classes)]
    return torch.tensor(told).view(-1, 1, 1, 1)


def reached(voters: Sequence[Voter], inside: Tensor) -> float:
    """Share of voxels that lies where some atlas was looked at.

    Parameters
    ----------
    voters : sequence of Voter
        In the shape of a scan.
    inside : (X, Y, Z) bool
        Voxels of the scan.
    """
    seen = np.logical_or.reduce([voter.label != IGNORE for voter in voters])
    return float((inside & torch.from_numpy(seen)).sum() / inside.sum().clamp(min=1))


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
        raw = _window(difference.square()).clamp(min=1e-4) ** -SHARPNESS
        return raw / raw.sum(0)
    shape = scan.shape[1:]
    matrix = torch.empty(*shape, count, count)
    for i in range(count):
        for j in range(i, count):
            matrix[..., i, j] = matrix[..., j, i] = _window((difference[i] * difference[j])[None])[0]
    matrix = matrix**JOINT_BETA  # chance that two atlases err together (Wang et al., eq. 11)
    matrix = matrix + JOINT_ALPHA * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(count)
    matrix = matrix + 1e-6 * torch.eye(count)
    solved = torch.linalg.solve(matrix, torch.ones(*shape, count, 1))[..., 0]
    solved = solved.clamp(min=0)
    weights: Tensor = solved / solved.sum(-1, keepdim=True).clamp(min=1e-9)
    return weights.permute(3, 0, 1, 2)


def _count(weights: Tensor, voters: Sequence[Voter], planes: slice) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Winner and its share at each voxel; an atlas votes where it was looked at, and on labels it was asked for."""
    looked = _looked(weights, voters, planes)
    values = sorted({int(v) for voter in voters for v in np.unique(voter.label[planes])} - {0, IGNORE})
    best, total = torch.zeros(weights.shape[1:]), torch.zeros(weights.shape[1:])
    winner = torch.zeros(weights.shape[1:], dtype=torch.int32)
    for value in values:  # one label at a time, so that many do not need much memory
        share = _share(value, voters, looked, planes)
        winner = torch.where(share > best, torch.full_like(winner, value), winner)
        best, total = torch.maximum(best, share), total + share
    background = (1 - total).clamp(min=0)
    winner = torch.where(background >= best, torch.zeros_like(winner), winner)
    sure = torch.maximum(best, background) * (looked.sum(0) > 0)
    return winner.numpy().astype(np.uint16), sure.numpy()


def _count_each(
    weights: Tensor, voters: Sequence[Voter], planes: slice
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Labels that more than half of the vote is for, one by one, and the narrowest decision at each voxel."""
    assert voters[0].table is not None
    looked, masks = _looked(weights, voters, planes), []
    sure = (looked.sum(0) > 0).float()
    for k in range(1, voters[0].table.shape[1]):
        share = _share(k, voters, looked, planes)
        masks.append((share > 0.5).numpy())
        sure = torch.minimum(sure, torch.maximum(share, 1 - share))
    return np.stack(masks), sure.numpy()


def _looked(weights: Tensor, voters: Sequence[Voter], planes: slice) -> Tensor:
    """Weights (N, X, Y, Z) where an atlas was looked at, else 0."""
    labels = [voter.label[planes] for voter in voters]
    return torch.stack([w * torch.from_numpy(label != IGNORE) for w, label in zip(weights, labels, strict=True)])


def _share(value: int, voters: Sequence[Voter], looked: Tensor, planes: slice) -> Tensor:
    """Share of a label in the votes of those atlases that were asked for it; 0 where there are none."""
    none = torch.zeros(looked.shape[1:])
    asked = [i for i, voter in enumerate(voters) if voter.asked(value)]
    yes = sum((looked[i] * voters[i].mask(value, planes) for i in asked), none)
    return yes / sum((looked[i] for i in asked), torch.full_like(none, 1e-9))


def _window(values: Tensor) -> Tensor:
    return kernels.window_mean(values[:, None], radius=PATCH)[:, 0]
