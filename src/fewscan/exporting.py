"""Export of files: a label map, a data set or a model in, what another program reads out, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fewscan.data import dataset as datasets
from fewscan.data.dicom import describe_series, is_series
from fewscan.data.dicom_labels import is_label, read_dicom_labels
from fewscan.data.found import LABEL_TAIL, Found, Pair, entries, stem_of
from fewscan.data.io import atomic, label_values, peek, read_labels
from fewscan.data.label_maps import left_out
from fewscan.deliver.binding import Binding, bind
from fewscan.deliver.structures import Structure, structures_of
from fewscan.errors import ConfigError, DataError, GeometryError
from fewscan.judge import metrics
from fewscan.learn import checkpoint
from fewscan.learn.checkpoint import USE
from fewscan.naming import label_names, record_of
from fewscan.space.geometry import check_same, from_ras, ras_geometry
from fewscan.space.volume import IGNORE, Labelmap

LEAST_DICE = {"dicom-seg": 1.0, "rtstruct": 0.99}
"""Of each label, between what was to be written and what comes back from the file; below it the file is not kept."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What was asked for."""

    thing: Path
    source: Path | None
    names: Mapping[int, str] | None
    ignore: int | None
    manual: bool

    @property
    def series(self) -> Path:
        """The source, which must be a DICOM series."""
        if self.source is None:
            raise ConfigError(f"{self.thing}: DICOM labels are bound to a series; give its folder with --source")
        if not is_series(self.source):
            raise DataError(f"{self.source}: is not a folder of DICOM slices; give the series that was segmented")
        return self.source


def export(
    thing: Path | str,
    out: Path | str,
    *,
    kind: str,
    source: Path | str | None = None,
    names: Path | str | None = None,
    manual: bool = False,
) -> dict[str, Any]:
    """Write a label map, a data set or a model for another program.

    Parameters
    ----------
    thing : path
        Label map; for "nnunet" also a folder of cases, for "bids" also a folder of label maps; for "monai" and "onnx"
        the folder of a model.
    out : path
        File or folder to write; must be new.
    kind : {"dicom-seg", "rtstruct", "seg-nrrd", "nnunet", "bids", "onnx", "monai"}
        For whom.
    source : path, optional
        Folder of the DICOM series that the label map belongs to; for "nnunet" any image.
    names : path, optional
        ``labels.json``, ``dataset.json`` or the folder of a model that names the labels; without it the names that
        `predict` recorded, or those listed in the label map's folder or up to two above it.
    manual : bool
        Whether a person drew the labels.

    Returns
    -------
    dict
        What was written, labels by name, Dice of each label read back from DICOM, and notes.

    Raises
    ------
    FewscanError
        If something cannot be used, does not fit, or is in the way; then nothing is written.
    """
    thing, out = Path(thing), Path(out)
    if kind not in KINDS:
        raise ConfigError(f"--as must be one of {', '.join(KINDS)}, got {kind!r}")
    if not thing.exists():
        raise DataError(f"{thing}: does not exist; give a label map, a data set or a model")
    if out.exists():
        raise ConfigError(f"{out} exists, and nothing is overwritten; give another -o")
    own, ignore = (
        (None, None) if kind in ("onnx", "monai") else label_names(thing, None if names is None else Path(names))
    )
    order = _Order(
        thing=thing, source=None if source is None else Path(source), names=own, ignore=ignore, manual=manual
    )
    return {"kind": kind, "written": out.name, **KINDS[kind](order, out), "use": USE}


# --------------------------------------------------------------------------------------------------------- label maps


def _dicom(order: _Order, out: Path, *, kind: str) -> dict[str, Any]:
    """A SEG or RTSTRUCT that was read back before it takes its name."""
    from fewscan.deliver import dicom_seg, rtstruct

    folder = order.series
    label = _labels(order)
    series = describe_series(folder)
    try:
        check_same(ras_geometry(series.native), label.geometry, what="")
    except GeometryError as error:
        reason = str(error).split(": ", 1)[1].split(";")[0]
        raise GeometryError(
            f"{order.thing}: does not lie on the grid of the series in {folder} ({reason}); "
            "give the whole series it was drawn on, or predict that series"
        ) from None
    binding = bind(series, version=_version(order.thing), manual=order.manual)
    data = np.asarray(from_ras(label.data, series.native), dtype=np.uint16)
    structures = structures_of(label.names)
    write: Callable[..., None] = {"dicom-seg": dicom_seg.write_seg, "rtstruct": rtstruct.write_rtstruct}[kind]
    with atomic(out) as part:
        write(data, part, structures=structures, binding=binding)
        dice = _read_back(part, label, structures, binding)
        low = {name: d for name, d in dice.items() if not d >= LEAST_DICE[kind]}
        if low:
            raise DataError(f"{order.thing}: came back from the written file with Dice {low}; nothing was kept")
    return {"labels": [s.name for s in structures], "dice": dice}


def _read_back(part: Path, label: Labelmap, structures: list[Structure], binding: Binding) -> dict[str, float]:
    """Dice of each label that occurs, between the label map and the file."""
    names = {s.value: s.name[:64] for s in structures if (label.data == s.value).any()}
    back = read_dicom_labels(part, source=binding.series.folder, names=names)
    return {name: float(metrics.dice(back.data == value, label.data == value)) for value, name in names.items()}


def _slicer(order: _Order, out: Path) -> dict[str, Any]:
    from fewscan.deliver.slicer import write_seg_nrrd

    if not out.name.endswith(".seg.nrrd"):
        raise ConfigError(f"{out}: 3D Slicer knows a segmentation by its name; end it in .seg.nrrd")
    label = _labels(order)
    native = label.geometry if is_label(order.thing) else peek(order.thing).geometry
    structures = structures_of(label.names)
    with atomic(out) as part:
        data = np.asarray(from_ras(label.data, native), dtype=np.uint16)
        write_seg_nrrd(data, part, structures=structures, native=native)
    return {"labels": [s.name for s in structures]}


def _labels(order: _Order) -> Labelmap:
    """The label map with names; voxels not looked at count as background, since no format can say more."""
    if order.thing.is_dir():
        raise DataError(f"{order.thing}: is a folder; give one label map")
    _refuse_unlisted(order.thing, order)
    label = read_labels(order.thing, names=order.names, ignore=order.ignore, source=order.source)
    data = np.where(label.data == IGNORE, 0, label.data)
    if not data.any():
        raise DataError(f"{order.thing}: holds no labelled voxel, so there is nothing to export")
    return Labelmap(data, label.geometry, label.names)


def _refuse_unlisted(file: Path, order: _Order) -> None:
    """A segment that somebody added must not be left out in silence."""
    if order.names and (lost := left_out(file, order.names, ignore=order.ignore)):
        raise DataError(
            f"{file}: holds segments {list(lost.values())[:8]} not in the list {list(order.names.values())[:40]}; give "
            "a list with them by --names, or take them out of the file"
        )


def _version(thing: Path) -> str:
    """Of fewscan, with the beginning of the model's hash where the label map is a prediction."""
    weights = next(iter(dict(record_of(thing).get("model", {})).values()), "")
    return f"{version('fewscan')}+{weights[:8]}" if weights else version("fewscan")


# ---------------------------------------------------------------------------------------------------------- data sets


def _nnunet(order: _Order, out: Path) -> dict[str, Any]:
    from fewscan.deliver.datasets import write_nnunet

    if order.thing.is_dir():
        found = datasets.find(order.thing)
    elif order.source is None:
        raise ConfigError(f"{order.thing}: a label map alone is no data set; give its image with --source")
    else:
        name = LABEL_TAIL.sub("", stem_of(order.thing))
        pair = {name: Pair((order.source,), order.thing)}
        found = datasets.assemble(
            order.thing.parent, Found("one case", pair, names=order.names or {}, ignore=order.ignore)
        )
    with _new_folder(out) as part:
        notes = write_nnunet(found, part)
    return {"labels": list(found.names.values()), "cases": len(found.cases) + len(found.test), "notes": notes}


def _bids(order: _Order, out: Path) -> dict[str, Any]:
    from fewscan.deliver.datasets import write_bids

    files = [order.thing]
    if order.thing.is_dir():
        files = [f for f in entries(order.thing) if f.is_file() and not stem_of(f).endswith("_probabilities")]
    if not files:
        raise DataError(f"{order.thing}: holds no label map; give a label map or the folder of some")
    for file in files:
        _refuse_unlisted(file, order)
    names = order.names or _values(files, order)
    with _new_folder(out) as part:
        write_bids(files, part, names=names, ignore=order.ignore)
    return {"labels": list(names.values()), "cases": len(files), "notes": []}


def _values(files: list[Path], order: _Order) -> dict[int, str]:
    """Labels that occur, named after their numbers."""
    seen: set[int] = set()
    for file in files:
        seen |= set(label_values(read_labels(file, ignore=order.ignore).data))
    return {value: f"label {value}" for value in sorted(seen - {0, IGNORE})}


# ------------------------------------------------------------------------------------------------------------- models


def _onnx(order: _Order, out: Path) -> dict[str, Any]:
    from fewscan.deliver.models import write_onnx

    model = checkpoint.load_model(order.thing)
    with atomic(out) as part:
        difference = write_onnx(model, part)
    return {"labels": list(model.names.values()), "largest_difference": difference}


def _monai(order: _Order, out: Path) -> dict[str, Any]:
    from fewscan.deliver.models import write_monai

    model = checkpoint.load_model(order.thing)
    with _new_folder(out) as part:
        difference = write_monai(model, part)
    return {"labels": list(model.names.values()), "largest_difference": difference}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes its name once the block has ended without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=out.parent))
    try:
        yield part
        part.chmod(0o755)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _seg(order: _Order, out: Path) -> dict[str, Any]:
    return _dicom(order, out, kind="dicom-seg")


def _rtstruct(order: _Order, out: Path) -> dict[str, Any]:
    return _dicom(order, out, kind="rtstruct")


KINDS: dict[str, Callable[[_Order, Path], dict[str, Any]]] = {
    "dicom-seg": _seg,
    "rtstruct": _rtstruct,
    "seg-nrrd": _slicer,
    "nnunet": _nnunet,
    "bids": _bids,
    "onnx": _onnx,
    "monai": _monai,
}
