"""What only shows when cases are held against each other: duplicates, outliers, mirrored labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fewscan.data.findings import Finding, Severity
from fewscan.data.io import label_values
from fewscan.space.geometry import Geometry
from fewscan.space.volume import IGNORE

ENOUGH = 4  # cases needed before one can be called an outlier
SPACING_FACTOR, INTENSITY_FACTOR, VOLUME_FACTOR = 3.0, 50.0, 5.0
SIDE_MM = 5.0  # centroids closer than this along left-right say nothing about sides
SIDE = re.compile(r"(?i)(?<![a-z])(left|right|lh|rh|l|r)(?![a-z])")


@dataclass(frozen=True, eq=False)
class Facts:
    """What is kept of a case for comparing.

    Parameters
    ----------
    case, patient, role : str
        Who it is and what it serves for.
    paths : (str, str)
        Image and label map.
    spacing : (3,) float
        Voxel size, mm, RAS+ order.
    scale : float
        99th percentile of the intensities.
    image_hash, label_hash : str
        Of the voxels; empty without labelled voxels.
    volume_mm3 : mapping of int to float
        Volume of each label.
    centres : mapping of int to (3,) float
        Centroid of each label, RAS+ mm.
    """

    case: str
    patient: str
    role: str
    paths: tuple[str, str]
    spacing: tuple[float, float, float]
    scale: float
    image_hash: str
    label_hash: str
    volume_mm3: Mapping[int, float]
    centres: Mapping[int, NDArray[np.float64]]


def measure(label: NDArray[np.uint16], geometry: Geometry) -> tuple[dict[int, int], dict[int, NDArray[np.float64]]]:
    """Voxels and centroid (RAS+ mm) of each label.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Label map.
    geometry : Geometry
        Its grid.
    """
    values = [v for v in label_values(label) if v not in (0, IGNORE)]
    counts, sums = dict.fromkeys(values, 0), {v: np.zeros(3) for v in values}
    for x in range(label.shape[0]):
        y, z = np.nonzero((label[x] > 0) & (label[x] < IGNORE))
        here = label[x][y, z]
        for value in np.unique(here).tolist():
            mine = here == value
            counts[value] += int(mine.sum())
            sums[value] += (x * mine.sum(), y[mine].sum(), z[mine].sum())
    matrix, origin = geometry.affine[:3, :3], geometry.affine[:3, 3]
    return counts, {v: matrix @ (sums[v] / counts[v]) + origin for v in values}


def boxes_overlap(a: Geometry, b: Geometry) -> float:
    """Share of the smaller grid's block of space that lies in the other's.

    Parameters
    ----------
    a, b : Geometry
        Two grids; oblique ones count with the upright box around them.
    """
    boxes = []
    for grid in (a, b):
        ends = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in grid.shape])))
        world = ends @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        boxes.append((world.min(0), world.max(0)))
    (low_a, high_a), (low_b, high_b) = boxes
    shared = np.prod(np.maximum(0, np.minimum(high_a, high_b) - np.maximum(low_a, low_b)))
    return float(shared / min(np.prod(high_a - low_a), np.prod(high_b - low_b)))


def compare(facts: Sequence[Facts], names: Mapping[int, str]) -> Iterator[Finding]:
    """Findings from all comparisons.

    Parameters
    ----------
    facts : sequence of Facts
        One per readable case.
    names : mapping of int to str
        Labels of the data set.
    """
    yield from _duplicates(facts)
    yield from _spacing(facts)
    yield from _intensity(facts)
    yield from _volumes(facts, names)
    yield from _sides(facts, names)


def _duplicates(facts: Sequence[Facts]) -> Iterator[Finding]:
    for kind, index in (("image", 0), ("label", 1)):
        first: dict[str, Facts] = {}
        for fact in facts:
            key = fact.image_hash if kind == "image" else fact.label_hash
            twin = first.setdefault(key, fact) if key else fact
            if twin is fact:
                continue
            leak = "test" in (fact.role, twin.role) and fact.role != twin.role
            severity: Severity = "error" if leak and kind == "image" else "warning"
            message = f"holds the same voxels as case {twin.case}" + (", which is on the other side of the test" * leak)
            yield Finding(
                f"duplicate-{kind}", severity, fact.case, fact.paths[index], message, "take one of the two out"
            )


def _spacing(facts: Sequence[Facts]) -> Iterator[Finding]:
    if len(facts) < ENOUGH:
        return
    usual = np.median([f.spacing for f in facts], axis=0)
    for fact in facts:
        ratio = np.array(fact.spacing) / usual
        if ratio.max() > SPACING_FACTOR or ratio.min() < 1 / SPACING_FACTOR:
            message = f"voxels of {_mm(fact.spacing)} mm, {_mm(usual)} mm is usual here"
            yield Finding(
                "spacing-outlier", "warning", fact.case, fact.paths[0], message, "check the header's voxel size"
            )


def _mm(spacing: Sequence[float] | NDArray[np.float64]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing)


def _intensity(facts: Sequence[Facts]) -> Iterator[Finding]:
    """One finding for all: scans in different units are common, and normalisation handles them."""
    scales = np.array([f.scale for f in facts if f.scale > 0])
    if len(scales) < ENOUGH:
        return
    usual = float(np.median(scales))
    odd = [f for f in facts if f.scale > usual * INTENSITY_FACTOR or 0 < f.scale < usual / INTENSITY_FACTOR]
    if odd:
        shown = ", ".join(f.case for f in odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        message = f"intensities far from the usual (99th percentile {usual:.3g}): {shown}"
        remedy = "check that they are the same kind of scan; each is normalised by itself"
        yield Finding(
            "intensity-outlier", "warning", odd[0].case if len(odd) == 1 else "", odd[0].paths[0], message, remedy
        )


def _volumes(facts: Sequence[Facts], names: Mapping[int, str]) -> Iterator[Finding]:
    for value, name in names.items():
        held = [(f, f.volume_mm3[value]) for f in facts if f.volume_mm3.get(value, 0) > 0]
        if len(held) < ENOUGH:
            continue
        usual = float(np.median([v for _, v in held]))
        spread = float(np.median([abs(np.log(v / usual)) for _, v in held]))
        for fact, volume in held:
            far = abs(np.log(volume / usual))
            if far > np.log(VOLUME_FACTOR) and far > 6 * spread:
                message = f"{name}: {volume / 1000:.3g} mL, {usual / 1000:.3g} mL is usual here"
                yield Finding("volume-outlier", "warning", fact.case, fact.paths[1], message, "look at it in a viewer")


def _sides(facts: Sequence[Facts], names: Mapping[int, str]) -> Iterator[Finding]:
    """Labels on the other side than elsewhere, or than their names say."""
    remedy = "look at it in a viewer that shows left and right; the scan or its label map may be mirrored"
    told: set[str] = set()
    for left, right in _pairs(names):
        gaps = {f.case: _gap(f, left, right) for f in facts}
        wrong = [f for f in facts if (g := gaps[f.case]) is not None and g < -SIDE_MM]
        fine = [c for c, g in gaps.items() if g is not None and g > SIDE_MM]
        if wrong and not fine and len(wrong) > 1:
            message = f"{names[left]!r} lies right of {names[right]!r} in all {len(wrong)} cases"
            yield Finding(
                "left-right", "warning", "", wrong[0].paths[1], message, "check whether the two names are swapped"
            )
        for fact in wrong if fine or len(wrong) == 1 else ():
            if fact.case not in told:
                sure = len(fine) >= 2 * len(wrong) and fact.role != "test"
                severity: Severity = "error" if sure else "warning"
                message = f"{names[left]!r} lies right of {names[right]!r}, elsewhere left of it"
                yield Finding("left-right", severity, fact.case, fact.paths[1], message, remedy)
                told.add(fact.case)
    yield from _mirrored([f for f in facts if f.case not in told], names, remedy)


def _mirrored(facts: Sequence[Facts], names: Mapping[int, str], remedy: str) -> Iterator[Finding]:
    """Cases in which most pairs of labels lie the other way round than in all others."""
    seen, flipped = dict.fromkeys((f.case for f in facts), 0), dict.fromkeys((f.case for f in facts), 0)
    for a, b in itertools.islice(itertools.combinations(names, 2), 2000):
        gaps = {f.case: _gap(f, a, b) for f in facts}
        signs = {c: float(np.sign(g)) for c, g in gaps.items() if g is not None and abs(g) > SIDE_MM}
        usual = float(np.sign(sum(signs.values())))
        odd = [c for c, s in signs.items() if s == -usual]
        if len(signs) >= ENOUGH and len(odd) * 4 <= len(signs) and len(signs) * 4 >= 3 * len(gaps):
            for case in signs:
                seen[case] += 1
                flipped[case] += case in odd
    for fact in facts:
        if 2 * flipped[fact.case] > seen[fact.case]:
            message = "most labels lie the other way round from left to right than in the other cases"
            yield Finding("left-right", "warning", fact.case, fact.paths[1], message, remedy)


def _gap(fact: Facts, left: int, right: int) -> float | None:
    """How far the second label lies to the right of the first, mm."""
    if left in fact.centres and right in fact.centres:
        return float(fact.centres[right][0] - fact.centres[left][0])
    return None


def _pairs(names: Mapping[int, str]) -> list[tuple[int, int]]:
    """Labels whose names differ in left and right only."""
    by_rest: dict[str, dict[str, int]] = {}
    for value, name in names.items():
        sides = SIDE.findall(name)
        if len(sides) == 1:
            by_rest.setdefault(SIDE.sub("?", name).lower(), {})[sides[0].lower()[0]] = value
    return [(p["l"], p["r"]) for p in by_rest.values() if len(p) == 2]
