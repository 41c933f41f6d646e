"""The verb that says which scans to label next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewscan.options import (
    Data,
    Device,
    Json,
    Memory,
    Seed,
    Settings,
    Steps,
    app,
    examples,
    maybe,
    pairs,
    stdout,
    to_json,
)
from fewscan.quantity import duration, size


@app.command(
    epilog=examples(
        "suggest model scans",
        "suggest model scans --images more --top 5 -o next",
        "suggest model scans --folds folds2 --folds folds3 --folds loo",
        "suggest model scans --curve -o next --budget 2m",
    )
)
def suggest(
    model: Annotated[Path, typer.Argument(help="Folder that train wrote; only read.", metavar="MODEL")],
    data: Data,
    images: Annotated[
        list[Path] | None, typer.Option(help="More unlabelled scans; repeatable.", metavar="FOLDER")
    ] = None,
    top: Annotated[int, typer.Option(help="How many to show; records hold all.", min=1)] = 10,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for suggest.json, which report shows.", metavar="DIR")
    ] = None,
    folds: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that crossval wrote, for a learning curve; repeatable.", metavar="FOLDS"),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Train on 1, 2, 4, ... labelled scans for a learning curve.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="Wall clock for looking at scans, and for each training of a curve.", metavar="TIME"),
    ] = None,
    steps: Steps = None,
    seed: Seed = 0,
    device: Device = "auto",
    max_memory: Memory = None,
    settings: Settings = None,
    json_file: Json = None,
) -> None:
    """Say which scans to label next and why, and what more labels are expected to bring."""
    from fewscan.progress import display
    from fewscan.suggesting import suggest as run
    from fewscan.tables import suggestions

    with display("suggest") as observe:
        found = run(
            model,
            data,
            images=images or (),
            out=out,
            folds=folds or (),
            curve=curve,
            budget=maybe(duration, budget, flag="--budget"),
            steps=steps,
            seed=seed,
            device=device,
            max_memory=maybe(size, max_memory, flag="--max-memory"),
            settings=pairs(settings or ()),
            observe=observe,
        )
    content = found.to_json()
    if to_json(content, json_file):
        return
    screen = stdout()
    if found.ranked:
        screen.print(suggestions(content["ranked"][:top]))
    for line in found.remarks():
        screen.print(line, markup=False)
