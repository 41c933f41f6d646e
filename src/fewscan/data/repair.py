"""Writes a repaired copy of a data set; the originals are only read."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import kinds
from fewscan.data.annotation import mark_blank
from fewscan.data.cohort import boxes_overlap
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.doctor import Checkup
from fewscan.data.findings import Finding
from fewscan.data.headers import suffix_of
from fewscan.data.io import label_values, read_labels, read_raw, whole, write_image, write_labelmap
from fewscan.data.label_maps import names_itself
from fewscan.data.listing import read_json
from fewscan.data.masks import is_masks
from fewscan.errors import DataError, FewscanError
from fewscan.space.geometry import Geometry, largest_gap_mm, ras_geometry, to_ras
from fewscan.space.volume import IGNORE, Kind


@dataclass(frozen=True)
class Change:
    """One thing that differs between the copy and its original.

    Parameters
    ----------
    case : str
        Case id.
    source : str
        The original, which stays as it was.
    written : str
        Its copy, relative to the copy's folder; empty when it was left out.
    what : str
        What was done.
    why : str
        The finding behind it.
    """

    case: str
    source: str
    written: str
    what: str
    why: str


def fix(dataset: Dataset, checkup: Checkup, *, out: Path) -> list[Change]:
    """Write a complete copy with what can be repaired repaired, and what cannot left out.

    The copy has images/, labels/ (and test/ with the same), labels.json or dataset.json, and changes.json, which names
    for each change the original, what was done and why. It appears whole or not at all.

    Parameters
    ----------
    dataset : Dataset
        The originals.
    checkup : Checkup
        What `fewscan.data.doctor.examine` found there.
    out : Path
        Folder of the copy: new or empty, and not inside the data set.

    Raises
    ------
    DataError
        If ``out`` holds something already, lies among the originals, nothing would be left to write, or labels overlap.
    """
    out = Path(out)
    if dataset.overlapping:
        raise DataError(f"{dataset.root}: masks of bundles are not repaired; write them anew, or take the case out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: holds something already; name a new folder for the repaired copy")
    if out.resolve() == dataset.root.resolve() or dataset.root.resolve() in out.resolve().parents:
        raise DataError(f"{out}: lies inside the data it would repair; name a folder elsewhere")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=out.parent))
    try:
        changes = _write_all(dataset, checkup, part)
        if not any((part / "images").glob("*")):
            raise DataError(f"{dataset.root}: no case could be repaired; see the findings for what to do by hand")
        part.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return changes


def _write_all(dataset: Dataset, checkup: Checkup, part: Path) -> list[Change]:
    changes: list[Change] = []
    names = dict(dataset.names)
    written: set[str] = set()
    present: frozenset[int] = frozenset()
    for case in [*dataset.cases, *dataset.test]:
        files = {"", *map(str, case.images), str(case.label)}  # a held-out case may be called like another
        about = [f for f in checkup.findings if f.case == case.id and f.path in files]
        mine = [f for f in about if f.severity == "error" or f.held_out]
        folder = part / "test" if any(case is held for held in dataset.test) else part
        stuck = [f for f in mine if not f.fixable]
        if stuck:
            changes += [Change(case.id, f.path, "", "left out", f"{f.message}; {f.remedy}") for f in stuck]
            continue
        try:
            made, found = _copy(case, dataset, mine, folder)
        except FewscanError as error:
            changes.append(Change(case.id, str(case.images[0]), "", "left out", str(error)))
            tails = [f"_{index:04d}" for index in range(len(case.images))] if len(case.images) > 1 else []
            for old in [f for tail in ["", *tails] for f in folder.glob(f"*/{glob.escape(case.id)}{tail}.nii.gz")]:
                old.unlink()
            continue
        present |= found
        if folder is part:
            written.add(case.id)
        changes += [Change(c.case, c.source, str(Path(c.written).relative_to(part)), c.what, c.why) for c in made]
        for value in found - names.keys():
            names[value] = f"label {value}"
            changes.append(Change(case.id, str(case.label), "", f"listed as 'label {value}'", "label not in the list"))
    _listing(dataset, names, part)
    _stated(dataset, written, {v: n for v, n in names.items() if v in present or not present}, part)
    (part / "changes.json").write_text(json.dumps([asdict(c) for c in changes], indent=2) + "\n", encoding="utf-8")
    return changes


def _listing(dataset: Dataset, names: dict[int, str], part: Path) -> None:
    """labels.json, or dataset.json where several channels need names."""
    labels = {str(value): name for value, name in sorted(names.items())} | {str(IGNORE): "ignore"}
    channels = dict(enumerate(dataset.channels))
    several = {"channel_names": channels, "labels": labels, **kinds.listed(dataset.kind)}
    content = labels if len(channels) == 1 else several
    file = part / ("labels.json" if len(channels) == 1 else "dataset.json")
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stated(dataset: Dataset, written: set[str], names: dict[int, str], part: Path) -> None:
    """drawn.json, about the cases and labels that the copy holds."""
    masks = [case for case in dataset.cases if case.id in written and case.label is not None and is_masks(case.label)]
    told = {case.id: [dataset.names[v] for v in sorted(case.drawn)] for case in masks if case.drawn is not None}
    if (dataset.root / "drawn.json").is_file():
        told |= read_json(dataset.root / "drawn.json")
    if told:
        known = {str(value) for value in names} | set(names.values())
        listed = {case: v for case, v in told.items() if case in written}
        kept = {case: [n for n in v if str(n) in known] for case, v in listed.items()}
        (part / "drawn.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _copy(
    case: CaseFiles, dataset: Dataset, faults: Sequence[Finding], folder: Path
) -> tuple[list[Change], frozenset[int]]:
    """Copy one case; returns what changed and which labels it holds."""
    changes: list[Change] = []
    reasons = {code: [f for f in faults if f.code == code] for code in {f.code for f in faults}}
    for index, source in enumerate(case.images):
        tail = f"_{index:04d}" if len(case.images) > 1 else ""
        why = _about(reasons, source, ("not-finite", "ambiguous-header"))
        target = folder / "images" / f"{case.id}{tail}.nii.gz"
        changes += _image(case.id, (source, target), why, kind=dataset.kind)
    if case.label is None:
        return changes, frozenset()
    _, native = read_raw(case.images[0], trust_sform=True)
    why = _about(reasons, case.label, ("grid-differs", "ambiguous-header", "not-finite"))
    target = folder / "labels" / f"{case.id}.nii.gz"
    made, found = _label(case, target, native, dataset, why)
    return changes + made, found


def _about(reasons: dict[str, list[Finding]], source: Path, codes: Sequence[str]) -> list[Finding]:
    return [f for code in codes for f in reasons.get(code, ()) if f.path == str(source)]


def _image(case: str, files: tuple[Path, Path], why: Sequence[Finding], *, kind: Kind) -> list[Change]:
    """Copy an image as it is, or write it anew where something had to change."""
    source, target = files
    if not why and source.is_file() and suffix_of(source) == ".nii.gz":
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return []
    data, native = read_raw(source, trust_sform=True)
    data = kinds.in_order(data, kind, file=source)  # what is written says nothing of another order
    what = ["written as NIfTI"] if suffix_of(source) not in (".nii", ".nii.gz") else []
    if any(f.code == "ambiguous-header" for f in why):
        what.append("sform kept, qform set to it")
    if data.dtype.kind == "f" and not (finite := np.isfinite(data)).all():
        empty = data[finite].min() if kind == "scalar" else data.dtype.type(0)  # no direction at all
        what.append(f"{int((~finite).sum())} voxels that were NaN or infinite set to {empty:g}")
        data = np.where(finite, data, empty)
    ordered, _ = to_ras(data[0] if data.shape[0] == 1 else data, native)
    write_image(ordered, target, native=native)
    reasons = "; ".join(f.message for f in why) or "one format for all"
    return [Change(case, str(source), str(target), ", ".join(what), reasons)] if what else []


def _label(
    case: CaseFiles, target: Path, native: Geometry, dataset: Dataset, why: Sequence[Finding]
) -> tuple[list[Change], frozenset[int]]:
    """Copy a label map, onto the image's grid where it lies elsewhere."""
    if case.label is None:
        raise DataError(f"case {case.id}: has no label map to copy; leave it unlabelled")
    grid, what = ras_geometry(native), []
    if names_itself(case.label):
        drawn = read_labels(case.label, names=dataset.names, ignore=dataset.ignore, source=case.images[0])
        label, own = drawn.data, drawn.geometry
        what.append("written as NIfTI")
    else:
        data, own = read_raw(case.label, trust_sform=True)
        label = np.asarray(to_ras(whole(data[0], case.label, ignore=dataset.ignore), own)[0], dtype=np.uint16)
        own = ras_geometry(own)
    if any(f.code == "ambiguous-header" for f in why):
        what.append("sform kept, qform set to it")
    if any(f.code == "grid-differs" for f in why):
        if label.shape == grid.shape and largest_gap_mm(grid, own) <= 0.5 * min(grid.spacing):
            what.append(f"the image's affine taken over ({largest_gap_mm(grid, own):.3g} mm apart)")
        elif boxes_overlap(grid, own) > 0:
            label = nearest(mark_blank(label), own, target=grid)
            what.append("resampled onto the image's grid, nearest voxel")
        else:
            raise DataError(f"{case.label}: lies outside its image; find the label map that belongs to it")
    write_labelmap(label, target, native=native)
    found = frozenset(label_values(label)) - {0, IGNORE}
    changes = [Change(case.id, str(case.label), str(target), ", ".join(what), "; ".join(f.message for f in why))]
    return (changes if what else []), found


def nearest(data: NDArray[Any], grid: Geometry, *, target: Geometry) -> NDArray[Any]:
    """Nearest-voxel resampling through world space; outside the data's grid is 0.

    Parameters
    ----------
    data : (X, Y, Z)
        Label map.
    grid : Geometry
        Grid of ``data``.
    target : Geometry
        Wanted grid.

    Examples
    --------
    >>> fine = Geometry((4, 1, 1), np.diag([0.5, 1.0, 1.0, 1.0]))
    >>> nearest(np.array([1, 2]).reshape(2, 1, 1), Geometry((2, 1, 1), np.eye(4)), target=fine)[:, 0, 0].tolist()
    [1, 1, 2, 2]
    """
    out = np.zeros(target.shape, dtype=data.dtype)
    to_grid = np.linalg.inv(grid.affine) @ target.affine
    y, z = np.meshgrid(np.arange(target.shape[1]), np.arange(target.shape[2]), indexing="ij")
    for x in range(target.shape[0]):
        places = to_grid[:3, :3] @ np.stack([np.full(y.size, x), y.ravel(), z.ravel()]) + to_grid[:3, 3:]
        index = np.floor(places + 0.5 - 1e-6).astype(np.int64)  # a place halfway belongs to the lower voxel
        inside = ((index >= 0) & (index < np.array(grid.shape)[:, None])).all(0)
        i, j, k = index[:, inside]
        out[x].reshape(-1)[inside] = data[i, j, k]
    return out
