"""The layout of BIDS: subjects, with label maps among derivatives and their names in a table."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

from fewscan.data.found import LABEL_TAIL, Found, Pair, below, chosen_label, stem_of, subfolders
from fewscan.data.headers import suffix_of
from fewscan.errors import DataError


def bids(root: Path) -> Found | None:
    """sub-*/ with label maps in derivatives/; of several contrasts the one that most subjects have.

    Parameters
    ----------
    root : Path
        Folder to look at.

    Raises
    ------
    DataError
        If its table of labels is wrong.
    """
    subjects = [p for p in subfolders(root) if p.name.startswith("sub-")]
    inner = [f for s in subjects for f in below(s)]
    images = [f for f in inner if suffix_of(f)]
    images = [f for f in images if "_" in stem_of(f) and not LABEL_TAIL.search(stem_of(f)) and "_dseg" not in f.name]
    if not images:
        return None
    having = {(f.relative_to(root).parts[0], stem_of(f).rsplit("_", 1)[1]) for f in images}
    contrasts = Counter(contrast for _, contrast in having)
    contrast = min(contrasts, key=lambda c: (-contrasts[c], c))
    scans = {stem_of(f).rsplit("_", 1)[0]: f for f in images if stem_of(f).endswith(f"_{contrast}")}
    files = [*below(root / "derivatives"), *inner] if (root / "derivatives").is_dir() else inner
    named = [f for f in files if suffix_of(f) and f.name.startswith("sub-")]
    labels = [f for f in named if re.search(r"_(dseg|seg|label|labels|mask)$", stem_of(f))]
    doubts: list[str] = []
    pairs = {}
    for case, scan in sorted(scans.items()):
        mine = [f for f in labels if stem_of(f).startswith(f"{case}_")]
        if len(mine) > 1:  # one for each contrast, or in several forms
            told = {f: contrasts.keys() & set(stem_of(f).split("_")) for f in mine}
            mine = [f for f in mine if contrast in told[f]] or [f for f in mine if not told[f]]
        mine = [f for f in mine if "_dseg" in f.name] or mine
        pairs[case] = Pair((scan,), chosen_label(case, mine, doubts=doubts))
    unmatched = tuple(f for f in labels if not any(stem_of(f).startswith(f"{case}_") for case in pairs))
    tables = sorted(f for f in {*below(root), *files} if f.name.endswith("dseg.tsv"))
    names = _table(tables[0]) if tables else {}
    return Found("BIDS", pairs, names=names, hint=contrast, unmatched=unmatched, doubts=tuple(doubts))


def _table(path: Path) -> dict[int, str]:
    """Label names from a BIDS lookup table (columns index and name)."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        return {int(r["index"]): r["name"] for r in rows if int(r["index"]) != 0}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: needs the columns index and name ({error}); correct the table") from None
