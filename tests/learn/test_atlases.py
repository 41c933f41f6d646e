"""Atlases beside a model, and what may be in their way."""

import errno
from dataclasses import replace

import numpy as np
import pytest

from fewscan.errors import ModelError, ResourceError
from fewscan.learn import atlases
from fewscan.learn.batches import Prepared


@pytest.fixture
def model(untrained, tmp_path):
    """With one atlas beside it."""
    image, label = np.zeros((1, 6, 5, 4), np.float32), np.zeros((6, 5, 4), np.int16)
    case = Prepared("a", image, label, ((), (), ()), (120, 0, 0), np.ones(3, np.bool_), "scalar")
    atlases.save_atlases([case], tmp_path)
    return replace(untrained, path=tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("480 requested, 0 written")]
)
def test_a_full_disk_is_no_damage(model, tmp_path, monkeypatch, error):
    def full(path, image):
        raise error

    monkeypatch.setattr(atlases.np, "save", full)
    with pytest.raises(ResourceError, match=r"atlas_1\.npy: the disk is full \(.*\); free some space"):
        atlases.load_atlases(model, folder=tmp_path)


def test_atlases_that_were_changed_are_refused_in_one_sentence(model):
    file = model.path / atlases.FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"is not the file that atlases\.json describes .*; copy the folder again$"):
        atlases.load_atlases(model)
