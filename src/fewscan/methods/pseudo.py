"""Labels for unlabelled scans while both networks learn: what atlases and segmenter say together.

Xu & Niethammer 2019 let a single warped label map teach the segmenter. Ours: several atlases vote, and the segmenter
with them, by what each is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewscan.judge.metrics import dice
from fewscan.learn import infer
from fewscan.learn.batches import Prepared
from fewscan.learn.pairs import Whole
from fewscan.learn.registrar import Registrar
from fewscan.learn.session import Session
from fewscan.methods import draft
from fewscan.space.deformable import DeformConfig
from fewscan.space.volume import IGNORE

SURE = 0.5  # least share of the fused vote from which a pseudo-label counts
ALONE = 0.75  # what a vote's Dice is taken for where only one scan is labelled, so that none can be left out
BEST = 0.95  # most that a Dice estimated without a label is believed to be
COMPARED = 3  # scans from which atlases and segmenter are rated
LABELLING = 0.1  # most of a budget that the labelling of one round may take
FULL = DeformConfig()  # where there is time to deform every atlas in earnest
Index = NDArray[np.int16]


class Drafted(NamedTuple):
    """What the atlases say of a scan: label and its share of the vote, and the atlas most like it, in its shape."""

    vote: tuple[NDArray[np.uint16], NDArray[np.float32]]
    nearest: draft.Voter


class Labeller:
    """Atlases and segmenter of one round.

    Parameters
    ----------
    session : Session
        Of the run.
    wholes : sequence of Whole
        All its cases on the registrar's grid.
    registrar : Registrar
        As it is when the round begins.
    predictor : callable
        The segmenter, as it is then.
    count : int
        Scans to label, between which the time is shared.
    """

    def __init__(
        self, session: Session, wholes: Sequence[Whole], *, registrar: Registrar, predictor: infer.Predictor, count: int
    ) -> None:
        self.session, self.wholes, self.count = session, {case.id: case for case in wholes}, count
        self.registrar, self.predictor = registrar, predictor
        self.cases = {case.id: case for case in (*session.labelled, *session.unlabelled)}
        self.begin, self.kept = session.fraction(), dict[str, Drafted | None]()
        refine = session.settings.joint.refine
        self.effort = DeformConfig(shrink=(2, 1), steps=(refine * 3 // 4, refine - refine * 3 // 4))
        self.measured = session.bounds.seconds is None  # a run bounded by steps must repeat bit for bit

    def spent(self) -> float:
        """Share of the run that this labelling has taken."""
        return self.session.fraction() - self.begin

    def draft(self, case: Prepared) -> Drafted | None:
        """The vote of the other labelled scans, None where all fold; how long the first takes sets the effort."""
        if case.id in self.kept:
            return self.kept.pop(case.id)
        others = [whole for whole in self.wholes.values() if whole.labelled and whole.id != case.id]
        effort, before = self.effort if self.measured else FULL, self.spent()
        voters = draft.shaped(
            self.wholes[case.id], others, cases=self.cases, registrar=self.registrar, config=effort,
            most=self.session.settings.joint.atlases,
        )  # fmt: skip
        if not self.measured and (self.spent() - before) * self.count < LABELLING:
            self.effort = FULL
        self.measured = True
        target = torch.from_numpy(np.array(case.image[:1]))
        return Drafted(draft.fuse(target, voters, fusion="local"), voters[0]) if voters else None

    def belief(self, case: Prepared) -> Tensor:
        """The segmenter's probabilities, without the weights that its loss gave small classes."""
        plan = self.session.plan
        probs = infer.probabilities(torch.from_numpy(np.array(case.image)), plan, predictor=self.predictor)
        if plan.weights:
            probs = probs / torch.tensor(plan.weights).view(-1, 1, 1, 1)
            probs = probs / probs.sum(0)
        return probs

    def trust(self, scans: Sequence[Prepared]) -> tuple[float, float]:
        """Weights of atlases and segmenter, from what each is worth.

        Labelled scans left out tell what the atlases are worth. Were the errors of the two independent, their agreement
        on scans without labels would be the product of both, which tells what the segmenter is worth.
        """
        config, votes, agreements = self.session.settings.joint, [], []
        for case in self.session.labelled[:COMPARED] if len(self.session.labelled) > 1 else ():
            if (drafted := self.draft(case)) is not None:
                assert case.label is not None
                found, truth = (np.where(x < 0, 0, x) for x in (index_of(drafted.vote[0]), np.array(case.label)))
                votes.append(mean_dice(torch.from_numpy(found), torch.from_numpy(truth)))
        for case in scans:
            drafted = self.kept[case.id] = self.draft(case)
            if drafted is not None:
                mine = self.belief(case).argmax(0)
                agreements.append(mean_dice(mine, torch.from_numpy(np.maximum(index_of(drafted.vote[0]), 0))))
        worth = float(np.mean(votes)) if votes else ALONE
        agreement = float(np.mean(agreements)) if agreements else worth
        trust = vote_weights(worth, agreement)
        self.session.request.say(
            f"atlases alone reach a Dice of {worth:.2f}{'' if votes else ' (assumed)'} and agree with the segmenter by "
            f"{agreement:.2f}: weights {trust[0]:.2f} and {trust[1]:.2f}"
            if config.agree else f"atlases alone reach a Dice of {worth:.2f}"
        )  # fmt: skip
        return trust


def vote_weights(worth: float, agreement: float) -> tuple[float, float]:
    """Weights of atlases and segmenter in a fused vote: the log odds of being right, of independent voters.

    Parameters
    ----------
    worth : float
        Dice of the atlases' vote.
    agreement : float
        Dice between atlases and segmenter.

    Examples
    --------
    >>> atlases, segmenter = vote_weights(0.8, 0.5)
    >>> atlases > 2 * segmenter
    True
    """
    segmenter = min(agreement / max(worth, 1e-3), BEST)
    odds = [max(0.0, math.log(d / (1 - d))) for d in (min(max(worth, 0.01), BEST), max(segmenter, 0.01))]
    whole = sum(odds)
    return (odds[0] / whole, odds[1] / whole) if whole > 0 else (0.5, 0.5)


def fused(
    label: NDArray[np.uint16], sure: NDArray[np.float32], *, belief: Tensor | None, trust: tuple[float, float]
) -> Index:
    """Class index where atlases and segmenter together are sure, else -1; the atlases alone without a belief.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Class indices that won the atlases' vote, `IGNORE` where none was looked at.
    sure : (X, Y, Z) float32
        Their share of it.
    belief : (K, X, Y, Z) float, optional
        The segmenter's probabilities.
    trust : (float, float)
        Weights of atlases and segmenter, which sum to one.
    """
    index, share = torch.from_numpy(index_of(label)).long(), torch.from_numpy(sure)
    heard = (index >= 0) & (share > 0)
    if belief is None:
        return torch.where(heard & (share >= SURE), index, -1).to(torch.int16).numpy()
    both = belief * trust[1]
    both.scatter_add_(0, index.clamp(min=0)[None], (trust[0] * share)[None])
    top, winner = both.max(0)
    return torch.where(heard & (top >= SURE), winner, -1).to(torch.int16).numpy()


def index_of(label: NDArray[np.uint16]) -> Index:
    """Class indices, -1 where none was looked at.

    Parameters
    ----------
    label : (X, Y, Z) uint16
        Class indices, `IGNORE` where none was looked at.
    """
    return np.where(label == IGNORE, -1, label.astype(np.int32)).astype(np.int16)


def mean_dice(a: Tensor, b: Tensor) -> float:
    """Mean over the labels that occur in either map; 1 when none does.

    Parameters
    ----------
    a, b : (X, Y, Z) int
        Class indices.
    """
    one, other = a.numpy(), b.numpy()
    scores = [dice(one == k, other == k) for k in np.union1d(one, other) if k > 0]
    return float(np.mean(scores)) if scores else 1.0
