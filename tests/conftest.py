"""Shared by all tests: two cores, and models small enough to train in a second."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crossing import write_crossings
from phantom import SMALL, write_dataset
from series import AXIAL, NAMES, SHAPE, anatomy, write_series

from fewscan.data.dicom import describe_series
from fewscan.data.io import write_labelmap
from fewscan.learn import checkpoint
from fewscan.learn.config import Settings
from fewscan.learn.intensity import Scaling
from fewscan.learn.plan import Plan
from fewscan.space.geometry import Geometry


@pytest.fixture(autouse=True, scope="session")
def _two_cores():
    """All that the tests may count on; two processes share them."""
    torch.set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A data set of phantoms and a model that has learnt them: (data folder, model)."""
    from fewscan import api

    root = tmp_path_factory.mktemp("trained")
    data = write_dataset(root / "data", labelled=3, unlabelled=1)
    model = api.train(data, root / "model", steps=60, settings=SMALL, device="cpu", method="segment")
    return data, model


@pytest.fixture(scope="session")
def crossed(tmp_path_factory):
    """A data set of crossing bundles and a model that has learnt it: (data folder, model)."""
    from fewscan import api

    root = tmp_path_factory.mktemp("crossed")
    data = write_crossings(root / "data", labelled=3, unlabelled=1)
    return data, api.train(data, root / "model", steps=160, settings=SMALL, device="cpu")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A model of random weights, for what needs no sense in the answers."""
    plan = Plan(
        names={1: "ball", 5: "rod"}, channels=("image",), scaling=(Scaling(kind="scan"),), spacing=(1.0, 1.0, 1.25),
        patch=(20, 24, 16), batch=1, widths=(4, 8), kernels=((3, 3, 3),) * 2, strides=((1, 1, 1), (2, 2, 2)),
        mirror=False, pairs=(), sole=(),
    )  # fmt: skip
    network = checkpoint.build_segmenter(plan, Settings(), seed=0)
    model = checkpoint.Model(segmenter=network, plan=plan, settings=Settings(), provenance={"method": "segment"})
    return checkpoint.save_model(model, tmp_path_factory.mktemp("untrained") / "model")


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a series and a label map on its grid, with names beside."""

    def write(grid: Geometry = AXIAL, **how: Any) -> tuple[Path, Path]:
        label = anatomy()
        image = np.where(label > 0, 60, -50) + np.random.default_rng(0).integers(0, 20, SHAPE)
        folder = write_series(tmp_path / "series", image, grid, **how)
        native = describe_series(folder).native
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / "labels.json").write_text(json.dumps(NAMES))
        write_labelmap(label, tmp_path / "labels" / "p1.nii.gz", native=native)
        return folder, tmp_path / "labels" / "p1.nii.gz"

    return write
