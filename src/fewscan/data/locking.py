"""Changes to a file that several programs write: read, change and write, one program after another."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewscan.data.io import disk_error

WAIT = 0.02  # seconds between two looks
REFUSED = 0.5  # seconds after which a lock that nobody holds and that cannot be made never will be
ABANDONED = 30.0  # seconds after which a lock that stays as it is was left behind


@contextmanager
def locked(path: Path, *, abandoned: float = ABANDONED) -> Iterator[None]:
    """Hold others off while a file is read, changed and written; the same in every system, on shared folders too.

    Parameters
    ----------
    path : Path
        File to change; its folder is made if need be.
    abandoned : float
        Seconds after which the lock of a program that was killed while it wrote is broken.

    Raises
    ------
    DataError
        If nothing can be written there.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(lock, abandoned)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _take(lock: Path, abandoned: float) -> None:
    """Make the lock's file, which only one program can."""
    seen, since = 0, time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return
        except (FileExistsError, PermissionError):  # the latter in Windows, while the file is being removed
            found = 0
            with contextlib.suppress(FileNotFoundError):
                found = lock.stat().st_mtime_ns
            if found != seen:  # another's turn since; clocks of two machines are not compared
                seen, since = found, time.monotonic()
            elif not found and time.monotonic() - since > REFUSED:
                raise
            elif time.monotonic() - since > abandoned:
                lock.unlink(missing_ok=True)
            time.sleep(WAIT)
