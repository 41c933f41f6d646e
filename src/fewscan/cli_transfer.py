"""Verbs for another population than the one a model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fewscan.options import (
    Data,
    Deforming,
    Device,
    Memory,
    Seed,
    Settings,
    Steps,
    app,
    examples,
    maybe,
    pairs,
    stdout,
)
from fewscan.quantity import duration, size

Start = Annotated[Path, typer.Argument(help="Folder that train wrote; only read.", metavar="MODEL")]


@app.command(
    epilog=examples(
        "transfer model patients -o adapted",
        "transfer model patients -o adapted --layers norms --budget 10m",
        "transfer model patients -o adapted --source scans",
        "transfer model patients -o adapted --resume",
    )
)
def transfer(
    model: Start,
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="Model folder to write.", metavar="MODEL2")],
    layers: Annotated[
        Literal["auto", "all", "decoder", "last", "norms"], typer.Option(help="Weights that learn.")
    ] = "auto",
    budget: Annotated[
        str | None, typer.Option(help="Wall clock to spend, such as 90s or 10m; 4m unless told.", metavar="TIME")
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    source: Annotated[
        Path | None, typer.Option(help="Scans of the old population: measure what is forgotten.", metavar="DATA")
    ] = None,
    keep_atlases: Annotated[
        bool, typer.Option("--keep-atlases", help="Leave up to 20 labelled scans beside MODEL2, to personalise with.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
    device: Device = "auto",
    max_memory: Memory = None,
    settings: Settings = None,
) -> None:
    """Adapt a model to few labelled scans of another population; the better of both is kept."""
    from fewscan.progress import display
    from fewscan.transferring import transfer as run

    with display("transfer") as observe:
        adapted = run(
            model,
            data,
            out,
            layers=layers,
            budget=maybe(duration, budget, flag="--budget"),
            steps=steps,
            seed=seed,
            source=source,
            resume=resume,
            device=device,
            max_memory=maybe(size, max_memory, flag="--max-memory"),
            settings=pairs(settings or ()),
            keep_atlases=keep_atlases,
            observe=observe,
        )
    stdout().print(f"{adapted.describe()}\nNext: fewscan predict {out} NEW_SCAN -o out", markup=False)


@app.command(
    epilog=examples(
        "shift model scans patients -o card.html", "shift model scans patients --lesions masks -o card.html"
    )
)
def shift(
    model: Start,
    source: Annotated[Path, typer.Argument(help="Scans of the population it was trained on.", metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(help="Scans of the other one.", metavar="TARGET")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write; JSON beside it.", metavar="FILE")],
    lesions: Annotated[
        Path | None, typer.Option(help="Folder of lesion masks, named like TARGET's cases.", metavar="MASKS")
    ] = None,
    seed: Seed = 0,
    device: Deforming = "auto",
) -> None:
    """Say how far another population is from the model's, of what kind, and what to do about it."""
    from fewscan.deliver.card import lines
    from fewscan.progress import display
    from fewscan.shifting import shift as run

    with display("shift") as observe:
        record = run(model, source, target, out, lesions=lesions, seed=seed, device=device, observe=observe)
    screen = stdout()
    for line in lines(record):
        screen.print(line, markup=False)
    screen.print(f"Card: {out}. For research use only.", markup=False)
