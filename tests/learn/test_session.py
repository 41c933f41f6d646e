"""Runs that meet another run, a full disk, a kill or too little memory: one sentence each, and nothing is lost."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from phantom import SMALL, write_dataset

from fewscan import api
from fewscan.data.io import atomic
from fewscan.errors import ConfigError, ModelError, ResourceError
from fewscan.learn import checkpoint, folder, hardware, infer, memory, session
from fewscan.learn.config import Settings
from fewscan.learn.hardware import Hardware
from fewscan.learn.request import Request

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"
CUDA = torch.device("cuda")


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data", labelled=2)


def train(data, out, **more):
    return api.train(data, out, method="segment", settings=SMALL, device="cpu", **more)


def holder(out, **more):
    """The lock that a run of this process would write, with something else in it."""
    born = folder._born(os.getpid())
    (out / folder.LOCK).write_text(json.dumps({"pid": os.getpid(), "born": born} | folder._where() | more))


def test_scans_that_cannot_be_removed_from_a_model_folder_are_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **k: None)  # as where a mapped file is held
    said = []
    train(data, tmp_path / "model", steps=2, observe=said.append)
    assert any(isinstance(line, str) and "cache holds scans and could not be removed" in line for line in said)


# -------------------------------------------------------------------------------------------------------------- lock


def test_a_folder_that_a_run_writes_is_taken_for_every_other(data, tmp_path):
    out = tmp_path / "model"
    with folder.claimed(out, going_on=False):
        (out / "cache").mkdir()
        (out / "cache" / "scan.npy").write_bytes(b"in use")
        with pytest.raises(ConfigError, match=rf"model is being written by another run \(process {os.getpid()} on .*"
                                              r"choose another folder.*delete .*running\.json"):  # fmt: skip
            train(data, out, steps=2)
        assert (out / "cache" / "scan.npy").read_bytes() == b"in use"
    assert not (out / folder.LOCK).exists()


def test_going_on_beside_a_run_is_refused_too(data, tmp_path):
    model = train(data, tmp_path / "model", steps=2)
    holder(model.path)
    with pytest.raises(ConfigError, match="is being written by another run"):
        train(data, model.path, steps=4, resume=True)
    (model.path / folder.LOCK).unlink()
    assert train(data, model.path, steps=4, resume=True).provenance["steps"] == 4
    assert not (model.path / folder.LOCK).exists()


def test_the_word_of_a_dead_process_is_taken_over_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    holder(tmp_path, pid=ended.pid, born=None)
    with folder.claimed(tmp_path, going_on=False):
        assert json.loads((tmp_path / folder.LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("left", [{"host": "another"}, {"space": "pid:[1]"}, ""], ids=["machine", "container", "empty"])
def test_a_lock_that_names_nobody_to_ask_is_taken_over_once_it_was_watched(tmp_path, monkeypatch, left):
    monkeypatch.setattr(folder, "WATCHED", 0.4)
    said, begin = [], time.monotonic()
    holder(tmp_path, **(left or {}))
    if not left:
        (tmp_path / folder.LOCK).write_text("")
    with folder.claimed(tmp_path, going_on=False, say=said.append):
        assert time.monotonic() - begin >= 0.4
        assert json.loads((tmp_path / folder.LOCK).read_text())["host"] == platform.node()
    assert len(said) == 1
    assert ("which cannot be asked from here; waiting" if left else "running.json cannot be read; waiting") in said[0]
    assert not list(tmp_path.iterdir())


def test_a_run_on_another_machine_that_lives_keeps_its_folder(tmp_path, monkeypatch):
    with folder.claimed(tmp_path, going_on=False):
        pass
    monkeypatch.setattr(folder, "WATCHED", 1.0)  # touched six times as often
    opened, ended = threading.Event(), threading.Event()

    def hold():
        with folder.claimed(tmp_path, going_on=False):
            opened.set()
            ended.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait(10)
    here = json.loads((tmp_path / folder.LOCK).read_text())["host"]
    monkeypatch.setattr(folder.platform, "node", lambda: "another")
    with pytest.raises(ConfigError, match=f"another run .*on {here}"), folder.claimed(tmp_path, going_on=False):
        pass
    assert (tmp_path / folder.LOCK).exists()
    ended.set()
    thread.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(folder._born(os.getpid()) is None, reason="this system does not tell when a process began")
def test_a_later_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path):
    holder(tmp_path, born="1")
    with folder.claimed(tmp_path, going_on=False):
        pass


# ------------------------------------------------------------------------------------------------------------- kills


def test_half_written_files_of_a_killed_run_are_in_nobodys_way(data, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    for name in (".part-x1_y-state.safetensors", ".tmpAb12Cd", "history.jsonl", "run.json"):
        (out / name).write_text('{"budget": 60, "steps": null}\n')
    with pytest.raises(ModelError, match=r"holds no state\.safetensors.*start without --resume"):
        train(data, out, resume=True)
    assert train(data, out, steps=2).provenance["steps"] == 2
    (out / ".part-z-state.safetensors").write_text("")
    train(data, out, steps=4, resume=True)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["cache", "history.jsonl", "run.json", "before.json"])
def test_what_is_only_called_like_remains_of_a_run_stays(data, tmp_path, name):
    mine = tmp_path / "model" / name if "." in name else tmp_path / "model" / name / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("[]")
    with pytest.raises(ConfigError, match="model exists and is not empty"):
        train(data, tmp_path / "model", steps=2)
    assert mine.read_text() == "[]"


def test_a_run_does_not_go_on_where_values_have_got_other_names(data, tmp_path):
    model, found = train(data, tmp_path / "model", steps=2), api.open(data)
    other = replace(found, names={value: f"other {name}" for value, name in found.names.items()})
    with pytest.raises(ModelError, match="belongs to another run: labels differ"):
        train(other, model.path, steps=4, resume=True)


def test_a_run_of_an_older_version_goes_on(data, tmp_path, monkeypatch):
    told = session.Session.identity
    with monkeypatch.context() as patch:

        def older(self):
            return {k: v for k, v in told.fget(self).items() if k not in ("labels", "ignore", "channels")}

        patch.setattr(session.Session, "identity", property(older))
        model = train(data, tmp_path / "model", steps=2)
    assert train(data, model.path, steps=4, resume=True).provenance["steps"] == 4


@pytest.mark.parametrize("moment", ["weights", "description", "switch"])
def test_a_model_that_is_replaced_is_there_at_every_moment(trained, untrained, tmp_path, monkeypatch, moment):
    old = checkpoint.save_model(trained[1], tmp_path / "model")

    def killed(*args, **how):
        raise KeyboardInterrupt

    def switched(source, target):
        return killed() if Path(source).name == checkpoint.NEXT else move(source, target)

    move = os.replace
    spoilt = {
        "weights": (checkpoint, "sha256", killed), "description": (checkpoint, "write_json", killed),
        "switch": (os, "replace", switched),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(*spoilt[moment])
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_model(untrained, tmp_path / "model")
    wanted = untrained if moment == "switch" else old
    found = checkpoint.load_model(tmp_path / "model")
    for a, b in zip(found.segmenter.parameters(), wanted.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)
    checkpoint.save_model(untrained, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", checkpoint.WEIGHTS]


def test_two_interruptions_in_a_row_cost_no_model(trained, untrained, tmp_path, monkeypatch):
    checkpoint.save_model(trained[1], tmp_path / "model")

    def killed(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_model", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_model(untrained, tmp_path / "model")
    (tmp_path / "model" / checkpoint.WEIGHTS).rename(tmp_path / "model" / checkpoint.NEXT)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_model(trained[1], tmp_path / "model")
    found = checkpoint.load_model(tmp_path / "model")
    for a, b in zip(found.segmenter.parameters(), untrained.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- disk


def full_for(monkeypatch, ending):
    """Let files of this name meet a full disk; what safetensors writes otherwise is written."""
    write = safetensors.torch.save_file

    def refuse(tensors, path, **how):
        if str(path).endswith(ending):
            raise safetensors.SafetensorError(FULL)
        write(tensors, path, **how)

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)


def test_a_full_disk_does_not_end_a_run_and_is_said_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "SAVE_EVERY_SECONDS", 0.0)
    full_for(monkeypatch, "state.safetensors")
    said = []
    model = train(data, tmp_path / "model", steps=4, observe=lambda e: isinstance(e, str) and said.append(e))
    assert model.provenance["steps"] == 4
    assert [line for line in said if "disk is full" in line and "was not saved" in line] == said[1:]
    assert len(said) == 2


def test_weights_that_do_not_fit_on_the_disk_are_one_sentence(data, tmp_path, monkeypatch):
    full_for(monkeypatch, checkpoint.NEXT)
    with pytest.raises(ResourceError, match="the disk is full; free some space"):
        train(data, tmp_path / "model", steps=2)


def test_another_fault_of_the_disk_names_the_file(tmp_path):
    for text in ("I/O error: Input/output error (os error 5)", "something else"):
        with pytest.raises(OSError, match="state") as caught, atomic(tmp_path / "state.safetensors"):
            raise safetensors.SafetensorError(text)
        assert caught.value.filename == str(tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- the machine


def test_a_run_goes_on_in_its_own_precision_whatever_the_clock_says_now(data, tmp_path, monkeypatch):
    for pays, steps in ((False, 2), (True, 4)):
        monkeypatch.setattr(hardware, "_bf16_pays_on_cpu", lambda pays=pays: pays)
        model = train(data, tmp_path / "model", steps=steps, resume=steps > 2)
    assert model.provenance["precision"] == "fp32"


def test_a_run_that_began_on_another_kind_of_device_goes_on_in_the_precision_of_this_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_bf16_pays_on_cpu", lambda: False)
    file = train(data, tmp_path / "model", steps=2).path / "state.safetensors"
    with safetensors.safe_open(file, framework="pt") as state:
        tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 (not a dict)
        told = state.metadata()
    identity = json.loads(told["identity"])
    assert identity["device"] == "cpu"
    told["identity"] = json.dumps(identity | {"device": "cuda", "precision": "bf16"})
    safetensors.torch.save_file(tensors, file, metadata=told)
    model = train(data, tmp_path / "model", steps=4, resume=True)
    assert (model.provenance["precision"], model.provenance["steps"]) == ("fp32", 4)


def test_a_gpus_free_memory_bounds_the_patch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    request = SimpleNamespace(hardware=Hardware(device=CUDA, precision="bf16"), max_memory=None)
    assert memory.allowed_bytes(request) == int(0.9 * (10 << 30))
    request.max_memory = 4 << 30
    assert memory.allowed_bytes(request) == 4 << 30
    request = SimpleNamespace(hardware=Hardware(device=torch.device("mps"), precision="fp32"), max_memory=None)
    assert memory.allowed_bytes(request) is None


def test_logits_are_summed_on_a_gpu_only_where_they_fit(monkeypatch):
    monkeypatch.setattr(infer, "free_device_bytes", lambda device: 1000)
    predictor = SimpleNamespace(device=CUDA)
    assert infer.summed_on(predictor, 100) == CUDA
    assert infer.summed_on(predictor, 200) == torch.device("cpu")
    assert infer.summed_on(lambda windows: windows, 1) == torch.device("cpu")
    monkeypatch.setattr(infer, "free_device_bytes", lambda device: pytest.fail("a CPU is not asked"))
    assert infer.summed_on(SimpleNamespace(device=torch.device("cpu")), 1) == torch.device("cpu")


def out_of_memory(*args, **how):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")


def test_memory_that_runs_out_is_one_sentence(trained, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(session, "prepare", out_of_memory)
        with pytest.raises(ResourceError, match=r"ran out of memory.*--max-memory.*--device cpu"):
            train(data, tmp_path / "model", steps=2)
    assert not (tmp_path / "model" / folder.LOCK).exists()
    monkeypatch.setattr(infer, "segment", out_of_memory)
    with pytest.raises(ResourceError, match=r"out of memory; case_00 is too large.*--max-memory.*--device cpu"):
        api.predict(trained[1], data / "images" / "case_00.nii.gz", tmp_path / "out", device="cpu")


def test_other_faults_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes differ"), hardware.memory_told(fix="less"):
        raise RuntimeError("shapes differ")
    told = pytest.raises(ResourceError, match="this machine ran out of memory; less")
    with told, hardware.memory_told(fix="less"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(ResourceError, match="the GPU ran out of memory; less"), hardware.memory_told(fix="less"):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")


# ------------------------------------------------------------------------------------------------------------ advice


@pytest.mark.parametrize("base", [False, True])
def test_only_a_run_that_has_extend_advises_it(trained, tmp_path, base):
    said, model = [], trained[1]
    request = Request(
        dataset=api.open(trained[0]), out=tmp_path, method="segment", settings=Settings(), steps=5, observe=said.append,
        hardware=Hardware(device=torch.device("cpu"), precision="fp32"), base=model if base else None,
    )  # fmt: skip
    run = session.Session(request, model.plan, labelled=[], unlabelled=[])
    run.interrupted = True
    run.finish(model.segmenter)
    assert ("--extend" in said[-1]) != base
    state = SimpleNamespace(step=5, seconds=1.0)
    with pytest.raises(ConfigError, match="is complete") as caught:
        run._limits(state)
    assert ("--extend" in str(caught.value)) != base


def test_what_extend_would_ignore_is_refused(data, tmp_path):
    for more, said in (({"budget": "5m"}, "--budget 5m"), ({"steps": 9}, "--steps 9")):
        with pytest.raises(ConfigError, match=f"--extend 1h is added to what was spent, and {said} would not count"):
            train(data, tmp_path / "model", extend="1h", **more)


def test_nothing_labelled_names_the_folder(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=0, unlabelled=2)
    found = api.open(data)
    request = Request(
        dataset=found, out=tmp_path / "model", method="segment", settings=Settings(), steps=1,
        hardware=Hardware(device=torch.device("cpu"), precision="fp32"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"data: no labelled case to learn from"), session.open_session(request):
        pass
    with pytest.raises(ValueError, match=r"data: no case to learn from"):
        memory.make_plan(replace(request, dataset=replace(found, cases=())))
    with pytest.raises(ValueError, match=r"data: no labelled case to draft from"):
        api.draft(data, tmp_path / "out", device="cpu")
