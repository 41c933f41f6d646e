"""White matter by files: inputs with a picture of the proof, masks of streamlines, cohorts; what the verbs call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data.bundles import ENDINGS, SEGMENTATIONS, write_bundles
from fewscan.data.io import peek
from fewscan.deliver.directions import directions_png
from fewscan.errors import ConfigError, DataError
from fewscan.space.geometry import Geometry, ras_geometry
from fewscan.space.orientation import Orientation, said
from fewscan.tracts import streamlines
from fewscan.tracts.bundles import ENDS
from fewscan.tracts.inputs import make_inputs

PICTURE = "orientation.png"


def inputs(
    source: Path, out: Path, *, bvals: Path | None = None, bvecs: Path | None = None, mask: Path | None = None,
    lesion: Path | None = None, axes: str | None = None, tell: Callable[[str], None] | None = None,
) -> Orientation:  # fmt: skip
    """Make network inputs of a diffusion scan or of peaks, with a picture of their directions.

    Parameters
    ----------
    source : Path
        Diffusion scan, or peaks where no gradient files are given.
    out : Path
        Folder to write.
    bvals, bvecs : Path, optional
        FSL's gradient files.
    mask, lesion : Path, optional
        Brain and tumour, on the source's grid.
    axes : str, optional
        How to take the axes of the directions, such as ``x,-y,z``.
    tell : callable, optional
        Gets a line for each step.

    Raises
    ------
    FewscanError
        If files cannot be used or the directions are proven wrong; the picture is written all the same.
    """
    if (bvals is None) != (bvecs is None):
        raise ConfigError("give both --bvals and --bvecs for a diffusion scan, or neither for peaks")

    def _show(
        found: Orientation, principal: NDArray[np.float32], clearness: NDArray[np.float32], geometry: Geometry
    ) -> None:
        title = said(found) if found.verdict != "wrong" else f"orientation WRONG: the axes fit as {found.axes}"
        directions_png(principal, clearness, geometry=geometry, title=title, out=out / PICTURE)

    tables = None if bvals is None or bvecs is None else (bvals, bvecs)
    return make_inputs(
        source, out, tables=tables, mask=mask, lesion=lesion, axes=axes, tell=tell, show=_show
    )[1]  # fmt: skip


def masks(tractograms: Sequence[Path], out: Path, *, like: Path) -> dict[str, dict[str, Any]]:
    """Training masks of bundles in TractSeg's layout, the ends too; each file is the bundle of its name.

    A file without streamlines says that the bundle is absent: its masks are empty.

    Parameters
    ----------
    tractograms : sequence of Path
        .trk or .tck, one a bundle; or folders of them.
    out : Path
        Folder of the case.
    like : Path
        Image that gives the grid.

    Raises
    ------
    FewscanError
        If a file cannot be used, two are of one bundle, or none of a bundle's points lies on the grid; then no mask is
        left behind.
    """
    native = peek(like).geometry
    files = [f for t in tractograms for f in (sorted(t.iterdir()) if t.is_dir() else [t])]
    files = [f for f in files if f.suffix.lower() in streamlines.SUFFIXES or f in tractograms]
    names = [f.stem for f in files]
    if not files or len(set(names)) < len(names):
        raise ConfigError(f"one .trk or .tck for each bundle is needed, got {names}")
    made = [(SEGMENTATIONS, n) for n in names] + [(ENDINGS, f"{n}_{end}") for n in names for end in ENDS]
    if there := [(folder, n) for folder, n in made if (out / folder / f"{n}.nii.gz").exists()]:
        raise ConfigError(f"{out / there[0][0]}: holds {there[0][1]} already; give another -o")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give a folder")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        return _masks(files, out, native=native, like=like)
    finally:
        if new and not any(out.iterdir()):
            out.rmdir()


def _masks(files: Sequence[Path], out: Path, *, native: Geometry, like: Path) -> dict[str, dict[str, Any]]:
    """All masks, made aside before the first takes its place: none stays behind if a file cannot be used."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as scratch:
        report = {file.stem: _mask(file, Path(scratch), native=native, like=like) for file in files}
        for made in sorted(Path(scratch).rglob("*.nii.gz")):
            target = out / made.relative_to(scratch)
            target.parent.mkdir(exist_ok=True)
            os.replace(made, target)
    return report


def _mask(file: Path, folder: Path, *, native: Geometry, like: Path) -> dict[str, Any]:
    """Write the masks of one bundle, empty ones where it has no streamline, and say what they hold."""
    grid = ras_geometry(native)
    lines = streamlines.read_streamlines(file)
    mask, beyond = streamlines.visited(lines, grid)
    if lines and not mask.any():
        raise DataError(f"{file}: none of its streamlines lies on the grid of {like}; are both in one space?")
    first, last = streamlines.ends(lines, grid)
    write_bundles({file.stem: mask}, folder, native=native)
    two = {f"{file.stem}_{end}": mark for end, mark in zip(ENDS, (first, last), strict=True)}
    write_bundles(two, folder, native=native, folder=ENDINGS)
    ml = float(mask.sum()) * grid.voxel_mm3 / 1000
    return {"streamlines": len(lines), "volume_ml": round(ml, 2), "points_beyond": beyond}
