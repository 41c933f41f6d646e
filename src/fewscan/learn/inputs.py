"""What a user points at, as a list of scans: files, folders of files, DICOM series, data sets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewscan.data import dicom
from fewscan.data.bundles import SEGMENTATIONS, bundle_files
from fewscan.data.folder_names import LABEL_FOLDERS
from fewscan.data.found import Found, called_label, folder_name, inside, readable, stem_of, subfolders
from fewscan.data.headers import suffix_of
from fewscan.data.layouts import TRACT_IMAGES, seen
from fewscan.data.listing import RECORD, channel_record
from fewscan.data.studies import flaw, set_aside
from fewscan.errors import DataError
from fewscan.space.volume import Kind

CHANNEL = re.compile(r"_\d{4}$")
FOR_LABELS = {*LABEL_FOLDERS, "labelstr", "labelsts"}
"""Names of folders of label maps, in lower case."""


@dataclass(frozen=True)
class Scan:
    """One scan to predict.

    Parameters
    ----------
    id : str
        Name of the result.
    images : tuple of Path
        One file per channel, or one folder of a DICOM series.
    """

    id: str
    images: tuple[Path, ...]


def find_scans(
    inputs: Sequence[Path],
    *,
    channels: Sequence[str],
    kind: Kind = "scalar",
    say: Callable[[str], object] | None = None,
) -> list[Scan]:
    """Scans behind files and folders.

    A folder is a data set where `fewscan.data.layouts.seen` finds more than images and accounts for every image: its
    cases are predicted under their ids, held-out ones too. Files called like label maps are not taken for scans there,
    nor in a folder with label maps that has images of no case, in which each image is a scan.

    Parameters
    ----------
    inputs : sequence of Path
        Image files, folders of image files, DICOM series or folders of them, data sets.
    channels : sequence of str
        Of the model; with more than one, files belong together that differ in a final ``_0000`` or ``_<channel>``, or
        that are named like the channels in one folder.
    kind : {"scalar", "peaks", "tensor"}
        Of the model: of folders that `fewscan tracts inputs` wrote, the image that it takes.
    say : callable, optional
        Gets a warning of each series of a study that is left out, since it is no volume.

    Raises
    ------
    DataError
        If something is missing, nothing is found, a channel is missing, or two scans would get the same name. If a
        folder may not be read, or a listing is wrong where label maps are to be told from scans.
    """
    found: list[Path] = []
    scans: list[Scan] = []
    for path in inputs:
        if not dicom.on_disk(path).exists():
            raise DataError(f"{path} does not exist; give image files, folders or DICOM series")
        if not path.is_dir():
            found.append(path)
            continue
        if not readable(path):
            raise DataError(f"{path}: may not be read; change its permissions")
        plain = _inside(path, channels, kind)
        aside = set_aside([p for p in plain if p.is_dir()])
        cases, files, unused = _in_folder(path, [p for p in plain if p not in aside], channels)
        taken = {*files, *(image for scan in cases for image in scan.images)}  # a labelled one is of a case
        for series, why in (aside | {p: flaw(p) for p in unused if p not in aside}).items():
            if say is not None and series not in taken:
                say(f"warning: {series} is left out: the series {why}; give its folder to predict it")
        scans.extend(cases)
        found.extend(files)
    if not found and not scans:
        raise DataError(
            f"no image in {', '.join(str(p) for p in inputs)}; readable are NIfTI, NRRD, MHA and DICOM series"
        )
    scans = list(dict.fromkeys([*scans, *_grouped(found, channels)]))
    for scan in scans:
        if len(scan.images) not in (1, len(channels)):
            raise DataError(
                f"{scan.images[0]}: {len(scan.images)} files are named {scan.id}, the model takes {len(channels)} "
                f"channel(s) {', '.join(channels)}; give one file per channel"
            )
    twice = {s.id for s in scans if sum(o.id == s.id for o in scans) > 1}
    if twice:
        raise DataError(f"several inputs are named {sorted(twice)[0]!r}; predict them into different folders")
    return scans


def _in_folder(
    folder: Path, plain: list[Path], channels: Sequence[str]
) -> tuple[list[Scan], list[Path], Iterable[Path]]:
    """Cases of a data set; of its plain images those that are still to be grouped; series that are of no case."""
    known = None if plain in ([], [folder]) else _data_set(folder, plain, channels)
    if known is None:
        return [], plain, ()
    cases = [*known.pairs.items(), *known.test.items()]
    images = {file for _, pair in cases for file in pair.images}
    others = {*(pair.label for _, pair in cases), *known.unmatched, *filter(called_label, plain)}
    if not images.union(others).issuperset(plain):  # whatever the layout passes over is somebody's scan
        drawn = {file for file in plain if called_label(file) or (file in others and _for_labels(file))} - images
        return [], [file for file in plain if file not in drawn], ()
    scans: list[Scan] = []
    files: list[Path] = []
    for case, pair in cases:
        if len(pair.images) == 1 < len(channels) and stem_of(pair.images[0]) == case:
            files.extend(pair.images)  # one of several channels, perhaps
        else:
            scans.append(Scan(case, _ordered(pair.images, known.channels, channels)))
    return scans, files, [p for p in known.unused if dicom.is_series(p)]


def _data_set(folder: Path, plain: Sequence[Path], channels: Sequence[str]) -> Found | None:
    """Cases of a data set; None where that says no more than the files do, and of what `fewscan tracts inputs` wrote,
    of which the model has its own choice."""
    tracts = (folder / RECORD).is_file() or bundle_files(folder / SEGMENTATIONS)
    if tracts or any(bundle_files(p) or (p / RECORD).is_file() for p in subfolders(folder)):
        return None
    try:
        found = seen(folder)
    except DataError:
        names = [scan.id for scan in _grouped(plain, channels)]
        drawn = any(called_label(file) or _for_labels(file) for file in plain)
        if drawn or len(set(names)) < len(names):
            raise
        return None  # plain images need no listing
    if found is None:
        return None
    drawn = any(pair.label is not None for pair in found.pairs.values())
    several = len(channels) > 1 and any(len(pair.images) > 1 for pair in found.pairs.values())
    patients = any(p.images[0].is_dir() and p.images[0].name != case for case, p in found.pairs.items())
    return found if drawn or found.test or several or patients else None


def _for_labels(file: Path) -> bool:
    return file.parent.name.lower() in FOR_LABELS


def _grouped(files: Sequence[Path], channels: Sequence[str]) -> list[Scan]:
    """Scans of files, those together that are channels of one."""
    groups: dict[tuple[Path, str], list[tuple[str, Path]]] = {}
    for path in dict.fromkeys(files):
        name, channel = _split(path, channels)
        groups.setdefault((path.parent, name), []).append((channel, path))
    return [Scan(name, tuple(p for _, p in sorted(group))) for (_, name), group in groups.items()]


def _ordered(images: tuple[Path, ...], named: Sequence[str], channels: Sequence[str]) -> tuple[Path, ...]:
    """Files of a case in the model's order: by the names of the channels, else by their numbers."""
    have, want = ([name.lower() for name in names] for names in (named, channels))
    if len(images) > 1 and sorted(have) == sorted(want):
        return tuple(images[have.index(channel)] for channel in want)
    if 1 < len(images) == len(channels) and not all(CHANNEL.search(stem_of(file)) for file in images):
        raise DataError(
            f"{images[0]}: is one of the channels {', '.join(named)}, the model takes {', '.join(channels)}; name the "
            "files like these"
        )
    return images


def _split(path: Path, channels: Sequence[str]) -> tuple[str, str]:
    """Name of the scan that a file belongs to, and its channel as a word that sorts in the model's order."""
    if (path.parent / RECORD).is_file() and path.name in TRACT_IMAGES.values():
        return path.parent.resolve().name, ""
    name = folder_name(path) if path.is_dir() else stem_of(path)
    if len(channels) == 1:
        return name, ""
    for i, channel in enumerate(channels):
        if name == channel:
            return folder_name(path.parent), f"{i:04d}"
        if name.endswith(f"_{channel}"):
            return name[: -len(channel) - 1], f"{i:04d}"
    return CHANNEL.sub("", name), name


def _inside(folder: Path, channels: Sequence[str], kind: Kind) -> list[Path]:
    """Images in a folder; a series is one image."""
    if dicom.is_series(folder):
        return [folder]
    taken = folder / TRACT_IMAGES[kind]
    if taken.is_file() and channel_record(taken)[1] == tuple(channels):
        return [taken]
    images = [p for p in inside(folder) if p.is_file() and suffix_of(p)]
    return images or [p for inner in subfolders(folder) for p in _inside(inner, channels, kind)]
