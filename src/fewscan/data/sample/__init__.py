"""The embedded scans; where they come from and their licence stand in ``ATTRIBUTION.md`` beside them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def sample_path() -> Path:
    """Folder of the embedded hippocampus scans: 5 labelled and 13 unlabelled, 12 labelled apart in ``test/``."""
    return Path(str(files(__package__) / "hippocampus"))
