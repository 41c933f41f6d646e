"""Pairs of whole scans on the registration grid, for networks that learn from two images at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fewscan.learn import augment
from fewscan.learn.alignment import Alignment
from fewscan.learn.batches import Prepared
from fewscan.learn.config import AugmentConfig
from fewscan.learn.plan import Plan
from fewscan.space.geometry import Shape

MOST_CHANNELS = 8  # labels compared in one step; with more, each step draws some


class Pair(NamedTuple):
    """What one registration step sees.

    Parameters
    ----------
    moving, fixed : (B, C, X, Y, Z) float
        Images on the registration grid.
    moving_label, fixed_label : (B, K, X, Y, Z) float
        One-hot maps of the labels that this step compares, foreground only; K is 0 where it compares none.
    moving_seen, fixed_seen : (B, 1, X, Y, Z) float
        1 where the labels of that scan are known.
    ids : tuple of str
        Moving and fixed case.
    """

    moving: Tensor
    fixed: Tensor
    moving_label: Tensor
    fixed_label: Tensor
    moving_seen: Tensor
    fixed_seen: Tensor
    ids: tuple[str, ...]


@dataclass(eq=False)
class Whole:
    """A case on the registration grid.

    Parameters
    ----------
    id : str
        The case's.
    image : (C, X, Y, Z) float
        Normalised; of directions their sizes, which no deformation turns.
    label : (X, Y, Z) int16, optional
        Class indices, -1 where unknown; a pseudo-label for an unlabelled case, once there is one.
    labelled : bool
        Whether a person drew the label.
    drawn : (K,) bool
        Classes that were looked for.
    place : Alignment
        Of the registration grid on the case's own.
    """

    id: str
    image: Tensor
    label: NDArray[np.int16] | None
    labelled: bool
    drawn: NDArray[np.bool_]
    place: Alignment


def whole(case: Prepared, place: Alignment, *, folder: Path, classes: int) -> Whole:
    """Bring a prepared case onto the registration grid; the image stays on disk.

    Parameters
    ----------
    case : Prepared
        On the plan's grid.
    place : Alignment
        Where it lies on the registration grid.
    folder : Path
        Cache folder.
    classes : int
        Of the plan.
    """
    path = folder / f"{case.id}.whole.npy"
    np.save(path, place.onto_shared(torch.from_numpy(np.array(case.guide))).numpy())
    label = None if case.label is None else place.labels_onto_shared(np.array(case.label), classes=classes)
    image = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Whole(case.id, image, label, case.label is not None, case.drawn, place)


class PairBatches:
    """Pairs of different scans, moved together by one random deformation.

    Parameters
    ----------
    cases : sequence of Whole
        Labelled and unlabelled; their pseudo-labels may appear while training runs.
    plan : Plan
        Classes, mirroring.
    config : AugmentConfig
        Spatial strengths; images keep their intensities.
    labelled : float
        Share of pairs whose moving scan is a labelled one; the fixed one then has known labels in half of them.
    spacing : (3,) float
        Of the registration grid, mm.
    device : torch.device
        Where the pair is made.
    """

    def __init__(
        self,
        cases: Sequence[Whole],
        plan: Plan,
        *,
        config: AugmentConfig,
        labelled: float,
        spacing: Sequence[float],
        device: torch.device,
    ) -> None:
        self.cases, self.plan, self.config, self.device = list(cases), plan, config, device
        self.spacing = spacing
        self.labelled, self.atlases = labelled, [i for i, c in enumerate(cases) if c.labelled]

    def __call__(self, rng: Generator) -> Pair:
        """Draw a pair; the same generator state gives the same pair."""
        from_atlas = bool(self.atlases) and float(torch.rand(1, generator=rng)) < self.labelled
        pool = self.atlases if from_atlas else list(range(len(self.cases)))
        i = pool[int(torch.randint(len(pool), (1,), generator=rng))]
        others = [k for k in range(len(self.cases)) if k != i] or [i]
        known = [k for k in others if self.cases[k].label is not None]
        if from_atlas and known and float(torch.rand(1, generator=rng)) < 0.5:
            others = known
        j = others[int(torch.randint(len(others), (1,), generator=rng))]
        moving, fixed = self.cases[i], self.cases[j]
        channels = len(moving.image)
        images = torch.cat([moving.image, fixed.image])[None].to(self.device)
        shape: Shape = (images.shape[2], images.shape[3], images.shape[4])
        compared = self._compared(moving, fixed, rng)
        labels = torch.stack([_as_float(c.label, shape) for c in (moving, fixed)])[None].to(self.device)
        params = augment.sample(
            self.config, rng, batch=1, shape=shape, spacing=self.spacing,
            mirror=self.plan.mirror and self.config.mirror == "auto",
        )  # fmt: skip
        images, labels = augment.spatial(params, images, labels=labels, shape=shape, nearest=True)
        number = labels.long() - 1  # beyond the border 0, which is "unknown"
        if bool(params.mirror[0]) and self.plan.pairs:
            number, compared = _swapped(number, self.plan), _swapped(torch.tensor(compared), self.plan).tolist()
        one = torch.tensor(compared, device=self.device).view(1, -1, 1, 1, 1)
        return Pair(
            images[:, :channels], images[:, channels:], (number[:, :1] == one).float(), (number[:, 1:] == one).float(),
            (number[:, :1] >= 0).float(), (number[:, 1:] >= 0).float(), (moving.id, fixed.id),
        )  # fmt: skip

    def _compared(self, moving: Whole, fixed: Whole, rng: Generator) -> list[int]:
        """Classes to compare: none unless both have labels and a person drew at least one of the two."""
        if moving.label is None or fixed.label is None or not (moving.labelled or fixed.labelled):
            return []
        there = [int(k) for k in np.unique(moving.label) if k > 0 and moving.drawn[k] and fixed.drawn[k]]
        order = torch.randperm(len(there), generator=rng).tolist()
        return sorted(there[k] for k in order[:MOST_CHANNELS])


def _as_float(label: NDArray[np.int16] | None, shape: Shape) -> Tensor:
    return torch.zeros(shape) if label is None else torch.from_numpy(label.astype(np.float32)) + 1


def _swapped(number: Tensor, plan: Plan) -> Tensor:
    """Class indices with left and right exchanged."""
    table = list(range(-1, plan.classes))
    for a, b in plan.pairs:
        table[a + 1], table[b + 1] = b, a
    return torch.tensor(table, device=number.device)[number.long() + 1]
