"""Which unlabelled scans to label next: those a model is unsure of and has seen nothing like, no two of them alike.

What a scan would bring is taken to be its doubt times its distance to the nearest scan that is labelled or was chosen
before it. Doubt is that of `judge.doubt`: answers that are blurred, or that change under small disturbances. Distance
is between means and deviations of the features of the model's encoder. Scans are chosen one after the other, the
farthest first as in k-centre clustering (Gonzalez 1985, doi 10.1016/0304-3975(85)90224-5; for choosing what to label:
Sener & Savarese 2018, arXiv 1708.00489). That doubt is a factor, that a label which most scans show counts as doubt
where it is not found, and that patients take turns, is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from fewscan.judge.looks import Array, Look

FAR, NEAR = 1.5, 0.5  # times the usual distance from which a scan is called unlike the labelled ones, or like another
FOREIGN = 4.0  # and from which it may not belong there at all
UNSURE, MORE, CALM = 0.25, 1.25, 0.05  # doubt called so; times the median also, from CALM on
LEAST = 0.005  # doubt of a scan at least: where a model is sure of everything, distance alone decides


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """An unlabelled scan that was looked at.

    Parameters
    ----------
    look : Look
        Its features, and whose it is.
    signs : mapping of str to mapping of str to float
        Signs of doubt of each label that was found, 0 to 1, high where there is none.
    """

    look: Look
    signs: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What speaks for labelling a scan, given the labelled ones and those suggested before it.

    Parameters
    ----------
    id, patient : str
        Which scan, and whose.
    worth : float
        Doubt times distance: only its order means anything.
    unsure : float
        Mean doubt over the labels, 0 to 1.
    label : str
        The label with most doubt; empty where none was found in any scan.
    unlike : float
        Distance to the nearest scan that is labelled or was suggested before, in usual distances of a labelled scan to
        the nearest one of another patient.
    nearest : str
        That scan; empty where there is none.
    reason : str
        In words.
    """

    id: str
    patient: str
    worth: float
    unsure: float
    label: str
    unlike: float
    nearest: str
    reason: str


def rank(candidates: Sequence[Candidate], labelled: Sequence[Look], *, every: bool = True) -> list[Suggestion]:
    """All candidates in the order in which to label them.

    No patient comes a second time before every other one has come once; equals are ordered by their names.

    Parameters
    ----------
    candidates : sequence of Candidate
        Scans without a label.
    labelled : sequence of Look
        Scans with one; without any, the first suggestion goes by doubt alone.
    every : bool
        Whether these are all that there are; else reasons tell of those looked at.
    """
    found = sorted(candidates, key=lambda one: one.look.id)
    labelled = sorted(labelled, key=lambda one: one.id)
    doubts = doubts_of([one.signs for one in found])
    unsure = [max(LEAST, float(np.mean(list(row.values())))) if row else 1.0 for row in doubts]
    gaps, usual = _gaps([one.look for one in found], labelled)
    count, fresh = len(found), gaps[:, len(found) :]
    far = fresh.min(1) if labelled else np.full(count, gaps.max(initial=1.0))
    near = [labelled[int(row.argmin())].id if labelled else "" for row in fresh]
    alone, order, turns = far.copy(), list[Suggestion](), Counter[str]()
    left, much = set(range(count)), _much(unsure)
    while left:
        turn = min(turns[found[i].look.patient] for i in left)
        open_ = [i for i in sorted(left) if turns[found[i].look.patient] == turn]
        best = max(open_, key=lambda i: (unsure[i] * far[i], -i))
        look, row = found[best].look, doubts[best]
        label = max(row, key=lambda name: row[name]) if row else ""
        words = [_doubted(found[best].signs, label, over=bool(row) and row[label] >= much)]
        words.append(_distant(float(alone[best]) / usual, every=every) if labelled else "")
        words.append(f"much like {near[best]}" if near[best] and far[best] <= NEAR * usual else "")
        reason = "; ".join(word for word in words if word) or "nothing stands out"
        order.append(Suggestion(
            id=look.id, patient=look.patient, worth=unsure[best] * float(far[best]) / usual, unsure=unsure[best],
            label=label, unlike=float(far[best]) / usual if near[best] else math.nan, nearest=near[best], reason=reason,
        ))  # fmt: skip
        left.discard(best)
        turns[look.patient] += 1
        for i in left:
            if gaps[i, best] < far[i] or not near[i]:
                far[i], near[i] = gaps[i, best], look.id
    return order


def doubts_of(signs: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, float]]:
    """Doubt of each label of each scan, 0 to 1; a label that most scans show is doubted where it is not found.

    Parameters
    ----------
    signs : sequence of mapping of str to mapping of str to float
        For each scan, the signs of each label that was found in it.

    Examples
    --------
    >>> sure, torn = {"sharp": 1.0, "steady": 1.0}, {"sharp": 0.75, "steady": 0.25}
    >>> doubts_of([{"liver": sure}, {"liver": torn}, {}])
    [{'liver': 0.0}, {'liver': 0.5}, {'liver': 1.0}]
    """
    shown = Counter(name for row in signs for name in row)
    usual = [name for name, count in sorted(shown.items()) if 2 * count > len(signs)]
    return [
        {name: 1 - float(np.mean(list(found.values()))) for name, found in row.items()}
        | {name: 1.0 for name in usual if name not in row}
        for row in signs
    ]


def _much(unsure: Sequence[float]) -> float:
    """Doubt from which a label is called unsure."""
    return min(UNSURE, max(CALM, MORE * float(np.median(unsure)))) if len(unsure) else UNSURE


def _distant(unlike: float, *, every: bool) -> str:
    known = "every labelled scan" if every else "every labelled scan that was looked at"
    if unlike >= FOREIGN:
        return f"very unlike {known}: see first whether it belongs here"
    return f"unlike {known}" if unlike >= FAR else ""


def _doubted(signs: Mapping[str, Mapping[str, float]], label: str, *, over: bool) -> str:
    if not signs:
        return "no label was found"
    if label not in signs:
        return f"no {label} was found, which most scans show"
    return f"unsure in {label}" if over else ""


def _gaps(found: Sequence[Look], labelled: Sequence[Look]) -> tuple[Array, float]:
    """Distances of the first to (these, labelled ones), and the usual one of a labelled scan to the nearest other."""
    looks = [*found, *labelled]
    points = _points(looks)
    gaps = cdist(points, points) / math.sqrt(points.shape[1])
    count = len(found)
    strangers = np.array([[a.patient != b.patient for b in labelled] for a in labelled]).reshape(
        len(labelled), len(labelled)
    )
    inner = np.where(strangers, gaps[count:, count:], np.inf).min(1, initial=np.inf)
    inner = inner[np.isfinite(inner)]
    outer = gaps[:count, count:].min(1) if labelled else gaps[:count, :count][~np.eye(count, dtype=bool)]
    known = inner if len(inner) else outer
    usual = float(np.median(known)) if len(known) else 1.0
    return np.asarray(gaps[:count]), max(usual, 1e-6)


def _points(looks: Sequence[Look]) -> Array:
    """Where scans lie, (scans, D): mean and deviation of their features, in deviations within a scan.

    Without an encoder, or where tissue fills no cell of its grid in one of the scans: normalised intensities.
    """
    if not all(len(one.features) for one in looks):
        return np.stack([one.quantiles.reshape(-1) for one in looks])
    means, spreads = (np.stack([f(one.features, axis=0) for one in looks]) for f in (np.mean, np.std))
    scale = np.maximum(np.sqrt((spreads**2).mean(0)), 1e-6)
    found: Array = np.concatenate([means / scale, spreads / scale], 1)
    return found
