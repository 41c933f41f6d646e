"""Names of labels, channels and modality, as ``labels.json`` and ``dataset.json`` list them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewscan.errors import DataError


def read_listing(root: Path) -> dict[str, Any]:
    """Names, channels, modality hint and ignore value from ``labels.json`` and ``dataset.json``; empty without them.

    Names in ``labels.json`` go before those in ``dataset.json``.

    Parameters
    ----------
    root : Path
        Folder of a data set.

    Raises
    ------
    DataError
        If the file is not the JSON it should be.
    """
    own, file = root / "labels.json", root / "dataset.json"
    content = read_json(file) if file.is_file() else {}
    listed, place = (read_json(own), own) if own.is_file() else (content.get("labels", {}), file)
    names, ignore = _names(listed, place)
    if ignore is None and isinstance(plain := content.get("labels"), dict) and isinstance(plain.get("ignore"), int):
        ignore = plain["ignore"]
    modality = content.get("channel_names") or content.get("modality") or {}
    channels = tuple(str(v) for v in (modality.values() if isinstance(modality, dict) else [modality]))
    several = channels if len(channels) > 1 else ()
    return {"names": names, "channels": several, "hint": " ".join(channels), "ignore": ignore}


def read_names(path: Path) -> tuple[dict[int, str], int | None]:
    """Names and ignore value from one file of labels.

    Parameters
    ----------
    path : Path
        ``labels.json``, ``dataset.json`` or another file like one of them.

    Raises
    ------
    DataError
        If the file is not the JSON it should be.
    """
    content = read_json(path)
    return _names(content.get("labels", content), path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Parameters
    ----------
    path : Path
        File to read.

    Raises
    ------
    DataError
        If it cannot be read or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); correct the file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold one JSON object, got a {type(content).__name__}; correct the file")
    return content


def _names(listed: object, path: Path) -> tuple[dict[int, str], int | None]:
    """{"1": "liver"} or {"liver": 1}, either way round, without background; the "ignore" entry apart."""
    names: dict[int, str] = {}
    entry: dict[int, str] = {}
    ignore: int | None = None
    if not isinstance(listed, dict):
        raise DataError(f'{path}: labels must be an object such as {{"1": "liver"}}; correct the file')
    for key, value in listed.items():
        number, name = (key, value) if str(key).lstrip("-").isdigit() else (value, key)
        if isinstance(number, (list, tuple)):
            raise DataError(f"{path}: label {name!r} is a region {number}; list plain labels, one value each")
        if not isinstance(name, (str, int)):
            raise DataError(f"{path}: label {number} is called {name!r}, a name is needed; correct the file")
        try:
            number = int(number)
        except (TypeError, ValueError):
            raise DataError(f"{path}: label {name!r} has the value {number!r}, a whole number is needed") from None
        if number in entry:
            raise DataError(f"{path}: {entry[number]!r} and {name!r} both have the value {number}; give each its own")
        for other, twin in entry.items():
            if twin == str(name):
                raise DataError(f"{path}: values {other} and {number} are both called {name!r}; give each its own name")
        entry[number] = str(name)
        if str(name).lower() == "ignore":
            ignore = number
        elif number != 0:
            names[number] = str(name)
    if names and not 0 < min(names) <= max(names) < 65535:
        raise DataError(f"{path}: labels run from {min(names)} to {max(names)}, 1 to 65534 are possible; renumber them")
    return dict(sorted(names.items())), ignore
