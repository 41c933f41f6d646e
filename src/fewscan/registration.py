"""Registration of files: two scans in, a folder with the warped scan, its labels, the field and a record out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import dicom_labels, places
from fewscan.data.bundles import bundle_files
from fewscan.data.dicom import on_disk
from fewscan.data.fields import write_field
from fewscan.data.io import peek, read_image, read_labels, write_image, write_labelmap
from fewscan.data.kinds import kind_of_file, of_kind
from fewscan.data.label_maps import names_in, names_itself
from fewscan.data.listing import KEY, REGISTERED, direction_channels, registered
from fewscan.data.painting import plain_name
from fewscan.deliver import warps
from fewscan.errors import ConfigError, DataError
from fewscan.judge import metrics
from fewscan.learn.channels import said, to_look_at
from fewscan.learn.checkpoint import USE, Model, versions, write_json
from fewscan.learn.engine import Status
from fewscan.learn.hardware import memory_told, pick
from fewscan.learn.request import Observer
from fewscan.methods import pairwise
from fewscan.methods import register as learned
from fewscan.methods.pairwise import RegisterConfig, Transform
from fewscan.space.deformable import DeformConfig
from fewscan.space.field import from_matrix, warp_labels, warp_nearest
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Labelmap, Volume

RECORD = REGISTERED
FILES = ("warped.nii.gz", "warped_labels.nii.gz", "field.nii.gz", "field_itk.nii.gz")
PICTURES = "pictures"
ROLES = ("fixed", "moving", "moving_labels", "fixed_labels", "fixed_mask", "fixed_lesion")


def register(
    fixed: Path | str,
    moving: Path | str,
    out: Path | str,
    *,
    moving_labels: Path | str | None = None,
    fixed_labels: Path | str | None = None,
    fixed_mask: Path | str | None = None,
    fixed_lesion: Path | str | None = None,
    config: RegisterConfig | None = None,
    model: Model | None = None,
    itk: bool = False,
    device: str = "auto",
    observe: Observer | None = None,
) -> dict[str, Any]:
    """Register two files and write what was found.

    Parameters
    ----------
    fixed, moving : path
        Scans; DICOM folders too. Or peaks or tensors that are declared as such: their lengths or traces are registered,
        and what is written has its directions turned along.
    out : path
        Folder to write: those of `FILES` that are asked for, `RECORD`, and a folder `PICTURES`.
    moving_labels : path, optional
        Label map in the moving scan's world, or DICOM labels of its series, to bring along.
    fixed_labels : path, optional
        Of the fixed scan and of the same kind, only to judge by: Dice of each label before and after.
    fixed_mask : path, optional
        Where likeness counts, in the fixed scan's world: its voxels above 0.
    fixed_lesion : path, optional
        What the moving scan lacks, in the fixed scan's world: likeness does not count there (cost-function masking,
        Brett et al. 2001, doi 10.1006/nimg.2001.0845).
    config : RegisterConfig, optional
        Map, similarity and steps.
    model : Model, optional
        Whose registration network gives the start.
    itk : bool
        Also write the field as ITK, ANTs and 3D Slicer read it: a displacement in LPS+ mm.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where the deformable part runs.
    observe : callable, optional
        Gets a `learn.engine.Status` as it goes.

    Raises
    ------
    FewscanError
        If a file cannot be used, the scans do not overlap, or the folder holds something else.
    """
    named = (fixed, moving, moving_labels, fixed_labels, fixed_mask, fixed_lesion)
    given = {role: Path(path) for role, path in zip(ROLES, named, strict=True) if path is not None}
    folder, own = _claim(Path(out), list(given.values()))
    if fixed_labels is not None and moving_labels is None:
        raise ConfigError("fixed labels alone cannot judge anything; give the moving scan's labels too")
    if model is not None and config is not None and config.transform != "deformable":
        raise ConfigError(
            f"a network's answer is deformable, {config.transform} was asked for; leave out one of the two"
        )
    _refuse_overlap((moving_labels, fixed_labels, fixed_mask, fixed_lesion))
    still, other = _scan(Path(fixed)), _scan(Path(moving))
    _refuse_odd_pair(Path(fixed), Path(moving), (still, other), model)
    carried = None if moving_labels is None else read_labels(Path(moving_labels), source=Path(moving))
    reference = None if fixed_labels is None else _reference(Path(fixed_labels), fixed, carried, moving_labels)
    for label, scan, path in ((carried, other, moving_labels), (reference, still, fixed_labels)):
        if label is not None:
            _refuse_elsewhere(label, scan, path=Path(str(path)))
    looked = _looked(fixed_mask, fixed_lesion, still.geometry, scan=Path(fixed))
    place, scaling = pick(device, deforms=True).device, None if model is None else model.plan.scaling
    with memory_told(fix="deform on a coarser grid with --grid-spacing, such as 2"):
        found = pairwise.register(
            still, other, config=config, weight=looked, scaling=scaling, device=place, progress=_teller(observe),
            start=None if model is None else learned.starter(model, device=place),
        )  # fmt: skip
    report = found.report | {role: path.name for role, path in given.items()} | {"versions": versions()}
    report |= {} if model is None or model.path is None else {"model": model.path.name}
    warped = None
    if carried is not None:
        warped = pairwise.apply_labels(found, carried)
        report["lost_labels"] = _lost(warped, carried)
        if reference is not None:
            report["dice"] = _dice(warped, carried, reference, still.geometry)
    for path in own:  # an earlier answer must not be taken for a part of this one
        path.unlink(missing_ok=True)
    scene = warps.Scene(
        fixed=to_look_at(still), moving=to_look_at(other), field=found.field, matrix=found.matrix, labels=carried,
        warped_labels=warped, reference=reference,
    )  # fmt: skip
    _write(folder, found, (still, other), scene=scene, itk=itk)
    report["pictures"] = [f"{PICTURES}/{name}" for name in warps.write_pictures(scene, folder / PICTURES)]
    report |= {"use": USE} | ({} if other.kind == "scalar" else {"kind": {FILES[0]: list(other.channels)}})
    write_json(report, folder / RECORD)
    places.remember(folder / RECORD, {"pair": {role: given[role] for role in ROLES[:4] if role in given}})
    return report


def register_config(
    *,
    transform: Transform = "deformable",
    similarity: str = "lncc",
    spacing_mm: float = 0.0,
    optimise: int | None = None,
    turned: bool = False,
) -> RegisterConfig:
    """How to register, in the words of the command line.

    Parameters
    ----------
    transform : {"rigid", "affine", "deformable"}
        The richest map allowed.
    similarity : {"lncc", "mi", "mind", "mse"}
        mi and mind compare different modalities.
    spacing_mm : float
        Voxel size to deform on, 0 takes the fixed scan's own; coarser beyond `pairwise.MOST_VOXELS`.
    optimise : int, optional
        Steps of optimisation after a network's answer, at half and at full resolution together; the whole pyramid when
        None.
    turned : bool
        Whether one of the scans may lie tilted or on another side than its header says.

    Examples
    --------
    >>> register_config(optimise=30).deform.steps
    (20, 10)
    """
    if optimise is None:
        deform = DeformConfig(similarity=similarity)
    else:
        fine = optimise // 3
        deform = DeformConfig(similarity=similarity, shrink=(2, 1), steps=(optimise - fine, fine))
    return RegisterConfig(transform=transform, spacing_mm=spacing_mm, deform=deform, turned=turned)


def _claim(folder: Path, inputs: list[Path]) -> tuple[Path, list[Path]]:
    """The folder, and what an earlier registration left in it; refuses where anything else is in the way."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the registration")
    for path in inputs:
        lies = on_disk(path).resolve()
        if folder.resolve() in (lies, lies.parent, lies.parent.parent):
            raise ConfigError(f"{path} lies in {folder}, where it might be overwritten; give another -o")
    if (folder / PICTURES).exists() and not (folder / PICTURES).is_dir():
        raise ConfigError(f"{folder / PICTURES} is a file where pictures are to lie; give another -o")
    own = [folder / name for name in (*FILES, *(f"{PICTURES}/{name}" for name in warps.FILES))]
    there = [path for path in own if path.exists()]
    strange = [] if registered(folder) else [path for path in (folder / RECORD, *there) if path.exists()]
    if strange:
        raise ConfigError(
            f"{strange[0]} exists and was not written by fewscan register; give another -o, or move it away"
        )
    return folder, there


def _scan(path: Path) -> Volume:
    """One map, or directions that are said to be some; what holds other volumes is refused with a way to get one."""
    volumes = peek(path).channels if path.is_file() else 1
    kind = kind_of_file(path, channels=volumes)
    if kind != "scalar":
        return of_kind(read_image(path, channels=direction_channels(kind, volumes)), kind, file=path)
    if volumes > 1:
        raise DataError(
            f"{path}: holds {volumes} volumes, but register takes one 3D map, or peaks or a tensor that a record, or "
            f"{KEY} in dataset.json, declares: declare them, or give FA instead, which `fewscan tracts inputs DWI "
            "--bvals BVALS --bvecs BVECS -o DIR` writes as DIR/fa.nii.gz"
        )
    return read_image(path)


def _refuse_odd_pair(fixed: Path, moving: Path, scans: tuple[Volume, Volume], model: Model | None) -> None:
    """Scans that cannot be compared, or a network that has not learnt to."""
    still, other = scans
    if still.kind != other.kind or len(still.data) != len(other.data):
        raise DataError(
            f"{moving}: holds {_held(other)}, {fixed} {_held(still)}; give two of a kind, such as the fa.nii.gz that "
            "`fewscan tracts inputs` writes of both"
        )
    if model is None:
        return
    if still.kind != "scalar":
        raise ConfigError(
            f"{fixed}: holds {said(still.kind)}, and a network gives a start for intensities only; leave out --model"
        )
    plan = model.plan
    if plan.kind != "scalar" or len(plan.channels) != len(still.data):
        raise ConfigError(
            f"{model.path}: its network has learnt from {said(plan.kind)} in {len(plan.channels)} channel(s), and "
            f"{fixed} holds {_held(still)}; leave out --model"
        )


def _held(scan: Volume) -> str:
    return f"{said(scan.kind)} in {len(scan.data)} channel(s)"


def _refuse_overlap(paths: Iterable[Path | str | None]) -> None:
    """Folders of masks: each mask is a label map of its own."""
    for path in paths:
        if path is not None and (masks := bundle_files(Path(path))):
            one = next(iter(masks.values()))
            raise DataError(f"{path}: holds masks that may overlap; register brings one along at a time, such as {one}")


def _reference(path: Path, scan: Path | str, carried: Labelmap | None, moving_labels: Path | str | None) -> Labelmap:
    """Labels of the fixed scan, numbered as those that are carried; DICOM knows them by name only."""
    named = [dicom_labels.is_label(Path(p)) for p in (path, moving_labels) if p is not None]
    if any(named) and not all(named):
        raise ConfigError(f"{path}: DICOM labels and label maps are numbered in their own ways; give two of one kind")
    spoken = any(named) or (moving_labels is not None and names_itself(path) and names_itself(Path(moving_labels)))
    if carried is None or not spoken:
        return read_labels(path, source=Path(scan))
    told = set(map(plain_name, names_in(path)))  # others are not drawn there, whatever number theirs is in the file
    names = {value: name for value, name in carried.names.items() if plain_name(name) in told} or carried.names
    found = read_labels(path, source=Path(scan), names=names)
    return Labelmap(found.data, found.geometry, dict(carried.names))


def _looked(
    mask: Path | str | None, lesion: Path | str | None, grid: Geometry, *, scan: Path
) -> NDArray[np.bool_] | None:
    """Voxels of the fixed grid whose likeness counts."""
    if mask is None and lesion is None:
        return None
    looked = np.ones(grid.shape, bool)
    for path, inside in ((mask, True), (lesion, False)):
        if path is None:
            continue
        label = read_labels(Path(path), source=scan)
        here = warp_nearest(label.data, label.geometry, field=from_matrix(np.eye(4), grid)) > 0
        if not here.any():
            raise DataError(f"{path}: the mask has no voxel on the fixed scan; draw it there, or leave it out")
        looked &= here if inside else ~here
    if not looked.any():
        raise DataError("mask and lesion together leave no voxel of the fixed scan to compare; make one smaller")
    return looked


def _refuse_elsewhere(label: Labelmap, scan: Volume, *, path: Path) -> None:
    """A label map none of whose voxels lies on its scan."""
    matrix, size = np.linalg.inv(scan.geometry.affine) @ label.geometry.affine, np.array(scan.geometry.shape)
    for x, plane in enumerate(label.data):  # one at a time, because a place takes many times the memory of a voxel
        y, z = np.nonzero(plane)
        at = np.stack([np.full(len(y), x), y, z], 1) @ matrix[:3, :3].T + matrix[:3, 3]
        if ((at >= -0.5) & (at <= size - 0.5)).all(1).any():
            break
    else:
        raise DataError(f"{path}: no label lies on its scan; is it another scan's label map, or an empty one?")


def _lost(warped: NDArray[np.uint16], carried: Labelmap) -> list[str]:
    """Names of labels that are not on the fixed scan: they lie beyond it, or are smaller than its voxels."""
    gone = np.setdiff1d(carried.data[carried.data > 0], warped)
    return [carried.names.get(value, str(value)) for value in gone.tolist()]


def _write(
    folder: Path, found: pairwise.Registration, pair: tuple[Volume, Volume], *, scene: warps.Scene, itk: bool
) -> None:
    """The warped scan, its labels and the field, on the fixed scan's grid."""
    still, other = pair
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"use": USE}, folder / RECORD)  # from here on the folder is ours, whatever happens
    write_image(_like(pairwise.apply(found, other), other), folder / FILES[0], native=still.native)
    if scene.warped_labels is not None:
        write_labelmap(scene.warped_labels, folder / FILES[1], native=still.native)
    write_field(found.field, folder / FILES[2], native=still.native)
    if itk:
        write_field(found.field, folder / FILES[3], convention="itk", native=still.native)


def _like(data: NDArray[np.float32], image: Volume) -> NDArray[Any]:
    """Back to the scan's own whole numbers, if it has any; components of directions are none."""
    kind = image.data.dtype
    if image.kind == "scalar" and np.issubdtype(kind, np.integer):
        data = np.clip(np.rint(data), np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
    return data[0] if len(data) == 1 else data


def _dice(warped: NDArray[np.uint16], carried: Labelmap, reference: Labelmap, grid: Geometry) -> dict[str, Any]:
    """Dice of each label of the fixed scan, by headers alone and registered."""
    header = from_matrix(np.eye(4), grid)
    truth = warp_nearest(reference.data, reference.geometry, field=header)
    before = warp_labels(carried.data, carried.geometry, field=header)
    rows = {}
    for value in np.unique(truth[truth > 0]).tolist():
        name = reference.names.get(value, carried.names.get(value, str(value)))
        pair = [metrics.dice(a == value, truth == value) for a in (before, warped)]
        rows[name] = {"before": pair[0], "after": pair[1]}
    means = {k: float(np.mean([r[k] for r in rows.values()])) if rows else None for k in ("before", "after")}
    return {"labels": rows, "mean": means}


def _teller(observe: Observer | None) -> Callable[[float, str], None]:
    begin = time.monotonic()

    def tell(share: float, part: str) -> None:
        if observe is not None:
            spent = time.monotonic() - begin
            left = spent * (1 - share) / max(share, 0.02)
            observe(Status(1, 1, share, spent, left, math.nan, {}, 0.0, part))

    return tell
