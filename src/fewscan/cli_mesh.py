"""The verb that makes surfaces of labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewscan.errors import ConfigError
from fewscan.options import Json, app, examples, stdout, to_json

FAULTY = 1


@app.command(
    epilog=examples(
        "mesh seg.nii.gz -o print",
        "mesh seg.nii.gz -o print --labels femur,tibia --smooth-mm 2",
        "mesh seg.nrrd -o print --merge --hollow-mm 3 --drain-mm 4 --strut-mm 3",
        "mesh seg.nii.gz -o print --cut S=120 --build-mm 180x180x180 --space LPS",
        "mesh seg.nii.gz -o headset --for vr --faces 100000",
        "mesh seg.nii.gz -o look --for view --probabilities seg_probabilities.nii.gz",
    )
)
def mesh(
    labelmap: Annotated[Path, typer.Argument(help="NIfTI, NRRD or MetaImage of labels.", metavar="LABELMAP")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.", metavar="DIR")],
    labels: Annotated[str, typer.Option(help="Values or names, separated by commas; all unless told.")] = "",
    purpose: Annotated[
        Literal["print", "vr", "view"], typer.Option("--for", help="Which files, and how closely to examine.")
    ] = "print",
    smooth_mm: Annotated[
        float | None,
        typer.Option(help="Smoothing along the surface; 2.5 times the coarsest voxel edge unless told.", min=0),
    ] = None,
    faces: Annotated[int | None, typer.Option(help="Triangles at most, all parts together; 0: all.", min=0)] = None,
    merge: Annotated[bool, typer.Option("--merge", help="All labels as one part.")] = False,
    space: Annotated[Literal["RAS", "LPS"], typer.Option(help="Of the coordinates in STL, 3MF and PLY.")] = "RAS",
    hollow_mm: Annotated[float, typer.Option(help="Wall to leave around a hollow inside; 0 is solid.", min=0)] = 0.0,
    drain_mm: Annotated[float, typer.Option(help="Hole under each hollow inside; 0 for none.", min=0)] = 0.0,
    cut: Annotated[
        list[str] | None, typer.Option(help="Cut in two at R, A or S = mm; repeatable.", metavar="S=MM")
    ] = None,
    strut_mm: Annotated[float, typer.Option(help="Struts between loose pieces; 0 for none.", min=0)] = 0.0,
    tag: Annotated[str, typer.Option(help="Text on a plate under each part; it may identify a patient.")] = "",
    wall_mm: Annotated[float, typer.Option(help="Thinnest wall that the printer makes.")] = 0.8,
    gap_mm: Annotated[float, typer.Option(help="Narrowest gap that stays open.")] = 0.3,
    build_mm: Annotated[str, typer.Option(help="Room to build in.", metavar="XxYxZ")] = "250x210x210",
    probabilities: Annotated[
        Path | None, typer.Option(help="From predict --probabilities, painted on PLY and GLB.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Surfaces in mm for print, VR or view, and a certificate of what can be printed.

    The exit code is 1 when a part must not be printed.
    """
    from fewscan import api
    from fewscan.progress import display
    from fewscan.tables import show_certificate

    with display("mesh") as observe:
        record = api.mesh(
            labelmap,
            out,
            labels=[word.strip() for word in labels.split(",") if word.strip()],
            purpose=purpose,
            config=api.MeshConfig(smooth_mm=smooth_mm, faces=faces, merge=merge, space=space),
            additions=api.Additions(
                hollow_mm=hollow_mm, drain_mm=drain_mm, cuts=tuple(cut or ()), strut_mm=strut_mm, tag=tag
            ),
            printer=api.Printer(wall_mm=wall_mm, gap_mm=gap_mm, build_mm=_lengths(build_mm)),
            probabilities=probabilities,
            observe=observe,
        )
    if not to_json(record, json_file):
        screen = stdout()
        show_certificate(record, screen)
        screen.print(f"Written to {out}. Next: fewscan report {out}", markup=False)
    if record["printable"] is False:
        raise typer.Exit(FAULTY)


def _lengths(text: str) -> tuple[float, float, float]:
    if re.fullmatch(r"\d+(\.\d+)?(x\d+(\.\d+)?){2}", text) is None:
        raise ConfigError(f"--build-mm must look like 250x210x210, got {text!r}")
    x, y, z = (float(length) for length in text.split("x"))
    return x, y, z
