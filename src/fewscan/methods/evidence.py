"""What speaks for or against a segmenter without any further label; the guards of several methods look at it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fewscan.judge.metrics import dice
from fewscan.learn import augment, infer
from fewscan.learn.answers import certain, chosen
from fewscan.learn.batches import Prepared
from fewscan.learn.plan import Plan
from fewscan.learn.session import Session

WORSE = {"consistency": 0.02, "labelled": 0.03}  # Dice by which a later segmenter must not be worse
FIT = 3.0  # standard deviations, of the atlases among themselves, by which their likeness may fall short
ALONE = 0.75  # what a vote's Dice is taken for where only one scan is labelled, so that none can be left out
SLACK = 0.02  # added to that deviation, and the least one of a worth: a handful of atlases tells them badly
ALIKE = 0.83  # of what vote and first mask are worth together: least Dice between them for both to be believed
UNSTEADY = 4.0  # Dice that a first mask is short of for each that it loses over disturbed views of the scan
LEAST = 0.6  # ... and the least it is taken for by this sign alone, which is a rough one
AT_HOME = 0.5  # how far to go where a model is at home
WELL = 2.0  # standard deviations, of the votes' worth, by which agreement exceeds it where a model is at home
LEAST_SEEN = 0.5  # share of the structures that atlases must reach


class Known(NamedTuple):
    """What atlases are worth among themselves, each left out once with all scans of its patient.

    Parameters
    ----------
    worths : tuple of float
        Dice of the others' vote on each; empty where none could be left out.
    likeness : tuple of float
        How alike the deformed others are to each, around its structures; as many.
    """

    worths: tuple[float, ...]
    likeness: tuple[float, ...]

    @property
    def worth(self) -> float:
        """Mean Dice of a vote; assumed where none could be left out."""
        return float(np.mean(self.worths)) if self.worths else ALONE

    def worth_at(self, likeness: float) -> float:
        """Of a vote on a scan that the deformed atlases are so alike to: less, where they fit it worse than each other.

        Parameters
        ----------
        likeness : float
            Of the deformed atlases and the scan, around its structures.
        """
        usual = float(np.mean(self.likeness)) if self.likeness else 0.0
        return self.worth * min(1.0, max(0.0, likeness) / usual) if usual > 0 else self.worth

    def strength(self, agreement: float) -> float:
        """How far to go from a model's answer towards the personalised one.

        A vote that agrees with the first mask better than it does with drawn labels says nothing against that mask:
        there the change brings little on the mean, and half of it brings as much and harms fewer scans.

        Parameters
        ----------
        agreement : float
            Dice of vote and first mask.
        """
        if len(self.worths) < 2:
            return 1.0
        beyond = (agreement - self.worth) / max(float(np.std(self.worths, ddof=1)), SLACK)
        return 1 - (1 - AT_HOME) * min(1.0, max(0.0, beyond / WELL))

    @property
    def floor(self) -> float:
        """Likeness below which the atlases do not fit a scan."""
        spread = float(np.std(self.likeness, ddof=1)) if len(self.likeness) > 1 else 0.0
        return float(np.mean(self.likeness)) - FIT * (spread + SLACK) if self.likeness else 0.0


def one_each(atlases: Sequence[Prepared], *, most: int) -> list[Prepared]:
    """Atlases to leave out in turn, a scan of every patient before a second one of any; none of a single patient.

    Parameters
    ----------
    atlases : sequence of Prepared
        All there are.
    most : int
        How many to leave out.
    """
    turns, order = Counter[str](), []
    for atlas in atlases:
        order.append((turns[atlas.whose], atlas))
        turns[atlas.whose] += 1
    return [atlas for _, atlas in sorted(order, key=lambda row: row[0])][:most] if len(turns) > 1 else []


def uncalibrated(known: Known) -> str:
    """Why nobody can tell whether atlases fit a scan; empty where they were compared with each other.

    Parameters
    ----------
    known : Known
        Of the atlases.
    """
    if known.likeness:
        return ""
    return (
        "how well atlases usually fit shows only with those of two patients that fit each other, and nothing was "
        "calibrated; give more with --atlases, or ask for --personalize always"
    )


def reliable(consistency: float) -> float:
    """What a first mask is worth at most, by how steady it is over disturbed views of the scan.

    Parameters
    ----------
    consistency : float
        Mean Dice of the answers to those views with their mean.

    Examples
    --------
    >>> round(reliable(0.97), 2), round(reliable(0.93), 2), reliable(0.8)
    (0.88, 0.72, 0.6)
    """
    return max(LEAST, 1 - UNSTEADY * (1 - consistency))


def objection(evidence: Mapping[str, float]) -> str:
    """What speaks against atlases in the shape of a scan; empty where nothing does.

    Parameters
    ----------
    evidence : mapping of str to float
        ``reached``, ``likeness``, ``likeness_floor``, ``agreement``, ``atlases_worth`` and ``consistency``.
    """
    if evidence["reached"] < LEAST_SEEN:
        return f"the atlases reach {evidence['reached']:.0%} of the structures only: another field of view?"
    if evidence["likeness"] < evidence["likeness_floor"]:
        return (
            f"the deformed atlases fit the scan by {evidence['likeness']:.3f}, at least "
            f"{evidence['likeness_floor']:.3f} is usual among themselves: another contrast, the other side or "
            "another body part?"
        )
    # an unsteady first mask explains by itself why sound atlases disagree with it: there they are to correct it
    if evidence["agreement"] < ALIKE * evidence["atlases_worth"] * reliable(evidence["consistency"]):
        return (
            f"atlases and first mask agree by a Dice of {evidence['agreement']:.2f} only, where the atlases are worth "
            f"{evidence['atlases_worth']:.2f}: one of them is wrong"
        )
    return ""


def setback(evidence: Mapping[str, float]) -> str:
    """What speaks for the answer of before, once that of after is there; empty where nothing does.

    Parameters
    ----------
    evidence : mapping of str to float
        ``consistency`` and, where a network was refined, ``consistency_after``.
    """
    before = evidence["consistency"]
    after = evidence.get("consistency_after", before)
    if after < before - WORSE["consistency"]:
        return f"the refined copy is less steady: {after:.3f} over disturbed views of the scan, {before:.3f} before"
    return ""


def consistency(case: Prepared, session: Session, *, predictor: infer.Predictor) -> float:
    """Dice between the answers to a scan and to a copy of it with other contrast, shading and noise.

    Parameters
    ----------
    case : Prepared
        With or without labels.
    session : Session
        Plan and strength of the change.
    predictor : callable
        Windows to logits.
    """
    image = torch.from_numpy(np.array(case.image))
    rng, shape = torch.Generator().manual_seed(0), (image.shape[1], image.shape[2], image.shape[3])
    config, spacing = session.settings.augment, session.plan.spacing
    params = augment.sample(config, rng, batch=1, shape=shape, spacing=spacing, mirror=False)
    other = augment.intensity(params, image[None], kind=session.plan.kind)[0]
    return mean_dice(_answer(image, session, predictor), _answer(other, session, predictor))


def fit(case: Prepared, session: Session, *, predictor: infer.Predictor) -> float:
    """Mean Dice on a case of the session, of the labels that were drawn in it.

    Parameters
    ----------
    case : Prepared
        Labelled.
    session : Session
        Its plan.
    predictor : callable
        Windows to logits.
    """
    assert case.label is not None
    truth = torch.from_numpy(np.array(case.label))
    found = _answer(torch.from_numpy(np.array(case.image)), session, predictor)
    asked = torch.from_numpy(case.drawn)
    return mean_dice(torch.where((truth < 0) | ~asked[found], 0, found), truth.clamp(min=0))


def met(answer: Tensor, case: Prepared, *, plan: Plan, asked: Tensor) -> float:
    """Mean Dice of class probabilities with the labels of a case, where somebody looked.

    Parameters
    ----------
    answer : (K, X, Y, Z) float
        Background first.
    case : Prepared
        Labelled.
    plan : Plan
        Whether labels overlap.
    asked : (K, 1, 1, 1) bool
        Classes that the answer tells something of.
    """
    seen = torch.from_numpy(np.array(case.label) >= 0) & asked & torch.from_numpy(case.drawn).view(-1, 1, 1, 1)
    return mean_dice(chosen(answer * seen, plan), chosen(certain(case) * seen, plan))


def mean_dice(a: Tensor, b: Tensor) -> float:
    """Mean over the labels that occur in either of two maps, or lists of masks; 1 when none does.

    Parameters
    ----------
    a, b : (X, Y, Z) int or (L, X, Y, Z) bool
        Class indices, or masks of labels that overlap: as `learn.answers.chosen` tells them.
    """
    one, other = a.numpy(), b.numpy()
    if one.ndim == 4:
        scores = [dice(x, y) for x, y in zip(one, other, strict=True) if x.any() or y.any()]
    else:
        scores = [dice(one == k, other == k) for k in np.union1d(one, other) if k > 0]
    return float(np.mean(scores)) if scores else 1.0


def _answer(image: Tensor, session: Session, predictor: infer.Predictor) -> Tensor:
    return chosen(infer.probabilities(image, session.plan, predictor=predictor), session.plan)


def guard(
    session: Session, *, before: nn.Module, after: nn.Module, held: frozenset[str] = frozenset(), most: int = 3
) -> dict[str, Any]:
    """Whether what joint training made of the segmenter may be kept.

    Two signs without a further label: Dice between the answers to an unlabelled scan and to the same scan with other
    contrast, shading and noise; and Dice on the labelled scans, which shows a collapse. The earlier segmenter is kept
    where it is better by `WORSE` in either.

    Parameters
    ----------
    session : Session
        Plan and cases.
    before, after : nn.Module
        Segmenters.
    held : frozenset of str
        Labelled scans that the earlier one has not seen: on those it would lose unfairly.
    most : int
        Scans of each kind to look at.
    """
    rows, seen = {}, [case for case in session.labelled if case.id not in held]
    for name, network in (("apart", before), ("joint", after)):
        predictor = infer.network_predictor(network.eval(), session.hardware)
        same = [consistency(c, session, predictor=predictor) for c in session.unlabelled[:most]]
        fitted = [fit(c, session, predictor=predictor) for c in seen[:most]]
        rows[name] = {"consistency": float(np.mean(same)), "labelled": float(np.mean(fitted))}
    lost = {k: rows["apart"][k] - rows["joint"][k] for k in ("consistency", "labelled")}
    worse = [k for k, v in lost.items() if v > WORSE[k]]
    kept = "apart" if worse else "joint"
    reason = f"guard: kept the segmenter of {kept} training; " + ", ".join(
        f"{k} {rows['apart'][k]:.3f} before and {rows['joint'][k]:.3f} after" for k in lost
    )
    return {"kept": kept, "reason": reason, **rows}
