"""How people store scans and labels: each layout is one function from a folder to `Found`, or None."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fewscan.data import dicom_labels
from fewscan.data.bids import bids
from fewscan.data.bundles import SEGMENTATIONS, bundle_files
from fewscan.data.dicom import is_series
from fewscan.data.flat import flat
from fewscan.data.folder_names import images_and_labels, left_over
from fewscan.data.found import (
    LABEL_STEMS,
    LABEL_TAIL,
    Found,
    Pair,
    below,
    by_stem,
    called_label,
    chosen_label,
    entries,
    files_in,
    folder_name,
    held_out,
    partner,
    stem_of,
    subfolders,
)
from fewscan.data.headers import suffix_of
from fewscan.data.listing import RECORD, channel_record, read_listing, stated
from fewscan.data.studies import set_aside
from fewscan.errors import DataError

TRACT_IMAGES = {"peaks": "peaks.nii.gz", "tensor": "tensor.nii.gz", "scalar": "scalars.nii.gz"}
CHANNEL_TAIL = re.compile(r"^(.+)_(\d{4})$")
NEW_FOLDER = "`fewscan tracts inputs` makes a new folder with it; copy the masks there"
UNDERSTOOD = (
    "images/ + labels/, imagesTr/ + labelsTr/ (nnU-Net, MSD), BIDS with derivatives/, files with _seg, _label or _mask "
    "in their names, a folder for each case, folders of DICOM series or of fewscan tracts inputs, these also with "
    "bundle_segmentations/"
)


def detect(root: Path) -> Found:
    """The cases of a data set, by the first layout that fits.

    Parameters
    ----------
    root : Path
        Folder to look at.

    Raises
    ------
    DataError
        If no layout fits; the message says which ones are understood and what was seen. If a case has several label
        maps.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the scans")
    found = seen(root)
    if found is None:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise DataError(f"{root}: no scans found; understood are {UNDERSTOOD}; seen were: {there}")
    if found.doubts:
        raise DataError(found.doubts[0])
    return found


def seen(root: Path) -> Found | None:
    """As `detect`, of a folder that need not be a data set: None where no layout fits, and doubts are not refused.

    Parameters
    ----------
    root : Path
        Folder to look at.

    Raises
    ------
    DataError
        If a listing is wrong, or two scans have one name.
    """
    layouts: tuple[Callable[[Path], Found | None], ...] = (
        _task, _folders, _subjects, bids, _tracts, _series, flat, _nested,
    )  # fmt: skip
    for layout in layouts:
        found = layout(root)
        if found is not None and (found.pairs or found.test):
            return _listed(root, found if found.test else _with_test(root, found))
    return None


def _with_test(root: Path, found: Found) -> Found:
    """With the cases that lie apart in ``test/``, in whatever layout, or in ``imagesTs/`` and ``labelsTs/``."""
    for folder in (p for p in subfolders(root) if p.name.lower() == "test"):
        held = flat(folder, channels=found.channels) if found.channels else None
        held = held if held is not None and held.pairs else seen(folder)
        if held is not None:
            unmatched, doubts = (*found.unmatched, *held.unmatched), (*found.doubts, *held.doubts)
            test = {**held.pairs, **held.test}
            if held.overlapping != found.overlapping:  # labels of another kind are no reference
                test = {case: replace(pair, label=None) for case, pair in test.items()}
            unused = (*found.unused, *held.unused)
            return replace(found, test=test, unmatched=unmatched, unused=unused, doubts=doubts)
    if (root / "imagesTs").is_dir():
        return _held(root / "imagesTs", root / "labelsTs", found)
    return found


def _held(images: Path, labels: Path | None, found: Found) -> Found:
    """With the cases of two folders as those to test on."""
    held = entries(labels) if labels is not None and labels.is_dir() else []
    more = _pair(entries(images), held, _files_each(found.pairs))
    unmatched, doubts = (*found.unmatched, *more.unmatched), (*found.doubts, *more.doubts)
    return replace(found, test=more.pairs, unmatched=unmatched, doubts=doubts)


def _listed(root: Path, found: Found) -> Found:
    """With what ``labels.json`` and ``dataset.json`` say and the layout does not, such as what numbered channels are
    called; masks of their own need no ignore value."""
    listing = read_listing(root)
    numbered = all(channel.isdigit() for channel in found.channels)
    return replace(
        found,
        names=found.names or listing["names"],
        channels=listing["channels"] if numbered and listing["channels"] else found.channels,
        hint=listing["hint"] or found.hint,
        ignore=None if found.overlapping else listing["ignore"],
    )


# ----------------------------------------------------------------------------------------------- folders of pairs


def _folders(root: Path) -> Found | None:
    """images/ with labels/ beside, held-out cases in test/."""
    images, labels = images_and_labels(root)
    if images is None:
        return None
    layout = f"{folder_name(images)}/ + {labels.name}/" if labels else f"{images.name}/ without labels"
    found = replace(_pairs(root, images, labels, layout), unused=left_over(root, images, labels=labels))
    held, drawn = images_and_labels(root / "test") if root / "test" in subfolders(root) else (None, None)
    return _held(held, drawn, found) if held else found


def _task(root: Path) -> Found | None:
    """nnU-Net raw and Medical Segmentation Decathlon."""
    images, labels = root / "imagesTr", root / "labelsTr"
    if not images.is_dir():
        return None
    found = _pairs(root, images, labels, "imagesTr/ + labelsTr/ (nnU-Net, MSD)")
    return _held(root / "imagesTs", root / "labelsTs", found) if (root / "imagesTs").is_dir() else found


def _pairs(root: Path, images: Path, labels: Path | None, layout: str) -> Found:
    """What two folders hold."""
    drawn = entries(labels) if labels is not None and labels.is_dir() else []
    made = _pair(entries(images), drawn, len(read_listing(root)["channels"]))
    return Found(layout, made.pairs, channels=made.channels, unmatched=made.unmatched, doubts=made.doubts)


def _files_each(pairs: Mapping[str, Pair]) -> int:
    """How many numbered files make one case; 0 where the files are not numbered."""
    return max((len(p.images) for case, p in pairs.items() if stem_of(p.images[0]) != case), default=0)


class Paired(NamedTuple):
    """Images and label files put together.

    Parameters
    ----------
    pairs : dict of str to Pair
        By case.
    channels : tuple of str
        Numbers of the channels, where there are several files for a case.
    unmatched : tuple of Path
        Label files that belong to no image.
    doubts : tuple of str
        Cases of which several files may be the label map.
    """

    pairs: dict[str, Pair]
    channels: tuple[str, ...]
    unmatched: tuple[Path, ...]
    doubts: tuple[str, ...]


def _pair(images: list[Path], labels: list[Path], expected: int = 0) -> Paired:
    """Match label files to images by name; gather ``_0000`` channels.

    Cases without a label need ``expected`` files each; labelled cases show how many, where nothing else says it.
    """
    stems = by_stem(images)
    by_id: dict[str, list[Path]] = {}
    for file in labels:
        by_id.setdefault(stem_of(file), []).append(file)
    for file in labels:
        case = partner(stem_of(file), stems) or LABEL_TAIL.sub("", stem_of(file))
        if case != stem_of(file) not in stems:
            by_id.setdefault(case, []).append(file)
    groups: dict[str, dict[str, Path]] = {}
    for stem, file in stems.items():
        match = CHANNEL_TAIL.match(stem)
        if match and stem not in by_id:
            groups.setdefault(match[1], {})[match[2]] = file
    shown = [len(g) for b, g in groups.items() if "0000" in g and b in by_id]
    if shown:
        expected = expected or max(shown)
    elif any(stem in by_id for stem in stems):
        expected = 0  # labelled scans without numbers: four digits are names here
    kept = {b: g for b, g in groups.items() if "0000" in g and (b in by_id or expected == len(g))}
    if not by_id and not expected and len({tuple(g) for g in groups.values()}) == 1 and len(groups) > 1:
        kept = {b: g for b, g in groups.items() if sorted(g) == [f"{i:04d}" for i in range(len(g))]}
    grouped = {file for group in kept.values() for file in group.values()}
    files = {base: tuple(g[c] for c in sorted(g)) for base, g in kept.items()}
    files |= {stem: (file,) for stem, file in stems.items() if file not in grouped}
    doubts: list[str] = []
    pairs = {case: Pair(f, chosen_label(case, by_id.get(case, ()), doubts=doubts)) for case, f in sorted(files.items())}
    numbers = max((tuple(sorted(g)) for g in kept.values()), key=len, default=())
    taken = {file for case in pairs for file in by_id.get(case, ())}
    unmatched = tuple(file for file in labels if file not in taken)
    return Paired(pairs, numbers if len(numbers) > 1 else (), unmatched, tuple(doubts))


# -------------------------------------------------------------------------------------------------- DICOM and tracts


def _series(root: Path) -> Found | None:
    """One folder of DICOM files, or a folder of such folders."""
    if is_series(root):
        return Found("one DICOM series", _bound(root, {folder_name(root): Pair((root,))}))
    folders = [p for p in subfolders(root) if not held_out(p)]
    series = [p for p in folders if is_series(p)]
    if not series:
        return None
    if deeper := [found for p in folders if p not in series for found in _series_below(p)]:
        return _patients(root, sorted([*series, *deeper]))
    files = files_in(root)
    aside = _undrawn(root, [p for p in set_aside(series) if not _named(files, p.name)])
    made = _pair([p for p in series if p not in aside], files)
    pairs = _bound(root, made.pairs)
    unmatched, unused = _left(made.unmatched, pairs)
    unused = (*unused, *aside)
    return Found("folders of DICOM series", pairs, unmatched=unmatched, unused=unused, doubts=made.doubts)


def _named(files: Iterable[Path], case: str) -> bool:
    """Whether one of some files is the label map of a case, by its name."""
    return any(case in (stem_of(file), LABEL_TAIL.sub("", stem_of(file))) for file in files)


def _nested(root: Path) -> Found | None:
    """patient/study/series folders of DICOM files."""
    folders = [p for p in subfolders(root) if not held_out(p)]
    return _patients(root, sorted(found for p in folders for found in _series_below(p)))


def _series_below(folder: Path) -> list[Path]:
    """Series in a folder, however deep; a series holds no other."""
    found: list[Path] = []
    for inner in subfolders(folder):
        if is_series(inner):
            found.append(inner)
        elif not inner.is_symlink():
            found += _series_below(inner)
    return found


def _patients(root: Path, series: Iterable[Path]) -> Found:
    """Series by the folders of their patients; several series of one patient become its sessions."""
    parts = {p: p.relative_to(root).parts for p in series}
    labels: dict[str, list[Path]] = {}
    for file in files_in(root):
        labels.setdefault(LABEL_TAIL.sub("", stem_of(file)), []).append(file)
    every = _case_names(parts)  # a label map that is called like the patient belongs to the only series there
    aside = _undrawn(root, [p for p in set_aside(list(parts)) if every[p] not in labels])
    doubts: list[str] = []
    pairs: dict[str, Pair] = {}
    for folder, case in _case_names({p: part for p, part in parts.items() if p not in aside}).items():
        if case in pairs:
            raise DataError(f"{folder}: reads like {pairs[case].images[0]} as a case name; rename one of the two")
        pairs[case] = Pair((folder,), chosen_label(case, labels.get(case, ()), doubts=doubts))
    pairs = _bound(root, pairs)
    unmatched, unused = _left((f for case, files in labels.items() if case not in pairs for f in files), pairs)
    layout, unused = "nested folders of DICOM series", (*unused, *aside)
    return Found(layout, pairs, unmatched=unmatched, unused=unused, doubts=tuple(doubts))


def _case_names(parts: Mapping[Path, Sequence[str]]) -> dict[Path, str]:
    """What each series is called: like its patient, of several with the folders below that."""
    count = Counter(patient for patient, *_ in parts.values())
    return {
        p: patient if count[patient] == 1 else f"{patient}_ses-{re.sub(r'[^A-Za-z0-9]+', '_', '_'.join(rest))}"
        for p, (patient, *rest) in parts.items()
    }


def _undrawn(root: Path, series: Iterable[Path]) -> list[Path]:
    """Those of some series to which no SEG or RTSTRUCT refers, sorted."""
    bare = sorted(series)
    drawn = _referring(root, bare)
    return [p for p in bare if p not in drawn]


def _referring(root: Path, series: Sequence[Path]) -> dict[Path, Path]:
    """The SEG or RTSTRUCT under ``root`` that refers to each of some series."""
    files = below(root) if series else []
    return dicom_labels.belonging(series, [p for p in files if dicom_labels.is_label(p)])


def _left(files: Iterable[Path], pairs: Mapping[str, Pair]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Files beside series that are of no pair: label maps, by their names or since they are DICOM, and images."""
    left = [file for file in files if all(pair.label != file for pair in pairs.values())]
    labels = tuple(file for file in left if suffix_of(file) is None or called_label(file))
    return labels, tuple(file for file in left if file not in labels)


def _bound(root: Path, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs, those without a label given the SEG or RTSTRUCT under ``root`` that refers to their series."""
    found = _referring(root, [pair.images[0] for pair in pairs.values() if pair.label is None])
    return {case: replace(pair, label=pair.label or found.get(pair.images[0])) for case, pair in pairs.items()}


def _subjects(root: Path) -> Found | None:
    """`_tracts` where all cases are called as in BIDS, whose rules their masks' names would satisfy."""
    subjects = [p for p in subfolders(root) if p.name.startswith("sub-")]
    every = all((p / RECORD).is_file() or bundle_files(p) for p in subjects)
    return _tracts(root) if subjects and every else None


def _tracts(root: Path) -> Found | None:
    """Folders that `fewscan tracts inputs` wrote, each with a label map or masks of bundles; dataset.json says which of
    the images."""
    inner = [p for p in subfolders(root) if not held_out(p)]
    masked = {p for p in inner if p.name != SEGMENTATIONS and bundle_files(p)}
    folders = sorted({p for p in inner if (p / RECORD).is_file()} | masked)
    if not folders:
        if bundle_files(root / SEGMENTATIONS):
            raise DataError(f"{root}: is one case, since {SEGMENTATIONS}/ lies directly in it; give the folder above")
        return None
    name, doubts = TRACT_IMAGES[stated(root) or "peaks"], list[str]()
    pairs: dict[str, Pair] = {}
    for folder in folders:
        if not (folder / RECORD).is_file():
            raise DataError(f"{folder}: has {SEGMENTATIONS}/ and no {RECORD}; {NEW_FOLDER}")
        stems = LABEL_STEMS - {"mask"}  # which is that of the brain
        labels = [f for f in entries(folder) if f.is_file() and stem_of(f).lower() in stems]
        if labels and masked:
            raise DataError(f"{labels[0]}: a label map where others have {SEGMENTATIONS}/; keep one of the two kinds")
        label = folder / SEGMENTATIONS if folder in masked else chosen_label(folder.name, labels, doubts=doubts)
        if (folder / name).is_file():
            pairs[folder.name] = Pair((folder / name,), label)
        elif folder in masked:
            raise DataError(f"{folder}: has {SEGMENTATIONS}/ and no {name}; {NEW_FOLDER}")
    channels = channel_record(next(iter(pairs.values())).images[0])[1] if pairs else ()
    layout = f"folders with {SEGMENTATIONS}/" if masked else "folders of fewscan tracts inputs"
    return Found(layout, pairs, channels=channels, overlapping=bool(masked), doubts=tuple(doubts))
