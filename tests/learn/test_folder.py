"""What a run leaves behind: no scan that is mapped still, no folder in its command; and what it says as it reads."""

import contextlib
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from phantom import SMALL, write_dataset

from fewscan import api, personalization
from fewscan.errors import DataError
from fewscan.learn import folder
from fewscan.methods.personalize import PersonalizeConfig
from fewscan.progress import describe

QUICK = PersonalizeConfig(views=1, rounds=1, steps=4, atlases=2)


def mapped(place):
    """Whether a file below a folder is mapped into this process."""
    return any(str(place) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def as_windows(monkeypatch):
    """Nothing that is mapped can be removed."""
    remove = shutil.rmtree

    def refuse(path, ignore_errors=False, **how):
        if not mapped(path):
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise PermissionError(13, "used by another process", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)


LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")


@LINUX
@pytest.mark.parametrize("method", ["segment", "joint"])
def test_no_scan_stays_in_a_model_folder_because_it_is_mapped(tmp_path, as_windows, method):
    data, said = write_dataset(tmp_path / "data", labelled=2, unlabelled=1), []
    api.train(data, tmp_path / "model", steps=2, settings=SMALL, device="cpu", method=method, observe=said.append)
    assert not (tmp_path / "model" / "cache").exists()
    assert not [line for line in said if isinstance(line, str) and line.startswith("warning")]


@LINUX
@pytest.mark.parametrize("fails", [False, True])
def test_a_scratch_folder_goes_with_what_was_mapped_from_it(as_windows, fails):
    def work(place):
        np.save(place / "a.npy", np.arange(1000.0))
        found = np.load(place / "a.npy", mmap_mode="r")
        assert mapped(place)
        if fails:
            raise DataError(f"{found.size} is too much")

    with contextlib.suppress(DataError), folder.scratch() as place:
        work(place)
    assert not place.exists()


@LINUX
def test_atlases_that_are_mapped_do_not_end_a_run_whose_work_is_done(trained, tmp_path, as_windows, monkeypatch):
    data, model = trained
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    api.personalize(
        model, data / "images" / "case_03.nii.gz", tmp_path / "out", atlases=data, mode="always", config=QUICK,
        device="cpu", budget_per_case=None,
    )  # fmt: skip
    copy = replace(model, path=shutil.copytree(model.path, tmp_path / "model"))
    personalization.keep_atlases(copy, api.open(data))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            (r"C:\Users\ann\fewscan", "train", r"D:\patients\Mary Smith", "-o", "out\\"),
            "fewscan train Mary Smith -o out",
        ),
        (("/usr/bin/fewscan", "train", "/data/p1/", "--set", "train.lr=0.01"), "fewscan train p1 --set train.lr=0.01"),
        (("fewscan", "predict", r"C:\x", "mixed/way\\y.nii"), "fewscan predict x y.nii"),
    ],
)
def test_the_command_of_a_model_tells_no_folder_of_any_system(monkeypatch, words, told):
    monkeypatch.setattr(sys, "argv", [words[0].replace("\\", "/"), *words[1:]])
    assert folder.command() == told


def test_reading_and_judging_show_how_far_they_are(tmp_path):
    data, seen = write_dataset(tmp_path / "data", labelled=2), []
    api.check(data, observe=seen.append)
    assert [(s.step, s.steps, s.note) for s in seen] == [(1, 2, "checking"), (2, 2, "checking")]
    assert describe(seen[0]) == "scan 1/2 · checking"
    assert " left · " in describe(seen[1])
    seen.clear()
    api.train(data, tmp_path / "model", steps=2, settings=SMALL, device="cpu", method="segment", observe=seen.append)
    notes = [s.note for s in seen if not isinstance(s, str)]
    assert list(dict.fromkeys(notes))[:3] == ["checking", "planning", "preparing"]
    assert [notes.count(note) for note in ("checking", "planning", "preparing")] == [2, 2, 2]
    seen.clear()
    api.evaluate(data / "labels", data / "labels", observe=seen.append)
    assert [(s.fraction, s.note) for s in seen] == [(0.0, "judging"), (0.5, "judging")]
