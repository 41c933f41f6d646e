"""What speaks for or against a segmenter without any further label; the guards of several methods look at it."""

from __future__ import annotations

from typing import Any

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


def guard(session: Session, *, before: nn.Module, after: nn.Module, most: int = 3) -> dict[str, Any]:
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
    most : int
        Scans of each kind to look at.
    """
    rows = {}
    for name, network in (("apart", before), ("joint", after)):
        predictor = infer.network_predictor(network.eval(), session.hardware)
        same = [consistency(c, session, predictor=predictor) for c in session.unlabelled[:most]]
        fitted = [fit(c, session, predictor=predictor) for c in session.labelled[:most]]
        rows[name] = {"consistency": float(np.mean(same)), "labelled": float(np.mean(fitted))}
    lost = {k: rows["apart"][k] - rows["joint"][k] for k in ("consistency", "labelled")}
    worse = [k for k, v in lost.items() if v > WORSE[k]]
    kept = "apart" if worse else "joint"
    reason = f"guard: kept the segmenter of {kept} training; " + ", ".join(
        f"{k} {rows['apart'][k]:.3f} before and {rows['joint'][k]:.3f} after" for k in lost
    )
    return {"kept": kept, "reason": reason, **rows}
