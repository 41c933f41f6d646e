"""What every training verb does around a method: check the data first, leave check and curve beside the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewscan.data import doctor
from fewscan.data.dataset import Dataset
from fewscan.deliver.pictures import curve_png
from fewscan.errors import DataError
from fewscan.learn.checkpoint import Model, write_json
from fewscan.learn.folder import drop_cache
from fewscan.learn.request import Observer, Request, telling


def run(request: Request, method: Callable[[Request], Model], *, checkup: doctor.Checkup | None = None) -> Model:
    """Check the data, train, and leave ``check.json`` and ``curve.png`` in the model folder.

    Parameters
    ----------
    request : Request
        What was asked.
    method : callable
        A method's ``run``.
    checkup : Checkup, optional
        From `checked`, of whose request this one is.

    Raises
    ------
    DataError
        If the data cannot be trained on.
    """
    if checkup is None:
        request, checkup = checked(request)
    try:
        model = method(request)
    finally:
        drop_cache(request.out, say=request.say)
    write_json(without_folders(checkup), request.out / "check.json")
    curve_png(request.out / "history.jsonl", request.out / "curve.png")
    return model


def checked(request: Request) -> tuple[Request, doctor.Checkup]:
    """The request without the unlabelled scans that are left out for their faults, and the check-up of all.

    Parameters
    ----------
    request : Request
        What was asked.

    Raises
    ------
    DataError
        As `usable`.
    """
    checkup = usable(request.dataset, observe=request.observe)
    kept = {case.id for case in checkup.sound.cases}
    for case in request.dataset.cases:
        if case.id not in kept:
            request.say(f"warning: {case.images[0]} is left out, as `fewscan check` says")
    unused = set(map(str, request.dataset.unused))
    for finding in checkup.findings:
        if finding.path in unused:
            request.say(f"warning: {finding.path}: {finding.message}")
    return replace(request, dataset=checkup.sound), checkup


def usable(dataset: Dataset, *, observe: Observer | None = None) -> doctor.Checkup:
    """The check-up of a data set that can be trained on.

    Parameters
    ----------
    dataset : Dataset
        To examine.
    observe : callable, optional
        As for `examined`.

    Raises
    ------
    DataError
        If there is an error in it; the first one is told.
    """
    checkup = examined(dataset, observe=observe)
    if not checkup.usable:
        worst = next(f for f in checkup.findings if f.severity == "error")
        others = sum(f.severity == "error" for f in checkup.findings) - 1
        more = f" (and {others} more; `fewscan check` lists them)" if others else ""
        raise DataError(f"{worst.path or worst.case}: {worst.message}; {worst.remedy}{more}")
    return checkup


def examined(dataset: Dataset, *, observe: Observer | None = None) -> doctor.Checkup:
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
