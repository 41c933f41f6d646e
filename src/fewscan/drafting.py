"""Drafted labels for the unlabelled scans of a data set, as files, with what they are worth."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fewscan.data import places
from fewscan.data.bundles import SEGMENTATIONS, replace_bundles
from fewscan.data.dataset import CaseFiles, Dataset, load
from fewscan.data.io import sha256, write_image, write_labelmap
from fewscan.deliver.markup import without_folders
from fewscan.deliver.records import failed as failed_of
from fewscan.deliver.records import part
from fewscan.errors import ConfigError, DataError, FewscanError
from fewscan.judge.metrics import dice
from fewscan.judge.statistics import bootstrap_interval
from fewscan.learn.checkpoint import USE, versions, write_json
from fewscan.learn.engine import Status
from fewscan.learn.hardware import memory_told, pick
from fewscan.learn.request import Observer
from fewscan.methods import draft as drafts
from fewscan.methods.draft import Draft
from fewscan.methods.pairwise import RegisterConfig
from fewscan.methods.voting import Fusion
from fewscan.space import kernels
from fewscan.space.volume import IGNORE, Case, Volume

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
    for. Drafts of an earlier call go.

    With two labelled cases or more, each of them is drafted from the others too, which tells what the drafts are worth.
    A scan that cannot be drafted is left out, and the record says why.

    Parameters
    ----------
    data : Dataset
        With labelled and unlabelled cases.
    out : Path
        Folder to write; must be new, or one that this function wrote.
    config : RegisterConfig
        Of each registration.
    fusion : {"joint", "local", "majority"}
        How votes are weighted; across modalities (mi, mind) all count alike, and the record says majority.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where to deform.
    observe : callable, optional
        Gets messages and a `learn.engine.Status`.

    Raises
    ------
    DataError
        If nothing is labelled, nothing is left to draft or to judge, or no scan could be drafted.
    ConfigError
        If the folder holds something else, or drafts that were corrected in place.
    """
    if not data.labelled:
        raise DataError(f"{data.root}: no labelled case to draft from; put a label map beside at least one image")
    judged = [c for c in data.labelled if any(other.patient != c.patient for other in data.labelled)][:MOST_JUDGED]
    if not data.unlabelled and not judged:
        what = "one labelled scan" if len(data.labelled) == 1 else "labelled scans of one patient"
        raise DataError(f"{data.root}: {what} and nothing else: no scan to draft labels for; add unlabelled scans")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file())):
        raise ConfigError(f"{out} exists and was not written by fewscan draft; give another -o")
    total, fusion = len(judged) + len(data.unlabelled), drafts.fusion_of(fusion, config.deform.similarity)
    work = _Work(
        _Shelf(data, config.deform.similarity), config, fusion, pick(device, deforms=True).device, observe, total
    )
    asked = {"fusion": fusion, "settings": asdict(config), "kernels": kernels.path(work.device)}
    record = _begin(out, asked, [case.id for case in data.unlabelled])
    places.remember(out / RECORD, {case.id: {"image": case.images[0]} for case in data.unlabelled})
    for i, files in enumerate(data.unlabelled):
        found = work.drafted(files, done=i)
        record["cases"][files.id] = {"failed": found} if isinstance(found, str) else _written(*found, out, data.names)
        write_json(record, out / RECORD)
    rows: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for i, files in enumerate(judged, start=len(data.unlabelled)):
        found = work.drafted(files, done=i, judged=True)
        if isinstance(found, str):
            failed[files.id] = found
        else:
            rows[files.id] = _scores(found[1], found[0])
    patients = {files.id: files.patient for files in judged}
    record |= {"leave_one_out": _summary(rows, patients, failed), "seconds": time.monotonic() - work.begin}
    record["sentence"] = _sentence(record)
    write_json(record, out / RECORD)
    lost = failed_of(record["cases"]) if data.unlabelled else failed
    if lost and len(lost) == (len(data.unlabelled) or len(judged)):
        case_id, reason = next(iter(lost.items()))
        raise DataError(f"none of {len(lost)} scans could be drafted; {case_id}: {reason}")
    return record


class _Shelf:
    """Labelled scans, read when they are needed: no more are held than vote on one scan."""

    def __init__(self, data: Dataset, similarity: str) -> None:
        self.data, self.similarity = data, similarity
        self.many = len(data.labelled) > drafts.MOST_ATLASES
        self.held: dict[str, Case] = {}
        self.thumbnails: dict[str, torch.Tensor] = {}
        for files in data.labelled:  # each is read here once, so that a damaged one is told before anything is done
            case = self.read(files)
            if self.many:
                self.thumbnails[files.id] = drafts.thumbnail_of(case.image)

    def read(self, files: CaseFiles) -> Case:
        """A case, from the shelf if it lies there."""
        if files.id in self.held:
            return self.held[files.id]
        case = load(files, self.data)
        if not self.many:
            self.held[files.id] = case
        return case

    def nearest(self, scan: Volume, *, without: str | None) -> list[Case]:
        """Those that are to vote on a scan, without a patient's own."""
        pool = [files for files in self.data.labelled if files.patient != without]
        if len(pool) > drafts.MOST_ATLASES:
            small = [self.thumbnails[files.id] for files in pool]
            alike = drafts.most_alike(
                drafts.thumbnail_of(scan), small, most=drafts.MOST_ATLASES, similarity=self.similarity
            )
            pool = [pool[i] for i in alike]
        if self.many:  # often the next scan's are the same
            self.held = {files.id: self.held[files.id] for files in pool if files.id in self.held}
            self.held |= {files.id: self.read(files) for files in pool}
        return [self.read(files) for files in pool]


@dataclass(frozen=True, eq=False)
class _Work:
    """What the drafts of one call share."""

    shelf: _Shelf
    config: RegisterConfig
    fusion: Fusion
    device: torch.device
    observe: Observer | None
    total: int
    begin: float = field(default_factory=time.monotonic)

    def drafted(self, files: CaseFiles, *, done: int, judged: bool = False) -> tuple[Case, Draft] | str:
        """A scan and its draft, or why there is none: one scan must not cost the others theirs."""
        tell = self.observe or (lambda event: None)
        spent = time.monotonic() - self.begin
        left = spent / max(done, 1) * (self.total - done)
        note = f"leave one out: {files.id}" if judged else files.id
        tell(Status(done + 1, self.total, done / self.total, spent, left, math.nan, {}, 0.0, note))
        try:
            whole = self.shelf.read(files) if judged else load(files, self.shelf.data)
            atlases = self.shelf.nearest(whole.image, without=files.patient if judged else None)
            with memory_told(fix="deform on a coarser grid with --grid-spacing, such as 2"):
                found = drafts.draft(whole.image, atlases, config=self.config, fusion=self.fusion, device=self.device)
        except (FewscanError, OSError) as error:
            reason = " ".join(str(error).split())
            tell(f"{note}: not drafted; {reason}")
            return without_folders(reason)
        return whole, found


def _begin(out: Path, asked: Mapping[str, Any], coming: Sequence[str]) -> dict[str, Any]:
    """A fresh record on disk, so that the folder is known as ours; drafts of an earlier call go, unless corrected."""
    earlier = _earlier(out / RECORD)
    for case in {**earlier, **dict.fromkeys(coming)}:
        for file in _files(out, case):
            if sha256(file) != earlier.get(case, {}).get(file.relative_to(out).as_posix()):
                raise ConfigError(
                    f"{file}: is not as it was drafted; move your corrections to the data set, or give another -o"
                )
    for case in earlier:
        _forget(out, case)
    record = {**asked, "leave_one_out": _summary({}, {}, {}), "cases": {}, "versions": versions(), "use": USE}
    write_json(record, out / RECORD)
    return record


def _earlier(path: Path) -> dict[str, Mapping[str, str]]:
    """Cases of an earlier call, each with its files and their hashes."""
    try:
        cases = dict(json.loads(path.read_text())["cases"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    plain = {str(name): row for name, row in cases.items() if name != ".." and Path(str(name)).name == name != ""}
    return {name: part(row, "sha256") if isinstance(row, Mapping) else {} for name, row in plain.items()}


def _files(out: Path, case: str) -> list[Path]:
    """A case's labels that lie there, as one map or as masks."""
    found = [out / "labels" / f"{case}.nii.gz", *(out / "labels" / case / SEGMENTATIONS).glob("[!.]*")]
    return sorted(file for file in found if file.is_file())


def _forget(out: Path, case: str) -> None:
    """A case's drafts of an earlier call."""
    for kind in ("labels", "sure"):
        (out / kind / f"{case}.nii.gz").unlink(missing_ok=True)
    folder = out / "labels" / case
    if (folder / SEGMENTATIONS).is_dir():
        shutil.rmtree(folder / SEGMENTATIONS)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def _written(case: Case, found: Draft, out: Path, names: Mapping[int, str]) -> dict[str, Any]:
    """Write a draft; what the record says of it."""
    sure = (found.sure * 255).clip(0, 255).astype(np.uint8)
    write_image(sure, out / "sure" / f"{case.id}.nii.gz", native=case.image.native)
    if found.overlapping:
        replace_bundles(_masks(found, names), out / "labels" / case.id, native=case.image.native)
    else:
        write_labelmap(
            found.label.astype(np.uint16, copy=False), out / "labels" / f"{case.id}.nii.gz", native=case.image.native
        )
    inside = found.inside
    return {
        "atlases": found.atlases,
        "sure": float(found.sure[inside].mean()) if inside.any() else 0.0,
        "sha256": {file.relative_to(out).as_posix(): sha256(file) for file in _files(out, case.id)},
    }


def _masks(found: Draft, names: Mapping[int, str]) -> dict[str, NDArray[np.bool_]]:
    """Of each label that an atlas was asked for, where they overlap: an empty mask would say that it is not there."""
    if not found.overlapping:
        return {name: found.label == value for value, name in names.items()}
    return {
        name: mask.astype(np.bool_, copy=False)
        for (value, name), mask in zip(names.items(), found.label, strict=True)
        if found.drawn is None or value in found.drawn
    }


def _scores(found: Draft, case: Case) -> dict[str, float]:
    assert case.label is not None
    looked, drafted = case.label.data != IGNORE, _masks(found, case.label.names)
    truth = {name: case.label.mask(value) for value, name in case.label.names.items() if name in drafted}
    return {name: dice(drafted[name] & looked, mask) for name, mask in truth.items() if mask.any()}


def _summary(rows: dict[str, dict[str, float]], patients: dict[str, str], failed: dict[str, str]) -> dict[str, Any]:
    scored = {case: float(np.mean(list(row.values()))) for case, row in rows.items() if row}
    means = list(scored.values())
    if not means:
        return {"n": 0, "dice": None, "low": None, "high": None, "cases": rows, "failed": failed}
    low, high = (None if math.isnan(v) else v for v in bootstrap_interval(means, groups=[patients[c] for c in scored]))
    mean = float(np.mean(means))
    return {"n": len(means), "dice": mean, "low": low, "high": high, "cases": rows, "failed": failed}


def _sentence(record: dict[str, Any]) -> str:
    one, lost = record["leave_one_out"], failed_of(record["cases"])
    head = f"{len(record['cases']) - len(lost)} scan(s) drafted into labels/; correct them before you train on them. "
    head += f"{len(lost)} could not be drafted: {', '.join(lost)}. " if lost else ""
    head += f"Leave one out failed on {', '.join(one['failed'])}. " if one["failed"] else ""
    if not one["n"]:
        why = "So" if one["failed"] else "With one labelled scan"
        return head + f"{why} nothing tells how good they are; look at each. For research use only."
    interval = "" if one["low"] is None else f" (95 % interval {one['low']:.3f} to {one['high']:.3f})"
    return head + f"Leave-one-out Dice {one['dice']:.3f}{interval} over {one['n']} scans. For research use only."
