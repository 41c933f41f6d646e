"""Which prediction belongs to which reference: by equal names, or by those without the endings of label maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fewscan.data.dicom import is_series
from fewscan.data.folder_names import images_and_labels
from fewscan.data.found import (
    LABEL_STEMS,
    LABEL_TAIL,
    called_label,
    entries,
    files_in,
    held_out,
    once,
    partner,
    stem_of,
    subfolders,
    walk,
)
from fewscan.data.headers import SUFFIXES, suffix_of
from fewscan.data.layouts import seen
from fewscan.data.masks import is_masks
from fewscan.errors import DataError


def case_id(path: Path) -> str:
    """Name of a file without its format and without endings such as ``_seg`` or ``_0000``.

    Parameters
    ----------
    path : Path
        Of an image or label map.

    Examples
    --------
    >>> case_id(Path("labels/patient_07_seg.nii.gz"))
    'patient_07'
    """
    return LABEL_TAIL.sub("", stem_of(path)).removesuffix("_0000")


def files_by_name(path: Path) -> dict[str, Path]:
    """Image files and DICOM series in a folder, or the one file, by name, and by `case_id` where that is nobody's name.

    Parameters
    ----------
    path : Path
        Folder or file.

    Raises
    ------
    DataError
        If it does not exist.
    """
    return _with_ids({stem_of(file): file for file in _files(path, series=True)})


def references_in(path: Path) -> tuple[dict[str, Path], dict[Path, Path], Mapping[int, str]]:
    """Reference files by name; the images of those that lie in a data set; names that only its layout tells.

    Parameters
    ----------
    path : Path
        Folder or file.

    Raises
    ------
    DataError
        If one reference cannot be told from another, or they are bundles.
    """
    series = path.is_dir() and any(map(is_series, walk(path)))
    marked = [] if series or _among_scans(path) else _marked(path)
    direct = once(((stem_of(file), file) for file in marked), clash=_two_formats)
    if direct and not (path.is_dir() and any(map(held_out, subfolders(path)))):
        return direct, {}, {}
    found = seen(path)
    if found is None or not any(pair.label for pair in (*found.pairs.values(), *found.test.values())):
        return direct or _below(path), {}, {}
    if found.doubts:
        raise DataError(found.doubts[0])
    if found.overlapping:
        raise DataError(f"{path}: holds bundles, a mask each; judge by them with `fewscan tracts evaluate`")
    listed = [(case, pair) for cases in (found.pairs, found.test) for case, pair in cases.items()]
    labelled = [(case, pair.label, pair.images[0]) for case, pair in listed if pair.label]
    references = once(
        ((case, label) for case, label, _ in labelled),
        clash=lambda case, first, second: f"{second}, {first}: both of a case named {case}; give one's folder",
    )
    return references, {label: image for _, label, image in labelled}, found.names


def _among_scans(path: Path) -> bool:
    """Whether a folder holds scans whose label maps begin so, as ``seg_1`` beside ``ct_1``, or lie in one below."""
    names = [stem_of(file) for file in files_in(path)] if path.is_dir() else []
    return any(partner(name, names) for name in names) or (path.is_dir() and images_and_labels(path)[0] == path)


def _two_formats(name: str, first: Path, second: Path) -> str:
    return f"{second}: {first.name} has the same name in another format; keep one of the two references"


def _below(folder: Path) -> dict[str, Path]:
    """Label maps below a folder without their images, by name, or by their folder's where they have none of their
    own."""
    files = sorted(file for inner in walk(folder) for file in files_in(inner) if suffix_of(file))
    named = ((f.parent.name if stem_of(f).lower() in LABEL_STEMS else stem_of(f), f) for f in files if called_label(f))
    return once(
        named,
        clash=lambda name, first, second: (
            f"{second} and {first} may both be the label map of {name}; keep one of the two"
        ),
    )


def pair(
    predictions: Path, labels: Path, *, references: Mapping[str, Path]
) -> tuple[dict[str, tuple[Path, Path]], dict[str, tuple[str, ...]]]:
    """Case id to prediction and reference, by equal names or else equal `case_id`; then what is left over.

    Parameters
    ----------
    predictions, labels : Path
        Folders or files.
    references : mapping of str to Path
        From `references_in`.

    Raises
    ------
    DataError
        If nothing belongs together, or two predictions to one reference.
    """
    found = _files(predictions)
    masks = is_masks(labels) and not {stem_of(predictions), case_id(predictions)} & references.keys()
    if predictions.is_file() and (labels.is_file() or masks):
        return {case_id(predictions): (predictions, labels)}, {}
    predicted = [stem_of(file) for file in found]
    headed = {scan: file for name, file in references.items() if (scan := partner(name, predicted)) is not None}
    by_name = headed | _with_ids(references)
    pairs: dict[str, tuple[Path, Path]] = {}
    taken: dict[Path, Path] = {}
    for file in found:
        reference = by_name.get(stem_of(file)) or by_name.get(case_id(file))
        if reference is None:
            continue
        if reference in taken:
            raise DataError(f"{file}: {taken[reference].name} already belongs to {reference}; keep one of the two")
        taken[reference] = file
        pairs[stem_of(file) if stem_of(file) == stem_of(reference) else case_id(file)] = (file, reference)
    if not pairs:
        raise DataError(
            f"{predictions}: none of its {len(found)} predictions is named like one of the {len(references)} "
            f"references in {labels}; give matching files one name"
        )
    left = [file for file in found if file not in taken.values()]
    alone = [name for name, file in references.items() if file not in taken]
    unmatched = {
        "predictions": tuple(stem_of(file) for file in left),
        "references": tuple(alone),
    }
    return dict(sorted(pairs.items())), unmatched


def _with_ids(named: Mapping[str, Path]) -> dict[str, Path]:
    """Files by name, and by `case_id` where that is nobody's name."""
    found = dict(named)
    for file in named.values():
        found.setdefault(case_id(file), file)
    return found


def _files(path: Path, *, series: bool = False) -> list[Path]:
    if is_series(path):
        return [path] if series else []
    if not path.exists():
        raise DataError(f"{path}: does not exist; give a folder of {', '.join(SUFFIXES)} files or one such file")
    if path.is_file():
        return [path]
    files = [file for file in entries(path) if file.is_file() or series]
    return [file for file in files if not stem_of(file).endswith("_probabilities")]


def _marked(path: Path) -> list[Path]:
    """Label maps in a folder; of scans and label maps side by side only what is named as a label map."""
    files = _files(path)
    marked = [file for file in files if LABEL_TAIL.search(stem_of(file))]
    of = {case_id(file) for file in marked}
    others = [case_id(file) for file in files if file not in marked]
    return marked if any(other == case or other.startswith(f"{case}_") for case in of for other in others) else files
