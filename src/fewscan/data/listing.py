"""Names of labels and channels, modality and kind, as ``labels.json``, ``dataset.json`` and records list them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fewscan.errors import DataError
from fewscan.space.volume import KINDS, Kind

KEY = "channel_kind"
"""In ``dataset.json``: what the channels hold."""

RECORD = "inputs.json"
"""What `fewscan tracts inputs` leaves beside its images: for each file, the names of its channels."""

REGISTERED = "registration.json"
"""What `fewscan register` leaves; says the same of directions that it has brought along."""

TENSOR_CHANNELS = ("Dxx", "Dxy", "Dxz", "Dyy", "Dyz", "Dzz")


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
    channels = tuple(str(v) for v in (_by_number(modality) if isinstance(modality, dict) else [modality]))
    several = channels if len(channels) > 1 else ()
    return {"names": names, "channels": several, "hint": " ".join(channels), "ignore": ignore}


def _by_number(channels: Mapping[str, object]) -> list[object]:
    """Names of channels in the order of their numbers, however the file lists them."""
    keys = sorted(channels, key=int) if all(key.isdecimal() for key in channels) else list(channels)
    return [channels[key] for key in keys]


def peak_channels(count: int) -> tuple[str, ...]:
    """Names of the channels of so many peaks.

    Parameters
    ----------
    count : int
        Peaks.

    Examples
    --------
    >>> peak_channels(1)
    ('peak1 x', 'peak1 y', 'peak1 z')
    """
    return tuple(f"peak{n} {axis}" for n in range(1, count + 1) for axis in "xyz")


def direction_channels(kind: Kind, count: int) -> tuple[str, ...]:
    """Names of so many channels of directions; none where so many are not that kind.

    Parameters
    ----------
    kind : {"scalar", "peaks", "tensor"}
        What they hold; intensities have names of their own.
    count : int
        Channels.

    Examples
    --------
    >>> direction_channels("peaks", 3), direction_channels("tensor", 3)
    (('peak1 x', 'peak1 y', 'peak1 z'), ())
    """
    if kind == "tensor":
        return TENSOR_CHANNELS if count == len(TENSOR_CHANNELS) else ()
    return peak_channels(count // 3) if kind == "peaks" and count % 3 == 0 else ()


def stated(root: Path) -> Kind | None:
    """The kind that ``dataset.json`` states; None where it says nothing.

    Parameters
    ----------
    root : Path
        Folder of a data set.

    Raises
    ------
    DataError
        If it states one that there is not.
    """
    file = root / "dataset.json"
    kind = read_json(file).get(KEY) if file.is_file() else None
    if kind is not None and kind not in KINDS:
        raise DataError(f"{file}: {KEY} is {kind!r}, it must be one of {', '.join(KINDS)}; correct the file")
    return cast(Kind | None, kind)


def registered(folder: Path) -> dict[str, Any]:
    """What `fewscan register` recorded in a folder; empty where it did not, or its record is damaged.

    Parameters
    ----------
    folder : Path
        Any; other programs call files of theirs `REGISTERED` too.
    """
    try:
        content = read_json(folder / REGISTERED)
    except DataError:
        return {}
    return content if "use" in content else {}


def channel_record(image: Path) -> tuple[str, tuple[str, ...]]:
    """Name of the record beside an image, and the names it gives the channels; both empty where there is none of it.

    Parameters
    ----------
    image : Path
        Image file.

    Raises
    ------
    DataError
        If `RECORD` is damaged.
    """
    inputs = image.parent / RECORD
    contents = {RECORD: read_json(inputs) if inputs.is_file() else {}, REGISTERED: registered(image.parent)}
    for record, content in contents.items():
        listed = content.get("kind")
        names = listed.get(image.name) if isinstance(listed, dict) else None
        if isinstance(names, list):
            return record, tuple(str(name) for name in names)
    return "", ()


def recorded(image: Path) -> Kind | None:
    """The kind that the record beside an image gives it; None where there is no record of it.

    Parameters
    ----------
    image : Path
        Image file.

    Raises
    ------
    DataError
        If `RECORD` is damaged.
    """
    return kind_named(channel_record(image)[1])


def kind_named(names: tuple[str, ...]) -> Kind | None:
    """The kind of channels with these names, as a record gives them; None without any.

    Parameters
    ----------
    names : tuple of str
        In order.
    """
    if not names:
        return None
    return next((kind for kind in KINDS if names == direction_channels(kind, len(names))), "scalar")


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
