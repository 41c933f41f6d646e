"""Draft labels for unlabelled scans from one or more labelled ones by registration: multi-atlas segmentation.

Each atlas is deformed to the scan and votes with its labels (`methods.voting`). Atlases whose deformation folds are
dropped. Labels that overlap are drafted as a mask each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.errors import DataError, GeometryError
from fewscan.learn import overlap
from fewscan.learn.batches import Prepared
from fewscan.learn.channels import to_look_at
from fewscan.learn.intensity import normalise
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar, register_images
from fewscan.methods import pairwise
from fewscan.methods.pairwise import RegisterConfig, Registration
from fewscan.methods.voting import Fusion, Voter, fuse
from fewscan.space import affine, directions, kernels
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.geometry import Array, Geometry, with_at_most
from fewscan.space.similarity import SIMILARITIES, features, ncc
from fewscan.space.volume import IGNORE, Case, Volume, resample

MOST_ATLASES = 8  # that are registered to one scan
MOST_VOXELS = 1_000_000  # of the grid on which a training run deforms its atlases
THUMBNAIL = (24, 24, 24)
MOST_FOLDING = 0.01  # share of folded voxels from which an atlas is dropped


@dataclass(frozen=True, eq=False)
class Draft:
    """Labels proposed for one scan.

    Parameters
    ----------
    label : (X, Y, Z) uint16, or (L, X, Y, Z) bool
        On the scan's grid; of labels that overlap a mask each, in the order of the atlases' names.
    sure : (X, Y, Z) float32
        Share of the vote that the winning label has; of labels that overlap that of the narrowest decision.
    atlases : mapping of str to dict
        Each atlas: whether it voted, and similarity and folding, or the reason why it could not be registered.
    drawn : frozenset of int, optional
        Labels that an atlas with a vote was asked for; all when None.
    """

    label: NDArray[np.uint16] | NDArray[np.bool_]
    sure: NDArray[np.float32]
    atlases: Mapping[str, dict[str, Any]]
    drawn: frozenset[int] | None = None

    @property
    def overlapping(self) -> bool:
        """Whether it holds a mask for each label."""
        return self.label.ndim == 4

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Voxels (X, Y, Z) that hold some label."""
        found: NDArray[np.bool_] = np.asarray(self.label.any(0)) if self.overlapping else self.label > 0
        return found


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
        How votes are weighted; across modalities all count alike, see `fusion_of`.
    device : torch.device
        Where to deform.

    Raises
    ------
    DataError
        If there is no atlas, none can be registered, or all that can fold.
    GeometryError
        If none overlaps the scan.
    """
    if not atlases:
        raise DataError("no labelled case to draft from; give at least one atlas")
    scan = to_look_at(scan)
    atlases = [replace(atlas, image=to_look_at(atlas.image)) for atlas in atlases]
    record: dict[str, dict[str, Any]] = {}
    voters, asked, refused = [], [], None
    similarity = config.deform.similarity
    for atlas in nearest(scan, atlases, similarity=similarity):
        try:
            found = pairwise.register(scan, atlas.image, config=config, device=device)
        except (DataError, GeometryError) as error:  # one bad atlas must not cost the others' drafts
            record[atlas.id], refused = {"voted": False, "reason": str(error)}, error
            continue
        folding, likeness = found.report["folding"], found.report["similarity"]["after"]
        fine = folding <= MOST_FOLDING
        record[atlas.id] = {"similarity": likeness, "folding": folding, "voted": fine}
        if fine:
            voters.append(_deformed(atlas, found))
            asked.append(atlas.drawn)
    if not voters:
        raise _none_fits(record, refused)
    label, sure = fuse(_unit(scan.data[:1]), voters, fusion=fusion_of(fusion, similarity))
    drawn = None if None in asked else frozenset[int]().union(*(one for one in asked if one is not None))
    return Draft(label, sure, record, drawn)


def _none_fits(record: Mapping[str, Mapping[str, Any]], refused: DataError | GeometryError | None) -> Exception:
    """Why no atlas has a vote: the last refusal where none could be registered, else that they fold."""
    if refused is None:
        return DataError(f"all {len(record)} atlases fold on this scan; is it of the same body part as they are?")
    if not (folded := sum("folding" in row for row in record.values())):
        return refused
    return DataError(
        f"{folded} of {len(record)} atlases fold on this scan, and the others could not be registered; is it of the "
        "same body part as they are?"
    )


def nearest(
    scan: Volume, atlases: Sequence[Case], *, most: int = MOST_ATLASES, similarity: str = "ncc"
) -> Sequence[Case]:
    """The atlases most like a scan, by thumbnails over the same share of each block.

    Parameters
    ----------
    scan : Volume
        To be labelled.
    atlases : sequence of Case
        All there are.
    most : int
        How many to keep.
    similarity : str
        As for `most_alike`.
    """
    if len(atlases) <= most:
        return atlases
    small = [thumbnail_of(atlas.image) for atlas in atlases]
    return [atlases[i] for i in most_alike(thumbnail_of(scan), small, most=most, similarity=similarity)]


def thumbnail_of(scan: Volume) -> Tensor:
    """A scan as `thumbnail` shows it.

    Parameters
    ----------
    scan : Volume
        As it was read.
    """
    return thumbnail(_unit(to_look_at(scan).data[:1]))


def thumbnail(image: Tensor) -> Tensor:
    """The first channel in few voxels, (1, 1, X, Y, Z): enough to tell which scans are alike.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        Normalised.
    """
    return resample(image[:1], THUMBNAIL)[None]


def most_alike(scan: Tensor, atlases: Sequence[Tensor], *, most: int, similarity: str = "ncc") -> list[int]:
    """Places of the atlases most like a scan, the most alike first.

    Parameters
    ----------
    scan : (1, 1, X, Y, Z) float
        Thumbnail.
    atlases : sequence of (1, 1, X, Y, Z) float
        Thumbnails.
    most : int
        How many.
    similarity : str
        Of the registration; across modalities ("mi", "mind") it is what thumbnails are compared by too, else they are
        by their correlation.
    """
    if similarity in pairwise.ACROSS_MODALITIES:
        fixed = features(similarity, scan)
        alike = [float(SIMILARITIES[similarity](fixed, features(similarity, atlas))) for atlas in atlases]
    else:
        alike = [float(ncc(scan, atlas)) for atlas in atlases]
    return [int(i) for i in np.argsort(alike)[::-1][:most]]


def fusion_of(fusion: Fusion, similarity: str) -> Fusion:
    """How votes are weighted: by likeness of intensities only where intensities can be compared.

    Parameters
    ----------
    fusion : {"local", "joint", "majority"}
        As it was asked for.
    similarity : str
        Of the registration.
    """
    return "majority" if similarity in pairwise.ACROSS_MODALITIES else fusion


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
        weight = affine.within(atlas.place.own, grid=grid, matrix=matrix)[None].to(device)
        u = deform(fixed[None].to(device), moving[None].to(device), config=config, start=start, weight=weight).cpu()
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
    drawn = frozenset(np.flatnonzero(atlas.drawn).tolist())
    return Voter(atlas.id, image[0], label, drawn, atlas.kind, atlas.table)


def _deformed(atlas: Case, found: Registration) -> Voter:
    """A case in the shape of a scan that it was registered to; beyond its field of view it has no vote."""
    assert atlas.label is not None
    image = _unit(pairwise.apply(found, atlas.image)[:1])
    value = fields.warp_labels(atlas.label.data.astype(np.int32) + 1, atlas.label.geometry, field=found.field) - 1
    label = np.where(value < 0, IGNORE, value).astype(np.uint16)  # 0 was beyond
    names, drawn = atlas.label.names, atlas.drawn
    if atlas.label.table is None:
        return Voter(atlas.id, image, label, drawn)
    asked = None if drawn is None else frozenset(k for k, value in enumerate(names, start=1) if value in drawn)
    return Voter(atlas.id, image, label, asked, table=overlap.coded(atlas.label, names)[1])


def _unit(data: NDArray[Any]) -> Tensor:
    return torch.from_numpy(normalise(data))
