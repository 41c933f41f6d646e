"""The verb that hands results to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewscan.options import Json, app, examples, stdout, to_json

Kind = Literal["dicom-seg", "rtstruct", "seg-nrrd", "nnunet", "bids", "onnx", "monai"]


@app.command(
    epilog=examples(
        "export out/p1.nii.gz --as dicom-seg --source p1_ct -o p1_seg.dcm",
        "export out/p1.nii.gz --as rtstruct --source p1_ct -o p1_rt.dcm",
        "export out/p1.nii.gz --as seg-nrrd -o p1.seg.nrrd",
        "export scans --as nnunet -o Dataset101_Knee",
        "export out --as bids -o derivatives/fewscan",
        "export model --as monai -o bundle",
        "export model --as onnx -o model.onnx",
    )
)
def export(
    thing: Annotated[
        Path,
        typer.Argument(
            help="Label map, or for bids a folder of them; data set for nnunet; model for onnx and monai.",
            metavar="THING",
        ),
    ],
    kind: Annotated[Kind, typer.Option("--as", help="For whom to write.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File or folder to write; must be new.")],
    source: Annotated[
        Path | None, typer.Option(help="DICOM series the label map belongs to.", metavar="SERIES")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="labels.json, dataset.json or model that names the labels.")
    ] = None,
    manual: Annotated[bool, typer.Option("--manual", help="A person drew the labels.")] = False,
    json_file: Json = None,
) -> None:
    """Write DICOM, NRRD, data sets or models for other programs."""
    from fewscan import api

    report = api.export(thing, out, kind=kind, source=source, names=names, manual=manual)
    if to_json(report, json_file):
        return
    screen = stdout()
    if report.get("dice"):
        screen.print(
            f"Read back from the file: Dice of each label {min(report['dice'].values()):.3f} at least.", markup=False
        )
    if "largest_difference" in report:
        screen.print(f"Compared with the model: logits differ by {report['largest_difference']:.2g} at most.")
    for note in report.get("notes", ()):
        screen.print(note, markup=False)
    screen.print(f"{len(report['labels'])} labels written to {out}. For research use only.", markup=False)
