"""Scans and label maps side by side, or in a folder for each case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fewscan.data.folder_names import doubt
from fewscan.data.found import (
    LABEL_STEMS,
    LABEL_TAIL,
    Found,
    Pair,
    by_stem,
    chosen_label,
    files_in,
    folder_name,
    held_out,
    label_name,
    once,
    partner,
    stem_of,
    subfolders,
)
from fewscan.data.headers import suffix_of
from fewscan.data.masks import masks_of

PLAIN = "images without labels"


def flat(root: Path, *, channels: Sequence[str] = ()) -> Found | None:
    """Scans and label maps told apart by their names, in the folder or one level below; None without any file.

    Parameters
    ----------
    root : Path
        Folder to look at.
    channels : sequence of str
        Endings of names that are known to be channels.

    Raises
    ------
    DataError
        If two files of one folder differ in their format only.
    """
    listed = {root: files_in(root)}
    if not listed[root]:
        listed = {folder: files_in(folder) for folder in subfolders(root) if not held_out(folder)}
    every = {folder: list(by_stem(files).values()) for folder, files in listed.items() if files}
    files = [f for inside in every.values() for f in inside]
    if not any(map(suffix_of, files)):  # none, or SEG and RTSTRUCT of series that lie deeper
        return None
    stems = Counter(stem_of(f) for f in files)
    plain = [f for f in files if stem_of(f).lower() in LABEL_STEMS]
    masked = [folder for folder in every if masks_of(folder)]
    if root not in every and (max(stems.values()) > 1 or plain or masked):
        found = _one_folder_each(every)
        unclear = "" if plain or masked or channels or any(map(_labelled, every.values())) else doubt(every)
        return replace(found, doubts=(*found.doubts, unclear)) if unclear else found
    if root in every and (len(plain) == len(files) - 1 > 0 or (masked and len(files) == 1)):
        return _one_folder_each(every)  # the folder of one case
    found = _side_by_side([f for f in files if f not in plain], plain, channels)
    return replace(found, unmatched=(*found.unmatched, *(p for folder in masked for p in masks_of(folder))))


def _side_by_side(files: Sequence[Path], strangers: Sequence[Path], known: Sequence[str]) -> Found:
    """Label maps called like their scans, with an ending; ``strangers`` are called like label maps of nothing."""
    doubts: list[str] = []
    drawn: dict[str, list[Path]] = {}
    for file in files:
        if LABEL_TAIL.search(stem_of(file)):
            drawn.setdefault(LABEL_TAIL.sub("", stem_of(file)), []).append(file)
    scans = {stem_of(f): f for f in files if not LABEL_TAIL.search(stem_of(f))}
    for name, scan in {name: partner(name, scans) for name in scans}.items():
        if scan is not None:  # seg_1 beside ct_1
            drawn.setdefault(scan, []).append(scans.pop(name))
    loose = [base for base in drawn if base not in scans]
    groups = {base: {i[len(base) + 1 :]: f for i, f in scans.items() if i.startswith(f"{base}_")} for base in loose}
    groups = {base: group for base, group in groups.items() if group}
    alike = {tuple(sorted(group)) for group in groups.values()}
    channels = next(iter(alike)) if len(alike) == 1 else tuple(known) if not alike else ()
    used = {f"{base}_{channel}" for base in groups for channel in channels}
    rest = {i: f for i, f in scans.items() if i not in used}
    images = {base: tuple(group[c] for c in channels) for base, group in groups.items() if channels}
    for base in sorted({i.rsplit("_", 1)[0] for i in rest if i.rsplit("_", 1)[-1] in channels}):
        if all(f"{base}_{c}" in rest for c in channels):  # patient_t1, patient_flair without patient_seg
            images[base] = tuple(rest.pop(f"{base}_{c}") for c in channels)
    images |= {i: (f,) for i, f in rest.items()}
    pairs = {i: Pair(files, chosen_label(i, drawn.get(i, ()), doubts=doubts)) for i, files in sorted(images.items())}
    unmatched = (*strangers, *(f for base, files in drawn.items() if base not in pairs for f in files))
    layout = "files with _seg, _label or _mask" if drawn else PLAIN
    several = channels if channels[1:] else ()
    return Found(layout, pairs, channels=several, unmatched=unmatched, doubts=tuple(doubts))


def _one_folder_each(folders: Mapping[Path, Sequence[Path]]) -> Found:
    """Every case in a folder of its own, with the same file names in each, or with its folder's name in them.

    Channels are the names that most folders have, so that a patient who lacks one takes it from nobody else.
    """
    doubts: list[str] = []
    drawn = {folder: [f for f in files if label_name(_part(f))] for folder, files in folders.items()}
    scans = {
        folder: once(((_part(f), f) for f in files if not label_name(_part(f))), clash=_alike)
        for folder, files in folders.items()
    }
    count = Counter(name for mine in scans.values() for name in mine)
    most, holding = max(count.values(), default=0), sum(bool(mine) for mine in scans.values())
    channels = tuple(sorted(name for name, n in count.items() if n == most or 2 * n > holding))
    if len(folders) > 1 and most == 1:  # no name recurs
        channels = ()
    pairs: dict[str, Pair] = {}
    unmatched: list[Path] = []
    for folder, mine in sorted(scans.items()):
        case, labels = folder_name(folder), [*drawn[folder], *masks_of(folder)]
        if channels and all(c in mine for c in channels):
            files = tuple(mine[c] for c in channels)
        elif not channels and len(mine) == 1:
            files = tuple(mine.values())
        else:
            unmatched += labels
            continue
        pairs[case] = Pair(files, chosen_label(case, labels, doubts=doubts))
    used = {file for pair in pairs.values() for file in pair.images}
    unused = tuple(file for mine in scans.values() for file in mine.values() if file not in used)
    return Found(
        "one folder per case",
        pairs,
        channels=channels if len(channels) > 1 else (),
        unmatched=tuple(unmatched),
        unused=unused,
        doubts=tuple(doubts),
    )


def _labelled(files: Sequence[Path]) -> bool:
    """Whether the folder of a case holds a file called like a label map beside others."""
    return 0 < sum(label_name(_part(file)) for file in files) < len(files)


def _alike(name: str, one: Path, other: Path) -> str:
    return f"{one} and {other} are both the scan {name!r} of {one.parent.name}; keep one of the two there"


def _part(file: Path) -> str:
    """What a file holds of its case, by its name, without that of the case: "t1" of ``p1/p1_t1.nii.gz``."""
    case, stem = file.parent.name, stem_of(file)
    return "image" if stem == case else stem.removeprefix(f"{case}_")
