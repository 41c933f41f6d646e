"""The folder of a run: who may write there, and what is left behind in it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from fewscan.errors import ConfigError, ModelError

BEFORE = "before.json"  # what the model that a transfer started from scores, for as long as the run is not done
UNFINISHED = ("cache", "history.jsonl", "run.json", BEFORE)


def claim(out: Path, *, going_on: bool) -> None:
    """Make the folder; refuse to write over what is not ours to write over.

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
    if going_on:
        if not (out / "state.safetensors").is_file():
            raise ModelError(f"{out} holds no state.safetensors to go on from; start without --resume or --extend")
        return
    if out.is_dir() and all(p.name in UNFINISHED for p in out.iterdir()):
        for name in UNFINISHED:  # a run that was killed before it could save anything
            (out / name).unlink(missing_ok=True) if name != "cache" else shutil.rmtree(out / name, ignore_errors=True)
    if out.exists() and (not out.is_dir() or any(p.name != "cache" for p in out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; choose another folder, or go on in it with --resume")
    out.mkdir(parents=True, exist_ok=True)


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
