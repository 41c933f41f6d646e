"""Drafted labels for the unlabelled scans of a data set, as files, with what they are worth."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import places
from fewscan.data.bundles import SEGMENTATIONS, replace_bundles
from fewscan.data.dataset import Dataset, load
from fewscan.data.io import write_image, write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.judge.metrics import dice
from fewscan.judge.statistics import bootstrap_interval
from fewscan.learn.checkpoint import USE, versions, write_json
from fewscan.learn.engine import Status
from fewscan.learn.hardware import pick
from fewscan.learn.request import Observer
from fewscan.methods import draft as drafts
from fewscan.methods.draft import Draft
from fewscan.methods.pairwise import RegisterConfig
from fewscan.methods.voting import Fusion
from fewscan.space.volume import IGNORE, Case, Labelmap, Volume

RECORD = "draft.json"
MOST_JUDGED = 8  # labelled cases that are drafted from the others


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

    Where labels overlap, ``OUT/labels/<case>/bundle_segmentations/<label>.nii.gz``, for each that an atlas was asked
    for.

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
    judged = [case for case in atlases if any(_patient(a) != _patient(case) for a in atlases)][:MOST_JUDGED]
    total = len(judged) + len(data.unlabelled)
    record = _begin(out, fusion)
    places.remember(out / RECORD, {case.id: {"image": case.images[0]} for case in data.unlabelled})

    def tell(done: int, note: str) -> None:
        if observe is not None:
            spent = time.monotonic() - begin
            left = spent / max(done, 1) * (total - done)
            observe(Status(done + 1, total, done / total, spent, left, math.nan, {}, 0.0, note))

    for i, files in enumerate(data.unlabelled):
        tell(i, files.id)
        case = load(files, data)
        found = drafts.draft(case.image, atlases, config=config, fusion=fusion, device=place)
        _write(found, out / "labels" / case.id, image=case.image, names=data.names)
        sure = (found.sure * 255).clip(0, 255).astype(np.uint8)
        write_image(sure, out / "sure" / f"{case.id}.nii.gz", native=case.image.native)
        share = float(found.sure[found.label > 0].mean()) if found.label.any() else 0.0
        record["cases"][case.id] = {"atlases": found.atlases, "sure": share}
        write_json(record, out / RECORD)
    rows: dict[str, dict[str, float]] = {}
    for i, case in enumerate(judged):
        tell(len(data.unlabelled) + i, f"leave one out: {case.id}")
        others = [atlas for atlas in atlases if _patient(atlas) != _patient(case)]
        found = drafts.draft(case.image, others, config=config, fusion=fusion, device=place)
        rows[case.id] = _scores(found, case)
    patients = {case.id: str(_patient(case)) for case in judged}
    record |= {"leave_one_out": _summary(rows, patients), "seconds": time.monotonic() - begin}
    record["sentence"] = _sentence(record)
    write_json(record, out / RECORD)
    return record


def _begin(out: Path, fusion: Fusion) -> dict[str, Any]:
    """A fresh record on disk, so that the folder is known as ours; drafts of an earlier call go."""
    path = out / RECORD
    if path.is_file():
        try:
            earlier = list(json.loads(path.read_text())["cases"])
        except (ValueError, KeyError, TypeError):
            earlier = []
        for case in (str(name) for name in earlier if Path(str(name)).name == str(name)):
            _forget(out, case)
    record = {"fusion": fusion, "leave_one_out": _summary({}, {}), "cases": {}, "versions": versions(),
              "use": USE}  # fmt: skip
    write_json(record, path)
    return record


def _forget(out: Path, case: str) -> None:
    """A case's drafts of an earlier call."""
    for kind in ("labels", "sure"):
        (out / kind / f"{case}.nii.gz").unlink(missing_ok=True)
    folder = out / "labels" / case
    if case not in ("", "..") and (folder / SEGMENTATIONS).is_dir():
        shutil.rmtree(folder / SEGMENTATIONS)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def _patient(case: Case) -> object:
    return case.meta.get("patient", case.id)


def _write(found: Draft, path: Path, *, image: Volume, names: Mapping[int, str]) -> None:
    if found.table is None:
        write_labelmap(found.label, path.with_name(f"{path.name}.nii.gz"), native=image.native)
    else:
        replace_bundles(_masks(found, image, names), path, native=image.native)


def _masks(found: Draft, image: Volume, names: Mapping[int, str]) -> dict[str, NDArray[np.bool_]]:
    """Of each label that an atlas was asked for, where they overlap: an empty mask would say that it is not there."""
    label = Labelmap(found.label, image.geometry, names, found.table)
    asked = names if found.table is None or found.drawn is None else found.drawn
    return {name: label.mask(value) for value, name in names.items() if value in asked}


def _scores(found: Draft, case: Case) -> dict[str, float]:
    assert case.label is not None
    looked, drafted = case.label.data != IGNORE, _masks(found, case.image, case.label.names)
    truth = {name: case.label.mask(value) for value, name in case.label.names.items() if name in drafted}
    return {name: dice(drafted[name] & looked, mask) for name, mask in truth.items() if mask.any()}


def _summary(rows: dict[str, dict[str, float]], patients: dict[str, str]) -> dict[str, Any]:
    scored = {case: float(np.mean(list(row.values()))) for case, row in rows.items() if row}
    means = list(scored.values())
    if not means:
        return {"n": 0, "dice": None, "low": None, "high": None, "cases": rows}
    low, high = (None if math.isnan(v) else v for v in bootstrap_interval(means, groups=[patients[c] for c in scored]))
    return {"n": len(means), "dice": float(np.mean(means)), "low": low, "high": high, "cases": rows}


def _sentence(record: dict[str, Any]) -> str:
    one, count = record["leave_one_out"], len(record["cases"])
    head = f"{count} scan(s) drafted into labels/; correct them before you train on them. "
    if not one["n"]:
        return head + "With one labelled scan nothing tells how good they are; look at each. For research use only."
    interval = "" if one["low"] is None else f" (95 % interval {one['low']:.3f} to {one['high']:.3f})"
    return head + f"Leave-one-out Dice {one['dice']:.3f}{interval} over {one['n']} scans. For research use only."
