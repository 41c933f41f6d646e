"""The folder of a run: who may write there, and what is left behind in it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewscan.data.locking import Patience, held
from fewscan.errors import ConfigError, ModelError

BEFORE = "before.json"  # what the model that a transfer started from scores, for as long as the run is not done
CACHE = "cache"  # the scans on the plan's grid, while a run is
UNFINISHED = (CACHE, "history.jsonl", "run.json", BEFORE)
LOCK = "running.json"  # there while a run is
WATCHED = 90.0  # seconds without a sign of life after which a lock that names nobody who could be asked is broken
_LEFT: set[Path] = set()  # caches of runs of this process that could not be removed as these ended
PARTS = re.compile(r"\.part-.*|\.tmp\w{6}")  # of `data.io.atomic`, and of safetensors within it


@contextmanager
def claimed(out: Path, *, going_on: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Make the folder and hold it; refuse to write over what is not ours, and beside another run.

    The lock of a process of this machine that died is taken over at once. Of one that another machine or container
    wrote, or this machine before a restart, or that cannot be read, nobody here knows whether it is dead: it is taken
    over once it was watched without a sign of life.

    Parameters
    ----------
    out : Path
        Model folder.
    going_on : bool
        Whether a run there is to be continued.
    say : callable
        Gets a line where a lock is watched.

    Raises
    ------
    ModelError
        If there is no run to continue.
    ConfigError
        If the folder is taken.
    DataError
        If nothing can be written there.
    """
    if going_on and not (out / "state.safetensors").is_file():
        raise ModelError(f"{out} holds no state.safetensors to go on from; start without --resume or --extend")
    if not going_on:
        _refuse_taken(out)
    lock, me = out / LOCK, os.getpid()
    told = {"pid": me, "born": _born(me), **_where()}
    with held(lock, about=lock, longest=WATCHED, patience=_patience(out, say), told=told):
        if not going_on:
            _refuse_taken(out)  # a run that has ended meanwhile has left its model
        _tidy(out, everything=not going_on)
        yield


def _refuse_taken(out: Path) -> None:
    """Anything in the folder but what a run leaves that was killed before it could save."""
    if not out.exists():
        return
    there = [p.name for p in out.iterdir() if not PARTS.fullmatch(p.name)] if out.is_dir() else [""]
    if set(there) - {*UNFINISHED, LOCK} or (there and not _begun(out)):
        raise ConfigError(f"{out} exists and is not empty; choose another folder, or go on in it with --resume")


def _begun(out: Path) -> bool:
    """Whether a run was in this folder; others may call something of theirs "cache"."""
    if (out / LOCK).exists():
        return True
    for name, keys in (("run.json", {"budget", "steps"}), (BEFORE, {"cases"})):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((out / name).read_text(encoding="utf-8")).keys() == keys:
                return True
    return False


def _tidy(out: Path, *, everything: bool) -> None:
    """Remove what a killed run left half written; of one that never saved, everything."""
    for path in out.iterdir():
        if PARTS.fullmatch(path.name) or (everything and path.name in UNFINISHED):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ removal


def let_go(out: Path) -> None:
    """Remove the prepared scans of a run that ends; what is mapped still, as in Windows, is left to `drop_cache`.

    Parameters
    ----------
    out : Path
        Model folder, which the run holds.
    """
    cache = out / CACHE
    shutil.rmtree(cache, ignore_errors=True)
    if cache.exists():
        _LEFT.add(cache.resolve())


def drop_cache(out: Path, *, say: Callable[[str], None]) -> None:
    """Remove the prepared scans that a run could not remove when it ended, because something of it was alive still.

    Parameters
    ----------
    out : Path
        Model folder.
    say : callable
        Gets a line where it cannot be done.
    """
    cache = out / CACHE
    if cache.resolve() not in _LEFT or (out / LOCK).exists():
        return
    _LEFT.discard(cache.resolve())
    if removed(cache):
        return
    say(f"warning: {cache} holds scans and could not be removed; delete it before you share the model")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for as long as the block lasts; let nothing outlive a function called in it that maps its files."""
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        removed(folder)


def removed(folder: Path) -> bool:
    """Remove a folder with all that is in it, and say whether it is gone; no error is raised.

    Windows removes no file that is mapped into memory. What nothing refers to any more is let go of first, and before
    a second try also what the frames refer to that an error has come through.

    Parameters
    ----------
    folder : Path
        It need not exist.
    """
    for attempt in range(2):
        if attempt:
            traceback.clear_frames(sys.exc_info()[2])
        gc.collect()
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return True
    return False


# -------------------------------------------------------------------------------------------------------------- lock


def _patience(out: Path, say: Callable[[str], None]) -> Patience:
    """For how long a lock in this folder is watched; refuses where its holder lives."""
    watched = False

    def patience(holder: Mapping[str, Any]) -> float:
        nonlocal watched
        here = all(holder.get(key) == value for key, value in _where().items())
        if here and not _runs(holder):
            return 0.0
        if here or watched:  # touched since
            raise ConfigError(_taken(out, holder))
        watched = True
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, which cannot be asked from here"
        say(
            f"{out / LOCK} {'is of ' + who if holder else 'cannot be read'}; waiting {WATCHED:.0f} s for a sign that "
            "its run lives, and taking the folder over if there is none"
        )
        return WATCHED

    return patience


def _where() -> dict[str, str]:
    """Among which processes this one counts: containers may share a machine's name, or all be called localhost."""
    told = {"host": platform.node()}
    with suppress(OSError):
        told["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        told["space"] = os.readlink("/proc/self/ns/pid")
    return told


def _taken(out: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return (
        f"{out} is being written by another run ({who}); wait for it, choose another folder, or, if that run is no "
        f"more, delete {out / LOCK}"
    )


def _runs(holder: Mapping[str, Any]) -> bool:
    """Whether a process of this machine still runs, and is not a later one with its number."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or not _alive(pid):
        return False
    born = _born(pid)
    return born is None or holder.get("born") is None or born == holder["born"]


def _born(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None where no file tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    if sys.platform == "win32":  # there `os.kill` would end it, or press Ctrl-C in its console
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.argtypes = [ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32]
        kernel.OpenProcess.restype = ctypes.c_void_p
        kernel.WaitForSingleObject.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        kernel.CloseHandle.argtypes = [ctypes.c_void_p]
        handle = kernel.OpenProcess(0x0010_0000, 0, pid)  # SYNCHRONIZE
        if not handle:
            return bool(ctypes.get_last_error() == 5)  # access denied: it is somebody else's
        ended = kernel.WaitForSingleObject(handle, 0) == 0
        kernel.CloseHandle(handle)
        return not ended
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def command() -> str:
    """The command line, file names without their folders; "python" where the Python interface was used."""
    program = Path(sys.argv[0])
    if program.name != "fewscan" and program.parent.name != "fewscan":
        return "python"
    return " ".join(["fewscan", *(re.split(r"[/\\]", word.rstrip("/\\"))[-1] for word in sys.argv[1:])])


def trim_history(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last saved state.

    Parameters
    ----------
    path : Path
        ``history.jsonl``.
    step : int
        Of the state.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(line + "\n" for line in kept))
