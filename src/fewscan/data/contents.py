"""By what a scan is known again, whatever it is called and wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fewscan.data.dicom import describe_series, on_disk
from fewscan.data.formats import peek
from fewscan.errors import FewscanError

PIECES, PIECE = 16, 65536  # so much is read of a file, in places spread over it: a hundredth of a second


def content_of(scan: Path) -> str:
    """Digest of a sample of a scan's bytes; empty where it cannot be read.

    The folder and the names of its slices have no say. Packing a file anew does, since bytes are compared, not voxels.

    Parameters
    ----------
    scan : Path
        Image file, or DICOM series.
    """
    try:
        series = on_disk(scan).is_dir()  # of a file the payload too, for a header alone may be that of many scans
        files = set(describe_series(scan).files) if series else {scan, peek(scan).payload}
        return hashlib.sha256("".join(sorted(_sample(file) for file in files)).encode()).hexdigest()[:32]
    except (OSError, FewscanError):
        return ""


def _sample(file: Path) -> str:
    """Digest of a file's length and of pieces spread over it, the first and the last among them."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - PIECE)
    with file.open("rb") as stream:
        for start in sorted({last * k // (PIECES - 1) for k in range(PIECES)}):
            stream.seek(start)
            digest.update(stream.read(PIECE))
    return digest.hexdigest()
