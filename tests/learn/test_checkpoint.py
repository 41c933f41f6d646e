"""Model folders: round trip, damage, hostility."""

import json

import pytest
import torch

from fewscan.errors import ConfigError, ModelError
from fewscan.learn import checkpoint
from fewscan.learn.config import Settings, override, settings_from_dict, to_dict
from fewscan.learn.state import State


@pytest.fixture
def saved(trained, tmp_path):
    return checkpoint.save_model(trained[1], tmp_path / "model")


def test_a_model_survives_the_disk(trained, saved):
    for (name, a), (_, b) in zip(
        trained[1].segmenter.state_dict().items(), saved.segmenter.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert saved.plan == trained[1].plan
    assert saved.settings == trained[1].settings


def test_changed_weights_are_refused(saved):
    path = saved.path / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        checkpoint.load_model(saved.path)


def test_a_pickle_in_place_of_weights_is_never_opened(saved):
    path = saved.path / "weights.safetensors"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    description = json.loads((saved.path / "model.json").read_text())
    description["sha256"][path.name] = checkpoint.sha256(path)
    (saved.path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match="damaged or foreign"):
        checkpoint.load_model(saved.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "format 'list'"), ('{"format": 99}', "format 99"), ('{"format": 1}', "SHA-256")],
)
def test_a_damaged_description_is_refused(saved, text, message):
    (saved.path / "model.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        checkpoint.load_model(saved.path)


def test_not_a_model_folder(tmp_path):
    with pytest.raises(ModelError, match=r"has no model\.json"):
        checkpoint.load_model(tmp_path)


def test_nothing_is_pickled(trained):
    for path in trained[1].path.rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:2]
            assert head not in (b"\x80\x02", b"\x80\x04", b"PK"), path
            assert path.suffix in (".safetensors", ".json", ".jsonl", ".png"), path


def test_settings_survive_json():
    settings = override(Settings(), {"network.widths": "8,16", "train.lr": "0.01", "augment.mirror": "never"})
    assert settings_from_dict(json.loads(json.dumps(to_dict(settings)))) == settings


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.rl", "1", "did you mean 'train.lr'"),
        ("lr", "1", "unknown setting 'lr'"),
        ("train.lr", "fast", "train.lr must be a float, got 'fast'"),
        ("train.lr", "-1", "train.lr must lie between"),
        ("network.widths", "8", "at least two levels"),
        ("augment.mirror", "yes", "auto or never"),
    ],
)
def test_wrong_settings_say_what_is_right(name, value, message):
    with pytest.raises(ConfigError, match=message):
        override(Settings(), {name: value})


def test_a_saved_state_keeps_the_order_of_labels(tmp_path):
    network = torch.nn.Linear(2, 1)
    names = {str(value): f"label {value}" for value in range(1, 13)}
    checkpoint.save_state(State([network], Settings().train), tmp_path, identity={"plan": {"names": names}})
    assert list(checkpoint.stored_identity(tmp_path)["plan"]["names"]) == list(names)
