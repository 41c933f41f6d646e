"""One self-contained HTML page about a run: verdict first, then the evidence; nothing is loaded from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from fewscan.data.io import atomic
from fewscan.deliver import (
    calibrated,
    drafted,
    learning,
    predicted,
    printed,
    registered,
    sections,
    suggested,
    transferred,
    verdict,
    viewer,
)
from fewscan.deliver.pictures import read_history
from fewscan.deliver.records import part
from fewscan.deliver.scenes import scenes
from fewscan.deliver.sections import Run
from fewscan.errors import ConfigError, DataError
from fewscan.judge.pairing import files_by_name
from fewscan.judge.results import read_evaluation

SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Registration", registered.registration),
    ("Drafts", drafted.drafts),
    ("Figures", sections.figures),
    ("Pictures", sections.overlays),
    ("Structures", sections.labels),
    ("Scans", sections.cases),
    ("Calibration", calibrated.calibration),
    ("Data", sections.data_check),
    ("Transfer", transferred.transfer),
    ("Training", learning.training),
    ("Predictions", predicted.predictions),
    ("Suggestions", suggested.suggestions),
    ("Meshes", printed.certificate),
    ("Model", sections.provenance),
)
"""Title and function of each part, in the order shown; a new part is one function and one line here."""
VIEWER_AFTER = ("Pictures", "Registration", "Drafts", "Predictions", "Meshes")
"""The viewer follows the first of these that is there."""


def write_report(directory: Path, out: Path, *, extent: viewer.Extent = "thin", images: Sequence[Path] = ()) -> Path:
    """Write the report of a run.

    Parameters
    ----------
    directory : Path
        Folder that holds any of ``check.json``, ``model/`` (or the model's own files), ``evaluation.json``,
        ``predictions/predictions.json``, ``registration.json``, ``draft.json``, ``certificate.json`` and
        ``suggest.json``; ``calibration.json`` beside an evaluation is shown too.
    out : Path
        HTML file to write.
    extent : {"full", "thin", "none"}
        What the viewer in the page holds of scans and masks.
    images : sequence of Path
        Folders or files where scans are looked for by name, when they do not lie where they lay.

    Raises
    ------
    DataError
        If the folder holds none of them, or one is damaged.
    ConfigError
        If the extent is unknown, or the file is not named as a page.
    """
    if extent not in viewer.EXTENTS:
        raise ConfigError(f"the viewer is one of {', '.join(viewer.EXTENTS)}, got {extent!r}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{out} must end in .html; give the page such a name with -o")
    run = read_run(directory, images)
    parts = parts_of(run)
    shown = [] if extent == "none" else scenes(run)
    room = viewer.MOST_BYTES - len(page_of(run, parts).encode())
    stills = run.evaluation is None and run.registration is None  # whose pictures are on the page already
    page = page_of(run, parts, viewer_html=viewer.embedded(shown, extent=extent, room=room, stills=stills))
    with atomic(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def parts_of(run: Run) -> list[tuple[str, str]]:
    """Title and HTML of each part that the run has something for.

    Parameters
    ----------
    run : Run
        Read by `read_run`.
    """
    return [(title, body) for title, section in SECTIONS if (body := section(run))]


def page_of(
    run: Run,
    parts: Sequence[tuple[str, str]],
    *,
    viewer_html: str = "",
    script: str = "",
    connect: str = "'none'",
) -> str:
    """The whole page.

    Parameters
    ----------
    run : Run
        Read by `read_run`.
    parts : sequence of (str, str)
        From `parts_of`.
    viewer_html : str
        From `fewscan.deliver.viewer`; empty for none.
    script : str
        What the page's own script needs before it.
    connect : str
        What the page may fetch from, as its content security policy says it.
    """
    parts = list(parts)
    if viewer_html:
        titles = [title for title, _ in parts]
        before = next((title for title in VIEWER_AFTER if title in titles), titles[-1])
        parts.insert(titles.index(before) + 1, ("Viewer", viewer_html))
    headline, remarks = _said(run)
    title = run.directory.resolve().name or "run"
    return render(
        title, headline, remarks=remarks, parts=parts, viewed=bool(viewer_html), script=script, connect=connect
    )


def render(
    title: str,
    headline: str,
    *,
    remarks: Sequence[str],
    parts: Sequence[tuple[str, str]],
    viewed: bool = False,
    script: str = "",
    connect: str = "'none'",
) -> str:
    """A whole page: verdict first, then the parts.

    Parameters
    ----------
    title : str
        Of the window.
    headline : str
        The one sentence to take away.
    remarks : sequence of str
        What else to know first.
    parts : sequence of (str, str)
        Title and HTML of each.
    viewed : bool
        Whether a viewer is among them.
    script : str
        What the page's own script needs before it.
    connect : str
        What the page may fetch from, as its content security policy says it.
    """
    links = "".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in parts)
    main = "".join(f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{body}</section>' for title, body in parts)
    points = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    page = _asset("report.html")
    for key, value in {
        "connect": connect,
        "title": escape(title),
        "style": _asset("report.css") + (_asset("viewer.css") if viewed else ""),
        "verdict": escape(headline),
        "remarks": points,
        "links": links,
        "sections": main,
        "script": script + _asset("report.js") + (_asset("viewer.js") if viewed else ""),
    }.items():
        before, after = page.split(f"<!-- {key} -->", 1)  # content is never searched for further marks
        page = before + value + after
    return page


def read_run(directory: Path, images: Sequence[Path] = ()) -> Run:
    """Read what a folder holds of a run.

    Parameters
    ----------
    directory : Path
        A run, or a model folder.
    images : sequence of Path
        As for `write_report`.

    Raises
    ------
    DataError
        If it holds nothing to report, or a damaged file; if there is nothing where scans are to be looked for.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such folder; give the folder of a run, such as `fewscan demo` leaves")
    model = directory / "model" if (directory / "model" / "model.json").is_file() else directory
    history, evaluation = model / "history.jsonl", directory / "evaluation.json"
    run = Run(
        directory=directory,
        check=_check(directory / "check.json") or _check(model / "check.json"),
        model=_mapping(model / "model.json"),
        history=read_history(history) if history.is_file() else None,
        evaluation=read_evaluation(evaluation) if evaluation.is_file() else None,
        predictions=_predictions(directory / "predictions" / "predictions.json")
        or _predictions(directory / "predictions.json"),
        failed=_failed(directory / "predictions" / "predictions.json") or _failed(directory / "predictions.json"),
        registration=_mapping(directory / "registration.json"),
        draft=_mapping(directory / "draft.json"),
        certificate=_mapping(directory / "certificate.json"),
        suggestions=_mapping(directory / "suggest.json"),
        scans={name: file for folder in images for name, file in files_by_name(folder).items()},
    )
    if all(getattr(run, part.name) is None for part in fields(run) if part.name not in ("directory", "scans")):
        raise DataError(
            f"{directory}: nothing to report; it should hold check.json, model/, evaluation.json, "
            "predictions/predictions.json, registration.json, draft.json, certificate.json or suggest.json, as "
            "fewscan's verbs leave them"
        )
    return run


def _said(run: Run) -> tuple[str, list[str]]:
    """Headline and remarks; what was measured on predictions counts most, then what the folder is about."""
    if run.evaluation is None and run.registration is not None:
        return verdict.registered(run.registration)
    if run.evaluation is None and run.draft is not None:
        return verdict.drafted(run.draft)
    if run.evaluation is None and run.certificate is not None:
        return printed.said(run.certificate)
    if run.evaluation is None and run.suggestions is not None and run.model is None and not run.predictions:
        return suggested.said(run.suggestions)
    segments = (run.model or {}).get("segments") is not False
    headline = verdict.headline(
        run.evaluation, trained=run.model is not None, segments=segments, predicted=len(run.predictions or ())
    )
    return headline, verdict.remarks(run.evaluation, run.check, model=run.model)


def _mapping(path: Path) -> dict[str, Any] | None:
    content = _json(path)
    if content is None or isinstance(content, dict):
        return content
    raise DataError(f"{path}: must hold one JSON object, got a {type(content).__name__}; write it again")


def _check(path: Path) -> dict[str, Any] | None:
    """A data check whose findings and cases can be shown."""
    content = _mapping(path) or {}
    for key in ("findings", "cases"):
        rows = content.get(key, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{path}: {key} must be a list of JSON objects; write it again with `fewscan check`")
    severities = [finding.get("severity") for finding in content.get("findings", [])]
    unknown = [severity for severity in severities if severity not in sections.SEVERITIES]
    if unknown:
        raise DataError(f"{path}: a finding has the severity {unknown[0]!r}; write it again with `fewscan check`")
    return content or None


def _predictions(path: Path) -> list[dict[str, Any]] | None:
    content = _json(path)
    if isinstance(content, dict):
        content = next((value for value in content.values() if isinstance(value, list)), [])
    if content is None or (isinstance(content, list) and all(isinstance(row, dict) for row in content)):
        return content
    raise DataError(f"{path}: must hold a list of predictions; predict again")


def _failed(path: Path) -> dict[str, str] | None:
    """Scans that could not be predicted, and why; None where the record tells of none."""
    content = _json(path)
    told = part(content, "failed") if isinstance(content, dict) else {}
    return {str(name): str(why) for name, why in told.items()} or None


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({error}); delete it or write it again") from error


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _asset(name: str) -> str:
    return resources.files("fewscan.deliver").joinpath(name).read_text(encoding="utf-8")
