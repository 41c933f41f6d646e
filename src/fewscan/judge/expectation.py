"""What is expected of a prediction, in the words of its record."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fewscan.judge.confidence import Calibration
from fewscan.judge.doubt import doubt
from fewscan.judge.recipe import trained_otherwise
from fewscan.learn import infer
from fewscan.learn.checkpoint import Model
from fewscan.naming import BEFORE
from fewscan.space.volume import Volume


def expectation(
    known: Calibration, volume: Volume, *, model: Model, predictor: infer.Predictor, replaced: bool = False
) -> dict[str, Any]:
    """What is expected of the model's own answer to a scan, as a field of its `fewscan.prediction.Prediction`.

    Expected Dice by label, also of those that were not found, without a range; and where to look.

    Parameters
    ----------
    known : Calibration
        From a cross-validation.
    volume : Volume
        The scan.
    model : Model
        That predicts.
    predictor : callable
        Windows to logits.
    replaced : bool
        Whether another answer took the place of its own, of which then nothing is expected.
    """
    of, found = {"of": BEFORE} if replaced else {}, doubt(volume, model.plan, predictor=predictor)
    if found is None:
        return {"expected": {"labels": {}, "reason": "the scan is too large to be held whole", **of}}
    labels: dict[str, dict[str, Any]] = {}
    for name in model.names.values():
        signs = found.signs.get(name)
        row: dict[str, Any] = asdict(known.expect(name, signs))  # unrounded: which label is the worst is never tied
        if signs is None:  # Dice is 0 if the label is there, and nobody knows whether it is: no range holds that
            row |= dict.fromkeys(("low", "high", "level"))
        labels[name] = row | {"found": signs is not None}
    rest = {"error": round(known.error, 3), "patients": known.patients, **found.to_json(), **of}
    if otherwise := trained_otherwise(known, model):
        rest["warning"] = otherwise
    return {"expected": {"labels": labels, **rest}}
