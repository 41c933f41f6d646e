"""The command line: one verb for each capability. Heavy libraries are imported inside the verbs only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fewscan import (  # noqa: F401 (add their verbs)
    cli_export,
    cli_mesh,
    cli_registration,
    cli_suggest,
    cli_tracts,
    cli_transfer,
    cli_view,
)
from fewscan.cli_scores import show_left_out, show_scores, verdict
from fewscan.errors import ConfigError, FewscanError, ScansError, lacking_on_mps, out_of_memory
from fewscan.options import (
    Budget,
    Data,
    Device,
    Images,
    Json,
    Memory,
    Method,
    Personalize,
    Seed,
    Settings,
    Steps,
    app,
    examples,
    maybe,
    pairs,
    parse_folds,
    parsed,
    stdout,
    to_json,
)
from fewscan.quantity import duration, size

UNUSABLE, REFUSED, INTERRUPTED = 1, 2, 130


@app.command(epilog=examples("demo", "demo -o demo --budget 60s"))
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("demo"),
    budget: Annotated[str, typer.Option(help="Wall clock for training.", metavar="TIME")] = "3m",
    seed: Seed = 0,
    device: Device = "auto",
    max_memory: Memory = None,
) -> None:
    """Train, predict, evaluate and report on the embedded scans."""
    from fewscan import runs
    from fewscan.progress import display
    from fewscan.tables import scores

    with display("demo") as observe:
        result = runs.demo(
            out, budget=parsed(duration, budget, flag="--budget"), seed=seed, device=device,
            max_memory=maybe(size, max_memory, flag="--max-memory"), observe=observe,
        ).to_json()  # fmt: skip
    screen = stdout()
    screen.print(scores(result))
    screen.print(f"\n{verdict(result)}\nReport: {out / 'report.html'}\nModel:  {out / 'model'}\n", markup=False)
    screen.print(NEXT, markup=False)


@app.command(epilog=examples("check scans", "check scans --fix repaired", "check scans --json check.json"))
def check(
    data: Data,
    fix: Annotated[Path | None, typer.Option(help="Write a repaired copy of the data set here.", metavar="DIR")] = None,
    json_file: Json = None,
) -> None:
    """List what was found and what is wrong with it; originals are never touched.

    The exit code is 1 when training would refuse the data for a fault in it.
    """
    from fewscan import api
    from fewscan.progress import display
    from fewscan.tables import show_checkup

    with display("check") as observe:
        checkup = api.check(data, fix=fix, observe=observe)
    if not to_json(checkup.to_json(), json_file):
        screen = stdout()
        show_checkup(checkup.to_json(), screen)
        if fix is not None:
            screen.print(f"Repaired copy in {fix}; every change is listed in {fix / 'changes.json'}.", markup=False)
    if not checkup.usable:
        raise typer.Exit(UNUSABLE)


@app.command(
    epilog=examples(
        "train scans -o model --budget 10m",
        "train scans -o model --resume",
        "train scans -o model --extend 1h",
        "train scans -o model --dry-run",
    )
)
def train(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Model folder to write.", metavar="MODEL")],
    budget: Budget = None,
    steps: Steps = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    extend: Annotated[str | None, typer.Option(help="Train a finished model for longer.", metavar="TIME")] = None,
    device: Device = "auto",
    max_memory: Memory = None,
    settings: Settings = None,
    method: Method = "auto",
    keep_atlases: Annotated[
        bool,
        typer.Option("--keep-atlases", help="Leave up to 20 labelled scans beside the model, to personalise with."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Train a segmenter; Ctrl-C ends early and leaves a usable model."""
    from fewscan import api
    from fewscan.progress import display

    with display("train") as observe:
        model = api.train(
            data,
            out,
            budget=maybe(duration, budget, flag="--budget"),
            steps=steps,
            seed=seed,
            resume=resume,
            extend=maybe(duration, extend, flag="--extend"),
            device=device,
            max_memory=maybe(size, max_memory, flag="--max-memory"),
            settings=pairs(settings or ()),
            method=method,
            keep_atlases=keep_atlases,
            dry_run=dry_run,
            observe=observe,
        )
    if not dry_run:
        only = model.provenance.get("method") == "register"
        then = f"register FIXED MOVING -o out --model {out}" if only else f"predict {out} NEW_SCAN -o out"
        stdout().print(f"{model.describe()}\nNext: fewscan {then}", markup=False)


@app.command(epilog=examples("predict model new.nii.gz -o out", "predict model scans/images -o out --skip-existing"))
def predict(
    model: Annotated[Path, typer.Argument(help="Folder that train wrote.", metavar="MODEL")],
    inputs: Annotated[list[Path], typer.Argument(help="Files, folders or DICOM series.", metavar="INPUT...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write probabilities.")] = False,
    tta: Annotated[bool, typer.Option("--tta", help="Average over mirrored inputs; slower.")] = False,
    personalize: Annotated[
        Personalize, typer.Option(help="Deform labelled scans to each scan and refine a copy of the model on them.")
    ] = "never",
    atlases: Annotated[
        Path | None, typer.Option(help="Labelled scans to deform; else those the model keeps.", metavar="DATA")
    ] = None,
    budget_per_case: Annotated[
        str | None,
        typer.Option(help="Wall clock for personalising one scan; if not given 60s to 4m by its size.", metavar="TIME"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder that crossval wrote: says what Dice to expect.", metavar="FOLDS")
    ] = None,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave finished scans alone.")] = False,
    max_memory: Memory = None,
    device: Device = "auto",
) -> None:
    """Segment scans, each on its own grid: OUT/NAME.nii.gz, or a mask for each bundle where labels overlap."""
    from fewscan import api
    from fewscan.progress import display
    from fewscan.tables import expected, volumes

    if personalize == "never" and atlases is not None:
        raise ConfigError("--atlases are there to personalise with; add --personalize auto, or leave them out")
    if personalize == "never" and budget_per_case is not None:
        raise ConfigError("--budget-per-case is that of personalising; add --personalize auto, or leave it out")
    if personalize != "never" and tta:
        raise ConfigError("--personalize averages over disturbed copies already; leave --tta out")
    if personalize != "never" and max_memory is not None:
        raise ConfigError("--max-memory bounds plain predictions, --personalize holds scans whole; leave one out")
    failed = None
    with display("predict") as observe:
        shared: dict[str, Any] = {"probabilities": probabilities, "skip_existing": skip_existing, "device": device}
        shared |= {"calibration": calibration, "observe": observe}
        verb: Callable[..., list[Any]] = api.predict if personalize == "never" else api.personalize
        if personalize == "never":
            shared |= {"tta": tta, "max_memory": maybe(size, max_memory, flag="--max-memory")}
        else:
            shared |= {"atlases": atlases, "mode": personalize}
            if budget_per_case is not None:
                shared["budget_per_case"] = parsed(duration, budget_per_case, flag="--budget-per-case")
        try:
            done = verb(api.load(model), inputs, out, **shared)
        except ScansError as error:
            done, failed = list(error.done), error
    new = [prediction for prediction in done if not prediction.skipped]
    screen = stdout()
    if new:
        screen.print(volumes((p.id, p.volumes_ml, p.seconds) for p in new))
    if calibration is not None:
        screen.print(expected((p.id, p.expected) for p in new if p.expected is not None))
    screen.print(f"{len(new)} written to {out}, {len(done) - len(new)} there already", markup=False)
    if failed is not None:
        raise failed


@app.command(
    epilog=examples("evaluate out scans/labels", "evaluate out labels --json scores.json", "evaluate out dicom_study")
)
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder that predict wrote.", metavar="PREDICTIONS")],
    labels: Annotated[Path, typer.Argument(help="Folder of reference labels.", metavar="LABELS")],
    images: Annotated[Path | None, typer.Option(help="Folder of the scans, for pictures and DICOM labels.")] = None,
    json_file: Json = None,
) -> None:
    """Dice, surface distances in mm and volume errors, with intervals."""
    from fewscan import api
    from fewscan.progress import display

    with display("evaluate") as observe:
        evaluation = api.evaluate(predictions, labels, images=images, observe=observe)
    show_scores(evaluation, json_file)


@app.command(epilog=examples("compare before/evaluation.json after/evaluation.json"))
def compare(
    first: Annotated[Path, typer.Argument(help="evaluation.json of one run.", metavar="FIRST")],
    second: Annotated[Path, typer.Argument(help="evaluation.json of another.", metavar="SECOND")],
    json_file: Json = None,
) -> None:
    """Test whether two runs differ on the scans that both judged."""
    from fewscan import api
    from fewscan.tables import differences

    comparison = api.compare(first, second).to_json()
    if not to_json(comparison, json_file):
        screen = stdout()
        screen.print(differences(comparison))
        for side, key in ((first, "only_a"), (second, "only_b")):
            show_left_out(f"Only in {side}, so left out", comparison[key], screen=screen)


@app.command(epilog=examples("crossval scans -o folds", "crossval scans -o folds --folds 4 --budget 5m"))
def crossval(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    folds: Annotated[str, typer.Option(help="loo (leave one patient out) or a number.", metavar="loo|K")] = "loo",
    budget: Budget = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = "auto",
    max_memory: Memory = None,
    settings: Settings = None,
    method: Method = "auto",
    json_file: Json = None,
) -> None:
    """Honest figures from few labels: patients are never split; the budget is each fold's."""
    from fewscan import runs
    from fewscan.progress import display

    with display("crossval") as observe:
        evaluation = runs.crossval(
            data,
            out,
            folds=parse_folds(folds),
            budget=maybe(duration, budget, flag="--budget"),
            steps=steps,
            seed=seed,
            device=device,
            max_memory=maybe(size, max_memory, flag="--max-memory"),
            settings=pairs(settings or ()),
            method=method,
            observe=observe,
        )
    show_scores(evaluation, json_file)


@app.command(
    epilog=examples(
        "report demo", "report runs/knee -o knee.html", "report out --images scans", "report out --viewer none"
    )
)
def report(
    directory: Annotated[
        Path, typer.Argument(help="Folder with a model, predictions or an evaluation.", metavar="DIR")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.", metavar="FILE")] = Path("report.html"),
    viewer: Annotated[
        Literal["thin", "full", "none"], typer.Option(help="Scans in the page: below 25 MB, whole, or none.")
    ] = "thin",
    images: Images = None,
) -> None:
    """Write one offline HTML file for a clinician, with a viewer inside."""
    from fewscan import api

    path = api.report(directory, out, viewer=viewer, images=images or ())
    size = path.stat().st_size
    told = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    stdout().print(f"Report: {path}, {told}", markup=False)


def main() -> None:
    """Run the command line; what fewscan refuses becomes one red line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # into a file of a Windows code page, say, which lacks some letters
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        app(prog_name="fewscan")
    except FewscanError as error:
        _refuse(str(error))
    except OSError as error:
        where = error.filename or "a file"
        _refuse(f"{where}: {error.strerror or error}; check the name, the rights and the free space")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (MemoryError, RuntimeError, TypeError) as error:
        memory = out_of_memory(error, fix="give it smaller scans")  # what bounds it otherwise differs between verbs
        told = memory or lacking_on_mps(error)
        if told is None:
            raise
        _refuse(str(told))


def _refuse(sentence: str) -> None:
    line = escape(" ".join(sentence.split()))
    Console(stderr=True, highlight=False).print(f"[red]{line}[/red]", soft_wrap=True)
    sys.exit(REFUSED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewscan {version('fewscan')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


NEXT = """\
With your own scans (images/ + labels/, nnU-Net, MSD, BIDS, NAME_seg.nii.gz; NIfTI, NRRD, MHA, DICOM):

  fewscan check SCANS                          what was found, what is wrong
  fewscan train SCANS -o model --budget 10m    Ctrl-C keeps a usable model
  fewscan predict model NEW.nii.gz -o out      masks on the scan's own grid
  fewscan crossval SCANS -o folds              how good it is, honestly
  fewscan report folds -o report.html          one file to show around

Scans without a label may lie among the others. One labelled scan is enough to start."""
