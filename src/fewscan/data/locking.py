"""Locks that are files, the same in every system and on shared folders: taken, kept alive, broken, released."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from fewscan.data.io import disk_error
from fewscan.errors import DataError

WAIT = 0.02  # seconds between two looks
REFUSED = 0.5  # seconds after which what cannot be made or removed never will be
ABANDONED = 30.0  # seconds after which a lock that stays as it is was left behind
SIGNS = 6  # signs of life of a holder in the time after which its lock would be taken for left behind
TOKEN = "token"

Patience = Callable[[Mapping[str, Any]], float]
"""Gets what a lock of another says, nothing where it cannot be read, each time it has changed; answers after how many
seconds without a change it may be broken, or raises so as not to wait."""
_Seen = tuple[int, bytes]
"""When a lock was touched last, by the clock of its disk, and its content."""


@contextmanager
def locked(path: Path, *, abandoned: float = ABANDONED) -> Iterator[None]:
    """Hold others off while a file is read, changed and written.

    Parameters
    ----------
    path : Path
        File to change; its folder is made if need be.
    abandoned : float
        Seconds after which the lock of a program that was killed while it wrote is broken.

    Raises
    ------
    DataError
        If nothing can be written there, or a lock that was left behind cannot be removed.
    """
    with held(path.with_name(f".{path.name}.lock"), about=path, longest=abandoned, patience=lambda _: abandoned):
        yield


@contextmanager
def held(
    lock: Path, *, about: Path, longest: float, patience: Patience, told: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hold a lock, and touch it now and then, for others to see that its holder lives.

    Parameters
    ----------
    lock : Path
        File that is the lock; its folder is made if need be.
    about : Path
        What an error names where nothing can be written.
    longest : float
        Seconds for which others wait for a sign of life.
    patience : callable
        Judges the lock of another.
    told : mapping of str to any, optional
        What the lock says of its holder.

    Raises
    ------
    DataError
        If nothing can be written there, or a lock that was left behind cannot be removed.
    """
    token = uuid4().hex
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        _take(lock, {**(told or {}), TOKEN: token}, patience)
    except OSError as error:
        raise disk_error(error, about) from error
    try:
        with _alive(lock, token, every=longest / SIGNS):
            yield
    finally:
        _release(lock, token)


def _take(lock: Path, told: Mapping[str, Any], patience: Patience) -> None:
    """Make the lock's file, which only one program can."""
    seen: _Seen | None = None
    since, enough = time.monotonic(), REFUSED
    while True:
        try:
            _make(lock, told)
            return
        except (FileExistsError, PermissionError):  # the latter in Windows, while the file is being removed
            found = _look(lock)
            if found != seen:  # another's turn since, or a sign of life; clocks of two machines are not compared
                seen, since = found, time.monotonic()
                enough = REFUSED if found is None else patience(_said(found))
            over = time.monotonic() - since - enough
            if over >= 0 and seen is None:
                raise
            if over >= 0 and seen is not None:
                try:
                    _remove(lock, seen)
                    continue
                except OSError as error:
                    if over > REFUSED:
                        raise DataError(
                            f"{lock} was left behind by a program that was killed and cannot be removed "
                            f"({error.strerror or error}); delete it, or make its folder writable"
                        ) from error
            time.sleep(WAIT)


def _make(lock: Path, told: Mapping[str, Any]) -> None:
    """The file with what it says; none where that cannot be written."""
    file = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as text:
            json.dump(told, text)
    except BaseException:
        with contextlib.suppress(OSError):
            lock.unlink()
        raise


def _look(lock: Path) -> _Seen | None:
    """The lock as it is now; None where there is none."""
    try:
        with lock.open("rb") as file:  # opened also for its time: on a network disk that of a closed file may be old
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    except OSError:  # somebody else's, or on its way out in Windows
        with contextlib.suppress(OSError):
            return lock.stat().st_mtime_ns, b""
        return 0, b""


def _said(seen: _Seen) -> dict[str, Any]:
    """What a lock says; nothing where it is not to be read."""
    try:
        told = json.loads(seen[1])
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


@contextmanager
def _alive(lock: Path, token: str, *, every: float) -> Iterator[None]:
    """Touch the lock while it is ours, beside whatever its holder does meanwhile."""
    ended = Event()

    def touch() -> None:
        while not ended.wait(every):
            found = _look(lock)
            if found is not None and _said(found).get(TOKEN) == token:
                with contextlib.suppress(OSError):
                    os.utime(lock)

    thread = Thread(target=touch, name=f"alive {lock.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _release(lock: Path, token: str) -> None:
    """Remove the lock if it is ours still; where that fails, what was done under it is done all the same."""
    begin = time.monotonic()
    while (found := _look(lock)) is not None and _said(found).get(TOKEN) == token:
        try:
            _remove(lock, found)
        except OSError:  # in Windows, while another looks at it
            if time.monotonic() - begin > REFUSED:
                return  # left behind, and broken by the next
            time.sleep(WAIT)


def _remove(lock: Path, judged: _Seen) -> None:
    """Remove the lock that was judged: moved away first, for another may have taken its place since."""
    aside = lock.with_name(f".part-{uuid4().hex}-{lock.name}")
    try:
        lock.rename(aside)
    except FileNotFoundError:
        return
    with contextlib.suppress(OSError):
        if _look(aside) != judged:
            _put_back(aside, lock)
        aside.unlink(missing_ok=True)


def _put_back(aside: Path, lock: Path) -> None:
    """The lock of somebody who lives, unless there is a newer one meanwhile."""
    try:
        os.link(aside, lock)  # unlike a move, takes nobody's place
    except FileExistsError:
        return
    except OSError:  # a disk without links
        if not lock.exists():
            aside.rename(lock)
