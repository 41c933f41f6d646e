"""Shared by all tests: two threads, and models small enough to train in a second."""

import pytest
import torch
from phantom import SMALL, write_dataset


@pytest.fixture(autouse=True, scope="session")
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A data set of phantoms and a model that has learnt them: (data folder, model)."""
    from fewscan import api

    root = tmp_path_factory.mktemp("trained")
    data = write_dataset(root / "data", labelled=3, unlabelled=1)
    model = api.train(data, root / "model", steps=60, settings=SMALL, device="cpu", method="segment")
    return data, model
