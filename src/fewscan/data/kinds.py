"""What the channels of scans hold, as ``dataset.json`` or the record beside an image says it; never guessed.

Peaks and tensors look like any other channels, and training would then move voxels without turning what is in them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewscan.data import dicom
from fewscan.data.formats import peek
from fewscan.data.found import Found
from fewscan.data.listing import KEY, channel_record, direction_channels, kind_named, recorded, stated
from fewscan.errors import DataError, FewscanError
from fewscan.space.volume import Kind, Volume

LOWER_TRIANGLE = (0, 1, 3, 2, 4, 5)  # places of Dxx, Dxy, Dxz, Dyy, Dyz, Dzz in Dxx, Dxy, Dyy, Dxz, Dyz, Dzz
DIRECTIONS = (6, 9)  # channels of a tensor and of three peaks: as many of intensities are rare enough to ask


def kind_of(root: Path, found: Found) -> tuple[Kind, tuple[str, ...]]:
    """Kind and names of the channels of a data set.

    Parameters
    ----------
    root : Path
        Its folder.
    found : Found
        What a layout function saw.

    Raises
    ------
    DataError
        If two sources contradict each other, the number of channels does not fit, or there are as many channels as
        directions have and nothing says what they hold.
    """
    said, by = stated(root), root / "dataset.json"
    pairs = [*found.pairs.values(), *found.test.values()]
    for image in (image for pair in pairs for image in pair.images):
        record, named = channel_record(image)
        if (own := kind_named(named)) is None:
            continue
        if said is None:
            said, by = own, image.parent / record
        if said != own:
            raise DataError(f"{image}: its {record} says {own}, {by} says {said}; keep one kind")
    names = found.channels or ("image",)
    if not pairs:
        return said or "scalar", names
    file, count = pairs[0].images[0], _count(pairs[0].images)
    if said is None and (count in DIRECTIONS[1:] or (len(pairs[0].images) == 1 and count in DIRECTIONS)):
        raise DataError(
            f'{file}: {count} channels may be directions or not; write "{KEY}": "peaks", "tensor" or "scalar" into '
            f"{root / 'dataset.json'}"
        )
    if said in ("peaks", "tensor") and count is not None:
        if not (own_names := direction_channels(said, count)):
            wanted = "six channels" if said == "tensor" else "three channels for each direction"
            raise DataError(f"{file}: {said} have {wanted}, this has {count}; correct {KEY} or give other files")
        if len(names) != count:
            names = own_names
    return said or "scalar", names


def _count(images: Sequence[Path]) -> int | None:
    """Channels of a case; None where its file cannot be read, which others report."""
    if len(images) > 1:
        return len(images)
    if dicom.on_disk(images[0]).is_dir():
        return 1
    try:
        return peek(images[0]).channels
    except FewscanError:
        return None


def kind_of_scan(images: Sequence[Path], *, wanted: Kind) -> Kind:
    """Kind of one scan by its files: as a record or a ``dataset.json`` nearby says, else what is wanted.

    Parameters
    ----------
    images : sequence of Path
        One per channel, or one.
    wanted : {"scalar", "peaks", "tensor"}
        What is taken for granted where nothing is said.
    """
    for look, place in ((recorded, images[0]), (stated, images[0].parent), (stated, images[0].parent.parent)):
        with contextlib.suppress(DataError):  # a file of another program, or a broken one: nothing said
            if (kind := look(place)) is not None:
                return kind
    return wanted


def kind_of_file(path: Path, *, channels: int) -> Kind:
    """Kind of a file with so many channels: directions where they are said to be and as many as these take.

    Parameters
    ----------
    path : Path
        Image file.
    channels : int
        That it has.
    """
    kind = kind_of_scan([path], wanted="scalar")
    return kind if direction_channels(kind, channels) else "scalar"


def of_kind(image: Volume, kind: Kind, *, file: Path) -> Volume:
    """A scan as it was read, with what its channels hold, in the order that belongs to it.

    Parameters
    ----------
    image : Volume
        From `io.read_image`.
    kind : {"scalar", "peaks", "tensor"}
        What they hold.
    file : Path
        Of the scan, the first where there are several.
    """
    return replace(image, data=in_order(image.data, kind, file=file), kind=kind)


def in_order(data: NDArray[Any], kind: Kind, *, file: Path) -> NDArray[Any]:
    """Components of a tensor as `listing.TENSOR_CHANNELS` has them, where the file says that it has the lower triangle.

    Such is NIfTI's intent of a symmetric matrix, as dipy and ITK write it. All else stays as it is.

    Parameters
    ----------
    data : (C, X, Y, Z) number
        Channels of the file.
    kind : {"scalar", "peaks", "tensor"}
        What they hold.
    file : Path
        Where they were read.
    """
    if kind != "tensor" or len(data) != len(LOWER_TRIANGLE) or not file.is_file():
        return data
    if not peek(file, trust_sform=True).triangle:  # forms that contradict each other are told elsewhere
        return data
    return np.ascontiguousarray(data[list(LOWER_TRIANGLE)])


def listed(kind: Kind) -> Mapping[str, Any]:
    """What a ``dataset.json`` must hold to say it; nothing for intensities.

    Parameters
    ----------
    kind : {"scalar", "peaks", "tensor"}
        To be said.
    """
    return {} if kind == "scalar" else {KEY: kind}
