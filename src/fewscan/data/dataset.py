"""A folder of scans as cases: what is there, what is labelled, who is the same patient."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewscan.data import annotation, bundles, kinds, layouts, listing
from fewscan.data.formats import segments_of
from fewscan.data.found import Found, Pair
from fewscan.data.io import label_values, peek, read_image, read_labels
from fewscan.data.label_maps import names_itself, numbered
from fewscan.data.masks import is_masks, mask_files
from fewscan.data.painting import plain_name
from fewscan.errors import DataError, FewscanError
from fewscan.space.geometry import check_same
from fewscan.space.volume import IGNORE, Case, Kind, Labelmap

Modality = Literal["ct", "mr", "other"]
TAIL = re.compile(r"(?i)[-_.]([lr]|left|right|frame-?\d+|(ses|run)-\w+|t\d+|time-?\d+|e[ds]|[ab]_(healthy|tumour))$")
MR_WORDS = re.compile(r"(?i)\b(mri?|t1w?|t2w?|flair|pdw?|t1c|t1ce|t1gd|adc|dwi|swi)\b")


@dataclass(frozen=True)
class CaseFiles:
    """Where one case lies on disk.

    Parameters
    ----------
    id : str
        Unique within its data set.
    images : tuple of Path
        One per channel; a DICOM series is its folder.
    label : Path, optional
        Label map, or a folder of masks that overlap.
    patient : str
        Cases of one patient never end up on both sides of a split.
    drawn : frozenset of int, optional
        Labels that were drawn in this case; None means all.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    patient: str = ""
    drawn: frozenset[int] | None = None


@dataclass(frozen=True)
class Dataset:
    """What was found in a folder.

    Parameters
    ----------
    root : Path
        The folder.
    layout : str
        How its files are arranged, in words.
    cases : tuple of CaseFiles
        Labelled and unlabelled ones, sorted by id.
    names : mapping of int to str
        Labels that occur, without background.
    channels : tuple of str
        One name per channel.
    modality : {"ct", "mr", "other"}
        Kind of intensities.
    ignore : int, optional
        Value in label files that means "not looked at".
    test : tuple of CaseFiles
        Cases set apart by the layout; never used for training.
    kind : {"scalar", "peaks", "tensor"}
        What the channels hold.
    overlapping : bool
        Whether labels are masks that may overlap.
    unmatched, unused : tuple of Path
        Label files that belong to no image, and images that are of no case.
    """

    root: Path
    layout: str
    cases: tuple[CaseFiles, ...]
    names: Mapping[int, str]
    channels: tuple[str, ...] = ("image",)
    modality: Modality = "other"
    ignore: int | None = None
    test: tuple[CaseFiles, ...] = field(default=())
    kind: Kind = "scalar"
    overlapping: bool = False
    unmatched: tuple[Path, ...] = ()
    unused: tuple[Path, ...] = ()

    @property
    def labelled(self) -> tuple[CaseFiles, ...]:
        """Cases with a label map."""
        return tuple(c for c in self.cases if c.label is not None)

    @property
    def unlabelled(self) -> tuple[CaseFiles, ...]:
        """Cases without one."""
        return tuple(c for c in self.cases if c.label is None)

    def one_label_each(self, what: str) -> None:
        """Refuse labels that overlap, where something cannot be done with them.

        Parameters
        ----------
        what : str
            What that is, in words.

        Raises
        ------
        DataError
            If labels overlap.
        """
        if self.overlapping:
            raise DataError(
                f"{self.root}: its bundles overlap, and {what} takes one label a voxel, so far; "
                "train, predict, crossval, transfer, draft, shift and suggest take bundles"
            )


def find(root: Path) -> Dataset:
    """Find the cases in a folder, whatever its layout.

    Label files are read once to see which labels occur. A broken file does not stop the search: `fewscan.data.doctor`
    reports it, and `load` refuses it.

    Parameters
    ----------
    root : Path
        Folder in one of the layouts of `fewscan.data.layouts`.

    Raises
    ------
    DataError
        If nothing usable is there, a listing such as ``drawn.json`` is wrong, or two files are one part of a case.
    """
    root = Path(root)
    return assemble(root, layouts.detect(root))


def assemble(root: Path, found: Found) -> Dataset:
    """A data set from what a layout function saw.

    Parameters
    ----------
    root : Path
        The folder.
    found : Found
        Its files.

    Raises
    ------
    DataError
        If ``drawn.json`` is wrong, or it is not said whether channels hold directions.
    """
    kind, channels = kinds.kind_of(root, found)
    found = replace(found, channels=channels)
    if found.overlapping:
        names, drawn = bundles.listed(root, {i: p.label for i, p in found.pairs.items() if p.label}, names=found.names)
    else:
        names, drawn = _single(found)
    found = _unlabelled(found, drawn)
    drawn = {i: values for i, values in drawn.items() if found.pairs[i].label} | _stated(root, names, found.pairs)
    return Dataset(
        root=root,
        layout=found.layout,
        cases=tuple(CaseFiles(i, p.images, p.label, patient_of(i), drawn.get(i)) for i, p in found.pairs.items()),
        names=names,
        channels=channels,
        modality=_modality(found),
        ignore=found.ignore,
        test=tuple(CaseFiles(i, p.images, p.label, patient_of(i)) for i, p in found.test.items()),
        kind=kind,
        overlapping=found.overlapping,
        unmatched=found.unmatched,
        unused=found.unused,
    )


def _unlabelled(found: Found, drawn: Mapping[str, frozenset[int]]) -> Found:
    """With the cases whose folders of masks hold none of a listed structure as cases without a label."""
    bare = {i: p.label for i, p in found.pairs.items() if p.label and p.label.is_dir() and not drawn.get(i, True)}
    pairs = {i: replace(pair, label=None) if i in bare else pair for i, pair in found.pairs.items()}
    return replace(found, pairs=pairs, unmatched=(*found.unmatched, *bare.values()))


def _single(found: Found) -> tuple[dict[int, str], dict[str, frozenset[int]]]:
    """Labels that occur in label maps, and what was drawn in the cases that lack some."""
    drawn = [p.label for p in found.pairs.values() if p.label] or [p.label for p in found.test.values() if p.label]
    listed = found.names or numbered(drawn, ignore=found.ignore)
    values = {i: _values(p, listed, found.ignore) for i, p in found.pairs.items() if p.label is not None}
    held = {i: _values(p, listed, found.ignore) for i, p in found.test.items() if p.label is not None}
    present = frozenset[int]().union(*values.values(), *held.values())
    if listed:
        names = {v: n for v, n in listed.items() if v in present or not present}
    else:
        names = {v: f"label {v}" for v in sorted(present)}
    apart = {i: v & set(names) for i, v in values.items() if is_masks(found.pairs[i].label or Path())}
    told = annotation.not_drawn({i: v & set(names) for i, v in values.items() if v and i not in apart}, names)
    return names, told | {i: v for i, v in apart.items() if len(v) < len(names)}


def _values(pair: Pair, names: Mapping[int, str], ignore: int | None) -> frozenset[int]:
    """Labels in a case's file; none when it cannot be read."""
    if pair.label is None:
        return frozenset()
    if is_masks(pair.label):  # an empty mask was looked for
        files = {plain_name(name) for name in mask_files(pair.label)}
        return frozenset(value for value, name in names.items() if plain_name(name) in files)
    wanted = names if names_itself(pair.label) else None
    try:
        label = read_labels(pair.label, names=wanted, ignore=ignore, source=pair.images[0])
        return frozenset(label_values(label.data)) - {0, IGNORE}
    except FewscanError:  # a segment that is called otherwise than its number keeps that label in the list
        return frozenset(segments_of(pair.label)) & set(names)


def _stated(root: Path, names: Mapping[int, str], cases: Mapping[str, Pair]) -> dict[str, frozenset[int]]:
    """What ``drawn.json`` says: case id to the names of the labels drawn there."""
    path = root / "drawn.json"
    if not path.is_file():
        return {}
    numbers = {name: value for value, name in names.items()} | {str(value): value for value in names}
    result = {}
    for case, listed in listing.read_json(path).items():
        if case not in cases:
            raise DataError(f"{path}: there is no case {case!r}{_meant(case, cases)}")
        if not isinstance(listed, list) or any(str(n) not in numbers for n in listed):
            raise DataError(f"{path}: case {case!r} lists {listed}, labels are {sorted(names.values())}; correct it")
        result[case] = frozenset(numbers[str(n)] for n in listed)
    return result


def _meant(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; check the name"


def _modality(found: Found) -> Modality:
    """As the layout says; else CT when, in most of three scans, air at -300 or less and matter above 200 both occur."""
    if re.search(r"(?i)\bct\b", found.hint):
        return "ct"
    if MR_WORDS.search(found.hint):
        return "mr"
    votes = []
    for pair in [*found.pairs.values(), *found.test.values()][:3]:
        try:
            header = peek(pair.images[0]) if pair.images[0].is_file() else None
            if header is not None and header.dtype.kind == "u" and header.inter >= 0 and header.slope >= 0:
                votes.append(False)  # cannot hold air
                continue
            data = read_image(pair.images[0], channels=found.channels if len(pair.images) == 1 else None).data
        except FewscanError:
            continue
        votes.append(looks_like_ct(data))
    return "ct" if votes and 2 * sum(votes) > len(votes) else "other"


def looks_like_ct(data: NDArray[Any]) -> bool:
    """Whether air at -300 or less and matter above 200 both occur, as in Hounsfield units.

    Parameters
    ----------
    data : number
        Intensities of a scan.
    """
    sample = data.ravel(order="K")[:: max(1, data.size // 100_000)]
    return bool(np.mean(sample <= -300) > 0.01 and sample.max() > 200)


def patient_of(case: str) -> str:
    """Patient that a case id belongs to: sides, frames, sessions, runs and time points at its end are cut off.

    Parameters
    ----------
    case : str
        Case id.

    Examples
    --------
    >>> [patient_of(i) for i in ("patient001_frame01", "oasis_1000_L", "sub-03_ses-1_run-2", "hippocampus_017")]
    ['patient001', 'oasis_1000', 'sub-03', 'hippocampus_017']
    """
    bids = re.match(r"sub-[A-Za-z0-9]+", case)
    if bids:
        return bids[0]
    while (shorter := TAIL.sub("", case)) != case and shorter:
        case = shorter
    return case


def load(case: CaseFiles, dataset: Dataset) -> Case:
    """Read one case, with slices left blank on purpose marked as not looked at.

    Parameters
    ----------
    case : CaseFiles
        One of ``dataset.cases`` or ``dataset.test``.
    dataset : Dataset
        Where it belongs.

    Raises
    ------
    DataError
        If a file cannot be used as it is.
    GeometryError
        If image and label map lie on different grids.
    """
    paths = case.images[0] if len(case.images) == 1 else case.images
    image = kinds.of_kind(read_image(paths, channels=dataset.channels), dataset.kind, file=case.images[0])
    label = None
    if case.label is not None and dataset.overlapping:
        label = bundles.read_bundles(case.label, names=dataset.names, like=image.geometry)
    elif case.label is not None:
        label = read_labels(case.label, names=dataset.names, ignore=dataset.ignore, source=case.images[0])
        what = f"case {case.id}, {case.images[0].name} and its label map (`fewscan check DATA --fix DIR` can repair it)"
        check_same(image.geometry, label.geometry, what=what)
        label = Labelmap(annotation.mark_blank(label.data), image.geometry, label.names)
    meta = {"patient": case.patient, "images": tuple(str(p) for p in case.images)}
    return Case(case.id, image, label, case.drawn, meta)


def select(dataset: Dataset, *, labelled: Sequence[str], unlabelled: Sequence[str] = ()) -> Dataset:
    """The same data set with only these cases.

    Parameters
    ----------
    dataset : Dataset
        Where to choose from.
    labelled : sequence of str
        Ids of cases that keep their label.
    unlabelled : sequence of str
        Ids of cases to use without a label; where there is one, it is taken away.

    Raises
    ------
    DataError
        If an id is unknown, listed twice, or has no label to keep.
    """
    known = {c.id: c for c in dataset.cases}
    wanted = [*labelled, *unlabelled]
    for case in wanted:
        if case not in known:
            raise DataError(f"{dataset.root}: there is no case {case!r}{_meant(case, known)}")
    if len(set(wanted)) != len(wanted):
        raise DataError(f"{dataset.root}: a case is listed twice among {len(wanted)} ids; list each once")
    if bare := [case for case in labelled if known[case].label is None]:
        raise DataError(f"{dataset.root}: cases {bare[:5]} have no label map; list them as unlabelled")
    kept = [known[c] for c in labelled] + [replace(known[c], label=None, drawn=None) for c in unlabelled]
    return replace(dataset, cases=tuple(sorted(kept, key=lambda c: c.id)))


def folds(dataset: Dataset, k: int | Literal["loo"], *, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Split the labelled cases for cross-validation, whole patients at a time.

    Parameters
    ----------
    dataset : Dataset
        Its labelled cases are split.
    k : int or "loo"
        Number of folds; "loo" leaves out one patient at a time.
    seed : int
        Order in which patients are dealt out.

    Returns
    -------
    list of (list of str, list of str)
        Ids to train on and ids to test on, per fold.

    Raises
    ------
    DataError
        If there are fewer than two patients, or fewer than folds.
    """
    by_patient: dict[str, list[str]] = {}
    for case in dataset.labelled:
        by_patient.setdefault(case.patient, []).append(case.id)
    count = len(by_patient) if k == "loo" else int(k)
    if len(by_patient) < 2 or not 2 <= count <= len(by_patient):
        raise DataError(
            f"{dataset.root}: {len(by_patient)} labelled patients cannot be split into {k} folds; "
            "label at least two patients and ask for 2 folds or more, at most one per patient"
        )
    patients = sorted(by_patient)
    random.Random(seed).shuffle(patients)
    patients.sort(key=lambda p: -len(by_patient[p]))  # stable: large patients first, to balance the folds
    tests: list[list[str]] = [[] for _ in range(count)]
    for patient in patients:
        min(tests, key=len).extend(by_patient[patient])
    everyone = {c.id for c in dataset.labelled}
    return [(sorted(everyone - set(test)), sorted(test)) for test in tests]
