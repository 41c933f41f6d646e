"""The folder of a run: who may write there, and what is left behind in it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewscan.data.io import disk_error
from fewscan.errors import ConfigError, ModelError

BEFORE = "before.json"  # what the model that a transfer started from scores, for as long as the run is not done
UNFINISHED = ("cache", "history.jsonl", "run.json", BEFORE)
LOCK = "running.json"  # there while a run is
PARTS = re.compile(r"\.part-.*|\.tmp\w{6}")  # of `data.io.atomic`, and of safetensors within it


@contextmanager
def claimed(out: Path, *, going_on: bool) -> Iterator[None]:
    """Make the folder and hold it; refuse to write over what is not ours, and beside another run.

    Parameters
    ----------
    out : Path
        Model folder.
    going_on : bool
        Whether a run there is to be continued.

    Raises
    ------
    ModelError
        If there is no run to continue.
    ConfigError
        If the folder is taken.
    """
    if going_on and not (out / "state.safetensors").is_file():
        raise ModelError(f"{out} holds no state.safetensors to go on from; start without --resume or --extend")
    if not going_on:
        _refuse_taken(out)
        out.mkdir(parents=True, exist_ok=True)
    _lock(out)
    try:
        if not going_on:
            _refuse_taken(out)  # a run that has ended meanwhile has left its model
        _tidy(out, everything=not going_on)
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)


def _refuse_taken(out: Path) -> None:
    """Anything in the folder but what a run leaves that was killed before it could save."""
    if not out.exists():
        return
    if not out.is_dir() or any(
        p.name not in (*UNFINISHED, LOCK) and not PARTS.fullmatch(p.name) for p in out.iterdir()
    ):
        raise ConfigError(f"{out} exists and is not empty; choose another folder, or go on in it with --resume")


def _tidy(out: Path, *, everything: bool) -> None:
    """Remove what a killed run left half written; of one that never saved, everything."""
    for path in out.iterdir():
        if PARTS.fullmatch(path.name) or (everything and path.name in UNFINISHED):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- lock


def _lock(out: Path) -> None:
    """Say in the folder that this process writes there; the word of a process that died is taken over."""
    path, mine = out / LOCK, {"pid": os.getpid(), "host": platform.node(), "born": _born(os.getpid())}
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:  # fails where the file exists: one of two comes first
                json.dump(mine, file)
            return
        except FileExistsError:
            holder = _holder(path)
            if holder is None or (holder.get("host") == mine["host"] and not _runs(holder)):
                path.unlink(missing_ok=True)
                continue
            raise ConfigError(_taken(out, holder)) from None
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error, path) from None
    raise ConfigError(_taken(out, {}))


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds the folder; nobody where the file has gone meanwhile."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _taken(out: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
    return (
        f"{out} is being written by another run ({who}); wait for it, choose another folder, or, if that run is no "
        f"more, delete {out / LOCK}"
    )


def _runs(holder: dict[str, Any]) -> bool:
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
    return " ".join(["fewscan", *(Path(word).name if "/" in word else word for word in sys.argv[1:])])


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
