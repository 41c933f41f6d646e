"""Do the directions fit the anatomy? A proof by the coherence of fibres, under every exchange and reversal of axes.

Neighbours along a fibre point the same way. Where axes of the directions were exchanged or reversed against the image,
one steps off the fibre and meets another. After Schilling et al. 2019, doi 10.1016/j.mri.2019.01.018; ours: steps in
mm, the likeness of directions counts in full rather than by a threshold, and spatial blocks say how sure the lead is.

Of the 48 signed permutations 24 are distinct: a direction of diffusion and its opposite are one. What turns image and
directions alike, such as a header with left and right exchanged, cannot be seen this way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from fewscan.errors import ConfigError, DataError
from fewscan.space.geometry import Array, Geometry

STEPS_MM = (2.5, 5.0, 7.5)
LEAST_WEIGHT = 0.25  # of a voxel that counts as fibre; on the scale of fractional anisotropy
LEAST_VOXELS = 200
MOST_VOXELS = 15_000  # more of them change nothing but the time
BLOCK_MM = 20.0
LEAST_LEAD = 3.0
"""Standard errors by which the best must lead before directions are called right, or anything is said against them."""
LARGEST_CHANCE = 0.001
"""Of directions that tell nothing to be called wrong: the best of 23 others leads by chance, most over few blocks."""
LEAST_BLOCKS = 8  # fewer tell no standard error
AS_THEY_ARE = "x,y,z"
LETTERS = "xyz"


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """What the proof found.

    Parameters
    ----------
    verdict : {"right", "wrong", "unsure"}
        Of the directions as they are.
    axes : str
        How to take the axes so that they fit best, as `parse_axes` reads it.
    lead : float
        Of the best before the second where right, before the directions as they are where wrong; standard errors.
    scores : mapping of str to float
        Coherence of the 24 distinct ways, best first; 0 to 1.
    voxels : int
        How many took part.
    """

    verdict: Literal["right", "wrong", "unsure"]
    axes: str
    lead: float
    scores: Mapping[str, float]
    voxels: int

    @property
    def doubted(self) -> bool:
        """Whether another way fits better, but not so clearly that they are called wrong."""
        return self.verdict == "unsure" and self.axes != AS_THEY_ARE and self.lead >= LEAST_LEAD

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return {
            "verdict": self.verdict,
            "axes": self.axes,
            "lead": round(self.lead, 2),
            "voxels": self.voxels,
            "coherence": {name: round(score, 4) for name, score in self.scores.items()},
        }


def prove(
    vectors: NDArray[np.float32],
    weight: NDArray[np.float32],
    *,
    geometry: Geometry,
    frame: Array | None = None,
    exclude: NDArray[np.bool_] | None = None,
) -> Orientation:
    """Compare the coherence of fibres under all signed permutations of the axes.

    Parameters
    ----------
    vectors : (3, X, Y, Z) float
        Unit directions of the strongest fibre in the RAS+ world.
    weight : (X, Y, Z) float
        How clear the fibre is, 0 to 1: fractional anisotropy, or length of the first peak; 0 outside the brain.
    geometry : Geometry
        Their grid.
    frame : (3, 3) float, optional
        From the axes that may have been exchanged to the world, such as `tracts.gradients.fsl_to_world`; the world's
        own when left out.
    exclude : (X, Y, Z) bool, optional
        Tumour, to be left out.
    """
    frame = np.eye(3) if frame is None else frame
    ways = {axes_text(p): frame @ p @ frame.T for p in signed_permutations()}
    inside = ndimage.binary_erosion(weight > 0, iterations=2)
    if exclude is not None:
        inside &= ~exclude
    places = np.argwhere((weight > LEAST_WEIGHT) & inside)
    if len(places) < LEAST_VOXELS:
        return Orientation(verdict="unsure", axes=AS_THEY_ARE, lead=0.0, scores={}, voxels=len(places))
    places = places[:: max(1, len(places) // MOST_VOXELS)]
    like = {name: _likeness(vectors, weight, places, geometry=geometry, turn=turn) for name, turn in ways.items()}
    blocks = np.unique(places * np.array(geometry.spacing) // BLOCK_MM, axis=0, return_inverse=True)[1].ravel()
    sums: dict[str, Array] = {name: np.bincount(blocks, found).astype(float) for name, found in like.items()}
    ranked = sorted(sums, key=lambda name: -float(sums[name].sum()))
    best = ranked[0]
    difference = sums[best] - sums[ranked[1] if best == AS_THEY_ARE else AS_THEY_ARE]
    lead = _lead(difference)
    return Orientation(
        verdict=_verdict(lead, blocks=len(difference), kept=best == AS_THEY_ARE, others=len(ways) - 1),
        axes=best,
        lead=lead,
        scores={name: float(sums[name].sum() / len(places)) for name in ranked},
        voxels=len(places),
    )


def refuse_wrong(found: Orientation, path: Path, *, turn: Array, what: str) -> None:
    """Raise where the proof found the directions wrong, with the remedy.

    Parameters
    ----------
    found : Orientation
        Of directions read with ``turn``.
    path : Path
        File of the directions.
    turn : (3, 3) float
        Axes applied already.
    what : str
        "rows" of a bvecs file or "components" of peaks.

    Raises
    ------
    DataError
        If the verdict is "wrong".
    """
    if found.verdict != "wrong":
        return
    fix = axes_text(turn @ parse_axes(found.axes))
    raise DataError(f"{path}: {misfit(found, fix=fix, what=what)}; give --axes={fix}")


def misfit(found: Orientation, *, fix: str, what: str) -> str:
    """What a proof that found the directions wrong has seen, in words.

    Parameters
    ----------
    found : Orientation
        Wrong.
    fix : str
        How to take the axes.
    what : str
        Of what: "rows" of a bvecs file or "components" of peaks.
    """
    best, now = max(found.scores.values()), found.scores[AS_THEY_ARE]
    return (
        f"directions do not fit the anatomy as they are read (fibre coherence {now:.3f}), but do when the {what} are "
        f"taken as {fix} ({best:.3f}, ahead by {found.lead:.0f} standard errors)"
    )


def said(found: Orientation) -> str:
    """One sentence on the proof.

    Parameters
    ----------
    found : Orientation
        Right or unsure.
    """
    if not found.scores:
        return f"orientation not proven: {found.voxels} voxels of clear fibre are too few"
    names = list(found.scores)
    if found.verdict == "right":
        return (
            f"orientation right: fibre coherence {found.scores[names[0]]:.3f}, next best of 24 is {names[1]} with "
            f"{found.scores[names[1]]:.3f} ({found.lead:.0f} standard errors)"
        )
    how = "which chance may show among 23 other ways" if found.doubted else "which is too little"
    lead = f"ahead by {found.lead:.1f} standard errors, {how}"
    return f"orientation unsure: best is {found.axes}, {lead}; look at the picture"


def parse_axes(text: str) -> Array:
    """Signed permutation from words: ``"y,x,-z"`` takes the second row first and reverses the third.

    Parameters
    ----------
    text : str
        Each of x, y and z once.

    Raises
    ------
    ConfigError
        If it is anything else.

    Examples
    --------
    >>> parse_axes("y,x,-z").tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
    """
    words = [word.strip().lower() for word in text.split(",")]
    if sorted(word.lstrip("+-") for word in words) != list(LETTERS) or any(len(word) > 2 for word in words):
        raise ConfigError(f"axes must hold x, y and z once each, such as x,-y,z, got {text!r}")
    matrix = np.zeros((3, 3))
    for row, word in enumerate(words):
        matrix[row, LETTERS.index(word[-1])] = -1.0 if word.startswith("-") else 1.0
    return matrix


def axes_text(matrix: Array) -> str:
    """The words of `parse_axes` for a signed permutation; of a matrix and its negative the one with fewer signs.

    Directions of diffusion have no sign, so that the two mean the same.

    Parameters
    ----------
    matrix : (3, 3) float
        Signed permutation.

    Examples
    --------
    >>> axes_text(-parse_axes("x,-y,z"))
    'x,-y,z'
    """
    signs = matrix.sum(1)
    if signs.sum() < 0:
        signs, matrix = -signs, -matrix
    letters = (LETTERS[int(np.argmax(np.abs(row)))] for row in matrix)
    return ",".join(f"{'-' if sign < 0 else ''}{letter}" for sign, letter in zip(signs, letters, strict=True))


def signed_permutations() -> list[Array]:
    """All 48 ways to exchange and reverse three axes."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            found.append(matrix)
    return found


def rotations() -> list[Array]:
    """The 24 ways in which a cube can lie: signed permutations that mirror nothing."""
    return [matrix for matrix in signed_permutations() if np.linalg.det(matrix) > 0]


def _likeness(
    vectors: NDArray[np.float32], weight: NDArray[np.float32], places: NDArray[Any], *, geometry: Geometry, turn: Array
) -> Array:
    """Mean over steps along the turned directions of weight times |cosine| with what is met there, one a place.

    A step that does not leave the voxel meets nothing: every voxel is like itself, most often along thick slices.
    """
    here = vectors[(slice(None), *places.T)].T.astype(np.float64)
    last = np.array(geometry.shape) - 1
    step = here @ (np.linalg.inv(geometry.affine[:3, :3]) @ turn).T  # one mm along the turned direction, in voxels
    total, steps = np.zeros(len(places)), np.zeros(len(places))
    for reach in (s * mm for s in (1, -1) for mm in STEPS_MM):
        met = np.clip(np.rint(places + reach * step).astype(int), 0, last)
        left, there = (met != places).any(1), tuple(met.T)
        total += left * weight[there] * np.abs((vectors[(slice(None), *there)].T * here).sum(1))
        steps += left
    return total / np.maximum(steps, 1)


def _verdict(lead: float, *, blocks: int, kept: bool, others: int) -> Literal["right", "wrong", "unsure"]:
    """What a lead over so many blocks says, of the directions as they are or of the best of so many others."""
    if kept or lead < LEAST_LEAD:
        return "right" if kept and lead >= LEAST_LEAD else "unsure"
    chance = others * float(special.stdtr(blocks - 1, -lead))  # of any of them, by Student and Bonferroni
    return "wrong" if chance <= LARGEST_CHANCE else "unsure"


def _lead(difference: Array) -> float:
    """Sum over spatial blocks in units of its standard error, the blocks taken as independent."""
    if len(difference) < LEAST_BLOCKS:
        return 0.0
    error = float(np.sqrt(len(difference) * difference.var(ddof=1)))
    return float(difference.sum() / error) if error > 0 else 0.0
