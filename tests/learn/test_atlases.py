"""Atlases beside a model, and what may be in their way."""

import errno
import json
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
    atlases.save_atlases([case], tmp_path, plan=untrained.plan)
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


OTHERS = [
    ({"names": {1: "ball", 5: "cone"}}, r"of a model with classes \['ball', 'rod'\], this one has \['ball', 'cone'\]"),
    ({"names": {1: "ball"}}, r"of a model with classes \['ball', 'rod'\], this one has \['ball'\]"),
    ({"channels": ("T1", "T2")}, r"of a model with channels \['image'\], this one has \['T1', 'T2'\]"),
    ({"spacing": (1.0, 1.0, 2.5)}, r"of a model with spacing \[1\.0, 1\.0, 1\.25\], this one has \[1\.0, 1\.0, 2\.5\]"),
]


@pytest.mark.parametrize(("plan", "told"), OTHERS)
def test_atlases_of_another_model_are_refused(model, plan, told):
    with pytest.raises(ModelError, match=rf"atlases\.safetensors: {told}; take those of this model"):
        atlases.load_atlases(replace(model, plan=replace(model.plan, **plan)))


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"names": {1: "ball"}}, "atlas 1 has 1 channels and 3 classes of one label a voxel, the model 1 and 2"),
        ({"channels": ("T1", "T2")}, "atlas 1 has 1 channels and 3 classes of one label a voxel, the model 2 and 3"),
        ({"overlapping": True}, "3 classes of one label a voxel, the model 1 and 3 of labels that overlap"),
    ],
)
def test_older_archives_do_not_say_whose_they_are_but_show_it(model, plan, told):
    record = json.loads((model.path / atlases.RECORD).read_text())
    kept = {key: record[key] for key in ("cases", "sha256")}
    (model.path / atlases.RECORD).write_text(json.dumps(kept))
    assert len(atlases.load_atlases(model)) == 1
    with pytest.raises(ModelError, match=told):
        atlases.load_atlases(replace(model, plan=replace(model.plan, **plan)))
