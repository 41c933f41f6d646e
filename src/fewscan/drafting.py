"""Drafted labels for the unlabelled scans of a data set, as files, with what they are worth."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from fewscan.data.dataset import Dataset, load
from fewscan.data.io import write_image, write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.judge.metrics import dice
from fewscan.judge.statistics import bootstrap_interval
from fewscan.learn.checkpoint import versions, write_json
from fewscan.learn.engine import Status
from fewscan.learn.hardware import pick
from fewscan.learn.request import Observer
from fewscan.methods import draft as drafts
from fewscan.methods.draft import Fusion
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space.volume import IGNORE, Case

RECORD = "draft.json"


def draft(
    data: Dataset,
    out: Path,
    *,
    config: RegisterConfig,
    fusion: Fusion = "joint",
    device: str = "auto",
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Write ``OUT/labels/<case>.nii.gz`` and ``OUT/sure/<case>.nii.gz`` for every unlabelled case, and `RECORD`.

    With two labelled cases or more, each of them is first drafted from the others, which tells what the drafts are
    worth.

    Parameters
    ----------
    data : Dataset
        With labelled and unlabelled cases.
    out : Path
        Folder to write; must be new, or one that this function wrote.
    config : RegisterConfig
        Of each registration.
    fusion : {"joint", "local", "majority"}
        How votes are weighted.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where to deform.
    observe : callable, optional
        Gets messages and a `learn.engine.Status`.

    Raises
    ------
    DataError
        If nothing is labelled, or nothing is left to draft or to judge.
    ConfigError
        If the folder holds something else.
    """
    if not data.labelled:
        raise DataError("no labelled case to draft from; put a label map beside at least one image")
    if not data.unlabelled and len(data.labelled) < 2:
        raise DataError("one labelled scan and nothing else: no scan to draft labels for; add unlabelled scans")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file())):
        raise ConfigError(f"{out} exists and was not written by fewscan draft; give another -o")
    place, begin = pick(device).device, time.monotonic()
    atlases = [load(case, data) for case in data.labelled]
    judged = list(atlases) if len(atlases) > 1 else []
    total = len(judged) + len(data.unlabelled)

    def tell(done: int, note: str) -> None:
        if observe is not None:
            spent = time.monotonic() - begin
            left = spent / max(done, 1) * (total - done)
            observe(Status(done, total, done / total, spent, left, math.nan, {}, 0.0, note))

    rows: dict[str, dict[str, float]] = {}
    for case in judged:
        others = [atlas for atlas in atlases if _patient(atlas) != _patient(case)]
        if others:
            found = drafts.draft(case.image, others, config=config, fusion=fusion, device=place)
            rows[case.id] = _scores(found.label, case)
        tell(len(rows), f"leave one out: {case.id}")
    written = {}
    for i, files in enumerate(data.unlabelled):
        case = load(files, data)
        found = drafts.draft(case.image, atlases, config=config, fusion=fusion, device=place)
        write_labelmap(found.label, out / "labels" / f"{case.id}.nii.gz", native=case.image.native)
        sure = (found.sure * 255).clip(0, 255).astype(np.uint8)
        write_image(sure, out / "sure" / f"{case.id}.nii.gz", native=case.image.native)
        written[case.id] = {
            "atlases": found.atlases,
            "sure": float(found.sure[found.label > 0].mean()) if found.label.any() else 0.0,
        }
        tell(len(judged) + i + 1, case.id)
    record: dict[str, Any] = {
        "fusion": fusion,
        "leave_one_out": _summary(rows),
        "cases": written,
        "versions": versions(),
    }
    record |= {"sentence": _sentence(record, out), "use": "research use only", "seconds": time.monotonic() - begin}
    write_json(record, out / RECORD)
    return record


def _patient(case: Case) -> object:
    return case.meta.get("patient", case.id)


def _scores(label: np.ndarray[Any, Any], case: Case) -> dict[str, float]:
    assert case.label is not None
    truth = case.label.data
    looked = truth != IGNORE
    names = {v: n for v, n in case.label.names.items() if (truth == v).any()}
    return {n: dice((label == v) & looked, truth == v) for v, n in names.items()}


def _summary(rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    means = [float(np.mean(list(row.values()))) for row in rows.values() if row]
    if not means:
        return {"n": 0, "dice": None, "low": None, "high": None, "cases": rows}
    low, high = bootstrap_interval(means) if len(means) > 1 else (None, None)
    return {"n": len(means), "dice": float(np.mean(means)), "low": low, "high": high, "cases": rows}


def _sentence(record: dict[str, Any], out: Path) -> str:
    one, count = record["leave_one_out"], len(record["cases"])
    head = f"{count} scan(s) drafted into {out / 'labels'}; correct them before you train on them. "
    if not one["n"]:
        return head + "With one labelled scan nothing tells how good they are; look at each. For research use only."
    interval = "" if one["low"] is None else f" (95 % interval {one['low']:.3f} to {one['high']:.3f})"
    return head + f"Leave-one-out Dice {one['dice']:.3f}{interval} over {one['n']} scans. For research use only."
