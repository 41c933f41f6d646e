"""The plan of a run: everything that is derived from the data, by rules written down here and in docs/preset.md.

Nothing in it is tuned per task. `derive` looks at the labelled cases once and answers with a `Plan`, which is stored
beside the weights and rules every later prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cc3d
import numpy as np
from numpy.typing import NDArray

from fewscan.errors import DataError
from fewscan.learn import overlap, symmetry
from fewscan.learn.config import Settings
from fewscan.learn.intensity import Scaling, scaling_of, some
from fewscan.learn.networks import Triple
from fewscan.space import directions
from fewscan.space.geometry import Shape
from fewscan.space.volume import IGNORE, Case, Kind

PATCH_VOXELS = {"cpu": 150_000, "gpu": 1_000_000}
CROWDED_VOXELS = {"cpu": 80_000, "gpu": 1_000_000}  # with many labels: more, smaller steps (decisions/005)
BATCH = {"cpu": 1, "gpu": 2}
LARGEST_GRID = 32  # patches' worth of voxels in a median scan, above which the working grid gets coarser
SMALLEST_FEATURE_MAP = 4
SOLE_COMPONENT = 0.995  # share of a label's voxels in its largest component, in every case, to trust in one component
AIR_HU = -150.0
MANY_LABELS = 8  # above it, small structures would wait long for their turn: see `class_weights`
LARGEST_WEIGHT = 30.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the data decided.

    Parameters
    ----------
    names : mapping of int to str
        Label value to name; the order gives the class indices, background being 0.
    channels : tuple of str
        Input channels.
    scaling : tuple of Scaling
        One per channel.
    spacing : (3,) float
        Working voxel size, mm.
    patch : (X, Y, Z) int
        Training patch and prediction window, voxels.
    batch : int
        Patches a step.
    widths : tuple of int
        Filters per level.
    kernels, strides : tuple of (3,) int
        Kernel and stride per level.
    mirror : bool
        Whether left-right mirroring is harmless.
    pairs : tuple of (int, int)
        Class indices that mirroring exchanges.
    sole : tuple of int
        Class indices that are a single connected piece in every training case.
    weights : tuple of float
        Weight of each class in the cross-entropy, background first; empty when all count alike.
    kind : {"scalar", "peaks", "tensor"}
        What the channels hold.
    overlapping : bool
        Whether a voxel may hold several labels: each is then answered for itself.
    """

    names: Mapping[int, str]
    channels: tuple[str, ...]
    scaling: tuple[Scaling, ...]
    spacing: tuple[float, float, float]
    patch: Shape
    batch: int
    widths: tuple[int, ...]
    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    mirror: bool
    pairs: tuple[tuple[int, int], ...]
    sole: tuple[int, ...]
    weights: tuple[float, ...] = ()
    kind: Kind = "scalar"
    overlapping: bool = False

    @property
    def width(self) -> int:
        """Channels that the segmenter takes: those of the file, or six for each direction (`space.directions`)."""
        return len(self.channels) if self.kind == "scalar" else 6 * self.guides

    @property
    def guides(self) -> int:
        """Channels that registration looks at."""
        return {"scalar": len(self.channels), "peaks": len(self.channels) // 3, "tensor": 1}[self.kind]

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return len(self.names) + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        plain = dataclasses.asdict(self) | {"names": {str(k): v for k, v in self.names.items()}}
        if self.kind == "scalar":
            del plain["kind"]  # as models were written before there were others
        if not self.overlapping:
            del plain["overlapping"]
        return plain


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """Undo `Plan.to_dict`.

    Parameters
    ----------
    data : mapping
        As stored in a model folder.
    """
    fields = dict(data)
    for name in ("channels", "spacing", "patch", "widths", "sole", "weights"):
        fields[name] = tuple(fields[name])
    for name in ("kernels", "strides", "pairs"):
        fields[name] = tuple(tuple(item) for item in fields[name])
    fields["names"] = {int(k): str(v) for k, v in fields["names"].items()}
    fields["scaling"] = tuple(Scaling(**item) for item in fields["scaling"])
    return Plan(**fields)


def derive(
    cases: Iterable[Case],
    *,
    names: Mapping[int, str],
    channels: Sequence[str],
    modality: str,
    settings: Settings,
    gpu: bool,
    kind: Kind = "scalar",
    overlapping: bool = False,
) -> Plan:
    """Derive the plan from the labelled cases.

    Parameters
    ----------
    cases : iterable of Case
        Labelled cases, loaded one at a time; unlabelled ones where a method needs no labels.
    names : mapping of int to str
        Labels to learn.
    channels : sequence of str
        Input channels.
    modality : {"ct", "mr", "other"}
        What the data set says of itself; CT is also recognised by its numbers.
    settings : Settings
        Widths, and patch size or batch where they were set by hand.
    gpu : bool
        Whether a GPU will train.
    kind : {"scalar", "peaks", "tensor"}
        What the channels hold.
    overlapping : bool
        Whether a voxel may hold several labels.

    Raises
    ------
    DataError
        If there is no case.
    """
    ordered = dict(sorted(names.items()))
    spacings, shapes, tissue, air, seen = [], [], [], [], []
    for case in cases:
        label = np.zeros(case.image.geometry.shape, np.uint16) if case.label is None else case.label.data
        spacings.append(case.image.geometry.spacing)
        shapes.append(np.array(case.image.geometry.shape) * case.image.geometry.spacing)  # mm
        structure = (label > 0) & (label != IGNORE)
        tissue.append([some(channel[structure]) for channel in case.image.data])
        air.append([float(np.quantile(some(channel.reshape(-1)), 0.05)) < AIR_HU for channel in case.image.data])
        picture = case.image.data if kind == "scalar" else directions.raw_sizes(case.image.data, kind)
        seen.append(_look(case, picture[0], ordered))
    if not spacings:
        raise DataError("no case to learn from; give at least one")
    spacing = np.median(spacings, 0)
    machine = "gpu" if gpu else "cpu"
    voxels = settings.train.patch_voxels or (CROWDED_VOXELS if len(ordered) > MANY_LABELS else PATCH_VOXELS)[machine]
    spacing = coarsen(spacing, np.median(shapes, 0), most=voxels * LARGEST_GRID)
    extent = np.median(shapes, 0) / spacing
    patch, kernels, strides = shape_network(extent, spacing, voxels=voxels, levels=len(settings.network.widths))
    mirror, pairs = symmetry.verdict([one.mirrored for one in seen], tuple(ordered.values()))
    is_ct = [modality == "ct" or float(np.mean([a[c] for a in air])) > 0.5 for c in range(len(channels))]
    scaling = tuple(scaling_of([t[c] for t in tissue], is_ct=is_ct[c]) for c in range(len(channels)))
    return Plan(
        names=ordered,
        channels=tuple(channels),
        scaling=scaling if kind == "scalar" else (Scaling(kind="length"),) * len(channels),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        patch=patch,
        batch=settings.train.batch or BATCH[machine],
        widths=tuple(settings.network.widths[: len(strides)]),
        kernels=kernels,
        strides=strides,
        mirror=mirror,
        pairs=pairs,
        sole=tuple(k for k in range(1, len(ordered) + 1) if all(k in one.single for one in seen)),
        weights=() if overlapping else class_weights(np.sum([one.counts for one in seen], axis=0)),
        kind=kind,
        overlapping=overlapping,
    )


class _Seen(NamedTuple):
    """What the labels of one case show: mirror image, classes in one piece, voxels of each class where single."""

    mirrored: symmetry.Mirrored
    single: set[int]
    counts: NDArray[np.int64]


def _look(case: Case, picture: NDArray[Any], names: Mapping[int, str]) -> _Seen:
    classes = len(names) + 1
    if case.label is not None and case.label.table is not None:
        index, table = overlap.coded(case.label, names)
        single = overlap.single(index, table, share=SOLE_COMPONENT)
        mirrored = symmetry.examine(picture, index, classes=classes, table=table)
        return _Seen(mirrored, single, np.zeros(0, np.int64))
    label = np.zeros(case.image.geometry.shape, np.uint16) if case.label is None else case.label.data
    index = to_index(label, names)
    counts = np.bincount(index[index >= 0], minlength=classes)
    return _Seen(symmetry.examine(picture, index, classes=classes), _single_components(index, classes), counts)


def class_weights(counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights of the cross-entropy: none for few labels, else falling with the square root of a class's volume.

    With dozens of labels a structure of a hundred voxels has no share in the mean cross-entropy, and its Dice has no
    slope until it is found. Weighting finds it in a fraction of the steps.

    Parameters
    ----------
    counts : (K,) int
        Voxels of each class over all labelled cases, background first.

    Examples
    --------
    >>> class_weights(np.array([900, 100]))
    ()
    """
    if len(counts) - 1 <= MANY_LABELS:
        return ()
    share = counts / max(1, counts.sum())
    raw = 1 / np.sqrt(np.maximum(share, 1e-9))
    raw = np.minimum(raw / raw.min(), LARGEST_WEIGHT)
    return tuple(float(w) for w in np.round(raw / (raw * share).sum(), 4))


def coarsen(spacing: NDArray[np.float64], extent_mm: NDArray[np.float64], *, most: float) -> NDArray[np.float64]:
    """Raise the finest spacings together until a scan of this extent has at most so many voxels.

    Parameters
    ----------
    spacing : (3,) float
        mm.
    extent_mm : (3,) float
        Size of a median scan.
    most : float
        Voxels.

    Examples
    --------
    >>> coarsen(np.array([1.0, 1.0, 4.0]), np.array([400.0, 400.0, 400.0]), most=5e6).round(1).tolist()
    [1.8, 1.8, 4.0]
    """
    while np.prod(extent_mm / spacing) > most:
        finest = spacing.min()
        spacing = np.where(spacing <= finest * 1.001, finest * 1.02, spacing)
        spacing = np.maximum(spacing, spacing.min())
    return spacing


def shape_network(
    extent: NDArray[np.float64], spacing: NDArray[np.float64], *, voxels: int, levels: int
) -> tuple[Shape, tuple[Triple, ...], tuple[Triple, ...]]:
    """Patch, kernels and strides for scans of this size.

    The patch is the scan where that fits the budget, else the largest block that is cubic in millimetres. An axis is
    halved from level to level while it keeps `SMALLEST_FEATURE_MAP` voxels and its voxels are not yet twice as coarse
    as the finest; until then its kernels are 1 voxel long.

    Parameters
    ----------
    extent : (3,) float
        Median scan size, voxels.
    spacing : (3,) float
        Voxel size, mm.
    voxels : int
        Budget per patch.
    levels : int
        Most levels of the network.

    Examples
    --------
    >>> patch, kernels, strides = shape_network(np.array([37.0, 54, 39]), np.ones(3), voxels=150_000, levels=5)
    >>> patch, len(strides)
    ((40, 56, 40), 4)
    """
    low, high = 0.0, float((extent * spacing).max())
    for _ in range(60):
        side = (low + high) / 2
        size = np.minimum(extent, side / spacing)
        low, high = (side, high) if np.prod(size) <= voxels else (low, side)
    size = np.maximum(np.minimum(extent, high / spacing), 1)
    current, mm = size.copy(), np.array(spacing, dtype=float)
    kernels, strides = [], [(1, 1, 1)]
    factor = np.ones(3, dtype=int)
    while True:
        can = current / 2 >= SMALLEST_FEATURE_MAP
        fine = mm <= 2 * (mm[can].min() if can.any() else mm.min())  # a slab must not hold back its other axes
        kernels.append(tuple(3 if f else 1 for f in fine))
        halve = fine & can
        if len(strides) == levels or not halve.any():
            break
        step = np.where(halve, 2, 1)
        current, mm, factor = current / step, mm * step, factor * step
        strides.append(tuple(int(s) for s in step))  # type: ignore[arg-type]
    fits = bool((size >= extent - 1e-6).all())
    whole = np.ceil(size / factor - 1e-6) if fits else np.maximum(1, np.round(size / factor))
    patch = (whole * factor).astype(int)
    return (int(patch[0]), int(patch[1]), int(patch[2])), tuple(kernels), tuple(strides)  # type: ignore[arg-type]


def to_index(label: NDArray[np.uint16], plan: Plan | Mapping[int, str]) -> NDArray[np.int16]:
    """Label values to class indices; -1 where nobody looked, background for values that are not learnt.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Values of a `Labelmap`.
    plan : Plan or mapping of int to str
        Labels to learn, in class order.
    """
    names = plan.names if isinstance(plan, Plan) else plan
    table = np.zeros(IGNORE + 1, dtype=np.int16)
    for k, value in enumerate(names):
        table[value] = k + 1
    table[IGNORE] = -1
    return table[label]


def _single_components(index: NDArray[np.int16], classes: int) -> set[int]:
    """Classes of which (nearly) all voxels are connected; absent ones count, since they prove nothing against it."""
    if (index < 0).any():
        return set()  # slices left out cut structures into pieces
    pieces = cc3d.connected_components(index.astype(np.uint16), connectivity=26)
    counts: NDArray[np.int64] = np.bincount(pieces.reshape(-1))
    owner = np.zeros(len(counts), dtype=np.int64)
    owner[pieces.reshape(-1)] = index.reshape(-1)
    alone = set()
    for k in range(1, classes):
        sizes = counts[owner == k]
        if sizes.size == 0 or sizes.max() >= SOLE_COMPONENT * sizes.sum():
            alone.add(k)
    return alone
