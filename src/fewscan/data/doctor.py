"""Finds what is wrong with a data set before training does, and says what to do about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import bundles, cohort, dicom, kinds, label_checks, proof
from fewscan.data.dataset import CaseFiles, Dataset
from fewscan.data.findings import Finding
from fewscan.data.io import peek, read_labels, read_raw, whole
from fewscan.data.label_maps import names_itself
from fewscan.data.studies import flaw
from fewscan.errors import FewscanError
from fewscan.space.geometry import Geometry, check_same, to_ras
from fewscan.space.volume import Kind

__all__ = ["Checkup", "Finding", "Row", "examine"]

SPARED = ("image-unreadable", "several-volumes", "ambiguous-header", "not-finite", "constant", "grid-differs")
"""Faults for which an unlabelled case is left out, rather than the data set refused."""
DRAWN = "say which labels were drawn in drawn.json"


@dataclass(frozen=True)
class Row:
    """One case in the table.

    Parameters
    ----------
    case : str
        Case id.
    role : {"labelled", "unlabelled", "test"}
        What the case serves for.
    shape : tuple of int
        Voxels, RAS+ order.
    spacing : tuple of float
        Voxel size, mm, RAS+ order.
    axes : str
        Axis codes of the file.
    dtype : str
        Number type of the intensities.
    low, high : float
        Range of the finite intensities.
    labels_ml : mapping of str to float
        Volume of each label, mL.
    """

    case: str
    role: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: str
    dtype: str
    low: float
    high: float
    labels_ml: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkup:
    """What `examine` found.

    Parameters
    ----------
    dataset : Dataset
        What was examined.
    findings : tuple of Finding
        Errors first.
    rows : tuple of Row
        One per readable case.
    """

    dataset: Dataset
    findings: tuple[Finding, ...]
    rows: tuple[Row, ...]

    @property
    def usable(self) -> bool:
        """Whether nothing stands in the way of training."""
        return not any(f.severity == "error" for f in self.findings)

    @property
    def sound(self) -> Dataset:
        """The data set without the unlabelled cases that training leaves out for their faults."""
        faulty = {f.path for f in self.findings if f.held_out}
        kept = [c for c in self.dataset.cases if c.label is not None or not faulty & set(map(str, c.images))]
        return replace(self.dataset, cases=tuple(kept))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        data = self.dataset
        return {
            "data": str(data.root),
            "layout": data.layout,
            "labelled": len(data.labelled),
            "unlabelled": len(data.unlabelled),
            "test": len(data.test),
            "labels": {str(value): name for value, name in data.names.items()},
            "channels": list(data.channels),
            "modality": data.modality,
            "usable": self.usable,
            "findings": [asdict(f) for f in self.findings],
            "cases": [asdict(r) for r in self.rows],
        }


def examine(dataset: Dataset, *, progress: Callable[[int, int], None] | None = None) -> Checkup:
    """Read every file once and report each fault with its remedy.

    Parameters
    ----------
    dataset : Dataset
        What `fewscan.data.dataset.find` found.
    progress : callable, optional
        Called with the number of cases done and of all cases.
    """
    findings: list[Finding] = []
    rows: list[Row] = []
    facts: list[cohort.Facts] = []
    everyone = [*dataset.cases, *dataset.test]
    for done, case in enumerate(everyone, start=1):
        row, fact, found = _case(case, dataset, role=_role(case, dataset))
        unlabelled = case.label is None and done <= len(dataset.cases)
        findings += map(_spared, found) if unlabelled else found if done <= len(dataset.cases) else map(_excused, found)
        if row is not None and fact is not None:
            rows.append(row)
            facts.append(fact)
        if progress is not None:
            progress(done, len(everyone))
    findings += cohort.compare(facts, dataset.names)
    findings += _decisions(dataset)
    findings += bundles.without_file(dataset.root, dataset.names) if dataset.overlapping else []
    findings += label_checks.without_structure(dataset)
    findings += [label_checks.unmatched(path, dataset=dataset) for path in dataset.unmatched]
    findings += [_unused(path, dataset) for path in dataset.unused]
    rank = {"error": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda f: (rank[f.severity], f.code, f.case))
    return Checkup(dataset, tuple(findings), tuple(rows))


def _role(case: CaseFiles, dataset: Dataset) -> str:
    if any(case is held for held in dataset.test):
        return "test"
    return "unlabelled" if case.label is None else "labelled"


def _excused(finding: Finding) -> Finding:
    """A fault of a held-out case, which hinders no training."""
    return replace(finding, severity="warning", held_out=True) if finding.severity == "error" else finding


def _spared(finding: Finding) -> Finding:
    """A fault of an unlabelled case, without which there is less to learn from and nothing wrong."""
    if finding.severity != "error" or finding.code not in SPARED:
        return finding
    return replace(_excused(finding), remedy=f"{finding.remedy}; until then training leaves this unlabelled scan out")


def _unused(path: Path, dataset: Dataset) -> Finding:
    if path.is_dir() and not dicom.is_series(path):
        message = f"{path.name}/ is left out, though its files are called like those of the cases"
        remedy = "channels of one scan go into one folder, as NAME_0000 and NAME_0001; predictions lie better elsewhere"
        return Finding("folder-left-out", "warning", "", str(path), message, remedy)
    if dicom.on_disk(path).is_dir():
        remedy = "give its folder where it is wanted"
        return Finding("series-left-out", "warning", "", str(path), f"is left out: the series {flaw(path)}", remedy)
    message = f"{path.name} is of no case: those found are {dataset.layout}, with {', '.join(dataset.channels)}"
    remedy = "complete or rename what lies there, or take it away"
    return Finding("image-unused", "warning", "", str(path), message, remedy)


def _decisions(dataset: Dataset) -> list[Finding]:
    """What was taken for not drawn, and what there is too little of."""
    found = []
    for case in dataset.cases:
        drawn = dataset.names if case.drawn is None else case.drawn
        if absent := [name for value, name in dataset.names.items() if value not in drawn]:
            found.append(
                Finding(
                    "not-drawn",
                    "note",
                    case.id,
                    str(case.label or ""),
                    f"{', '.join(absent)}: taken as not drawn here, so training neither expects nor forbids it",
                    "if it is truly absent, " + ("put an empty mask" if dataset.overlapping else DRAWN),
                )
            )
    if not dataset.labelled:
        message = f"none of {len(dataset.cases)} cases has a label map"
        remedy = f"training needs one: {label_checks.how_to_label(dataset)}; predicting works without"
        found.append(Finding("no-labels", "warning", "", str(dataset.root), message, remedy))
    elif not dataset.names:
        message = f"the label maps of {len(dataset.labelled)} cases hold no label"
        remedy = "check that they are the right files"
        found.append(Finding("no-labels", "error", "", str(dataset.root), message, remedy))
    return found


def _case(case: CaseFiles, dataset: Dataset, *, role: str) -> tuple[Row | None, cohort.Facts | None, list[Finding]]:
    """Everything about one case that needs no other case."""
    found: list[Finding] = []
    volumes = len(dataset.channels) if len(case.images) == 1 else 1
    parts = [
        part for path in case.images if (part := _image(path, case.id, (volumes, dataset.kind), found)) is not None
    ]
    label = None if dataset.overlapping else _label(case, dataset, found)
    if len(parts) != len(case.images):
        return None, None, found
    native = parts[0][1]
    for path, (_, other) in zip(case.images[1:], parts[1:], strict=True):
        found += _grids(native, other, case.id, path, "channel")
    for path, (values, _) in zip(case.images, parts, strict=True):
        found += label_checks.mask_among_channels(case, path, data=values)
    found += _directions(case, parts, dataset.kind)
    data = to_ras(parts[0][0], native)[0]
    geometry = to_ras(data[0], native)[1]
    finite = data[np.isfinite(data)] if data.dtype.kind == "f" else data
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low == high:
        message = f"every voxel is {low:g}"
        found.append(Finding("constant", "error", case.id, str(case.images[0]), message, "export the scan again"))
    counts: dict[int, int] = {}
    centres: dict[int, NDArray[np.float64]] = {}
    label_hash = ""
    if label is not None and case.label is not None:
        found += _grids(geometry, label[1], case.id, case.label, "label map")
        found += label_checks.content(label[0], case, dataset=dataset)
        counts, centres = cohort.measure(label[0], label[1])
        label_hash = _hash(label[0]) if counts else ""
    if case.label is not None and dataset.overlapping:
        counts, centres, label_hash = _bundles(case, dataset, geometry, found)
    millilitres = {dataset.names.get(v, f"label {v}"): n * geometry.voxel_mm3 / 1000 for v, n in counts.items()}
    shown = tuple(round(s, 4) for s in geometry.spacing)
    row = Row(case.id, role, geometry.shape, shown, native.axis_codes, str(data.dtype), low, high, millilitres)
    scale = float(np.percentile(finite.ravel(order="K")[:: max(1, finite.size // 50_000)], 99)) if finite.size else 0.0
    hashes = "".join(_hash(part) for part, _ in parts)
    files = (str(case.images[0]), str(case.label or ""))
    volume_mm3 = {v: n * (geometry if label is None else label[1]).voxel_mm3 for v, n in counts.items()}
    fact = cohort.Facts(
        case.id, case.patient, role, files, geometry.spacing, scale, hashes, label_hash, volume_mm3, centres
    )
    return row, fact, found


def _directions(case: CaseFiles, parts: Sequence[tuple[NDArray[Any], Geometry]], kind: Kind) -> list[Finding]:
    """Whether directions fit the anatomy."""
    if kind == "scalar":
        return []
    ordered = [to_ras(data, native) for data, native in parts]
    if len({data.shape for data, _ in ordered}) > 1:
        return []  # that they lie on several grids is found already
    data = ordered[0][0] if len(ordered) == 1 else np.concatenate([data for data, _ in ordered])
    data = kinds.in_order(data, kind, file=case.images[0])
    return proof.examine(data, ordered[0][1], images=case.images, kind=kind, case=case.id)


def _hash(data: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest() + str(data.shape)


def _image(
    path: Path, case: str, wanted: tuple[int, Kind], found: list[Finding]
) -> tuple[NDArray[Any], Geometry] | None:
    """Voxels and grid of a file that should hold so many volumes of a kind; faults go into ``found``."""
    volumes, kind = wanted
    try:
        data, native = _lenient(path, case, found)
    except FewscanError as error:
        found.append(_unreadable("image-unreadable", case, path, error))
        return None
    if data.shape[0] != volumes:
        message = f"holds {data.shape[0]} volumes where {volumes} is expected"
        remedy = "save one 3D volume per file, or name the channels in dataset.json"
        found.append(Finding("several-volumes", "error", case, str(path), message, remedy))
        return None
    if data.dtype.kind == "f" and not (finite := np.isfinite(data)).all():
        message = f"{int((~finite).sum())} voxels are NaN or infinite"
        remedy = f"--fix writes a copy with {'the lowest finite value' if kind == 'scalar' else 'zero'} in their place"
        fixable = bool(finite.any())
        found.append(Finding("not-finite", "error", case, str(path), message, remedy, fixable))
    return data, native


def _lenient(path: Path, case: str, found: list[Finding]) -> tuple[NDArray[Any], Geometry]:
    """Read even where sform and qform contradict each other, and say so."""
    if path.is_file():
        try:
            doubts = peek(path).doubts
        except FewscanError as error:
            peek(path, trust_sform=True)  # raises again unless the two forms were the only fault
            remedy = "--fix writes a copy that keeps the sform; look at it in a viewer"
            found.append(Finding("ambiguous-header", "error", case, str(path), _about(error, path), remedy, True))
            doubts = ()
        remedy = "look at it in a viewer that shows left and right; export it again with its orientation"
        found += [Finding("orientation-unknown", "warning", case, str(path), d, remedy) for d in doubts]
    return read_raw(path, trust_sform=True)


def _unreadable(code: str, case: str, path: Path, error: FewscanError) -> Finding:
    text = _about(error, path)
    message, _, remedy = text.rpartition("; ")
    return Finding(code, "error", case, str(path), message or text, remedy if message else "export the file again")


def _about(error: FewscanError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")


def _label(case: CaseFiles, dataset: Dataset, found: list[Finding]) -> tuple[NDArray[np.uint16], Geometry] | None:
    """Label map in RAS+ order and its grid; faults go into ``found``."""
    if case.label is None:
        return None
    try:
        if names_itself(case.label):
            drawn = read_labels(case.label, names=dataset.names, ignore=dataset.ignore, source=case.images[0])
            found += label_checks.not_listed(case, case.label, dataset=dataset)
            return drawn.data, drawn.geometry
        data, native = _lenient(case.label, case.id, found)
        if data.shape[0] != 1:
            message, remedy = f"holds {data.shape[0]} volumes", "save one 3D label map"
            found.append(Finding("several-volumes", "error", case.id, str(case.label), message, remedy))
            return None
        label = whole(data[0], case.label, ignore=dataset.ignore)
    except FewscanError as error:
        found.append(_unreadable("label-unreadable", case.id, case.label, error))
        return None
    ordered, geometry = to_ras(label, native)
    return np.ascontiguousarray(ordered, dtype=np.uint16), geometry


def _bundles(
    case: CaseFiles, dataset: Dataset, geometry: Geometry, found: list[Finding]
) -> tuple[dict[int, int], dict[int, NDArray[np.float64]], str]:
    """Voxels and centroid of each mask, and the hash of all; faults go into ``found``."""
    assert case.label is not None
    files = bundles.bundle_files(case.label)
    counts: dict[int, int] = {}
    centres: dict[int, NDArray[np.float64]] = {}
    digest = hashlib.sha256()
    for value, name in dataset.names.items():
        if name not in files:
            continue
        try:
            mask, own = bundles.read_bundle(files[name])
        except FewscanError as error:
            found.append(_unreadable("label-unreadable", case.id, files[name], error))
            continue
        found += _grids(geometry, own, case.id, files[name], "mask")
        number, middle = cohort.measure(mask.astype(np.uint16), own)
        if number:
            counts[value], centres[value] = number[1], middle[1]
            digest.update(np.packbits(mask).data)
        else:
            said = "the mask is empty: the bundle is taken as absent"
            remedy = "if it was not looked for, take the file away"
            found.append(Finding("label-empty", "note", case.id, str(files[name]), said, remedy))
    return counts, centres, digest.hexdigest() if counts else ""


def _grids(a: Geometry, b: Geometry, case: str, path: Path, what: str) -> list[Finding]:
    """Whether a second file lies on the image's grid."""
    try:
        check_same(a, b, what=what)
    except FewscanError as error:
        fixable = what == "label map" and cohort.boxes_overlap(a, b) > 0
        remedy = "--fix writes a copy on the image's grid; look at it in a viewer" if fixable else "export both again"
        message = str(error).split(";")[0]
        return [Finding("grid-differs", "error", case, str(path), message, remedy, fixable)]
    return []
