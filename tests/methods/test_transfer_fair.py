"""What a transfer is judged on: cases that neither model has learnt from, networks that are annealed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from phantom import write_dataset

from fewscan import api, training
from fewscan.errors import ConfigError
from fewscan.learn.config import Settings, TransferConfig
from fewscan.learn.hardware import pick
from fewscan.methods import transfer as method
from fewscan.methods.transfer import _forgotten, _unseen, _witnesses
from fewscan.transferring import transfer


def files(*patients):
    """A case of each, called like its patient where there is one."""
    return [SimpleNamespace(id=f"{name}_{i}", patient=name) for i, name in enumerate(patients)]


def test_the_trained_model_is_not_judged_on_what_it_has_learnt_from(untrained):
    cases = files("p", "q", "r")
    base = replace(untrained, provenance={"labelled": ["p_0"]})
    assert [case.id for case in _unseen(cases, base)] == ["q_1", "r_2"]
    came = {"transfer": {"kept": "adapted", "from": {"labelled": ["r_2"]}}, "labelled": ["x"]}
    assert [case.id for case in _unseen(cases, replace(untrained, provenance=came))] == ["p_0", "q_1"]
    assert _unseen(cases[:2], base) == cases[:2], "of one patient alone nothing can be told"


def test_cases_that_are_not_asked_are_named(untrained):
    base = replace(untrained, provenance={"labelled": ["p_0", "s_9"]})
    session = SimpleNamespace(labelled=files("p", "q", "r"))
    assert _witnesses(base, session, {"q_1": {}, "r_2": {}}) == (
        {"left_out": ["p_0"]}, "; 1 called as what it has learnt from not asked",
    )  # fmt: skip
    assert _witnesses(base, SimpleNamespace(labelled=files("x")), {"x_0": {}}) == ({}, "")


def test_where_it_has_to_be_the_verdict_says_so(trained, tmp_path):
    data, base = trained
    model = transfer(base, data, tmp_path / "model", steps=6, settings={"transfer.lr": "1e-6"}, device="cpu")
    record = model.provenance["transfer"]
    assert record["seen"] == sorted(record["cases"]) == sorted(base.provenance["labelled"])
    assert f"{len(record['seen'])} called so were learnt from before" in record["reason"]


def test_what_is_forgotten_is_measured_on_cases_that_were_not_learnt_by_heart(trained, untrained, tmp_path):
    source = api.open(write_dataset(tmp_path / "source", labelled=4))
    base = replace(trained[1], provenance={"labelled": [case.id for case in source.labelled[:3]]})
    session = SimpleNamespace(request=SimpleNamespace(seed=0, say=print), hardware=pick("cpu"))
    found = _forgotten(base, base, source, session)
    assert list(found["cases"]) == [source.labelled[3].id]
    assert not found["cases"][source.labelled[3].id]["trained"]


def test_how_a_model_was_transferred_is_no_wish_for_the_next_time(untrained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "run", lambda request, how: asked.append(request) or untrained)
    data = write_dataset(tmp_path / "data", labelled=2)
    base = replace(untrained, settings=replace(untrained.settings, transfer=TransferConfig(guard=False, layers="last")))
    transfer(base, data, tmp_path / "a", steps=1, device="cpu")
    transfer(base, data, tmp_path / "b", steps=1, device="cpu", settings={"transfer.layers": "norms"})
    transfer(base, data, tmp_path / "c", steps=1, device="cpu", layers="decoder")
    assert asked[0].settings.transfer == Settings().transfer
    assert [request.settings.transfer.layers for request in asked[1:]] == ["norms", "decoder"]


def test_layers_that_are_said_twice_and_differently_are_refused(untrained, tmp_path):
    with pytest.raises(ConfigError, match=r"--layers decoder and --set transfer\.layers=norms differ"):
        transfer(untrained, tmp_path, tmp_path / "m", layers="decoder", settings={"transfer.layers": "norms"})


def test_a_network_is_annealed_though_time_is_kept_for_its_judging(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(method, "_answers", lambda *a, **k: 1e6)  # the most that may be kept
    data = write_dataset(tmp_path / "data", labelled=2)
    transfer(trained[1], data, tmp_path / "model", budget=8, device="cpu", settings={"transfer.guard": "no"})
    lines = [json.loads(line) for line in (tmp_path / "model" / "history.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["phase"] != "warm-up"]
    assert rates[-1] < 0.25 * max(rates)
