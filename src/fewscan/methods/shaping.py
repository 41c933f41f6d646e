"""Labelled scans in the shape of another: the most like it, affinely fitted, then deformed together under its mask."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fewscan.errors import GeometryError
from fewscan.learn.alignment import grid_of
from fewscan.learn.answers import certain
from fewscan.learn.batches import Prepared
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import Hardware
from fewscan.learn.registrar import Registrar, register_images
from fewscan.methods import draft, voting
from fewscan.space import affine
from fewscan.space import field as fields
from fewscan.space.deformable import DeformConfig, deform
from fewscan.space.geometry import Array, Geometry, with_at_most
from fewscan.space.similarity import ncc
from fewscan.space.volume import resample

MOST_VOXELS = 1_000_000  # of the grid on which atlases are deformed
MOST_MASKS = 8  # labels that supervise the deformation, the largest ones: each costs as much as an image channel
AFFINE_LEVELS = ((8_000, 60),)
WARMED = DeformConfig(shrink=(2,), steps=(30,))  # from a registration network's answer
COLD = DeformConfig(shrink=(4, 2, 1), steps=(60, 40, 25))
MOST_FITTED = 12  # atlases that are affinely fitted to a scan; of more, thumbnails tell those most like it


class Aligned(NamedTuple):
    """Atlases affinely on a scan.

    Parameters
    ----------
    own, grid : Geometry
        Of the scan, and the one to deform on.
    fixed : (C, X, Y, Z) float
        The scan on the latter.
    moving : (N, C, X, Y, Z) float
        The atlases there.
    atlases : sequence of (Prepared, (4, 4) array)
        Each with its affine map.
    start : (N, 3, X, Y, Z) float, optional
        A registration network's answer.
    within : (N, 1, X, Y, Z) float
        1 where the atlas has voxels.
    """

    own: Geometry
    grid: Geometry
    fixed: Tensor
    moving: Tensor
    atlases: Sequence[tuple[Prepared, Array]]
    start: Tensor | None
    within: Tensor


class Shaper:
    """Atlases, ready to be deformed to one scan after another.

    Parameters
    ----------
    model : Model
        Its plan, and where it has one its registration network to start from.
    atlases : sequence of Prepared
        Labelled scans on the model's grid.
    most : int
        At most so many are deformed, those most like the scan.
    anatomy : float
        Weight of the scan's mask against the image in the deformation; 0 aligns by intensity alone, affinely too.
    hardware : Hardware
        Where.
    """

    def __init__(
        self, model: Model, atlases: Sequence[Prepared], *, most: int, anatomy: float, hardware: Hardware
    ) -> None:
        self.model, self.plan, self.atlases, self.hardware = model, model.plan, list(atlases), hardware
        self.most, self.anatomy = most, anatomy

    @functools.cached_property
    def _thumbnails(self) -> list[Tensor]:
        """Of all atlases."""
        return [draft.thumbnail(torch.from_numpy(np.array(atlas.guide))) for atlas in self.atlases]

    def aligned(self, guide: Tensor, own: Geometry, *, leave: str | None = None, mask: Tensor | None = None) -> Aligned:
        """The atlases most like a scan affinely onto it, and where a network lets them start; none where none fits.

        Parameters
        ----------
        guide : (C, X, Y, Z) float
            The scan, as similarities look at it.
        own : Geometry
            Its grid.
        leave : str, optional
            Patient whose scans are left out.
        mask : (K, X, Y, Z) float, optional
            Class probabilities of the scan: where its structures are counts as much as the image, unless anatomy is 0.
        """
        grid = with_at_most(own, MOST_VOXELS)
        fixed = resample(guide, grid.shape)
        found = []
        for atlas in self._candidates(guide, leave=leave):
            matrix = self._laid(guide, atlas, own=own, mask=mask)
            if matrix is not None:
                whole = torch.from_numpy(np.array(atlas.guide))
                moving = affine.onto(whole, grid_of(atlas, self.plan.spacing), grid=grid, matrix=matrix)
                found.append((float(ncc(fixed[None, :1], moving[None, :1])), atlas, matrix, moving))
        best = sorted(found, key=lambda row: -row[0])[: self.most]
        if not best:
            none = fixed.new_empty(0, *fixed.shape)
            return Aligned(own, grid, fixed, none, [], None, none[:, :1])
        moving = torch.stack([row[3] for row in best])
        atlases = [(atlas, matrix) for _, atlas, matrix, _ in best]
        within = [affine.within(grid_of(a, self.plan.spacing), grid=grid, matrix=matrix) for a, matrix in atlases]
        return Aligned(own, grid, fixed, moving, atlases, self._start(fixed, moving), torch.stack(within))

    def _laid(self, guide: Tensor, atlas: Prepared, *, own: Geometry, mask: Tensor | None) -> Array | None:
        """Affine map from a scan to an atlas; None where they do not overlap, or only blown up or shrunk."""
        fixed, moving = guide[:1], torch.from_numpy(np.array(atlas.guide[:1]))
        places = None if mask is None or not self.anatomy else _structures(mask, atlas)
        if places is not None:
            fixed, moving = torch.cat([fixed, places[0]]), torch.cat([moving, places[1]])
        try:
            grids = (own, grid_of(atlas, self.plan.spacing))
            matrix = affine.fit(fixed, moving, grids=grids, levels=AFFINE_LEVELS)
        except GeometryError:
            return None
        return matrix if affine.plausible(matrix) else None

    def _candidates(self, guide: Tensor, *, leave: str | None) -> list[Prepared]:
        """Atlases to fit to a scan: all of them, or where they are many those with the thumbnails most like its own."""
        pool = [i for i, atlas in enumerate(self.atlases) if atlas.whose != leave]
        most = max(MOST_FITTED, self.most)
        if len(pool) > most:
            small = draft.most_alike(draft.thumbnail(guide), [self._thumbnails[i] for i in pool], most=most)
            pool = [pool[i] for i in small]
        return [self.atlases[i] for i in pool]

    def shaped(self, aligned: Aligned, *, mask: Tensor | None) -> list[voting.Voter]:
        """The atlases in the shape of the scan; those that fold are left out.

        Parameters
        ----------
        aligned : Aligned
            Atlases and scan.
        mask : (K, X, Y, Z) float, optional
            Class probabilities of the scan that pull at the atlases' labels; the images alone when None.
        """
        own, grid, fixed, moving, atlases, start, within = aligned
        if not atlases:
            return []
        masks = None
        if mask is not None and self.anatomy > 0:
            masks = self._masks(mask, atlases, grid=grid)
        config = dataclasses.replace(COLD if start is None else WARMED, anatomy=self.anatomy)
        device = self.hardware.device
        u = deform(
            fixed.to(device).expand(len(atlases), -1, -1, -1, -1).contiguous(), moving.to(device), config=config,
            start=start, weight=within.to(device),
            masks=None if masks is None else (masks[0].to(device), masks[1].to(device)),
        ).cpu()  # fmt: skip
        return [
            draft.voter(atlas, u[i : i + 1], matrix=matrix, grids=(own, grid_of(atlas, self.plan.spacing)))
            for i, (atlas, matrix) in enumerate(atlases)
            if fields.folding(u[i : i + 1]) <= draft.MOST_FOLDING
        ]

    def _start(self, fixed: Tensor, moving: Tensor) -> Tensor | None:
        """The registration network's answer, where the model has one."""
        registrar = self.model.others.get("registrar")
        if registrar is None:
            return None
        network = cast(Registrar, registrar.to(self.hardware.device).eval())
        return torch.cat([register_images(network, fixed, moving=one) for one in moving]).to(self.hardware.device)

    def _masks(
        self, mask: Tensor, atlases: Sequence[tuple[Prepared, Array]], *, grid: Geometry
    ) -> tuple[Tensor, Tensor]:
        """Soft maps of the largest structures, of the scan and of each affinely aligned atlas.

        Both are empty where the atlas does not tell where a structure ends, so that its overlap does not count.
        """
        classes = mask[1:].sum((1, 2, 3)).argsort(descending=True)[:MOST_MASKS] + 1
        told = torch.stack([_told(atlas)[classes] for atlas, _ in atlases]).view(len(atlases), -1, 1, 1, 1)
        moving = [
            affine.onto(certain(atlas)[classes], grid_of(atlas, self.plan.spacing), grid=grid, matrix=matrix)
            for atlas, matrix in atlases
        ]
        return resample(mask[classes], grid.shape) * told, torch.stack(moving) * told


def _told(atlas: Prepared) -> Tensor:
    """Classes (K,) whose whole extent an atlas shows: drawn in it, and no voxel that nobody looked at."""
    drawn = torch.from_numpy(np.array(atlas.drawn))
    return drawn & bool((np.array(atlas.label) >= 0).all())


def _structures(mask: Tensor, atlas: Prepared) -> tuple[Tensor, Tensor] | None:
    """Where the classes drawn in an atlas lie, (1, X, Y, Z) in the scan and in it, with deviations near 1.

    None where the atlas does not tell: nothing was drawn, or voxels that nobody looked at.
    """
    asked, index = _told(atlas)[1:], torch.from_numpy(np.array(atlas.label)).long()
    if not asked.any():
        return None
    inside = index > 0 if atlas.table is None else torch.from_numpy(atlas.table)[:, 1:].any(1)[index]
    seen = 1 - mask[0] if asked.all() else mask[1:][asked].sum(0).clamp(max=1)
    seen, inside = seen[None], inside[None].float()
    return seen / seen.std().clamp(min=1e-3), inside / inside.std().clamp(min=1e-3)
