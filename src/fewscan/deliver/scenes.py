"""What a viewer can show of a run: a scene for each case, read only when it is wanted.

Everything in a scene lies on one grid, or in RAS+ millimetres. Where scans lie is known from the records beside the
results (`fewscan.data.places`), or from folders that the caller names; where they are gone, the rest is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewscan.data import io, places
from fewscan.data.bundles import names_in
from fewscan.data.dataset import looks_like_ct
from fewscan.data.dicom_labels import is_label
from fewscan.data.fields import read_field
from fewscan.data.found import stem_of
from fewscan.data.headers import suffix_of
from fewscan.deliver import scans, sections, warps
from fewscan.deliver.markup import number, without_folders
from fewscan.deliver.mesh_files import Item, read_glb
from fewscan.deliver.records import failed, figure, part, parts, place_of, plain_name
from fewscan.deliver.scans import LOST
from fewscan.deliver.sections import Run
from fewscan.errors import FewscanError
from fewscan.judge.results import CaseScore
from fewscan.naming import BEFORE as OWN
from fewscan.naming import PREDICTIONS, label_names, predictions_in
from fewscan.space.combinations import on_top
from fewscan.space.field import from_matrix, warp_array, warp_labels
from fewscan.space.geometry import Geometry, check_same
from fewscan.space.volume import IGNORE, Labelmap

OVERLAP = "Bundles overlap: where several meet, the smallest is shown."
GLB = "model.glb"
Kind = Literal["scan", "labels", "share"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One thing that can be shown or hidden.

    Parameters
    ----------
    name : str
        For the reader.
    kind : {"scan", "labels", "share"}
        Intensities, of which one layer is seen at a time; label values; or 0 to 255 for 0 to 1.
    data : (X, Y, Z) number
        On the scene's grid.
    state : str
        Name of the scan without which the layer is not seen; empty when it goes with every one.
    shown : bool
        Whether it is seen at first.
    ct : bool
        Whether a scan's numbers look like Hounsfield units.
    scale : (2,) float
        Slope and intercept that turn a scan's ``data`` into its intensities.
    """

    name: str
    kind: Kind
    data: NDArray[Any]
    state: str = ""
    shown: bool = True
    ct: bool = False
    scale: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What is in a scene.

    Parameters
    ----------
    geometry : Geometry, optional
        Grid of the layers; None without layers.
    layers : sequence of Layer
        First scans, then what lies over them.
    names : mapping of int to str
        Of the labels.
    lines : sequence of (N, 3) float32
        A deformed grid, RAS+ mm.
    step_mm : float
        Between two lines of the grid before it was deformed.
    items : sequence of Item
        Surfaces, RAS+ mm.
    remarks : sequence of str
        What is missing.
    """

    geometry: Geometry | None = None
    layers: Sequence[Layer] = ()
    names: Mapping[int, str]
    lines: Sequence[NDArray[np.float32]] = ()
    step_mm: float = 0.0
    items: Sequence[Item] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A case, not read yet.

    Parameters
    ----------
    title : str
        For the list of scenes.
    load : callable
        Reads it; raises FewscanError where its files are gone or damaged.
    """

    title: str
    load: Callable[[], Content]


def scenes(run: Run) -> list[Scene]:
    """What can be shown of a run, in the order of interest: of judged cases the worst, median and best come first.

    Parameters
    ----------
    run : Run
        Read by `fewscan.deliver.report.read_run`.
    """
    named, found = run.scans, list[Scene]()
    if run.registration is not None:
        found.append(Scene(title="Registration", load=partial(_registered, run, named)))
    cases = () if run.evaluation is None else run.evaluation.cases
    ranked = [] if run.evaluation is None else run.evaluation.ranked()
    first = [ranked[i] for i in (0, len(ranked) // 2, len(ranked) - 1)] if ranked else []
    for case in {case.id: case for case in [*first, *ranked, *cases]}.values():
        title = f"{case.id} · Dice {number(case.mean('dice'))}"
        found.append(Scene(title=title, load=partial(_judged, case, run.directory, named)))
    judged = {case.id for case in cases}
    folder = predictions_in(run.directory)
    for row in (run.predictions or ()) if folder else ():
        name, place = str(row.get("id", "")), place_of(row)
        if folder is not None and name not in judged and place is not None:
            own = folder / OWN / place if part(row, OWN) else None
            load = partial(_predicted, folder / place, own, folder / PREDICTIONS, name, named)
            found.append(Scene(title=f"{name} · predicted", load=load))
    every = parts(run.draft or {}, "cases")
    drafted = {name: case for name, case in every.items() if name not in failed(every)}
    for name in sorted((name for name in drafted if plain_name(name)), key=lambda name: figure(drafted[name], "sure")):
        sure = number(figure(drafted[name], "sure"), 0, percent=True)
        found.append(Scene(title=f"{name} · drafted, {sure} sure", load=partial(_drafted, run.directory, name, named)))
    if run.certificate is not None and (run.directory / GLB).is_file():
        found.append(Scene(title="Meshes", load=partial(_meshed, run.directory / GLB, named)))
    return found


def said(error: FewscanError) -> str:
    """An error for the page, without folders of this machine.

    Parameters
    ----------
    error : FewscanError
        From `Scene.load`.
    """
    return without_folders(str(error))


def _looked(data: NDArray[Any]) -> NDArray[Any]:
    return np.where(data == IGNORE, 0, data)


def _read(path: Path, bundles: Sequence[str]) -> tuple[Labelmap, dict[int, str], list[str]]:
    """A label map, or masks that overlap as one; what its labels are called; what is to be said of it."""
    if not bundles:
        label = io.read_labels(path)
        return replace(label, data=_looked(label.data)), _names(path, label.data), []
    label = _flat(sections.bundles(path, names=bundles))
    return label, dict(label.names), [OVERLAP]


def _flat(label: Labelmap) -> Labelmap:
    """With one label a voxel, which is all that a layer holds."""
    if label.table is None:
        return replace(label, data=_looked(label.data))
    return Labelmap(on_top(label.data, label.table, values=list(label.names)), label.geometry, label.names)


def _names(path: Path, *maps: NDArray[Any]) -> dict[int, str]:
    """What the labels that occur are called."""
    listed, _ = label_names(path)
    values = sorted({v for data in maps for v in io.label_values(data.astype(np.uint16)) if v})
    return {v: (listed or {}).get(v, f"label {v}") for v in values}


def _scan(path: Path | None, like: Geometry, what: str) -> tuple[list[Layer], list[str]]:
    """The scan as a layer, or why there is none."""
    data, remark = scans.on_grid(path, like, what=what)
    return ([], [remark]) if data is None else ([_intensities("scan", data)], [])


def _intensities(name: str, data: NDArray[Any]) -> Layer:
    return Layer(name=name, kind="scan", data=data, ct=looks_like_ct(data))


def _beside(path: Path) -> list[Layer]:
    """Uncertainty, where probabilities lie beside a predicted label map: how far the likeliest class is from 1."""
    file = path.with_name(f"{stem_of(path)}_probabilities{suffix_of(path)}")
    if not file.is_file():
        return []
    volume = io.read_image(file, channels=[f"class {i}" for i in range(io.peek(file).channels)])
    most = volume.data.max(0)
    share = 255 - most if most.dtype == np.uint8 else np.rint(255 * (1 - np.clip(most, 0, 1)))
    return [Layer(name="uncertainty", kind="share", data=share.astype(np.uint8), shown=False)]


def _judged(case: CaseScore, directory: Path, named: Mapping[str, Path]) -> Content:
    reference, prediction, scan = sections.judged(case, directory, named=named)
    path = scans.lies_at(case.prediction, directory, directory / "predictions" / case.prediction.name)
    overlap = [OVERLAP] if reference.table is not None else []
    first, second = _flat(prediction).data, _flat(reference).data
    layers = [] if scan is None else [_intensities("scan", scan)]
    layers += [
        Layer(name="prediction", kind="labels", data=first),
        Layer(name="reference", kind="labels", data=second, shown=False),
        *_beside(path),
    ]
    names = dict(reference.names)
    if not overlap:
        recorded = any(label_names(path))
        names = _names(path if recorded else scans.lies_at(case.reference, directory), first, second)
    remarks = [*overlap, *([LOST] if scan is None else [])]
    return Content(geometry=reference.geometry, layers=layers, names=names, remarks=remarks)


def _predicted(path: Path, own: Path | None, record: Path, name: str, named: Mapping[str, Path]) -> Content:
    """A predicted scan; of a personalised one also the model's own answer."""
    bundles = names_in(path, *([] if own is None else [own]))  # numbered alike in both
    label, names, told = _read(path, bundles)
    scan, remarks = _scan(scans.recalled(record, name, named=named), label.geometry, name)
    layers = [*scan, Layer(name="prediction", kind="labels", data=label.data), *_beside(path)]
    if own is not None and own.exists():
        try:
            before, more, _ = _read(own, bundles)
            check_same(before.geometry, label.geometry, what=f"{own} and {path}")
            layers.append(Layer(name="before", kind="labels", data=before.data, shown=False))
            names |= more
        except FewscanError as error:  # which costs the comparison alone
            remarks.append(said(error))
    return Content(geometry=label.geometry, layers=layers, names=names, remarks=[*told, *remarks])


def _drafted(directory: Path, name: str, named: Mapping[str, Path]) -> Content:
    path = directory / "labels" / name
    if not path.is_dir():
        path = path.with_name(f"{name}.nii.gz")
    label, names, told = _read(path, names_in(path))
    scan, remarks = _scan(scans.recalled(directory / "draft.json", name, named=named), label.geometry, name)
    layers = [*scan, Layer(name="draft", kind="labels", data=label.data)]
    file = directory / "sure" / f"{name}.nii.gz"
    if file.is_file():
        sure, geometry = scans.first_channel(file)
        check_same(geometry, label.geometry, what=f"{file.name} and the drafted labels")
        layers.append(Layer(name="uncertainty", kind="share", data=(255 - sure).astype(np.uint8), shown=False))
    return Content(geometry=label.geometry, layers=layers, names=names, remarks=[*told, *remarks])


def _meshed(path: Path, named: Mapping[str, Path]) -> Content:
    """Surfaces, over the scan where a single one was given: the meshes themselves do not say of whom they are."""
    items, given = read_glb(path), set(named.values())
    if any(item.confidence is not None for item in items):
        remarks = ["Surfaces are coloured by confidence: blue where the model was sure, orange where it was not."]
    else:
        remarks = []
    if len(given) != 1:
        hint = "" if not given else " Several scans were given, and which one was meshed is not recorded."
        return Content(names={}, items=items, remarks=[*remarks, f"Give its scan with --images to see it too.{hint}"])
    try:
        data, geometry = scans.first_channel(given.pop())
    except FewscanError as error:
        return Content(names={}, items=items, remarks=[*remarks, said(error)])
    return Content(geometry=geometry, layers=[_intensities("scan", data)], names={}, items=items, remarks=remarks)


# -------------------------------------------------------------------------------------------------------- registration


FIXED, BEFORE, AFTER = "fixed scan", "moving scan, before", "moving scan, registered"


def _registered(run: Run, named: Mapping[str, Path]) -> Content:
    """Both scans on the fixed grid, before and after; what was not kept is left out."""
    record, folder = run.registration or {}, run.directory
    kept = places.recall(folder / "registration.json").get("pair", {})

    after, geometry = scans.first_channel(folder / "warped.nii.gz")
    header = from_matrix(np.eye(4), geometry)
    layers: list[Layer] = []
    remarks: list[str] = []
    names: dict[int, str] = {}
    fixed, moving = (
        scans.place(stem_of(Path(str(record.get(k)))), kept.get(k), named=named) for k in ("fixed", "moving")
    )
    if fixed is None or moving is None:
        remarks.append(LOST)
    if fixed is not None:
        layers += [replace(layer, name=FIXED) for layer in _scan(fixed, geometry, "fixed scan")[0]]
    if moving is not None:
        data, grid = scans.first_channel(moving)
        before = warp_array(data[None], grid, field=header, background=float(data.min()))[0]
        layers.append(_intensities(BEFORE, before.astype(data.dtype)))
    layers.append(_intensities(AFTER, after))
    masks = _masks(kept, geometry, folder / "warped_labels.nii.gz")
    for name, state, label in masks:
        layers.append(Layer(name=name, kind="labels", data=_looked(label.data), state=state, shown=bool(state)))
        names |= _names(kept.get("moving_labels", folder), label.data)
    matrix = record.get("matrix")
    lines: list[NDArray[np.float32]] = []
    step = 0.0
    if record.get("transform") == "deformable" and isinstance(matrix, list):
        lines, step = warps.lattice(read_field(folder / "field.nii.gz", fixed=geometry), np.array(matrix, float))
    return Content(geometry=geometry, layers=layers, names=names, lines=lines, step_mm=step, remarks=remarks)


def _masks(kept: Mapping[str, Path], geometry: Geometry, warped: Path) -> list[tuple[str, str, Labelmap]]:
    """Label maps on the fixed grid: name, the scan each goes with, and what it holds."""
    found = []
    if warped.is_file():
        found.append(("moving labels, registered", AFTER, io.read_labels(warped)))
    header = from_matrix(np.eye(4), geometry)
    for role, name, state in (("moving_labels", "moving labels", BEFORE), ("fixed_labels", "fixed labels", "")):
        path = kept.get(role)
        if path is None or not path.exists():
            continue
        own = kept.get(role.removesuffix("_labels"))  # DICOM labels lie on the grid of their series
        label = io.read_labels(path, source=own if own is not None and is_label(path) else None)
        data = warp_labels(_looked(label.data), label.geometry, field=header)
        found.append((name, state, Labelmap(data, geometry, label.names)))
    return found
