"""The benchmark of transfer: a source model is read again only if it is whole and of this code."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benches
import pytest

bench = benches.load("transfer")


class Training:
    """Stands in for training: leaves a model folder, interrupted or not."""

    def __init__(self) -> None:
        self.interrupted, self.count = False, 0

    def train(self, data: object, folder: Path, **how: Any) -> SimpleNamespace:
        self.count += 1
        folder.mkdir(parents=True)
        (folder / "model.json").write_text(str(self.interrupted))
        return self.load(folder)

    def load(self, folder: Path) -> SimpleNamespace:
        return SimpleNamespace(provenance={"interrupted": (folder / "model.json").read_text() == "True"})


def test_a_source_model_of_half_a_run_or_of_other_code_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training()
    monkeypatch.setattr(bench, "api", training)
    monkeypatch.setattr(bench, "code_hash", lambda parts: "one")

    def made() -> None:
        bench.source_model(None, tmp_path, task="acdc", minutes=2.0)

    training.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        made()
    training.interrupted = False
    made()
    made()
    assert training.count == 2
    monkeypatch.setattr(bench, "code_hash", lambda parts: "other")
    made()
    assert training.count == 3


@pytest.mark.parametrize("development", [False, True])
def test_rows_of_different_source_models_are_kept_apart(monkeypatch: pytest.MonkeyPatch, development: bool) -> None:
    monkeypatch.setattr(bench, "only", lambda *a: SimpleNamespace(labelled=range(20)))
    monkeypatch.setattr(bench, "pool_of", lambda *a: [])
    monkeypatch.setattr(bench, "api", SimpleNamespace(open=lambda path: None))
    asked = {"data": Path(), "task": "acdc", "k": None, "seed": None, "system": None, "development": development}
    asked |= {"minutes": 4, "steps": 400, "layers": "all", "lr": 1e-3, "source_minutes": 3.0}
    keys = bench.wanted(argparse.Namespace(**asked))
    assert len(keys) == 1 + 6 * 3
    assert {key["source_minutes"] for key in keys} == {3.0}
    none = {"key": keys[0] | {"source_minutes": 9.0}, "cases": {"p1": 0.9}, "code": "b"}
    rows = [
        none,
        {"key": keys[0], "cases": {"p1": 0.9}, "code": "a"},
        {"key": keys[0], "cases": {"p1": 0.5}, "code": "b"},
    ]
    monkeypatch.setattr(bench, "load", lambda path: rows)
    mine = {"cases": {"p1": 0.6}}
    assert bench.harm(mine, "transfer.json", keys[1], code="b") == {"harm": 0.0, "gain": 0.1}
    assert bench.harm(mine, "transfer.json", keys[1], code="c") == {}
