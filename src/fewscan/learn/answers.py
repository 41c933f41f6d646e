"""From what a network says of each class to labels: one a voxel, or a mask each where they may overlap.

An answer is (K, X, Y, Z), background first: logits, probabilities, shares of a vote, or labels that are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.learn import overlap
from fewscan.learn.batches import Prepared
from fewscan.learn.plan import Plan
from fewscan.space.geometry import Shape
from fewscan.space.volume import bounding_box, one_hot

CLEAR = 0.2  # by which each of the labels that overlap must differ from one half to be learnt from
SPECK = 0.5  # of the largest piece: smaller ones are dropped where training labels were always one piece
SPECK_OF_BUNDLE = 0.05  # the same of labels that overlap: a tumour, or noise, may cut a bundle into large parts


@dataclass(frozen=True, eq=False)
class Segmented:
    """A predicted scan, on the scan's own grid in RAS+ order.

    Parameters
    ----------
    label : (X, Y, Z) uint8 or uint16
        Label values; of labels that overlap a mask each, (L, X, Y, Z) bool, in the order of the plan's names.
    probs : (K, X, Y, Z) uint8, optional
        Probability of each class in 255ths, background first.
    """

    label: NDArray[Any]
    probs: NDArray[np.uint8] | None

    def mask(self, value: int, plan: Plan) -> NDArray[np.bool_]:
        """Voxels of a label.

        Parameters
        ----------
        value : int
            A key of the plan's names.
        plan : Plan
            That ruled the prediction.
        """
        found: NDArray[np.bool_] = (
            self.label[list(plan.names).index(value)] if plan.overlapping else self.label == value
        )
        return found


def shares(logits: Tensor, plan: Plan) -> Tensor:
    """Class probabilities of logits (K, X, Y, Z): by softmax; of labels that overlap by a sigmoid each, and of class 0
    how sure it is that there is none.

    Parameters
    ----------
    logits : (K, X, Y, Z) float
        Network output.
    plan : Plan
        Whether labels overlap.

    Examples
    --------
    The first logit of labels that overlap means nothing:

    >>> from types import SimpleNamespace
    >>> logits = torch.tensor([5.0, 0.0, 2.0]).view(3, 1, 1, 1)
    >>> (100 * shares(logits, SimpleNamespace(overlapping=True))).flatten().round().tolist()
    [12.0, 50.0, 88.0]
    """
    if not plan.overlapping:
        return logits.softmax(0)
    return after_none(logits[1:].sigmoid())


def after_none(own: Tensor) -> Tensor:
    """Probabilities of labels that overlap (L, X, Y, Z), after how sure it is that there is none (K, X, Y, Z).

    Parameters
    ----------
    own : (L, X, Y, Z) float
        Of each label.
    """
    return torch.cat([1 - own.amax(0, keepdim=True), own])


def certain(case: Prepared) -> Tensor:
    """The labels of a case as an answer (K, X, Y, Z) of 0 and 1; background where nobody looked.

    Parameters
    ----------
    case : Prepared
        Labelled.
    """
    index = torch.from_numpy(np.array(case.label)).long()
    if case.table is None:
        return one_hot(index[None].clamp(min=0), len(case.drawn))[0]
    return after_none(torch.from_numpy(case.table).T[1:, index].float())


def chosen(answer: Tensor, plan: Plan, *, half: float = 0.5) -> Tensor:
    """The likeliest class (X, Y, Z); of labels that overlap those above one half, (L, X, Y, Z) bool.

    Parameters
    ----------
    answer : (K, X, Y, Z) float
        Background first.
    plan : Plan
        Whether labels overlap.
    half : float
        Answer that means one half: 0 of logits, 0.5 of probabilities.
    """
    return answer[1:] > half if plan.overlapping else answer.argmax(0)


def labelled(answer: Tensor, plan: Plan) -> Tensor:
    """Voxels (X, Y, Z) that hold a label, by class probabilities.

    Parameters
    ----------
    answer : (K, X, Y, Z) float
        Background first.
    plan : Plan
        Whether labels overlap.
    """
    found = chosen(answer, plan)
    return found.any(0) if plan.overlapping else found > 0


def confident(answer: Tensor, plan: Plan) -> tuple[NDArray[np.int16], NDArray[np.bool_] | None]:
    """What can be learnt from an answer: class indices, -1 where none has half of it.

    Of labels that overlap combinations and their table, -1 where one of them is less than `CLEAR` from one half.

    Parameters
    ----------
    answer : (K, X, Y, Z) float
        Class probabilities, background first.
    plan : Plan
        Whether labels overlap.
    """
    if plan.overlapping:
        return overlap.likely(answer[1:], margin=CLEAR)
    top, winner = answer.max(0)
    return torch.where(top >= 0.5, winner, -1).to(torch.int16).numpy(), None


def decided(answer: Tensor, plan: Plan, *, half: float) -> NDArray[Any]:
    """The likeliest label's value (X, Y, Z); of labels that overlap those above one half, (L, X, Y, Z) bool.

    Parameters
    ----------
    answer : (K, X, Y, Z) float
        Logits or probabilities, background first.
    plan : Plan
        Labels.
    half : float
        Answer that means one half: 0 of logits, 0.5 of probabilities.
    """
    found: NDArray[Any] = chosen(answer, plan, half=half).numpy()
    return found if plan.overlapping else values_of(plan)[found]


def values_of(plan: Plan) -> NDArray[Any]:
    """Label value of each class (K,).

    Parameters
    ----------
    plan : Plan
        Labels.
    """
    return np.array([0, *plan.names], dtype=np.uint16 if max(plan.names, default=0) > 255 else np.uint8)


def empty(shape: Shape, plan: Plan) -> NDArray[Any]:
    """Labels that are yet to be decided, none so far.

    Parameters
    ----------
    shape : (X, Y, Z) int
        Of the scan.
    plan : Plan
        Labels.
    """
    if plan.overlapping:
        return np.zeros((len(plan.names), *shape), np.bool_)
    return np.zeros(shape, dtype=values_of(plan).dtype)


def keep_sole_pieces(label: NDArray[Any], plan: Plan) -> NDArray[Any]:
    """Drop specks of labels that were one connected piece in every training case.

    Parameters
    ----------
    label : (X, Y, Z) int or (L, X, Y, Z) bool
        Label values, or masks of labels that overlap; changed in place and returned.
    plan : Plan
        Knows which labels.
    """
    values = [0, *plan.names]
    for k in plan.sole:
        if plan.overlapping:
            _drop_specks(label[k - 1], True, least=SPECK_OF_BUNDLE)
        else:
            _drop_specks(label, values[k], least=SPECK)
    return label


def _drop_specks(label: NDArray[Any], value: int, *, least: float) -> None:
    """Take away pieces below this share of the largest."""
    box = bounding_box(label == value, margin=1)
    inside = label[box] == value
    if not inside.any():
        return
    pieces = cc3d.connected_components(inside, connectivity=26)
    sizes = np.zeros(int(pieces.max()) + 1, dtype=np.int64)
    for slab in pieces:  # one at a time: counting takes eight bytes a voxel
        sizes += np.bincount(slab.reshape(-1), minlength=len(sizes))
    sizes[0] = 0
    speck = (sizes > 0) & (sizes < least * sizes.max())
    for row, slab in zip(label[box], pieces, strict=True):
        row[speck[slab]] = 0
