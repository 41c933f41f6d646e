"""Where the files that a record speaks of lie on this machine.

Records may be handed on, so they name files by their bare names. Where these really lie is kept beside the records in
``files.local.json``, for the pictures and the viewer of a report made on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fewscan.data.io import atomic
from fewscan.data.locking import locked

LOCAL = "files.local.json"
NOTE = "where the files of the records beside this lie on this machine; never hand this file on"


def remember(record: Path, files: Mapping[str, Mapping[str, Path]], *, more: bool = False) -> None:
    """Keep where the files of a record lie; what was kept for other records stays.

    Parameters
    ----------
    record : Path
        Such as ``evaluation.json``; `LOCAL` is written beside it.
    files : mapping of str to mapping of str to Path
        By case, then by role, such as "image".
    more : bool
        Whether what was kept of other cases of this record stays, too.
    """
    told = {case: {k: str(p.absolute()) for k, p in of.items()} for case, of in files.items()}
    with locked(record.parent / LOCAL):
        places = _all(record.parent)
        places[record.name] = (places.get(record.name, {}) if more else {}) | told
        with atomic(record.parent / LOCAL) as temporary:
            temporary.write_text(json.dumps({"note": NOTE, "files": places}, indent=1) + "\n", encoding="utf-8")


def recall(record: Path) -> dict[str, dict[str, Path]]:
    """What `remember` kept for a record: by case and role; empty where nothing was kept, or it is damaged.

    Parameters
    ----------
    record : Path
        Such as ``evaluation.json``.
    """
    kept = _all(record.parent).get(record.name, {})
    return {case: {role: Path(place) for role, place in files.items()} for case, files in kept.items()}


def _all(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Record, case and role to place."""
    try:
        listed = json.loads((folder / LOCAL).read_text(encoding="utf-8"))["files"]
        return {
            name: {case: {k: str(v) for k, v in files.items()} for case, files in cases.items()}
            for name, cases in listed.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
