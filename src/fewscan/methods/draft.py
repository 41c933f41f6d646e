"""Draft labels for unlabelled scans from one or more labelled ones by registration: multi-atlas segmentation.

Each atlas is deformed to the scan and votes with its labels; votes count locally by how alike the deformed atlas is
there (locally weighted voting: Artaechevarria et al. 2009, IEEE TMI 28(8), doi 10.1109/TMI.2009.2014372) or jointly, so
that atlases which err together share one voice (joint label fusion: Wang et al. 2013, IEEE TPAMI 35(3), doi
10.1109/TPAMI.2012.143). Atlases whose deformation folds are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import DataError
from fewscan.learn.batches import Prepared
from fewscan.learn.channels import to_look_at
from fewscan.learn.intensity import normalise
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar, register_images
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import affine, directions, kernels
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.geometry import Array, Geometry, with_at_most
from fewscan.space.similarity import ncc
from fewscan.space.volume import IGNORE, Case, Kind, Volume, resample

MOST_ATLASES = 8  # that are registered to one scan
MOST_VOXELS = 1_000_000  # of the grid on which a training run deforms its atlases
SLAB_VALUES = 20_000_000  # of the matrices of joint fusion held at a time
MOST_FOLDING = 0.01  # share of folded voxels from which an atlas is dropped
PATCH = 2  # half width of the window in which deformed atlas and scan are compared
SHARPNESS = 2.0  # of locally weighted voting: weight = mean squared difference to the power of minus this
JOINT_BETA = 2.0
JOINT_ALPHA = 0.1

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
        Labels that were looked for; all when None.
    kind : {"scalar", "peaks", "tensor"}
        Of the image.
    """

    name: str
    image: Tensor
    label: NDArray[np.uint16]
    drawn: frozenset[int] | None
    kind: Kind = "scalar"

    @property
    def guide(self) -> Tensor:
        """By what it is compared with the scan."""
        return directions.guide(self.image, self.kind)


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
        Labelled; where there are more than `MOST_ATLASES`, those most like the scan.
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
    scan = to_look_at(scan)
    atlases = [replace(atlas, image=to_look_at(atlas.image)) for atlas in atlases]
    record: dict[str, dict[str, float | bool]] = {}
    voters = []
    for atlas in nearest(scan, atlases):
        assert atlas.label is not None
        found = pairwise.register(scan, atlas.image, config=config, device=device)
        folding, likeness = found.report["folding"], found.report["similarity"]["after"]
        fine = folding <= MOST_FOLDING
        record[atlas.id] = {"similarity": likeness, "folding": folding, "voted": fine}
        if fine:
            image = _unit(pairwise.apply(found, atlas.image)[:1])
            voters.append(Voter(atlas.id, image, pairwise.apply_labels(found, atlas.label), atlas.drawn))
    if not voters:
        raise DataError(f"all {len(record)} atlases fold on this scan; is it of the same body part as they are?")
    label, sure = fuse(_unit(scan.data[:1]), voters, fusion=fusion)
    return Draft(label, sure, record)


def fuse(target: Tensor, voters: Sequence[Voter], *, fusion: Fusion) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Winning label at each voxel, and the share of the vote that it has.

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
    label, sure = np.zeros(shape, np.uint16), np.zeros(shape, np.float32)
    guides = [voter.guide[0] for voter in voters]
    step = max(1, SLAB_VALUES // (int(np.prod(shape[1:])) * len(voters) ** 2))
    for low in range(0, len(label), step):  # planes at a time, with the neighbours that their windows see
        high, first, last = min(low + step, len(label)), max(0, low - PATCH), min(len(label), low + step + PATCH)
        pieces = torch.stack([guide[first:last] for guide in guides])
        weights = vote_weights(target[:, first:last], pieces, fusion=fusion)[:, low - first : high - first]
        label[low:high], sure[low:high] = _count(weights, voters, slice(low, high))
    return label, sure


def shares(target: Tensor, voters: Sequence[Voter], *, classes: int) -> Tensor:
    """Share (K, X, Y, Z) of a locally weighted vote that each class has; background where no atlas reaches.

    Parameters
    ----------
    target : (C, X, Y, Z) float
        The scan's guide, normalised.
    voters : sequence of Voter
        In its shape; their labels are class indices.
    classes : int
        Background included.
    """
    weights = vote_weights(target[:1], torch.stack([voter.guide[0] for voter in voters]), fusion="local")
    found = torch.zeros(classes, *target.shape[1:])
    for weight, voter in zip(weights, voters, strict=True):
        index = torch.from_numpy(voter.label.astype(np.int64))
        seen = index != IGNORE
        found.scatter_add_(0, torch.where(seen, index, 0)[None], (weight * seen)[None])
    heard = found.sum(0)
    found[0] += (heard <= 0).float()
    return found / heard.where(heard > 0, torch.ones_like(heard))


def nearest(scan: Volume, atlases: Sequence[Case], *, most: int = MOST_ATLASES) -> Sequence[Case]:
    """The atlases most like a scan, by the correlation of thumbnails over the same share of each block.

    Parameters
    ----------
    scan : Volume
        To be labelled.
    atlases : sequence of Case
        All there are.
    most : int
        How many to keep.
    """
    if len(atlases) <= most:
        return atlases
    small = (24, 24, 24)
    fixed = resample(_unit(scan.data[:1]), small)[None]
    alike = [float(ncc(fixed, resample(_unit(atlas.image.data[:1]), small)[None])) for atlas in atlases]
    return [atlases[i] for i in np.argsort(alike)[::-1][:most]]


def _count(weights: Tensor, voters: Sequence[Voter], planes: slice) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Winner and its share at each voxel; an atlas votes where it was looked at, and on labels it was asked for."""
    labels = [voter.label[planes] for voter in voters]
    looked = torch.stack([w * torch.from_numpy(label != IGNORE) for w, label in zip(weights, labels, strict=True)])
    values = sorted({int(v) for label in labels for v in np.unique(label)} - {0, IGNORE})
    best, total = torch.zeros(weights.shape[1:]), torch.zeros(weights.shape[1:])
    winner = torch.zeros(weights.shape[1:], dtype=torch.int32)
    for value in values:  # one label at a time, so that many do not need much memory
        asked = [i for i, voter in enumerate(voters) if voter.drawn is None or value in voter.drawn]
        yes = sum((looked[i] * torch.from_numpy(labels[i] == value) for i in asked), torch.zeros_like(best))
        share = yes / sum((looked[i] for i in asked), torch.full_like(best, 1e-9))
        winner = torch.where(share > best, torch.full_like(winner, value), winner)
        best, total = torch.maximum(best, share), total + share
    background = (1 - total).clamp(min=0)
    winner = torch.where(background >= best, torch.zeros_like(winner), winner)
    sure = torch.maximum(best, background) * (looked.sum(0) > 0)
    return winner.numpy().astype(np.uint16), sure.numpy()


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


def shaped(
    scan: Whole, atlases: Sequence[Whole], *, cases: Mapping[str, Prepared], registrar: Registrar, config: DeformConfig,
    most: int,
) -> list[Voter]:  # fmt: skip
    """The atlases most like a scan, in its shape, the most alike first; their labels are class indices.

    A trained registrar's answer is where the optimisation starts.

    Parameters
    ----------
    scan : Whole
        To be labelled.
    atlases : sequence of Whole
        Labelled, on the same grid.
    cases : mapping of str to Prepared
        All of them as the segmenter sees them.
    registrar : Registrar
        Trained.
    config : DeformConfig
        How its answer is optimised.
    most : int
        Atlases to deform; those that fold are left out.
    """
    device = next(registrar.parameters()).device
    alike = [float(ncc(scan.image[None], atlas.image[None])) for atlas in atlases]
    own = scan.place.own
    grid = with_at_most(own, MOST_VOXELS)
    fixed = resample(torch.from_numpy(np.array(cases[scan.id].guide)), grid.shape)
    answer = []
    for i in np.argsort(alike)[::-1][:most].tolist():
        atlas, image = atlases[i], torch.from_numpy(np.array(cases[atlases[i].id].guide))
        matrix = atlas.place.matrix @ np.linalg.inv(scan.place.matrix)
        moving = affine.onto(image, atlas.place.own, grid=grid, matrix=matrix)
        start = register_images(registrar, fixed, moving=moving).to(device)
        u = deform(fixed[None].to(device), moving[None].to(device), config=config, start=start).cpu()
        if fields.folding(u) > MOST_FOLDING:
            continue
        answer.append(voter(cases[atlas.id], u, matrix=matrix, grids=(own, atlas.place.own)))
    return answer


def voter(atlas: Prepared, u: Tensor, *, matrix: Array, grids: tuple[Geometry, Geometry]) -> Voter:
    """An atlas in the shape of a scan; its labels are class indices.

    Parameters
    ----------
    atlas : Prepared
        Labelled.
    u : (1, 3, X, Y, Z) float
        Displacement on the scan's block, in voxels of any grid over it, after the affine part.
    matrix : (4, 4) float
        Affine part, from the world of the scan to that of the atlas, mm.
    grids : (Geometry, Geometry)
        Of the scan and of the atlas.
    """
    own, other = grids
    whole = fields.resize(u, own.shape)[0].numpy()
    way = fields.then(whole, matrix, fixed=own)
    places = torch.from_numpy(way.to_moving(other))
    index = kernels.vote_labels(np.array(atlas.label) + 1, places).astype(np.int32) - 1  # 0 is beyond
    label = np.where(index < 0, IGNORE, index).astype(np.uint16)
    image = kernels.sample(torch.from_numpy(np.array(atlas.image))[None], places[None])
    if atlas.kind != "scalar":
        image = directions.reorient(image, torch.from_numpy(way.u)[None], kind=atlas.kind, spacing=own.spacing)
    return Voter(atlas.id, image[0], label, frozenset(np.flatnonzero(atlas.drawn).tolist()), atlas.kind)


def _unit(data: NDArray[Any]) -> Tensor:
    return torch.from_numpy(normalise(data))


def _window(values: Tensor) -> Tensor:
    return kernels.window_mean(values[:, None], radius=PATCH)[:, 0]
