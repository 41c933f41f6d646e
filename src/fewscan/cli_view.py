"""The verb that shows a run in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewscan.options import Images, app, examples, stdout


@app.command(epilog=examples("view demo", "view out --images scans", "view out --no-browser --port 8000"))
def view(
    directory: Annotated[Path, typer.Argument(help="Folder of a run, as for report.", metavar="DIR")],
    images: Images = None,
    port: Annotated[int, typer.Option(help="To listen on; 0 takes a free one.", min=0, max=65535)] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the browser.")] = True,
) -> None:
    """Serve the report to this machine's browser, scans whole; Ctrl-C ends it."""
    from fewscan import api

    screen = stdout()

    def ready(address: str) -> None:
        screen.print(f"{address}\nOnly this machine can open it, and only by this address. Ctrl-C ends.", markup=False)
        if browser:
            import webbrowser

            webbrowser.open(address)

    try:
        api.view(directory, images=images or (), port=port, ready=ready)
    except KeyboardInterrupt:
        screen.print("Ended.")
