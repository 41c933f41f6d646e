"""A folder of results as a page: one offline file, or served with its scans whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fewscan.deliver import serve
from fewscan.deliver.report import write_report
from fewscan.deliver.viewer import Extent


def report(
    directory: Path | str, out: Path | str, *, viewer: Extent = "thin", images: Sequence[Path | str] = ()
) -> Path:
    """Write one offline HTML file about a folder of results.

    Parameters
    ----------
    directory : path
        With a model, predictions or an evaluation in it.
    out : path
        HTML file to write.
    viewer : {"thin", "full", "none"}
        Scans and masks for the viewer in the page: thinned so that it stays below 25 MB, whole, or none.
    images : sequence of paths
        Folders or files where scans are looked for by name, when they do not lie where they lay.

    Raises
    ------
    FewscanError
        If there is nothing to report on.
    """
    return write_report(Path(directory), Path(out), extent=viewer, images=[Path(path) for path in images])


def view(
    directory: Path | str,
    *,
    images: Sequence[Path | str] = (),
    port: int = 0,
    ready: Callable[[str], object] = print,
) -> None:
    """Serve the report with its scans whole to this machine's browser, until interrupted.

    Parameters
    ----------
    directory : path
        As for `report`.
    images : sequence of paths
        As for `report`.
    port : int
        0 takes a free one.
    ready : callable
        Gets the address as soon as it answers.

    Raises
    ------
    FewscanError
        If there is nothing to show, or the port cannot be used.
    """
    serve.view(Path(directory), images=[Path(path) for path in images], port=port, ready=ready)
