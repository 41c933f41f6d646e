"""Draft labels for unlabelled scans from one or more labelled ones by registration: multi-atlas segmentation.

Each atlas is deformed to the scan and votes with its labels; votes count locally by how alike the deformed atlas is
there (locally weighted voting: Artaechevarria et al. 2009, IEEE TMI 28(8), doi 10.1109/TMI.2009.2014372) or jointly, so
that atlases which err together share one voice (joint label fusion: Wang et al. 2013, IEEE TPAMI 35(3), doi
10.1109/TPAMI.2012.143). Atlases whose deformation folds are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import DataError
from fewscan.learn.intensity import normalise
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import kernels
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.similarity import ncc
from fewscan.space.volume import IGNORE, Case, Volume, one_hot, resample

MOST_ATLASES = 8  # that are registered to one scan
MOST_CLASSES = 9  # background included, up to which the segmenter's belief takes part in the optimisation
SLAB_VALUES = 20_000_000  # of the matrices of joint fusion held at a time
MOST_FOLDING = 0.01  # share of folded voxels from which an atlas is dropped
PATCH = 2  # half width of the window in which deformed atlas and scan are compared
SHARPNESS = 2.0  # of locally weighted voting: weight = mean squared difference to the power of minus this
JOINT_BETA = 2.0
JOINT_ALPHA = 0.1

Fusion = Literal["local", "joint", "majority"]


class Vote(NamedTuple):
    """What trained atlases say of one scan; see `vote`.

    Parameters
    ----------
    share : (K, X, Y, Z) float
        Of each class; all 0 where no atlas was looked at.
    atlas : Whole
        The one most like the scan.
    u : (1, 3, X, Y, Z) float
        Its displacement, voxels of the registrar's grid.
    """

    share: Tensor
    atlas: Whole
    u: Tensor


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
    record: dict[str, dict[str, float | bool]] = {}
    images, labels, voters = [], [], []
    for atlas in nearest(scan, atlases):
        assert atlas.label is not None
        found = pairwise.register(scan, atlas.image, config=config, device=device)
        folding, likeness = found.report["folding"], found.report["similarity"]["after"]
        fine = folding <= MOST_FOLDING
        record[atlas.id] = {"similarity": likeness, "folding": folding, "voted": fine}
        if fine:
            images.append(_unit(pairwise.apply(found, atlas.image)[:1])[0])
            labels.append(pairwise.apply_labels(found, atlas.label))
            voters.append(atlas)
    if not images:
        raise DataError(f"all {len(record)} atlases fold on this scan; is it of the same body part as they are?")
    target = _unit(scan.data[:1])
    label = np.zeros(scan.geometry.shape, np.uint16)
    sure = np.zeros(scan.geometry.shape, np.float32)
    step = max(1, SLAB_VALUES // (int(np.prod(scan.geometry.shape[1:])) * len(images) ** 2))
    for low in range(0, len(label), step):  # planes at a time, with the neighbours that their windows see
        high, first, last = min(low + step, len(label)), max(0, low - PATCH), min(len(label), low + step + PATCH)
        pieces = torch.stack([image[first:last] for image in images])
        weights = vote_weights(target[:, first:last], pieces, fusion=fusion)[:, low - first : high - first]
        label[low:high], sure[low:high] = _count(weights, [one[low:high] for one in labels], voters)
    return Draft(label, sure, record)


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


def _count(
    weights: Tensor, labels: Sequence[NDArray[np.uint16]], voters: Sequence[Case]
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Winner and its share at each voxel; an atlas votes where it was looked at, and on labels it was asked for."""
    looked = torch.stack([w * torch.from_numpy(label != IGNORE) for w, label in zip(weights, labels, strict=True)])
    values = sorted({int(v) for label in labels for v in np.unique(label)} - {0, IGNORE})
    best, total = torch.zeros(weights.shape[1:]), torch.zeros(weights.shape[1:])
    winner = torch.zeros(weights.shape[1:], dtype=torch.int32)
    for value in values:  # one label at a time, so that many do not need much memory
        asked = [i for i, atlas in enumerate(voters) if atlas.drawn is None or value in atlas.drawn]
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


def vote(
    scan: Tensor,
    atlases: Sequence[Whole],
    *,
    registrar: Registrar,
    most: int,
    refine: int = 0,
    belief: Tensor | None = None,
) -> Vote:
    """Vote of labelled scans on the classes of another one, through a trained registrar and on its grid.

    Parameters
    ----------
    scan : (C, X, Y, Z) float
        On the registrar's grid.
    atlases : sequence of Whole
        Labelled, on the same grid.
    registrar : Registrar
        Trained.
    most : int
        Atlases that vote: those most like the scan, as they lie, of which there may be many.
    refine : int
        Steps by which the registrar's answer is optimised.
    belief : (K, X, Y, Z) float, optional
        What the segmenter thinks of the scan, for the optimisation to agree with.
    """
    device = next(registrar.parameters()).device
    fixed = scan[None].to(device)
    with torch.no_grad():
        alike = [float(ncc(fixed, atlas.image[None].to(device))) for atlas in atlases]
        chosen = [atlases[i] for i in np.argsort(alike)[::-1][:most]]
        moving = torch.cat([atlas.image[None] for atlas in chosen]).to(device)
        fixed = fixed.expand(len(chosen), -1, -1, -1, -1)
        u = registrar(moving, fixed)
    if refine > 0:
        config = DeformConfig(shrink=(2, 1), steps=(refine * 3 // 4, refine - refine * 3 // 4))
        masks = None if belief is None else _beliefs(chosen, belief, device)
        u = deform(fixed.contiguous(), moving, config=config, start=u, masks=masks)
    with torch.no_grad():
        weights = vote_weights(scan[:1].to(device), kernels.sample(moving, u)[:, 0], fusion="local")
        return Vote(_tally(chosen, u, weights).cpu(), chosen[0], u[:1].cpu())


def _beliefs(chosen: Sequence[Whole], belief: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Foreground of the segmenter's belief and of the atlases' labels, class by class where there are few."""
    if len(belief) > MOST_CLASSES:
        return None
    index = torch.stack([torch.from_numpy(np.asarray(atlas.label)) for atlas in chosen])
    ours = one_hot(index.to(device), len(belief))[:, 1:]
    return belief[None, 1:].expand(len(chosen), -1, -1, -1, -1).to(device), ours


def _tally(chosen: Sequence[Whole], u: Tensor, weights: Tensor) -> Tensor:
    """Shares of the classes; an atlas has a voice where it was looked at, on the classes that were looked for."""
    classes = len(chosen[0].drawn)
    yes = torch.zeros(classes, *u.shape[2:], device=u.device)
    heard = torch.full_like(yes, 1e-6)
    for i, atlas in enumerate(chosen):
        assert atlas.label is not None
        seen = torch.from_numpy((atlas.label >= 0).astype(np.float32))[None, None].to(u.device)
        voice = weights[i] * kernels.sample(seen, u[i : i + 1])[0, 0]
        for k in range(1, classes):
            if atlas.drawn[k]:
                heard[k] += voice
                mask = torch.from_numpy((atlas.label == k).astype(np.float32))[None, None].to(u.device)
                yes[k] += weights[i] * kernels.sample(mask, u[i : i + 1])[0, 0]
        heard[0] += voice
    share = yes / heard
    share[0] = (1 - share[1:].sum(0)).clamp(min=0)
    return share / share.sum(0) * (heard[0] > 0.01)


def _unit(data: NDArray[Any]) -> Tensor:
    return torch.from_numpy(normalise(data))


def _window(values: Tensor) -> Tensor:
    return kernels.window_mean(values[:, None], radius=PATCH)[:, 0]
