"""Verbs that bring scans onto each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewscan.errors import ConfigError
from fewscan.options import Data, Deforming, app, examples, stdout

Similarity = Literal["lncc", "mi", "mind", "mse"]
Spacing = Annotated[
    float,
    typer.Option(
        "--grid-spacing",
        help="Voxel size to deform on, mm; 0 takes the fixed scan's. Coarser beyond 12 million voxels.",
        min=0,
    ),
]


@app.command(
    epilog=examples(
        "register fixed.nii.gz moving.nii.gz -o out",
        "register fixed.nii.gz moving.nii.gz -o out --moving-labels moving_seg.nii.gz",
        "register t1.nii.gz ct.nii.gz -o out --rigid --similarity mi",
        "register patient.nii.gz healthy.nii.gz -o out --fixed-lesion tumour.nii.gz",
        "register fixed.nii.gz moving.nii.gz -o out --model model --optimise 30",
    )
)
def register(
    fixed: Annotated[Path, typer.Argument(help="Scan that stays where it is.", metavar="FIXED")],
    moving: Annotated[Path, typer.Argument(help="Scan to bring onto it.", metavar="MOVING")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    moving_labels: Annotated[Path | None, typer.Option(help="Label map of the moving scan, to bring along.")] = None,
    fixed_labels: Annotated[Path | None, typer.Option(help="Label map of the fixed scan, only to judge by.")] = None,
    fixed_mask: Annotated[Path | None, typer.Option(help="Where likeness counts, on the fixed scan.")] = None,
    fixed_lesion: Annotated[Path | None, typer.Option(help="What the moving scan lacks; left out of likeness.")] = None,
    rigid: Annotated[bool, typer.Option("--rigid", help="Rotation and translation only.")] = False,
    affine: Annotated[bool, typer.Option("--affine", help="Also scaling and shear.")] = False,
    deformable: Annotated[bool, typer.Option("--deformable", help="Affine, then a diffeomorphism (default).")] = False,
    turned: Annotated[bool, typer.Option("--turned", help="One may lie tilted or on another side.")] = False,
    similarity: Annotated[Similarity, typer.Option(help="lncc; mi or mind across modalities; mse.")] = "lncc",
    grid_spacing: Spacing = 0.0,
    model: Annotated[Path | None, typer.Option(help="Start from this model's registration network.")] = None,
    optimise: Annotated[
        int | None, typer.Option(help="With --model: steps of optimisation after it.", min=0, metavar="N")
    ] = None,
    itk: Annotated[bool, typer.Option("--itk", help="Also field_itk.nii.gz, for ANTs, ITK and 3D Slicer.")] = False,
    device: Deforming = "auto",
) -> None:
    """Register two scans: the warped scan, its labels and the field, on the fixed scan's grid."""
    from fewscan import api
    from fewscan.deliver.verdict import registered
    from fewscan.progress import display
    from fewscan.tables import registration

    if optimise is not None and model is None:
        raise ConfigError("--optimise goes on from a network's answer; add --model, or leave it out for all the steps")
    with display("register") as observe:
        report = api.register(
            fixed,
            moving,
            out,
            moving_labels=moving_labels,
            fixed_labels=fixed_labels,
            fixed_mask=fixed_mask,
            fixed_lesion=fixed_lesion,
            config=api.register_config(
                transform=_transform(rigid=rigid, affine=affine, deformable=deformable),
                similarity=similarity,
                spacing_mm=grid_spacing,
                optimise=optimise,
                turned=turned,
            ),
            model=None if model is None else api.load(model),
            itk=itk,
            device=device,
            observe=observe,
        )
    screen = stdout()
    screen.print(registration(report))
    for remark in registered(report)[1]:
        screen.print(remark, markup=False, highlight=False)
    screen.print(f"Written to {out}. For research use only.", markup=False)


@app.command(epilog=examples("draft scans -o drafts", "draft scans -o drafts --fusion local --grid-spacing 2"))
def draft(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    fusion: Annotated[
        Literal["joint", "local", "majority"],
        typer.Option(help="How the atlases' votes are weighted; all alike with mi and mind."),
    ] = "joint",
    similarity: Annotated[Similarity, typer.Option(help="lncc; mi or mind across modalities; mse.")] = "lncc",
    grid_spacing: Spacing = 0.0,
    device: Deforming = "auto",
) -> None:
    """Propose labels for every unlabelled scan from the labelled ones, without training."""
    from fewscan import api
    from fewscan.progress import display

    with display("draft") as observe:
        record = api.draft(
            data, out, fusion=fusion, config=api.register_config(similarity=similarity, spacing_mm=grid_spacing),
            device=device, observe=observe,
        )  # fmt: skip
    stdout().print(record["sentence"], markup=False)


def _transform(*, rigid: bool, affine: bool, deformable: bool) -> Literal["rigid", "affine", "deformable"]:
    if sum((rigid, affine, deformable)) > 1:
        raise ConfigError("give one of --rigid, --affine and --deformable, not several")
    return "rigid" if rigid else "affine" if affine else "deformable"
