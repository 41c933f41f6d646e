"""How people store scans and labels: each layout is one function from a folder to `Found`, or None."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewscan.data import dicom_labels
from fewscan.data.bundles import SEGMENTATIONS, bundle_files
from fewscan.data.dicom import is_series
from fewscan.data.headers import suffix_of
from fewscan.data.listing import RECORD, channel_record, read_listing, stated
from fewscan.errors import DataError

IMAGE_FOLDERS = ("images", "image", "imgs", "scans")
LABEL_FOLDERS = ("labels", "label", "masks", "mask", "segmentations", "annotations")
LABEL_STEMS = {"seg", "segmentation", "label", "labels", "labelmap", "gt"}
TRACT_IMAGES = {"peaks": "peaks.nii.gz", "tensor": "tensor.nii.gz", "scalar": "scalars.nii.gz"}
LABEL_TAIL = re.compile(r"(?i)[-_.](seg|segmentation|label|labels|labelmap|mask|gt)$")
CHANNEL_TAIL = re.compile(r"^(.+)_(\d{4})$")
NEW_FOLDER = "`fewscan tracts inputs` makes a new folder with it; copy the masks there"
UNDERSTOOD = (
    "images/ + labels/, imagesTr/ + labelsTr/ (nnU-Net, MSD), BIDS with derivatives/, files with _seg, _label or _mask "
    "in their names, folders of DICOM series or of fewscan tracts inputs, these also with bundle_segmentations/"
)


@dataclass(frozen=True)
class Pair:
    """Files of one case.

    Parameters
    ----------
    images : tuple of Path
        One per channel; a DICOM series is its folder.
    label : Path, optional
        Label map, or a folder of masks that overlap.
    """

    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a layout function saw.

    Parameters
    ----------
    layout : str
        Name of the layout.
    pairs, test : mapping of str to Pair
        Case id to files: for training, and set apart for testing.
    names : mapping of int to str
        Listed labels; empty when none are listed.
    channels : tuple of str
        Listed channels; empty when none are listed.
    hint : str
        Modality as far as the layout names it.
    ignore : int, optional
        Label value that means "not looked at".
    overlapping : bool
        Whether labels are masks that may overlap.
    """

    layout: str
    pairs: Mapping[str, Pair]
    test: Mapping[str, Pair] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)
    channels: tuple[str, ...] = ()
    hint: str = ""
    ignore: int | None = None
    overlapping: bool = False


def stem_of(path: Path) -> str:
    """Name without image suffix, or the folder's name.

    Parameters
    ----------
    path : Path
        Image file or DICOM folder.

    Examples
    --------
    >>> stem_of(Path("images/patient.01.nii.gz"))
    'patient.01'
    """
    suffix = suffix_of(path) or (".dcm" if path.suffix.lower() == ".dcm" else "")
    return path.name[: -len(suffix)] if suffix else path.name


def entries(folder: Path) -> list[Path]:
    """Image files, DICOM folders and DICOM label files directly inside, sorted; hidden ones left out.

    Parameters
    ----------
    folder : Path
        Folder to list.
    """
    seen = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return [p for p in seen if (is_series(p) if p.is_dir() else suffix_of(p) or dicom_labels.is_label(p))]


def detect(root: Path) -> Found:
    """Try every layout.

    Parameters
    ----------
    root : Path
        Folder to look at.

    Raises
    ------
    DataError
        If no layout fits; the message says which ones are understood and what was seen.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the folder that holds the scans")
    layouts: tuple[Callable[[Path], Found | None], ...] = (
        _task, _folders, _subjects, _bids, _tracts, _series, _flat, _nested,
    )  # fmt: skip
    for layout in layouts:
        found = layout(root)
        if found is not None and (found.pairs or found.test):
            return found
    seen = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
    raise DataError(f"{root}: no scans found; understood are {UNDERSTOOD}; seen were: {seen}")


# ----------------------------------------------------------------------------------------------- folders of pairs


def _folders(root: Path) -> Found | None:
    """images/ with labels/ beside, held-out cases in test/."""
    images = _first(root, IMAGE_FOLDERS)
    if images is None:
        return None
    labels = _first(root, LABEL_FOLDERS)
    test: dict[str, Pair] = {}
    listing = read_listing(root)
    pairs, channels = _pair(entries(images), entries(labels) if labels else [], len(listing["channels"]))
    if (root / "test").is_dir() and (held := _first(root / "test", IMAGE_FOLDERS)):
        held_labels = _first(root / "test", LABEL_FOLDERS)
        test, _ = _pair(entries(held), entries(held_labels) if held_labels else [], _files_each(pairs))
    layout = f"{images.name}/ + {labels.name}/" if labels else f"{images.name}/ without labels"
    return Found(layout, pairs, test, **(listing | {"channels": listing["channels"] or channels}))


def _task(root: Path) -> Found | None:
    """nnU-Net raw and Medical Segmentation Decathlon."""
    images, labels = root / "imagesTr", root / "labelsTr"
    if not images.is_dir():
        return None
    listing = read_listing(root)
    pairs, channels = _pair(entries(images), entries(labels) if labels.is_dir() else [], len(listing["channels"]))
    test: dict[str, Pair] = {}
    if (root / "imagesTs").is_dir():
        held = entries(root / "labelsTs") if (root / "labelsTs").is_dir() else []
        test, _ = _pair(entries(root / "imagesTs"), held, _files_each(pairs))
    layout = "imagesTr/ + labelsTr/ (nnU-Net, MSD)"
    return Found(layout, pairs, test, **(listing | {"channels": listing["channels"] or channels}))


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / n for n in names if (root / n).is_dir()), None)


def _files_each(pairs: Mapping[str, Pair]) -> int:
    """How many numbered files make one case; 0 where the files are not numbered."""
    return max((len(p.images) for case, p in pairs.items() if stem_of(p.images[0]) != case), default=0)


def _pair(images: list[Path], labels: list[Path], expected: int = 0) -> tuple[dict[str, Pair], tuple[str, ...]]:
    """Match label files to images by name; gather ``_0000`` channels. Returns pairs and channel numbers if any.

    Cases without a label need ``expected`` files each; labelled cases show how many, where nothing else says it.
    """
    by_id: dict[str, Path] = {}
    for file in labels:
        by_id[stem_of(file)] = file
    for stem, file in list(by_id.items()):
        by_id.setdefault(LABEL_TAIL.sub("", stem), file)
    stems = {stem_of(file): file for file in images}
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
    pairs = {base: Pair(tuple(g[c] for c in sorted(g)), by_id.get(base)) for base, g in kept.items()}
    pairs |= {stem: Pair((file,), by_id.get(stem)) for stem, file in stems.items() if file not in grouped}
    numbers = max((tuple(sorted(g)) for g in kept.values()), key=len, default=())
    return dict(sorted(pairs.items())), numbers if len(numbers) > 1 else ()


# ------------------------------------------------------------------------------------------- BIDS, flat and DICOM


def _bids(root: Path) -> Found | None:
    """sub-*/ with label maps in derivatives/; of several contrasts the one that most subjects have."""
    subjects = sorted(p for p in root.glob("sub-*") if p.is_dir())
    images = [f for s in subjects for f in sorted(s.rglob("*")) if suffix_of(f) and f.is_file()]
    images = [f for f in images if "_" in stem_of(f) and not LABEL_TAIL.search(stem_of(f)) and "_dseg" not in f.name]
    if not images:
        return None
    having = {(f.relative_to(root).parts[0], stem_of(f).rsplit("_", 1)[1]) for f in images}
    contrasts = Counter(contrast for _, contrast in having)
    contrast = min(contrasts, key=lambda c: (-contrasts[c], c))
    scans = {stem_of(f).rsplit("_", 1)[0]: f for f in images if stem_of(f).endswith(f"_{contrast}")}
    places = [root / "derivatives", *subjects]
    files = [f for p in places if p.is_dir() for f in sorted(p.rglob("sub-*")) if suffix_of(f) and f.is_file()]
    labels = [f for f in files if re.search(r"_(dseg|seg|label|labels|mask)$", stem_of(f))]
    pairs = {}
    for case, scan in sorted(scans.items()):
        mine = [f for f in labels if stem_of(f).startswith(f"{case}_")]
        if len(mine) > 1:  # one for each contrast, or in several forms
            named = {f: contrasts.keys() & set(stem_of(f).split("_")) for f in mine}
            mine = [f for f in mine if contrast in named[f]] or [f for f in mine if not named[f]]
        mine = [f for f in mine if "_dseg" in f.name] or mine
        pairs[case] = Pair((scan,), mine[0] if mine else None)
    tables = [t for p in (root, root / "derivatives") if p.is_dir() for t in sorted(p.rglob("*dseg.tsv"))]
    names = _table(tables[0]) if tables else read_listing(root)["names"]
    return Found(layout="BIDS", pairs=pairs, names=names, channels=(), hint=contrast)


def _table(path: Path) -> dict[int, str]:
    """Label names from a BIDS lookup table (columns index and name)."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        return {int(r["index"]): r["name"] for r in rows if int(r["index"]) != 0}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: needs the columns index and name ({error}); correct the table") from None


def _series(root: Path) -> Found | None:
    """One folder of DICOM files, or a folder of such folders."""
    if is_series(root):
        return Found(layout="one DICOM series", pairs=_bound(root, {root.name: Pair((root,))}), **_named(root))
    series = [p for p in entries(root) if p.is_dir()]
    if not series:
        return None
    pairs, _ = _pair(series, [p for p in entries(root) if p.is_file()])
    return Found(layout="folders of DICOM series", pairs=_bound(root, pairs), **_named(root))


def _nested(root: Path) -> Found | None:
    """patient/study/series folders of DICOM files; several series of one patient become its sessions."""
    series = sorted(p for p in root.rglob("*") if p.is_dir() and is_series(p))
    count = Counter(p.relative_to(root).parts[0] for p in series)
    labels = {LABEL_TAIL.sub("", stem_of(f)): f for f in entries(root) if f.is_file()}
    pairs: dict[str, Pair] = {}
    for folder in series:
        patient, *rest = folder.relative_to(root).parts
        case = patient if count[patient] == 1 else f"{patient}_ses-{re.sub(r'[^A-Za-z0-9]+', '_', '_'.join(rest))}"
        if case in pairs:
            raise DataError(f"{folder}: reads like {pairs[case].images[0]} as a case name; rename one of the two")
        pairs[case] = Pair((folder,), labels.get(case))
    return Found(layout="nested folders of DICOM series", pairs=_bound(root, pairs), **_named(root))


def _named(root: Path) -> dict[str, Any]:
    listing = read_listing(root)
    return {"names": listing["names"], "ignore": listing["ignore"]}


def _bound(root: Path, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The pairs, those without a label given the SEG or RTSTRUCT under ``root`` that refers to their series."""
    bare = [pair.images[0] for pair in pairs.values() if pair.label is None]
    files = sorted(p for p in root.rglob("*") if not p.name.startswith(".")) if bare else []
    found = dicom_labels.belonging(bare, [p for p in files if dicom_labels.is_label(p)])
    return {case: replace(pair, label=pair.label or found.get(pair.images[0])) for case, pair in pairs.items()}


def _subjects(root: Path) -> Found | None:
    """`_tracts` where all cases are called as in BIDS, whose rules their masks' names would satisfy."""
    subjects = [p for p in root.glob("sub-*") if p.is_dir()]
    every = all((p / RECORD).is_file() or bundle_files(p) for p in subjects)
    return _tracts(root) if subjects and every else None


def _tracts(root: Path) -> Found | None:
    """Folders that `fewscan tracts inputs` wrote, each with a label map or masks of bundles; dataset.json says which of
    the images."""
    masked = {p for p in root.iterdir() if p.is_dir() and p.name != SEGMENTATIONS and bundle_files(p)}
    folders = sorted({p for p in root.iterdir() if (p / RECORD).is_file()} | masked)
    if not folders:
        if bundle_files(root / SEGMENTATIONS):
            raise DataError(f"{root}: is one case, since {SEGMENTATIONS}/ lies directly in it; give the folder above")
        return None
    name, pairs = TRACT_IMAGES[stated(root) or "peaks"], {}
    for folder in folders:
        if not (folder / RECORD).is_file():
            raise DataError(f"{folder}: has {SEGMENTATIONS}/ and no {RECORD}; {NEW_FOLDER}")
        labels = [f for f in entries(folder) if f.is_file() and stem_of(f).lower() in LABEL_STEMS]
        if labels and masked:
            raise DataError(f"{labels[0]}: a label map where others have {SEGMENTATIONS}/; keep one of the two kinds")
        label = folder / SEGMENTATIONS if folder in masked else next(iter(labels), None)
        if (folder / name).is_file():
            pairs[folder.name] = Pair((folder / name,), label)
        elif folder in masked:
            raise DataError(f"{folder}: has {SEGMENTATIONS}/ and no {name}; {NEW_FOLDER}")
    channels = channel_record(next(iter(pairs.values())).images[0])[1] if pairs else ()
    listing = read_listing(root)["names"]
    if not masked:
        return Found("folders of fewscan tracts inputs", pairs, names=listing, channels=channels)
    return Found(f"folders with {SEGMENTATIONS}/", pairs, names=listing, channels=channels, overlapping=True)


def _flat(root: Path) -> Found | None:
    """Scans and label maps side by side, told apart by their names; in the folder or one level below."""
    files = [f for f in entries(root) if f.is_file()]
    if not files:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files = [f for folder in folders for f in entries(folder) if f.is_file()]
    stems = Counter(stem_of(f) for f in files)
    unique = not stems or max(stems.values()) == 1
    ids = {f: stem_of(f) if unique else f"{f.parent.name}_{stem_of(f)}" for f in files}
    labels = {LABEL_TAIL.sub("", i): f for f, i in ids.items() if LABEL_TAIL.search(i)}
    scans = {i: f for f, i in ids.items() if not LABEL_TAIL.search(i)}
    if not unique:  # patient/image.nii.gz + patient/label.nii.gz
        return _one_folder_each(files, read_listing(root)["names"])
    pairs = {i: Pair((f,), labels.get(i)) for i, f in scans.items()}
    channels: tuple[str, ...] = ()
    loose = {base: f for base, f in labels.items() if base not in scans}
    groups = {base: {i[len(base) + 1 :]: f for i, f in scans.items() if i.startswith(f"{base}_")} for base in loose}
    if loose and len({tuple(sorted(g)) for g in groups.values()}) == 1 and all(groups.values()):
        channels = tuple(sorted(next(iter(groups.values()))))  # patient_t1, patient_flair + patient_seg
        used = {i for base, g in groups.items() for i in (f"{base}_{c}" for c in g)}
        pairs = {base: Pair(tuple(g[c] for c in channels), loose[base]) for base, g in groups.items()}
        rest = {i: f for i, f in scans.items() if i not in used}
        for base in sorted({i.rsplit("_", 1)[0] for i in rest if i.rsplit("_", 1)[-1] in channels}):
            if all(f"{base}_{c}" in rest for c in channels):
                pairs[base] = Pair(tuple(rest[f"{base}_{c}"] for c in channels))
    layout = "files with _seg, _label or _mask" if labels else "images without labels"
    names = read_listing(root)["names"]
    return Found(
        layout=layout, pairs=dict(sorted(pairs.items())), names=names, channels=channels if channels[1:] else ()
    )


def _one_folder_each(files: list[Path], names: Mapping[int, str]) -> Found:
    """Every case in a folder of its own, with the same file names in each."""
    label_stems = LABEL_STEMS | {"mask"}
    pairs: dict[str, Pair] = {}
    contrasts = Counter(stem_of(f) for f in files if stem_of(f).lower() not in label_stems)
    contrasts = Counter({s: n for s, n in contrasts.items() if not LABEL_TAIL.search(s)})
    most = max(contrasts.values(), default=0)
    channels = tuple(sorted(s for s, n in contrasts.items() if n == most))
    for folder in sorted({f.parent for f in files}):
        mine = {stem_of(f): f for f in files if f.parent == folder}
        marked = [f for s, f in mine.items() if s.lower() in label_stems or LABEL_TAIL.search(s)]
        if all(c in mine for c in channels):
            pairs[folder.name] = Pair(tuple(mine[c] for c in channels), marked[0] if marked else None)
    return Found(layout="one folder per case", pairs=pairs, names=names, channels=channels if len(channels) > 1 else ())
