"""The command line: what each verb asks of the API, what it prints, how it refuses."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from fewscan import cli
from fewscan.errors import ConfigError, ScansError

ROW = {"mean": 0.861, "low": 0.84, "high": 0.882, "sd": 0.03, "n": 12}
SCORES = {"summary": {"dice": ROW, "hd95_mm": ROW}, "labels": {"left [L]": {"dice": ROW}}, "cases": []}
PAIR = {"difference": -0.012, "low": -0.02, "high": None, "p": 0.0313, "n": 6, "wins": 1, "losses": 5}
DIFFERENCES = {"metrics": {"dice": PAIR}, "labels": {"left [L]": PAIR}, "only_a": [], "only_b": []}
REMEDY = "fewscan check DATA --fix DIR"
FOUND = {"severity": "error", "case": "case03", "message": "[grid] differs", "remedy": REMEDY}
SCAN = {
    "case": "case03",
    "role": "labelled",
    "shape": [4, 5, 6],
    "spacing": [1, 1, 2.5],
    "axes": "LPS",
    "dtype": "int16",
}
CHECKED = {
    "layout": "images/ + labels/",
    "labelled": 5,
    "unlabelled": 12,
    "test": 0,
    "labels": {"1": "femur"},
    "channels": ["image"],
    "modality": "ct",
    "usable": False,
    "findings": [FOUND],
    "cases": [SCAN | {"low": -1000.0, "high": 900.0, "labels_ml": {"femur": 12.5}}] * 41,
}
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Evaluation:
    def to_json(self) -> dict[str, Any]:
        return SCORES

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(SCORES))


class Comparison:
    def to_json(self) -> dict[str, Any]:
        return DIFFERENCES


class Checkup:
    usable = False

    def to_json(self) -> dict[str, Any]:
        return CHECKED


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand in for `fewscan.api`; the value lists what was asked of it."""
    made: Calls = []
    done = SimpleNamespace(
        id="case07", path=Path("out/case07.nii.gz"), seconds=1.5, volumes_ml={"knee": 2.25}, skipped=False
    )
    answers = {
        "demo": Evaluation(),
        "check": Checkup(),
        "train": SimpleNamespace(describe=lambda: "2 labels", path=Path("model"), provenance={"method": "segment"}),
        "load": "the model",
        "predict": [done, SimpleNamespace(id="case08", seconds=0.0, volumes_ml={}, skipped=True)],
        "personalize": [done],
        "evaluate": Evaluation(),
        "compare": Comparison(),
        "crossval": Evaluation(),
        "report": Path("report.html"),
        "export": {"labels": ["liver"]},
        "mesh": {"printable": None, "parts": {}},
        "MeshConfig": None,
        "Additions": None,
        "Printer": None,
    }

    def stand_in(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append((name, args, kwargs))
            if observe := kwargs.get("observe"):
                observe("plan: 96 x 96 x 96, 5.1 steps/s")
            return answers[name]

        return call

    api = SimpleNamespace(**{name: stand_in(name) for name in answers})
    for module in ("api", "runs"):
        monkeypatch.setitem(sys.modules, f"fewscan.{module}", api)
        monkeypatch.setattr(f"fewscan.{module}", api, raising=False)
    return made


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


EVERY_VERB = [
    ("demo", "-o", "d", "--budget", "60s"),
    ("check", "scans", "--fix", "repaired"),
    ("train", "scans", "-o", "m", "--budget", "1h30m", "--set", "train.lr=0.01", "--max-memory", "4GiB"),
    ("train", "scans", "-o", "m", "--steps", "20", "--resume", "--dry-run", "--method", "segment", "--device", "cpu"),
    ("train", "scans", "-o", "m", "--extend", "1h", "--seed", "3"),
    ("predict", "m", "a.nii.gz", "b", "-o", "out", "--probabilities", "--tta", "--skip-existing"),
    ("predict", "m", "a.nii.gz", "-o", "out", "--personalize", "auto", "--atlases", "scans", "--budget-per-case", "2m"),
    ("predict", "m", "a.nii.gz", "-o", "out", "--calibration", "folds"),
    ("predict", "m", "a.nii.gz", "-o", "out", "--calibration", "folds", "--personalize", "auto"),
    ("evaluate", "out", "labels", "--images", "images"),
    ("compare", "a.json", "b.json"),
    ("crossval", "scans", "-o", "folds", "--folds", "4", "--steps", "5", "--max-memory", "2GiB"),
    ("demo", "-o", "d", "--max-memory", "2GiB"),
    ("report", "demo", "-o", "r.html"),
    ("export", "p1.nii.gz", "--as", "rtstruct", "--source", "ct", "-o", "p1.dcm", "--names", "model", "--manual"),
    ("mesh", "m.nrrd", "-o", "out", "--labels", "1,femur", "--for", "vr", "--faces", "9", "--space", "LPS", "--merge"),
    (
        "mesh",
        "m.nrrd",
        "-o",
        "out",
        "--hollow-mm",
        "3",
        "--drain-mm",
        "2",
        "--cut",
        "S=3",
        "--cut",
        "R=1",
    ),
]


@pytest.mark.parametrize("words", EVERY_VERB, ids=" ".join)
def test_verbs_call_the_api_as_it_is_declared(words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    from fewscan import api, runs

    made: Calls = request.getfixturevalue("calls")
    run(*words)
    assert made
    for name, args, kwargs in made:
        inspect.signature(getattr(runs if name in ("demo", "crossval") else api, name)).bind(*args, **kwargs)


def test_train_hands_over_what_was_typed(calls: Calls) -> None:
    done = run("train", "scans", "-o", "m", "--budget", "1m30s", "--max-memory", "2GiB", "--set", "a.b=c=d")
    assert done.exit_code == 0, done.output
    name, args, kwargs = calls[0]
    assert (name, args) == ("train", (Path("scans"), Path("m")))
    assert kwargs["budget"] == 90
    assert kwargs["max_memory"] == 2 * 2**30
    assert kwargs["settings"] == {"a.b": "c=d"}
    assert "fewscan predict m" in done.stdout
    assert "plan: 96 x 96 x 96" in done.stderr


def test_a_dry_run_promises_no_model(calls: Calls) -> None:
    done = run("train", "scans", "-o", "m", "--dry-run")
    assert done.exit_code == 0
    assert calls[0][2]["dry_run"]
    assert not done.stdout


def test_predict_counts_what_was_there_already(calls: Calls) -> None:
    done = run("predict", "m", "x.nii.gz", "-o", "out")
    assert calls[1][1] == ("the model", [Path("x.nii.gz")], Path("out"))
    assert "case07" in done.stdout
    assert "2.25" in done.stdout
    assert "1 written to out, 1 there already" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("predict", "m", "x", "-o", "o", "--budget-per-case", "2m"), "add --personalize auto"),
        (("predict", "m", "x", "-o", "o", "--personalize", "auto", "--max-memory", "2GiB"), "leave one out"),
        (("register", "a", "b", "-o", "o", "--optimise", "30"), "add --model"),
    ],
)
def test_options_that_would_do_nothing_are_refused(calls: Calls, words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
    assert not calls


def test_the_budget_of_a_case_is_handed_over_where_it_is_given(calls: Calls) -> None:
    run("predict", "m", "x", "-o", "o", "--personalize", "auto", "--budget-per-case", "2m")
    run("predict", "m", "x", "-o", "o", "--personalize", "auto")
    given = [kwargs.get("budget_per_case") for name, _, kwargs in calls if name == "personalize"]
    assert given == [120, None]


def test_check_shows_what_is_there_and_what_is_wrong_and_ends_with_one(calls: Calls) -> None:
    done = run("check", "scans")
    assert done.exit_code == cli.UNUSABLE
    assert "images/ + labels/: 5 labelled, 12 unlabelled, 0 test\nlabels: 1 femur\n" in done.stdout
    assert "4x5x6" in done.stdout
    assert "and 1 more; --json lists them all" in done.stdout
    assert "case03: [grid] differs" in done.stdout
    assert REMEDY in done.stdout


def test_scores_are_shown_with_their_interval(calls: Calls) -> None:
    done = run("evaluate", "out", "labels")
    assert "Mean Dice 0.861 (95 % interval 0.840 to 0.882) over 12 scans" in done.stdout
    assert "left [L]" in done.stdout


def test_comparisons_show_difference_and_test(calls: Calls) -> None:
    lines = run("compare", "a.json", "b.json").stdout.splitlines()
    assert lines[1].split() == ["Dice", "-0.012", "0.0313", "6", "1", "5"]
    assert lines[2].startswith("Dice, left [L]")


def test_cases_without_a_partner_are_named(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"p{i}" for i in range(1, 23)]
    monkeypatch.setitem(SCORES, "unmatched", {"references": many, "predictions": ["p [0]"]})
    said = run("evaluate", "out", "labels").stdout
    assert "References without a prediction (22): p1, p2," in said
    assert "p20 and 2 more\n" in said
    assert "Predictions without a reference (1): p [0]\n" in said
    monkeypatch.setitem(DIFFERENCES, "only_b", ["p7"])
    said = run("compare", "a.json", "b.json").stdout
    assert "Only in b.json, so left out (1): p7\n" in said
    assert "a.json" not in said


def test_scans_that_failed_are_told_after_those_that_did_not(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewscan.api

    api: Any = fewscan.api
    done = api.predict("m", "x", "out")

    def fail(*_: Any, **__: Any) -> Any:
        raise ScansError("1 of 3 scans could not be predicted", done=done, failed={"case09": "2 slices"})

    monkeypatch.setattr(api, "predict", fail)
    told = run("predict", "m", "scans", "-o", "out")
    assert "case07" in told.stdout
    assert "1 written to out, 1 there already" in told.stdout
    assert isinstance(told.exception, ScansError)
    assert str(told.exception).endswith("could not be predicted: case09 (2 slices)")


@pytest.mark.parametrize("verb", ["register", "draft", "shift"])
def test_a_device_that_a_verb_cannot_use_is_not_offered(verb: str) -> None:
    assert "mps" not in run(verb, "--help").stdout
    assert "mps" in run("train", "--help").stdout


def test_json_goes_to_a_file_or_alone_to_the_terminal(calls: Calls, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    assert "Mean Dice" in run("evaluate", "out", "labels", "--json", str(file)).stdout
    assert json.loads(file.read_text()) == SCORES
    assert json.loads(run("evaluate", "out", "labels", "--json", "-").stdout) == SCORES
    assert json.loads(run("compare", "a.json", "b.json", "--json", "-").stdout) == DIFFERENCES


def test_demo_says_what_to_do_next(calls: Calls) -> None:
    done = run("demo")
    assert calls[0][2]["budget"] == 180
    for word in ("report.html", "fewscan check SCANS", "fewscan train SCANS"):
        assert word in done.stdout
    assert len(done.stdout.splitlines()) <= 24


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("train", "scans", "-o", "m", "--budget", "soon"),
            "--budget: a duration must look like 90s, 10m or 1h30m.*'soon'",
        ),
        (("train", "scans", "-o", "m", "--extend", "0m"), "--extend: a duration must look like.*'0m'"),
        (
            ("predict", "m", "x", "-o", "o", "--personalize", "auto", "--budget-per-case", "x"),
            "--budget-per-case: a dur",
        ),
        (
            ("train", "scans", "-o", "m", "--max-memory", "lots"),
            "--max-memory: a size must look like 4GiB or 800MB.*'lots'",
        ),
        (("train", "scans", "-o", "m", "--set", "lr"), "--set needs KEY=VALUE.*'lr'"),
        (("crossval", "scans", "-o", "f", "--folds", "1"), "--folds must be loo or a number of at least 2, got '1'"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(calls: Calls, words: tuple[str, ...], sentence: str) -> None:
    done = run(*words)
    assert isinstance(done.exception, ConfigError)
    assert re.search(sentence, str(done.exception))
    assert not [call for call in calls if call[0] != "load"]


def test_every_option_says_what_it_does_and_every_verb_shows_examples() -> None:
    verbs = get_command(cli.app).commands  # type: ignore[attr-defined]
    nested = {f"{name} {n}": c for name, group in verbs.items() for n, c in getattr(group, "commands", {}).items()}
    for name, command in {**verbs, **nested}.items():
        assert command.epilog, name
        assert not [p.name for p in command.params if not p.help], name


def test_help_and_version_answer() -> None:
    assert run("--version").stdout.startswith("fewscan ")
    assert "fewscan train scans -o model --budget 10m" in run("train", "--help").stdout


# From here on the real thing, on two spheres.


def sphere_cases(root: Path, *, labelled: int, unlabelled: int) -> None:
    import nibabel as nib

    rng = np.random.default_rng(0)
    grid = np.indices((24, 24, 24))
    for i in range(labelled + unlabelled):
        centre = rng.uniform(9, 14, (3, 1, 1, 1))
        inside = ((grid - centre) ** 2).sum(0) < 36
        scan = (100 * inside + rng.normal(0, 10, inside.shape)).astype(np.float32)
        for folder, data in [("images", scan)] + ([("labels", inside.astype(np.uint8))] if i < labelled else []):
            (root / folder).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.eye(4)), root / folder / f"case{i}.nii.gz")


def fewscan(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewscan", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_from_a_folder_of_scans_to_a_report(tmp_path: Path) -> None:
    sphere_cases(tmp_path / "scans", labelled=3, unlabelled=1)
    run_folder = tmp_path / "run"
    steps: list[tuple[str | Path, ...]] = [
        ("check", tmp_path / "scans"),
        ("train", tmp_path / "scans", "-o", run_folder / "model", "--steps", "3", "--device", "cpu"),
        ("predict", run_folder / "model", tmp_path / "scans" / "images", "-o", run_folder / "predictions"),
        ("evaluate", run_folder / "predictions", tmp_path / "scans/labels", "--json", run_folder / "evaluation.json"),
        ("report", run_folder, "-o", run_folder / "report.html"),
    ]
    for words in steps:
        done = fewscan(*words)
        assert done.returncode == 0, done.stderr
    assert (run_folder / "predictions" / "case0.nii.gz").exists()
    assert 0 <= json.loads((run_folder / "evaluation.json").read_text())["summary"]["dice"]["mean"] <= 1
    assert "<html" in (run_folder / "report.html").read_text()


def test_a_folder_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    done = fewscan("train", tmp_path / "nowhere", "-o", tmp_path / "model")
    assert done.returncode == cli.REFUSED
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr
    assert not (tmp_path / "model").exists()
