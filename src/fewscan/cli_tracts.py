"""Verbs for white matter: ``fewscan tracts ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewscan.options import Json, Seed, app, examples, stdout, to_json

tracts = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(
    tracts,
    name="tracts",
    help="White matter: inputs from diffusion scans, masks of bundles, their figures, cohorts.",
    epilog=examples(
        "tracts inputs dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec --mask brain.nii.gz -o case",
        "tracts evaluate predicted reference -o figures",
    ),
)

Out = Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")]


@tracts.command(
    epilog=examples(
        "tracts inputs dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec -o out",
        "tracts inputs peaks.nii.gz -o out",
        "tracts inputs dwi.nii.gz --bvals dwi.bval --bvecs dwi.bvec --axes=x,-y,z -o out",
    )
)
def inputs(
    source: Annotated[
        Path,
        typer.Argument(
            help="Diffusion scan, or peaks of MRtrix or TractSeg; no .mif: mrconvert makes NIfTI of it.", metavar="DWI"
        ),
    ],
    out: Out,
    bvals: Annotated[Path | None, typer.Option(help="FSL's b-values; leave out for peaks.")] = None,
    bvecs: Annotated[Path | None, typer.Option(help="FSL's directions; leave out for peaks.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Brain mask on the scan's grid.")] = None,
    lesion: Annotated[Path | None, typer.Option(help="Tumour mask, kept out of the orientation proof.")] = None,
    axes: Annotated[str | None, typer.Option(help="How to take the axes of the directions.", metavar="x,-y,z")] = None,
    json_file: Json = None,
) -> None:
    """Peaks, tensor and scalars of a scan, its directions proven against the anatomy."""
    from fewscan import white_matter
    from fewscan.progress import display

    with display("inputs") as observe:
        found = white_matter.inputs(
            source, out, bvals=bvals, bvecs=bvecs, mask=mask, lesion=lesion, axes=axes, tell=observe
        )
    if not to_json(found.to_json(), json_file):
        stdout().print(f"Written to {out}; see {out / white_matter.PICTURE}. For research use only.", markup=False)


@tracts.command(epilog=examples("tracts masks CST_left.trk AF_left.tck --like peaks.nii.gz -o case"))
def masks(
    tractograms: Annotated[
        list[Path], typer.Argument(help="One .trk or .tck for each bundle, or folders.", metavar="FILE...")
    ],
    like: Annotated[Path, typer.Option(help="Image that gives the grid.")],
    out: Out,
    json_file: Json = None,
) -> None:
    """Training masks of streamlines, with their ends, in TractSeg's layout."""
    from fewscan import white_matter
    from fewscan.tables import bundle_volumes

    report = white_matter.masks(tractograms, out, like=like)
    if not to_json(report, json_file):
        stdout().print(bundle_volumes(report))


@tracts.command(epilog=examples("tracts evaluate predicted reference -o figures"))
def evaluate(
    predicted: Annotated[Path, typer.Argument(help="Cases with bundle_segmentations/, or one.", metavar="PREDICTED")],
    reference: Annotated[Path, typer.Argument(help="The same, to judge by.", metavar="REFERENCE")],
    out: Out,
    json_file: Json = None,
) -> None:
    """Dice, overlap, overreach, volumes and ends of each bundle; empty ones are said to be empty."""
    from fewscan.judge.results import plain, read_evaluation
    from fewscan.tables import bundle_scores
    from fewscan.tracts import bundles

    found = bundles.evaluate_bundles(predicted, reference, out=out)
    table, unmatched = bundles.summary(found), read_evaluation(out / bundles.EVALUATION).unmatched
    if not to_json(plain({"summary": table, "unmatched": unmatched}), json_file):
        screen = stdout()
        screen.print(bundle_scores(table))
        for key, names in unmatched.items():
            if names:
                screen.print(f"{', '.join(names)}: {bundles.UNMATCHED[key]}", markup=False)
        screen.print(f"Every case in {out / bundles.TABLE}. For research use only.", markup=False)


@tracts.command(
    epilog=examples(
        "tracts cohort anatomy.npz -o cohort",
        "tracts cohort anatomy.npz -o small --train 4 --jobs 2",
        "tracts cohort anatomy.npz -o hard --hard",
    )
)
def cohort(
    anatomy: Annotated[Path, typer.Argument(help="Sticks, ball and bundles of one real brain.", metavar="ANATOMY")],
    out: Out,
    train: Annotated[int, typer.Option(help="Healthy people to train on.", min=0)] = 24,
    val: Annotated[int, typer.Option(help="Healthy people to validate on.", min=0)] = 6,
    pool: Annotated[int, typer.Option(help="Patients to adapt with.", min=0)] = 8,
    test: Annotated[int, typer.Option(help="People scanned four times.", min=0)] = 12,
    hard: Annotated[bool, typer.Option("--hard", help="People who differ more from each other.")] = False,
    jobs: Annotated[int, typer.Option(help="Scans made at a time, in processes.", min=1)] = 1,
    seed: Seed = 0,
) -> None:
    """Healthy people and patients made from one brain, with 2 x 2 twins and true displacements; resumable."""
    from fewscan.progress import display
    from fewscan.tracts.anatomy import Variation, read_anatomy
    from fewscan.tracts.cohort import make_cohort
    from fewscan.tracts.population import HARD, CohortConfig

    variation = HARD if hard else Variation()
    config = CohortConfig(train=train, val=val, pool=pool, test=test, seed=seed, variation=variation)
    with display("cohort") as observe:
        record = make_cohort(read_anatomy(anatomy), out, config=config, jobs=jobs, tell=observe)
    made, there = record["made"], len(record["cases"]) - record["made"]
    stdout().print(f"{made} scans made in {out}, {there} there already. For research use only.", markup=False)
