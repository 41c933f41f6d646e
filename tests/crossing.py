"""Two bundles that cross: an upright rod and one from left to right share the voxels where they meet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.bundles import write_bundles
from fewscan.data.io import write_image
from fewscan.data.listing import RECORD, peak_channels
from fewscan.space.geometry import Geometry

SHAPE = (20, 18, 22)
GRID = Geometry(SHAPE, np.eye(4))
CHANNELS = {"scalars.nii.gz": ["FA", "MD", "S0"], "peaks.nii.gz": list(peak_channels(3))}

Masks = dict[str, NDArray[np.bool_]]


def crossing(seed: int) -> tuple[NDArray[np.float32], Masks]:
    """Scalar maps of one case and its masks: each rod shows in a map of its own."""
    rng = np.random.default_rng(seed)
    x, y, z = np.indices(SHAPE).astype(float)
    middle = np.array(SHAPE) / 2 + rng.uniform(-2, 2, 3)
    masks = {
        "CST": (x - middle[0]) ** 2 + (y - middle[1]) ** 2 < 3.2**2,
        "CC": (y - middle[1]) ** 2 + (z - middle[2]) ** 2 < 3.2**2,
    }
    maps = np.stack([masks["CST"], masks["CC"], np.zeros(SHAPE, bool)]) * 0.6 + rng.normal(0.2, 0.12, (3, *SHAPE))
    return maps.astype(np.float32), masks


def write_case(folder: Path, image: NDArray[np.float32], masks: Mapping[str, NDArray[np.bool_]] | None) -> Path:
    """A case as `fewscan tracts inputs` and `fewscan tracts masks` leave it."""
    name = "scalars.nii.gz" if len(image) == 3 else "peaks.nii.gz"
    write_image(image, folder / name, native=GRID)
    (folder / RECORD).write_text(json.dumps({"kind": {name: CHANNELS[name]}}))
    if masks is not None:
        write_bundles(masks, folder, native=GRID)
    return folder


def write_crossings(root: Path, *, labelled: int = 3, unlabelled: int = 0) -> Path:
    """A data set of such cases."""
    for i in range(labelled + unlabelled):
        image, masks = crossing(i)
        write_case(root / f"case_{i}", image, masks if i < labelled else None)
    (root / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    return root
