"""Synthetic anatomy: a bright ball and a dark rod in a noisy, shaded box, different in every case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.io import write_image, write_labelmap
from fewscan.space.geometry import Geometry

NAMES = {1: "ball", 2: "rod"}
SMALL = {"network.widths": "8,16,16", "train.warmup_steps": "5"}  # learns phantoms in a second


def phantom(
    seed: int, *, shape: tuple[int, int, int] = (20, 24, 18), spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Image, labels and grid of one case."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).astype(float)
    size = np.array(shape, float)
    centre = size * (0.35 + 0.05 * rng.random(3))
    radius = size.min() * (0.22 + 0.05 * rng.random())
    label = np.zeros(shape, np.uint8)
    label[((grid - centre[:, None, None, None]) ** 2).sum(0) < radius**2] = 1
    x, y = size[0] * (0.75 + 0.05 * rng.random()), size[1] * (0.7 + 0.05 * rng.random())
    label[(grid[0] - x) ** 2 + (grid[1] - y) ** 2 < (size.min() * 0.13) ** 2] = 2
    image = 100 + 80 * (label == 1) - 60 * (label == 2) + 20 * grid[2] / size[2] + rng.normal(0, 8, shape)
    return image.astype(np.float32), label, Geometry(shape, np.diag([*spacing, 1.0]))


def write_dataset(root: Path, *, labelled: int = 2, unlabelled: int = 0, **shape: object) -> Path:
    """An ``images/`` and ``labels/`` folder of phantoms."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "labels.json").write_text(json.dumps({str(k): v for k, v in NAMES.items()}))
    for i in range(labelled + unlabelled):
        image, label, geometry = phantom(i, **shape)  # type: ignore[arg-type]
        write_image(image, root / "images" / f"case_{i:02d}.nii.gz", native=geometry)
        if i < labelled:
            write_labelmap(label, root / "labels" / f"case_{i:02d}.nii.gz", native=geometry)
    return root
