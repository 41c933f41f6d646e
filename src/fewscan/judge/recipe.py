"""Whether a cross-validation was of models such as the one at hand: of one trained otherwise it tells less.

What the folds of a cross-validation lack by being folds, the scans left out, is no difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fewscan.errors import ConfigError
from fewscan.judge.confidence import Calibration, read_calibration
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import to_dict

APART = 1.5  # times as many steps; the same minutes give other numbers of steps on a busy machine
MATTERS = ("network", "train", "augment")  # settings of every method
OWN = {"joint": ("pair", "joint"), "register": ("pair",), "transfer": ("transfer",)}  # of some
SHOWN = 3  # settings that a message names


def recipe_of(descriptions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How models that were trained alike were: method, settings that matter, steps, scans; and how many they are.

    Parameters
    ----------
    descriptions : sequence of mapping
        Contents of their ``model.json``.
    """
    first = descriptions[0]
    method, settings = str(first.get("method")), first["settings"]
    matters = (*MATTERS, *OWN.get(method, ()))
    recipe = {
        "method": method,
        "settings": {part: settings[part] for part in matters if part in settings},
        "steps": median(int(one.get("steps", 0)) for one in descriptions),
        "seconds": median(float(one.get("seconds", 0.0)) for one in descriptions),
        "labelled": sorted({str(i) for one in descriptions for i in one.get("labelled", ())}),
        "folds": len(descriptions),
    }
    plain: dict[str, Any] = json.loads(json.dumps(recipe))  # as it is read back, tuples as lists
    return plain


def differences(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs, in words; empty where nothing does that matters.

    Parameters
    ----------
    recipe, other : mapping
        Of the model, and of those of the folds.
    """
    found = []
    if recipe["method"] != other["method"]:
        found.append(f"trained by {recipe['method']}, the folds by {other['method']}")
    ours, theirs = (
        {f"{part}.{name}": value for part, values in one["settings"].items() for name, value in values.items()}
        for one in (recipe, other)
    )
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    found += [f"{name} is {ours[name]}, in the folds {theirs[name]}" for name in changed[:SHOWN]]
    if more := len(changed) - SHOWN if len(changed) > SHOWN else 0:
        found.append(f"{more} more setting(s) differ")
    steps = (recipe["steps"], other["steps"])
    if min(steps) > 0 and max(steps) > APART * min(steps):
        found.append(f"{steps[0]:.0f} steps, the folds {steps[1]:.0f} each")
    scans, known = set(recipe["labelled"]), set(other["labelled"])
    if scans and known and scans != known:
        found.append(f"{len(scans)} labelled scan(s), the folds {len(known)}, {len(scans & known)} of them the same")
    return tuple(found)


def calibration_of(
    model: Model, path: Path, *, tta: bool = False, observe: Callable[[str], None] | None = None
) -> Calibration:
    """What a cross-validation learnt of predictions such as these; of others it would tell nothing.

    Parameters
    ----------
    model : Model
        That predicts.
    path : Path
        Folder of the cross-validation.
    tta : bool
        Whether it averages with mirrored inputs.
    observe : callable, optional
        Gets a warning where the folds were trained otherwise than the model.

    Raises
    ------
    FewscanError
        If it does, or there is no calibration, or it is that of other labels.
    """
    if tta:
        raise ConfigError("--calibration was learnt from predictions without mirrored inputs; leave it out, or --tta")
    known = read_calibration(path)
    known.check_labels(model.names.values(), where=path)
    if observe is not None and (otherwise := trained_otherwise(known, model)):
        observe(f"warning: {path}: {otherwise}")
    return known


def trained_otherwise(known: Calibration, model: Model) -> str:
    """In what a model was trained otherwise than those that were calibrated; empty where in nothing, or none can tell.

    Parameters
    ----------
    known : Calibration
        From a cross-validation.
    model : Model
        That predicts.
    """
    found = () if known.recipe is None else differences(_recipe(model), known.recipe)
    if not found:
        return ""
    return (
        f"the model was trained otherwise than those of the cross-validation ({'; '.join(found)}), so the Dice "
        "expected may be off; cross-validate as the model was trained"
    )


def _recipe(model: Model) -> dict[str, Any]:
    return recipe_of([{**model.provenance, "settings": to_dict(model.settings)}])
