"""Rows of a benchmark: each written as soon as it is there, none measured twice for the same code.

One process at a time may write to a result file.

::

    for k in (1, 5, 20):
        with rows("few_label.json", {"k": k, "seed": 0}) as row:
            if row is not None:                     # None: this code's row is in the file already
                row["dice"] = measure(k)
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TRAINING = ("methods/segment.py", "prediction.py", "judge/metrics.py")  # what few labels rest on, with what they import

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "SimpleITK", "openvino")

Key = Mapping[str, str | int | float]
Row = dict[str, Any]


@contextmanager
def rows(result_file: Path | str, key: Key, *, code: str | None = None) -> Iterator[Row | None]:
    """Give a row to fill, or None where the file already holds it; write it on leaving without an error.

    A row of older code with the same key is replaced. The key and where, when and with what it was measured are added.

    Parameters
    ----------
    result_file : Path or str
        JSON file; a bare name lies in ``benchmarks/results``.
    key : mapping
        What makes the row unique: task, number of labels, seed, system.
    code : str, optional
        Hash of what is measured; that of ``src/fewscan`` when left out. A peer's row takes one of its own version.
    """
    path = RESULTS / result_file
    code = code or code_hash()
    if any(row["key"] == dict(key) and row["code"] == code for row in load(path)):
        yield None
        return
    row: Row = {}
    yield row
    kept = [other for other in load(path) if other["key"] != dict(key)]
    _write(path, [*kept, {"key": dict(key), **row, "code": code, "provenance": provenance()}])


def show(event: object) -> None:
    """Messages of a run, not its steps.

    Parameters
    ----------
    event : object
        What an observer gets.
    """
    if isinstance(event, str):
        print(event, flush=True)


def load(path: Path) -> list[Row]:
    """Rows of a result file, none where there is no file.

    Parameters
    ----------
    path : Path
        JSON file of rows.
    """
    if not path.exists():
        return []
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def code_hash(root: Path = ROOT / "src" / "fewscan", *, parts: Sequence[str] = ()) -> str:
    """Hash of the Python files that can change a measurement, names included.

    Parameters
    ----------
    root : Path
        Folder of the package that is measured.
    parts : sequence of str
        Files below it where the measured work starts; what they import belongs to it. All files when left out.
    """
    digest = hashlib.sha256()
    for path in _closure(root, parts) if parts else sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _closure(root: Path, parts: Sequence[str]) -> list[Path]:
    """Files of the package that these import, directly or not, with themselves."""
    found: set[Path] = set()
    waiting = [root / part for part in parts]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(root.name):
                continue
            inside = root.joinpath(*(node.module or "").split(".")[1:])
            names = [inside / f"{alias.name}.py" for alias in node.names]
            waiting += [p for p in [inside.with_suffix(".py"), *names] if p.is_file()]
    return sorted(found)


def provenance() -> Row:
    """When, where and with what something was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *(Path(word).name for word in sys.argv[1:])]),
        "commit": _commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def machine() -> Row:
    """Processor, cores this process may use, memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "ram_gib": _ram_gib()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows, and systems that do not say
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _write(path: Path, found: list[Row]) -> None:
    """Atomically, so that an interrupted benchmark never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
