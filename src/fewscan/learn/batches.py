"""From prepared cases to batches of patches: a pure function of a random generator, so a resumed run repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fewscan.learn import augment, overlap
from fewscan.learn.channels import entry
from fewscan.learn.config import AugmentConfig
from fewscan.learn.plan import MANY_LABELS, Plan, to_index
from fewscan.space import directions
from fewscan.space.geometry import Shape, with_spacing
from fewscan.space.volume import Case, Kind, Volume, one_hot, resample

SEEN_SAMPLES = 20_000
MARGIN = 1.25  # source crop over patch, so that a turned patch finds real voxels in its corners


class Batch(NamedTuple):
    """What one step sees.

    Parameters
    ----------
    images : (B, C, X, Y, Z) float
        Augmented patches.
    labels : (B, K, X, Y, Z) float
        Soft one-hot, background first; all 0 where nobody looked. Of labels that overlap: first whether a voxel was
        looked at, then a mask each.
    drawn : (B, K) bool
        Labels that were looked for.
    ids : tuple of str
        Cases.
    """

    images: Tensor
    labels: Tensor
    drawn: Tensor
    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case on the plan's grid, normalised, as memory maps.

    Parameters
    ----------
    id : str
        The case's.
    image : (C, X, Y, Z) float32
        Normalised; of directions their matrices along the grid's axes.
    label : (X, Y, Z) int16, optional
        Class indices, or combinations of them; -1 where nobody looked.
    places : tuple of (N,) int
        For each class, flat positions of a sample of its voxels; class 0 is background.
    counts : tuple of int
        For each class, how many voxels it has.
    drawn : (K,) bool
        Classes that were looked for.
    kind : {"scalar", "peaks", "tensor"}
        Of the image.
    table : (N + 1, K) bool, optional
        Of labels that overlap: what the combinations stand for (`learn.overlap`).
    patient : str
        Whose scan it is; empty where nobody knows.
    """

    id: str
    image: NDArray[np.float32]
    label: NDArray[np.int16] | None
    places: tuple[NDArray[np.int64], ...]
    counts: tuple[int, ...]
    drawn: NDArray[np.bool_]
    kind: Kind = "scalar"
    table: NDArray[np.bool_] | None = None
    patient: str = ""

    @property
    def whose(self) -> str:
        """The patient, or the scan itself where nobody knows."""
        return self.patient or self.id

    @property
    def guide(self) -> NDArray[np.float32]:
        """What registration may look at."""
        if self.kind == "scalar":
            return self.image
        return directions.guide(torch.from_numpy(np.array(self.image)), self.kind).numpy()


def prepare(case: Case, plan: Plan, *, folder: Path) -> Prepared:
    """Resample and normalise a case, and leave it in ``folder`` as memory-mapped arrays.

    Parameters
    ----------
    case : Case
        Loaded.
    plan : Plan
        Grid and normalisation.
    folder : Path
        Cache folder, which exists.
    """
    image = on_plan(case.image, plan)
    target: Shape = (image.shape[1], image.shape[2], image.shape[3])
    path = folder / f"{case.id}.image.npy"
    np.save(path, image.numpy())
    drawn = np.array([True, *(case.drawn is None or value in case.drawn for value in plan.names)])
    patient = str(case.meta.get("patient", ""))
    if case.label is None:
        empty = tuple(np.zeros(0, np.int64) for _ in drawn)
        none = (0,) * len(drawn)
        return Prepared(case.id, np.load(path, mmap_mode="r"), None, empty, none, drawn, plan.kind, patient=patient)
    table = None
    if case.label.table is not None:
        index, table = overlap.resampled(*overlap.coded(case.label, plan.names), shape=target)
    else:
        index = resample_index(to_index(case.label.data, plan), target, classes=len(drawn))
    label_path = folder / f"{case.id}.label.npy"
    np.save(label_path, index)
    done = Prepared(case.id, np.load(path, mmap_mode="r"), None, (), (), drawn, plan.kind, patient=patient)
    return labelled_as(done, np.load(label_path, mmap_mode="r"), table=table)


def on_plan(image: Volume, plan: Plan) -> Tensor:
    """A scan (C, X, Y, Z) on the plan's grid, normalised.

    Parameters
    ----------
    image : Volume
        On any grid.
    plan : Plan
        Grid and normalisation.
    """
    return resample(entry(image, plan)(image.data), with_spacing(image.geometry, plan.spacing).shape)


def bytes_on_plan(image: Volume, plan: Plan, *, values: int) -> int:
    """What so many 32-bit values for each voxel of the plan's grid take.

    Parameters
    ----------
    image : Volume
        On any grid.
    plan : Plan
        Its grid.
    values : int
        At a voxel.
    """
    return int(np.prod(with_spacing(image.geometry, plan.spacing).shape)) * 4 * values


def labelled_as(case: Prepared, index: NDArray[np.int16], *, table: NDArray[np.bool_] | None = None) -> Prepared:
    """The case with these labels.

    Parameters
    ----------
    case : Prepared
        With or without labels.
    index : (X, Y, Z) int16
        Class indices, or combinations of them; -1 where nobody knows.
    table : (N + 1, K) bool, optional
        What combinations stand for.
    """
    rng = np.random.default_rng(0)
    places, counts = [], []
    for k in range(len(case.drawn)):
        flat = np.flatnonzero(index == k if table is None else overlap.mask(index, table, k=k))
        counts.append(len(flat))
        places.append(rng.choice(flat, SEEN_SAMPLES, replace=False) if len(flat) > SEEN_SAMPLES else flat)
    return replace(case, label=index, places=tuple(places), counts=tuple(counts), table=table)


def resample_index(index: NDArray[np.int16], shape: Shape, *, classes: int) -> NDArray[np.int16]:
    """Resample class indices by the vote of linearly resampled masks; where nobody looked stays so.

    Parameters
    ----------
    index : (X, Y, Z) int16
        Class indices, -1 where nobody looked.
    shape : (X, Y, Z) int
        Wanted shape.
    classes : int
        Number of classes.
    """
    if index.shape == tuple(shape):
        return index
    best = torch.zeros(shape)
    out = torch.zeros(shape, dtype=torch.int16)
    for k in range(-1, classes):  # one class at a time, so that many labels do not need much memory
        share = resample(torch.from_numpy((index == k).astype(np.float32))[None], shape)[0]
        out = torch.where(share > best, torch.full_like(out, k), out)
        best = torch.maximum(best, share)
    return out.numpy()


def crop(array: NDArray[np.generic], centre: Sequence[int], *, size: Sequence[int]) -> NDArray[np.generic]:
    """Box of ``size`` voxels around a centre, its border repeated where it leaves the grid.

    Parameters
    ----------
    array : (..., X, Y, Z)
        Source.
    centre : (3,) int
        Voxel in the middle.
    size : (3,) int
        Voxels along each axis.
    """
    inside: list[slice] = []
    padding = []
    for c, s, n in zip(centre, size, array.shape[-3:], strict=True):
        low = int(c) - s // 2
        inside.append(slice(min(max(low, 0), n - 1), max(min(low + s, n), 1)))
        padding.append((max(-low, 0), max(low + s - n, 0)))
    x, y, z = inside
    piece = array[..., x, y, z]
    if any(sum(p) for p in padding):
        piece = np.pad(piece, [(0, 0)] * (array.ndim - 3) + padding, mode="edge")
    return np.ascontiguousarray(piece)


class PatchBatches:
    """Batches of augmented patches around labelled structures.

    Parameters
    ----------
    cases : sequence of Prepared
        Labelled cases; every patch comes from one drawn at random.
    plan : Plan
        Patch size, spacing, mirroring.
    config : AugmentConfig
        How strongly to vary.
    batch : int
        Patches per batch.
    foreground : float
        Share of patches centred on a label drawn at random; the others on any voxel that was looked at.
    device : torch.device
        Where the batch is made.
    """

    def __init__(
        self,
        cases: Sequence[Prepared],
        plan: Plan,
        *,
        config: AugmentConfig,
        batch: int,
        foreground: float,
        device: torch.device,
    ) -> None:
        self.cases, self.plan, self.config = list(cases), plan, config
        self.batch, self.foreground, self.device = batch, foreground, device
        self.source: Shape = tuple(_cropped(n) for n in plan.patch)  # type: ignore[assignment]

    def __call__(self, rng: Generator) -> Batch:
        """Draw a batch; the same generator state gives the same batch."""
        images, labels, chosen = [], [], []
        for _ in range(self.batch):
            case = self.cases[int(torch.randint(len(self.cases), (1,), generator=rng))]
            centre = self._centre(case, rng)
            assert case.label is not None
            images.append(torch.from_numpy(crop(case.image, centre, size=self.source)))
            labels.append(torch.from_numpy(crop_label(case.label, centre, size=self.source)))
            chosen.append(case)
        source = torch.stack(images).to(self.device, non_blocking=True)
        index = torch.stack(labels).to(self.device, non_blocking=True)
        params = augment.sample(
            self.config, rng, batch=self.batch, shape=self.plan.patch, spacing=self.plan.spacing,
            mirror=self.plan.mirror and self.config.mirror == "auto",
        )  # fmt: skip
        kind, shape = self.plan.kind, self.plan.patch
        crowded = self.plan.overlapping and len(self.plan.names) > MANY_LABELS
        if self.plan.weights or crowded:  # many labels: one nearest-neighbour channel is far cheaper than linear ones
            number = (index[:, None] + 1).float()  # 0 is "nobody looked", also beyond the border
            patch, number = augment.spatial(
                params, source, labels=number, shape=self.plan.patch, nearest=True, kind=kind
            )
            target = self._masks(number[:, 0].long() - 1, chosen)
        else:
            masks = self._masks(index, chosen)
            patch, target = augment.spatial(params, source, labels=masks, shape=shape, kind=kind)
        target = swap_sides(target, params.mirror, pairs=self.plan.pairs)
        drawn = torch.stack([torch.from_numpy(case.drawn) for case in chosen])
        known = swap_sides(drawn, params.mirror, pairs=self.plan.pairs)
        ids = tuple(case.id for case in chosen)
        return Batch(augment.intensity(params, patch, kind=kind), target, known, ids)

    def _masks(self, index: Tensor, cases: Sequence[Prepared]) -> Tensor:
        """Class indices, or combinations of each case's own table, (B, X, Y, Z) to a mask each (B, K, X, Y, Z)."""
        if not self.plan.overlapping:
            return one_hot(index, self.plan.classes)
        tables = [torch.from_numpy(case.table).to(index.device) for case in cases if case.table is not None]
        held = [table.T[:, one.long()] for one, table in zip(index, tables, strict=True)]
        return torch.stack(held).float()

    def _centre(self, case: Prepared, rng: Generator) -> list[int]:
        """A voxel to centre the crop on, kept so far inside that the patch stays on the grid where it can."""
        shape = case.image.shape[1:]
        there = [k for k in range(1, len(case.places)) if len(case.places[k])]
        background = float(torch.rand(1, generator=rng)) >= self.foreground
        if background or not there:
            there = [k for k in range(len(case.places)) if len(case.places[k])]
            weights = torch.tensor([float(len(case.places[k])) for k in there])
            chosen = there[int(torch.multinomial(weights, 1, generator=rng))]
        else:
            chosen = there[int(torch.randint(len(there), (1,), generator=rng))]
        flat = case.places[chosen][int(torch.randint(len(case.places[chosen]), (1,), generator=rng))]
        jitter = ((torch.rand(3, generator=rng) - 0.5) * 0.5).tolist()
        centre = []
        for c, j, n, p in zip(np.unravel_index(int(flat), shape), jitter, shape, self.plan.patch, strict=True):
            c = int(c) + round(j * p)
            centre.append(min(max(c, p // 2), n - (p + 1) // 2) if n > p else n // 2)
        return centre


def _cropped(patch: int) -> int:
    """Voxels to crop for so many of a patch: a margin, but none around one slice, beyond which nobody looked.

    A patch of an odd number lies half a voxel off in a crop of an even one, and the other way round: of few slices
    all would be read from between two.
    """
    if patch == 1:
        return 1
    wanted = int(np.ceil(patch * MARGIN))
    return wanted + (wanted - patch) % 2


def crop_label(label: NDArray[np.int16], centre: Sequence[int], *, size: Sequence[int]) -> NDArray[np.int16]:
    """`crop` for class indices: beyond the grid nobody looked, so it is -1 there.

    Parameters
    ----------
    label : (X, Y, Z) int16
        Class indices.
    centre, size : (3,) int
        As for `crop`.
    """
    out = np.full(tuple(size), -1, np.int16)
    here, there = [], []
    for c, s, n in zip(centre, size, label.shape, strict=True):
        low = int(c) - s // 2
        a, b = max(low, 0), min(low + s, n)
        there.append(slice(a, b))
        here.append(slice(a - low, b - low))
    out[tuple(here)] = label[tuple(there)]
    return out


def swap_sides(labels: Tensor, mirrored: Tensor, *, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange left and right structures in the samples that were mirrored.

    Parameters
    ----------
    labels : (B, K, ...)
        One channel per class.
    mirrored : (B,) bool
        Which samples.
    pairs : sequence of (int, int)
        Class indices that are each other's mirror image.
    """
    if not pairs or not bool(mirrored.any()):
        return labels
    order = list(range(labels.shape[1]))
    for a, b in pairs:
        order[a], order[b] = b, a
    return torch.where(mirrored.to(labels.device).view(-1, *[1] * (labels.ndim - 1)), labels[:, order], labels)
