"""Round clumps of fibres that differ in nothing but the way their fibres run: only a direction tells the label."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewscan.data.io import write_image, write_labelmap
from fewscan.space.geometry import Geometry

NAMES = {1: "along", 2: "across"}
WAYS = np.array([[1.0, 0.3, 0.0], [0.0, 0.3, 1.0]])  # of the fibres of each label, RAS+ world
SHAPE = (20, 22, 18)
GRID = Geometry(SHAPE, np.eye(4))


def clumps(seed: int, *, kind: str = "peaks") -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Channels and labels of one scan: three clumps anywhere, of either kind, equally long peaks of random sign."""
    rng = np.random.default_rng(seed)
    places = np.indices(SHAPE).astype(float)
    label = np.zeros(SHAPE, np.uint8)
    corners = rng.permutation(np.array([[5, 5, 5], [14, 6, 12], [6, 15, 12], [14, 16, 5]]))
    for value, corner in zip((1, 2, 1 + seed % 2), corners, strict=False):
        centre = corner + rng.uniform(-1, 1, 3)
        label[((places - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) < 4.0**2] = value
    vectors = np.zeros((3, *SHAPE))
    for value, way in enumerate(WAYS, start=1):
        vectors += np.where(label == value, (way / np.linalg.norm(way)).reshape(3, 1, 1, 1), 0)
    vectors += rng.normal(0, 0.1, vectors.shape)
    if kind == "tensor":
        full = np.eye(3)[:, :, None, None, None] * 0.5 + np.einsum("ixyz,jxyz->ijxyz", vectors, vectors)
        return np.stack([full[i, j] for i in range(3) for j in range(i, 3)]).astype(np.float32), label
    small = rng.normal(0, 0.1, (6, *SHAPE))  # second and third peaks: nothing in particular
    return signed(np.concatenate([vectors, small]).astype(np.float32), seed), label


def signed(peaks: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """The same peaks, each written as itself or its opposite."""
    sign = np.random.default_rng(seed).choice([-1.0, 1.0], (len(peaks) // 3, *peaks.shape[1:]))
    return (peaks * np.repeat(sign, 3, axis=0)).astype(np.float32)


def write_fibres(
    root: Path, *, labelled: int = 2, unlabelled: int = 0, kind: str | None = "peaks", content: str = "peaks"
) -> Path:
    """A data set of such scans; what its ``dataset.json`` says the channels are may be left out."""
    said: dict[str, object] = {} if kind is None else {"channel_kind": kind}
    for i in range(labelled + unlabelled):
        image, label = clumps(i, kind=content)
        write_image(image, root / "images" / f"case_{i:02d}.nii.gz", native=GRID)
        if i < labelled:
            write_labelmap(label, root / "labels" / f"case_{i:02d}.nii.gz", native=GRID)
    (root / "dataset.json").write_text(json.dumps(said | {"labels": {n: v for v, n in NAMES.items()}}))
    return root
