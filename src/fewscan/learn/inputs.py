"""What a user points at, as a list of scans: files, folders of files, DICOM series, data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewscan.data import dicom
from fewscan.data.bundles import SEGMENTATIONS, bundle_files
from fewscan.data.flat import PLAIN
from fewscan.data.found import Found, folder_name
from fewscan.data.layouts import TRACT_IMAGES, seen, stem_of
from fewscan.data.listing import RECORD, channel_record
from fewscan.errors import DataError
from fewscan.space.volume import Kind

CHANNEL = re.compile(r"_\d{4}$")


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


def find_scans(inputs: Sequence[Path], *, channels: Sequence[str], kind: Kind = "scalar") -> list[Scan]:
    """Scans behind files and folders.

    A folder in which `fewscan.data.layouts.seen` finds more than images is a data set: its cases are predicted under
    their ids, held-out ones too, and its label maps are not taken for scans.

    Parameters
    ----------
    inputs : sequence of Path
        Image files, folders of image files, DICOM series or folders of them, data sets.
    channels : sequence of str
        Of the model; with more than one, files belong together that differ in a final ``_0000`` or ``_<channel>``, or
        that are named like the channels in one folder.
    kind : {"scalar", "peaks", "tensor"}
        Of the model: of folders that `fewscan tracts inputs` wrote, the image that it takes.

    Raises
    ------
    DataError
        If something is missing, nothing is found, a channel is missing, or two scans would get the same name.
    """
    found: list[Path] = []
    scans: list[Scan] = []
    for path in inputs:
        if not dicom.on_disk(path).exists():
            raise DataError(f"{path} does not exist; give image files, folders or DICOM series")
        known = _data_set(path) if path.is_dir() else None
        if known is None:
            found.extend(_inside(path, channels, kind) if path.is_dir() else [path])
            continue
        for case, pair in [*known.pairs.items(), *known.test.items()]:
            if len(pair.images) == 1 < len(channels) and stem_of(pair.images[0]) == case:
                found.extend(pair.images)  # one of several channels, perhaps
            else:
                scans.append(Scan(case, _ordered(pair.images, known.channels, channels)))
    if not found and not scans:
        raise DataError(
            f"no image in {', '.join(str(p) for p in inputs)}; readable are NIfTI, NRRD, MHA and DICOM series"
        )
    groups: dict[tuple[Path, str], list[tuple[str, Path]]] = {}
    for path in dict.fromkeys(found):
        name, channel = _split(path, channels)
        groups.setdefault((path.parent, name), []).append((channel, path))
    scans += [Scan(name, tuple(p for _, p in sorted(files))) for (_, name), files in groups.items()]
    scans = list(dict.fromkeys(scans))
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


def _data_set(folder: Path) -> Found | None:
    """Cases of a data set; None where nothing but images lies there, or what `fewscan tracts inputs` wrote, of which
    the model has its own choice."""
    tracts = (folder / RECORD).is_file() or bundle_files(folder / SEGMENTATIONS)
    if tracts or any(bundle_files(p) or (p / RECORD).is_file() for p in folder.iterdir() if p.is_dir()):
        return None
    found = seen(folder)
    return None if found is None or (found.layout == PLAIN and not found.test) else found


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
    files = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    images = [
        p
        for p in files
        if p.is_file() and p.name.lower().endswith((".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"))
    ]
    folders = [p for p in files if p.is_dir()]
    return images or [p for folder in folders for p in _inside(folder, channels, kind)]
