"""Signs of doubt in an answer, without a reference: how sharp and how steady it is, and where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewscan.judge.metrics import dice
from fewscan.learn import infer
from fewscan.learn.batches import bytes_on_plan, on_plan
from fewscan.learn.hardware import free_memory_bytes
from fewscan.learn.plan import Plan
from fewscan.learn.views import believed, views
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume

VIEWS = 3
SLICES = 3  # to look at first
HELD = 12  # values of 32 bits for each voxel and class that views take at most, together with what comes of them


class Doubt(NamedTuple):
    """What speaks against an answer.

    Parameters
    ----------
    signs : mapping of str to mapping of str to float
        By label name, of those that were found; 0 to 1, high where there is no doubt. A label without signs was not
        found.
    slices : tuple of int
        Axial slices with most doubt, most first, counted upwards from the lowest one.
    heights_mm : tuple of float
        Where the middles of these lie, RAS+.
    """

    signs: dict[str, dict[str, float]]
    slices: tuple[int, ...]
    heights_mm: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Slices, for a record."""
        return {"slices": list(self.slices), "heights_mm": [round(mm, 1) for mm in self.heights_mm]}


def doubt(volume: Volume, plan: Plan, *, predictor: infer.Predictor) -> Doubt | None:
    """Look for doubt in the answer to a scan; None where it is too large to be held whole.

    Parameters
    ----------
    volume : Volume
        On any grid.
    plan : Plan
        Of the model.
    predictor : callable
        Windows to logits.
    """
    if bytes_on_plan(volume, plan, values=HELD * plan.classes) > free_memory_bytes():
        return None
    answers = views(
        on_plan(volume, plan), plan, predictor=predictor, count=VIEWS, answer=infer.probabilities
    )  # as they are: the mask that is written is made of them
    slices = _slices(torch.stack(answers).mean(0), plan, volume.geometry)
    middle = (np.array(volume.geometry.shape) - 1) / 2
    heights = tuple(float((volume.geometry.affine @ [middle[0], middle[1], z, 1])[2]) for z in slices)
    return Doubt(signs_of(answers, plan), slices, heights)


def signs_of(answers: Sequence[Tensor], plan: Plan) -> dict[str, dict[str, float]]:
    """Sharpness and steadiness of each label that was found.

    ``sharp`` is the soft Dice of a label's probability with the mask that is predicted: what Dice would be, were the
    probabilities right. ``steady`` is the mean Dice of that mask with those of the disturbed copies.

    Parameters
    ----------
    answers : sequence of (K, X, Y, Z) float
        Class probabilities of the scan, then of its disturbed copies, as the network says them.
    plan : Plan
        Label names, and the weights of classes in the loss: the mask is made with them, as predictions are, but how
        likely a label is shows without them only.
    """
    right = believed(answers[0], plan)
    likeliest = [answer.argmax(0) for answer in answers]
    found = {}
    for k, name in enumerate(plan.names.values(), start=1):
        masks = [answer[k] > 0.5 for answer in answers] if plan.overlapping else [best == k for best in likeliest]
        inside = masks[0]
        if not bool(inside.any()):
            continue
        probs, size = right[k], float(inside.sum())
        steady = [dice(inside.numpy(), other.numpy()) for other in masks[1:]]
        sharp = 2 * float(probs[inside].sum()) / (float(probs.sum()) + size)
        found[name] = {"sharp": sharp, "steady": float(np.mean(steady)) if steady else 1.0}
    return found


def _doubtful(mean: Tensor, plan: Plan) -> Tensor:
    """Doubt at each voxel (X, Y, Z); of labels that overlap that of all of them, since each is an answer of its own."""
    if plan.overlapping:
        return torch.minimum(mean[1:], 1 - mean[1:]).sum(0)
    return 1 - mean.max(0).values


def _slices(mean: Tensor, plan: Plan, geometry: Geometry) -> tuple[int, ...]:
    """Axial slices of the scan's own grid with most doubt in them, apart from each other."""
    weight = _doubtful(mean, plan).sum((0, 1)).numpy()
    depth = geometry.shape[2]
    at = (np.arange(len(weight)) + 0.5) * depth / len(weight) - 0.5
    own = np.interp(np.arange(depth), at, weight)
    apart, chosen = max(2, depth // 12), list[int]()
    for z in np.argsort(-own, kind="stable"):
        if own[z] > 0 and all(abs(int(z) - other) >= apart for other in chosen):
            chosen.append(int(z))
        if len(chosen) == SLICES:
            break
    return tuple(chosen)
