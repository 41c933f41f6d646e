"""What every training verb does around a method: check the data first, leave check and curve beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewscan.data import doctor
from fewscan.data.dataset import Dataset
from fewscan.deliver.pictures import curve_png
from fewscan.errors import DataError
from fewscan.learn.checkpoint import Model, write_json
from fewscan.learn.folder import drop_cache
from fewscan.learn.request import Observer, Request, telling


def run(request: Request, method: Callable[[Request], Model]) -> Model:
    """Check the data, train, and leave ``check.json`` and ``curve.png`` in the model folder.

    Parameters
    ----------
    request : Request
        What was asked.
    method : callable
        A method's ``run``.

    Raises
    ------
    DataError
        If the data cannot be trained on.
    """
    checkup = usable(request.dataset, observe=request.observe)
    try:
        model = method(request)
    finally:
        drop_cache(request.out, say=request.say)
    write_json(without_folders(checkup), request.out / "check.json")
    curve_png(request.out / "history.jsonl", request.out / "curve.png")
    return model


def usable(dataset: Dataset, *, observe: Observer | None = None) -> doctor.Checkup:
    """The check-up of a data set that can be trained on.

    Parameters
    ----------
    dataset : Dataset
        To examine.
    observe : callable, optional
        As for `checked`.

    Raises
    ------
    DataError
        If there is an error in it; the first one is told.
    """
    checkup = checked(dataset, observe=observe)
    if not checkup.usable:
        worst = next(f for f in checkup.findings if f.severity == "error")
        others = sum(f.severity == "error" for f in checkup.findings) - 1
        more = f" (and {others} more; `fewscan check` lists them)" if others else ""
        raise DataError(f"{worst.path or worst.case}: {worst.message}; {worst.remedy}{more}")
    return checkup


def checked(dataset: Dataset, *, observe: Observer | None = None) -> doctor.Checkup:
    """The check-up of a data set, with word of how far it is.

    Parameters
    ----------
    dataset : Dataset
        To examine.
    observe : callable, optional
        Gets a `learn.engine.Status` for each scan.
    """
    total = len(dataset.cases) + len(dataset.test)
    return doctor.examine(dataset, progress=telling(observe, total=total, doing="checking"))


def without_folders(checkup: doctor.Checkup) -> dict[str, Any]:
    """A check-up for folders that travel: where the files lie, and so whose they are, stays behind.

    Parameters
    ----------
    checkup : Checkup
        From `doctor.examine`.
    """
    content = checkup.to_json()
    content["data"] = Path(content["data"]).name
    for finding in content["findings"]:
        finding["path"] = Path(finding["path"]).name
    return content
