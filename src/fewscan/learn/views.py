"""What a network answers to a scan and to disturbed copies of it: a sturdier mean, and a sign of how sure it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewscan.learn import infer
from fewscan.learn.plan import Plan
from fewscan.space import affine, directions
from fewscan.space.geometry import Array, Geometry, thick

TURN, STRETCH = 0.2, 0.1  # rad and logarithm of scale by which views differ at most
GAIN = (0.85, 1.15)


class Answer(Protocol):
    """A scan on the plan's grid to class probabilities (K, X, Y, Z)."""

    def __call__(self, image: Tensor, plan: Plan, *, predictor: infer.Predictor) -> Tensor: ...


def belief(image: Tensor, plan: Plan, *, predictor: infer.Predictor) -> Tensor:
    """Class probabilities (K, X, Y, Z), without the weights that the loss gave small classes.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        On the plan's grid, normalised.
    plan : Plan
        Windows and weights.
    predictor : callable
        Windows to logits.
    """
    return believed(infer.probabilities(image, plan, predictor=predictor), plan)


def believed(probs: Tensor, plan: Plan) -> Tensor:
    """Class probabilities of a network's answer, without the weights that the loss gave small classes.

    Parameters
    ----------
    probs : (K, X, Y, Z) float
        As the network says them.
    plan : Plan
        Weights.
    """
    if plan.weights:
        probs = probs / torch.tensor(plan.weights).view(-1, 1, 1, 1)
        probs = probs / probs.sum(0)
    return probs


def views(
    image: Tensor, plan: Plan, *, predictor: infer.Predictor, count: int, answer: Answer = belief
) -> list[Tensor]:
    """Class probabilities of the scan as it is, and of copies turned, stretched and brightened, each turned back.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        On the plan's grid, normalised.
    plan : Plan
        Windows and weights.
    predictor : callable
        Windows to logits.
    count : int
        Of the copies.
    answer : callable
        What is asked of the network: `belief`, or `infer.probabilities` as a prediction takes them.
    """
    found = [answer(image, plan, predictor=predictor)]
    for grid, matrix, gain in _turns(image.shape[1:], plan.spacing, count=count):
        seen = affine.onto(image, grid, grid=grid, matrix=matrix) * gain
        if plan.kind != "scalar":
            linear = torch.from_numpy(matrix[:3, :3]).float().view(1, 3, 3, 1, 1, 1)
            seen = directions.follow(seen[None], linear, kind=plan.kind)[0]
        back: Array = np.asarray(np.linalg.inv(matrix), np.float64)
        found.append(affine.onto(answer(seen, plan, predictor=predictor), grid, grid=grid, matrix=back))
    return found


def _turns(shape: Sequence[int], spacing: Sequence[float], *, count: int) -> Iterator[tuple[Geometry, Array, float]]:
    """Small rotations, scalings and changes of gain, the same for every scan; thick slices are turned in plane only."""
    x, y, z = shape
    grid = Geometry((x, y, z), np.diag([*spacing, 1.0]))
    middle = torch.from_numpy(grid.affine[:3, :3] @ ((np.array(shape) - 1) / 2))
    free = ~np.array(thick(spacing))  # an axis of thick slices is neither turned away nor stretched
    rng = np.random.default_rng(0)
    for _ in range(count):
        angles = rng.uniform(-TURN, TURN, 3) * [free[1] and free[2], free[0] and free[2], free[0] and free[1]]
        scales = rng.uniform(-STRETCH, STRETCH, 3) * free
        yield grid, affine.build(torch.tensor([*angles, *scales, *[0.0] * 6]), middle).numpy(), rng.uniform(*GAIN)
