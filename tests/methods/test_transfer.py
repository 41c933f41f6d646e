"""Transfer: weights go by name, the base stays as it is, the guard keeps the better one, a killed run goes on."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from phantom import NAMES, phantom, write_dataset

from fewscan import api
from fewscan.data.contents import contents_of
from fewscan.data.io import write_image, write_labelmap
from fewscan.errors import ConfigError, DataError, ModelError
from fewscan.learn import checkpoint, grafting, session
from fewscan.learn.atlases import atlases_of, load_atlases
from fewscan.learn.config import Settings
from fewscan.learn.folder import BEFORE
from fewscan.learn.intensity import Scaling
from fewscan.learn.networks import layers
from fewscan.methods import transfer as method
from fewscan.methods.personalize import PersonalizeConfig
from fewscan.methods.scores import by_label, paired, shared_labels, trained_on
from fewscan.space.geometry import Geometry
from fewscan.transferring import transfer


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def inverted(root, *, labelled, unlabelled=0, names=NAMES):
    """Phantoms of another contrast: dark is bright."""
    data = write_dataset(root, labelled=labelled, unlabelled=unlabelled)
    (root / "labels.json").write_text(json.dumps({str(k): v for k, v in names.items()}))
    for path in (data / "images").iterdir():
        image, _, geometry = phantom(int(path.name[5:7]))
        write_image(300 - image, path, native=geometry)
    return data


def said_by(events):
    return " ".join(event for event in events if isinstance(event, str))


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """A model moved to inverted phantoms, what was said, and the base's files before."""
    _, base = trained
    root, before, events = tmp_path_factory.mktemp("adapted"), hashes(base.path), []
    data = inverted(root / "data", labelled=3, unlabelled=1)
    source = write_dataset(root / "source", labelled=2)
    model = transfer(
        base.path, data, root / "model", steps=240, device="cpu", source=source, settings={"transfer.lr": "0.003"},
        observe=events.append,
    )  # fmt: skip
    return root, model, events, before, base


def test_the_base_stays_as_it_was_to_the_bit(adapted):
    _, _, _, before, base = adapted
    assert hashes(base.path) == before


def test_what_helps_on_cases_left_out_is_kept_with_its_evidence(adapted):
    root, model, events, _, _ = adapted
    record = api.load(root / "model").provenance["transfer"]
    assert (record["kept"], record["by"], record["folds"]) == ("adapted", "cross-validation", 3)
    assert record["adapted"] > record["base"]
    assert sorted(record["cases"]) == ["case_00", "case_01", "case_02"]
    assert record["layers"] == "all"
    assert record["weights"]["labels"] == {"ball": "ball", "rod": "rod"}
    assert "kept the adapted model: cross-validated Dice over 3 labelled case(s)" in said_by(events)
    assert not (root / "model" / "cache").exists()
    assert {"before", "after", "cases"} <= record["source"].keys()
    assert record["source"]["cases"]["case_00"]["trained"]
    done = model.predict(root / "data" / "images" / "case_03.nii.gz", root / "out")
    assert done[0].volumes_ml["ball"] > 0


def test_the_report_shows_before_after_and_the_verdict(adapted):
    root = adapted[0]
    page = api.report(root / "model", root / "report.html").read_text()
    assert 'id="transfer"' in page
    for text in ("The adapted model was kept", "case_02", "cross-validat", "Old population"):
        assert text in page, text


def test_a_base_that_is_as_good_is_kept_to_the_bit(trained, tmp_path, monkeypatch):
    data, base = trained
    real = method.score
    monkeypatch.setattr(
        method, "score", lambda model, case, **k: dict.fromkeys(real(model, case, **k), 1.0 if model is base else 0.5)
    )
    model = transfer(base, data, tmp_path / "model", steps=12, device="cpu")
    assert model.provenance["transfer"]["kept"] == "base"
    for a, b in zip(model.segmenter.parameters(), base.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("labelled", [1, 2])
def test_a_new_label_does_not_hide_a_loss_on_those_known_before(trained, tmp_path, monkeypatch, labelled):
    _, base = trained
    data = inverted(tmp_path / "data", labelled=labelled, unlabelled=1, names={1: "Rod", 2: "cyst"})
    for rod, kept in ((0.6, "base"), (0.89, "adapted"))[:labelled]:
        answers = {True: {"Rod": 0.9, "cyst": 0.0}, False: {"Rod": rod, "cyst": 0.8}}
        monkeypatch.setattr(method, "score", lambda model, case, answers=answers, **k: answers[model is base])
        model = transfer(base, data, tmp_path / kept, steps=4, device="cpu", keep_atlases=True)
        record = model.provenance["transfer"]
        assert (record["kept"], record["base"]) == (kept, pytest.approx(0.45))
        assert record["shared"] == {
            "labels": ["Rod"], "base": pytest.approx(0.9), "adapted": pytest.approx(rod), "lost": kept == "base",
            **({"worse": ["Rod"]} if kept == "base" else {}),
        }  # fmt: skip
        assert f"on the labels known before 0.900 before, {rod:.3f} adapted" in record["reason"]
        drawn = dict(zip(model.names.values(), load_atlases(model)[0].drawn[1:], strict=True))
        assert drawn == ({"rod": True, "ball": False} if kept == "base" else {"Rod": True, "cyst": True})
        config = PersonalizeConfig(views=1, rounds=1, steps=2, atlases=1)
        scan = data / "images" / f"case_{labelled:02d}.nii.gz"
        [done] = api.personalize(
            model, scan, tmp_path / f"out_{kept}", config=config, device="cpu", budget_per_case=None
        )
        assert set(done.volumes_ml) == set(drawn)
    page = api.report(tmp_path / "base", tmp_path / "report.html").read_text()
    assert "on the labels that it knows the adapted one was worse" in page
    assert "Adapting cost Dice on labels that were known before" in page


def test_atlases_have_the_channels_of_the_model_by_name(untrained, tmp_path):
    image, label, grid = phantom(0)
    write_image(np.stack([image, image**2]), tmp_path / "data" / "images" / "case_00.nii.gz", native=grid)
    write_labelmap(label, tmp_path / "data" / "labels" / "case_00.nii.gz", native=grid)
    (tmp_path / "data" / "labels.json").write_text(json.dumps({"1": "ball", "2": "rod"}))
    data = replace(api.open(tmp_path / "data"), channels=("T2", "T1"))
    scaling = (Scaling(kind="scan"),) * 2
    plan = replace(untrained.plan, channels=("T1", "T2"), scaling=scaling, names={1: "ball", 2: "rod"})
    swapped = replace(plan, channels=("T2", "T1"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    [one] = atlases_of(data, plan, folder=tmp_path / "a")
    [other] = atlases_of(data, swapped, folder=tmp_path / "b")
    np.testing.assert_array_equal(one.image, other.image[::-1])
    assert not np.array_equal(one.image, other.image)
    with pytest.raises(DataError, match="T2, T1 of intensities, the model takes T1, FLAIR of"):
        atlases_of(data, replace(plan, channels=("T1", "FLAIR")), folder=tmp_path / "a")


def test_no_label_hides_the_loss_of_another_and_no_patient_outweighs_the_rest(untrained):
    """Three gain, one loses: the mean alone would take it. One patient's many scans count as one."""
    whose = {"a1": "a", "a2": "a", "a3": "a", "b": "b", "c": "c"}
    names = list(untrained.names.values())
    before = {case: dict.fromkeys(names, 0.8) for case in whose}
    after = {case: {names[0]: 0.9 if case[0] == "a" else 0.5, names[1]: 0.9} for case in whose}
    labels = by_label(before, after, whose=whose)
    assert labels[names[0]] == {"base": pytest.approx(0.8), "adapted": pytest.approx(1.9 / 3)}
    found = shared_labels(untrained, labels, before=before, after=after, whose=whose)
    assert found == {"worse": [names[0]], "lost": True}
    after["c"][names[0]] = 0.8  # now one loses and one gains: a single voxel out of place may do that
    labels = by_label(before, after, whose=whose)
    assert shared_labels(untrained, labels, before=before, after=after, whose=whose) == {}
    assert shared_labels(untrained, {names[1]: labels[names[1]]}, before=before, after=after, whose=whose) == {}


def test_what_is_known_of_the_base_is_of_the_files_as_they_are(tmp_path):
    request = SimpleNamespace(out=tmp_path)
    row = {"of": ["1", "2"], "scores": {"ball": 0.5}, "seconds": 2.0}
    (tmp_path / BEFORE).write_text(json.dumps({"cases": {"p1": row}}))
    assert method._known(request) == {"p1": row}
    for damaged in ("", "[]", '{"cases": 3}', '{"cases": {"p1": {"scores": {}}}}'):
        (tmp_path / BEFORE).write_text(damaged)
        assert method._known(request) == {}
    data = api.open(write_dataset(tmp_path / "data", labelled=1))
    [case] = data.labelled
    before = contents_of(case, data)
    assert contents_of(case, replace(data, names={1: "another"}))[:2] == before[:2]
    assert contents_of(case, replace(data, names={1: "another"})) != before
    label = np.zeros(phantom(0)[0].shape, np.uint8)
    label[2, 2, 2] = 1
    write_labelmap(label, case.label, native=phantom(0)[2])
    assert contents_of(case, data)[0] == before[0]
    assert contents_of(case, data)[1] != before[1]


def test_time_is_kept_for_answers_that_will_be_asked_for(untrained):
    plan = untrained.plan
    finer = replace(plan, spacing=tuple(v / 2 for v in plan.spacing))
    for own, folds, answers in ((plan, 1, 2 + 4 * 3), (plan, 3, 2), (finer, 1, 16), (finer, 3, 16)):
        session_ = SimpleNamespace(plan=own, unlabelled=range(9))
        assert method._answers(session_, untrained, range(folds), judged=2) == pytest.approx(answers)


def test_one_labelled_case_is_enough_and_says_what_cannot_be_known(trained, tmp_path):
    _, base = trained
    events = []
    data = inverted(tmp_path / "data", labelled=1, unlabelled=1)
    model = transfer(base, data, tmp_path / "model", steps=60, device="cpu", observe=events.append)
    record = model.provenance["transfer"]
    assert record["by"] == "signs"
    assert "consistency" in record["signs"]
    assert "One labelled patient cannot show" in said_by(events)


def test_other_labels_learn_first_on_a_frozen_trunk(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "LOG_EVERY_SECONDS", 0.0)
    _, base = trained
    data = inverted(tmp_path / "data", labelled=2, names={1: "Rod", 2: "cyst"})
    model = transfer(base, data, tmp_path / "model", steps=30, device="cpu", settings={"transfer.warm": "0.5"})
    weights = model.provenance["transfer"]["weights"]
    assert weights["labels"] == {"Rod": "rod", "cyst": ""}
    assert weights["dropped"] == ["ball"]
    assert set(weights["adapted"]) == {"head.weight", "head.bias"}
    rows = [json.loads(line) for line in (tmp_path / "model" / "history.jsonl").read_text().splitlines()]
    assert rows[0]["phase"] == "warm-up"
    assert {"adapt", "folds"} <= {row["phase"] for row in rows}


def test_only_the_layers_asked_for_change(trained, tmp_path):
    data, base = trained
    model = transfer(base, data, tmp_path / "model", steps=12, layers="norms", device="cpu")
    moved = layers(base.segmenter, "norms")
    if model.provenance["transfer"]["kept"] == "adapted":
        own, trained_weights = model.segmenter.state_dict(), base.segmenter.state_dict()
        assert {n for n in own if not torch.equal(own[n], trained_weights[n])} == moved
    assert {n.rpartition(".")[0] for n in moved} < {n for n, _ in base.segmenter.named_modules()}


def test_a_killed_run_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(session, "LOG_EVERY_SECONDS", 0.0)
    _, base = trained
    data = inverted(tmp_path / "data", labelled=2, names={1: "ball", 2: "cyst"})

    def stop(event):
        if not isinstance(event, str) and event.step >= 25:
            raise KeyboardInterrupt

    whole = transfer(base, data, tmp_path / "whole", steps=40, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        transfer(base, data, tmp_path / "parts", steps=40, device="cpu", observe=stop)
    with pytest.raises(ConfigError, match="made by fewscan transfer; go on with that verb"):
        api.train(data, tmp_path / "parts", resume=True, device="cpu")
    before = json.loads((tmp_path / "parts" / BEFORE).read_text())["cases"]
    asked = list[bool]()
    real = method.score
    monkeypatch.setattr(method, "score", lambda model, case, **k: asked.append(model is base) or real(model, case, **k))
    parts = transfer(base, data, tmp_path / "parts", resume=True, device="cpu")
    assert asked
    assert not any(asked)  # what the trained model scores was known from before
    assert before.keys() == parts.provenance["transfer"]["cases"].keys()
    assert not (tmp_path / "parts" / BEFORE).exists()
    assert whole.provenance["transfer"] == parts.provenance["transfer"]
    for a, b in zip(whole.segmenter.parameters(), parts.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_go_by_channel_and_label(untrained):
    plan = replace(
        untrained.plan, channels=("flair", "Image"), names={3: "rod", 7: "new", 9: "ball"},
        scaling=untrained.plan.scaling * 2,
    )  # fmt: skip
    network = checkpoint.build_segmenter(plan, Settings(), seed=1)
    fresh = {k: v.clone() for k, v in network.state_dict().items()}
    grafted = grafting.graft(network, untrained, plan=plan)
    own, base = network.state_dict(), untrained.segmenter.state_dict()
    assert torch.equal(own["down.0.0.weight"], base["down.0.0.weight"].expand(-1, 2, -1, -1, -1))
    assert torch.equal(own["head.weight"][[0, 1, 3]], base["head.weight"][[0, 2, 1]])
    assert torch.equal(own["head.weight"][2], fresh["head.weight"][2])
    assert grafted.fresh == {"down.0.0.weight", "head.weight", "head.bias"}
    assert len(grafted.kept) == len(own) - 3
    assert grafted.channels == {"flair": "image", "Image": "image"}


def test_the_voxel_size_is_the_models_unless_a_label_would_be_lost(trained, tmp_path):
    _, base = trained
    for name, size in (("near", 0.9), ("fine", 0.2)):
        data = write_dataset(tmp_path / name, labelled=1, spacing=(size,) * 3)
        if name == "fine":
            thin = np.zeros((20, 24, 18), np.uint8)
            thin[5:7, 8:20, 9:11] = 1
            write_labelmap(
                thin, data / "labels" / "case_00.nii.gz", native=Geometry((20, 24, 18), np.diag([size] * 3 + [1]))
            )
        events = []
        model = transfer(base, data, tmp_path / f"{name}_model", steps=4, device="cpu", observe=events.append)
        plan = grafting.changes(model.plan, base.plan)
        assert ("a label would be lost" in said_by(events)) == (name == "fine"), plan


def test_what_cannot_be_transferred_is_refused(trained, tmp_path):
    data, base = trained
    with pytest.raises(ConfigError, match="would be overwritten; give another -o"):
        transfer(base, data, base.path)
    with pytest.raises(ConfigError, match=r"network\.widths cannot be set"):
        transfer(base, data, tmp_path / "a", settings={"network.widths": "8,8"})
    registers = replace(base, segmenter=checkpoint.networks.Absent())
    with pytest.raises(ModelError, match="only registers; give one that segments"):
        transfer(registers, data, tmp_path / "b", steps=1)
    with pytest.raises(ConfigError, match="layers must be auto"):
        transfer(base, data, tmp_path / "c", layers="first")


def test_labels_take_the_numbers_of_the_new_data():
    assert grafting.renumbered({1: "a", 2: "b", 3: "c"}, {1: "C", 7: "a"}) == {7: "a", 2: "b", 1: "c"}


def test_the_record_of_a_transfer_of_a_transfer_tells_the_whole_way(untrained, tmp_path):
    began = {"method": "joint", "sha256": {}, "labelled": ["old_1"]}
    transferred = {"kept": "adapted", "from": began}
    base = replace(untrained, provenance={"method": "transfer", "labelled": ["new_1"], "transfer": transferred})
    session_ = SimpleNamespace(
        request=SimpleNamespace(out=tmp_path), settings=Settings(), plan=base.plan, interrupted=False,
        finish=lambda segmenter, **kept: kept["record"]["transfer"],
    )  # fmt: skip
    grafted = SimpleNamespace(to_dict=dict)
    found = method._finish(session_, base, base.segmenter, grafted, {"kept": "adapted"}, None)
    assert found["from"] == {"method": "transfer", "sha256": None, "labelled": ["new_1"], "from": began}
    last = {"labelled": ["newest_1"], "transfer": found | {"kept": "base"}}
    assert (trained_on(last), trained_on(last, before=True)) == (set(), {"new_1", "old_1"})


def test_an_old_population_that_cannot_be_read_is_refused_before_anything_is_spent(untrained, tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1)
    image, _, grid = phantom(0)
    write_image(np.stack([image, image]), data / "images" / "case_00.nii.gz", native=grid)
    data, source = api.open(data), api.open(write_dataset(tmp_path / "source", labelled=1))
    both = replace(data, channels=("image", "T2"))  # the adapted model will want both, the old scans have one
    with pytest.raises(DataError, match=r"channels image cannot tell what is forgotten: .* with image, T2 are read"):
        transfer(untrained, both, tmp_path / "model", source=source, steps=4, device="cpu")
    t1 = replace(untrained, plan=replace(untrained.plan, channels=("T1", "FLAIR")))
    with pytest.raises(DataError, match=r"with T1, FLAIR are read; leave --source out"):
        transfer(t1, replace(data, channels=("T1", "FLAIR")), tmp_path / "model", source=source, steps=4, device="cpu")
    assert not (tmp_path / "model").exists()


def test_a_damaged_scan_of_the_old_population_costs_neither_the_model_nor_the_others(trained, tmp_path):
    data, base = trained
    source = api.open(write_dataset(tmp_path / "source", labelled=3))
    (tmp_path / "source" / "images" / "case_01.nii.gz").write_bytes(b"no image")
    events = []
    model = transfer(base, data, tmp_path / "model", source=source, steps=4, device="cpu", observe=events.append)
    found = api.load(model.path).provenance["transfer"]["source"]
    assert (sorted(found["cases"]), found["unread"]) == (["case_00", "case_02"], ["case_01"])
    assert found["before"] == pytest.approx(np.mean([row["before"] for row in found["cases"].values()]))
    assert "case_01 of the old population is left out: " in said_by(events)
    assert "could not be read: case_01" in api.report(model.path, tmp_path / "report.html").read_text()


def test_the_model_is_written_before_forgetting_is_measured(trained, tmp_path, monkeypatch):
    data, base = trained

    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(method, "_forgotten", broken)
    with pytest.raises(ValueError, match="ran out of memory"):
        transfer(base, data, tmp_path / "model", source=data, steps=4, device="cpu")
    assert api.load(tmp_path / "model").provenance["transfer"]["kept"] in ("base", "adapted")


def test_a_rightly_empty_answer_counts_as_right(trained, tmp_path, monkeypatch):
    assert paired({}, {}) == (1.0, 1.0)
    assert paired({}, {"ball": 0.0}) == (1.0, 0.0)
    before, after = {"a": {}, "b": {"ball": 0.9}}, {"a": {"ball": 0.0}, "b": {"ball": 0.9, "cyst": 0.5}}
    whose = {"a": "a", "b": "b"}
    labels = by_label(before, after, whose=whose)
    assert labels["ball"] == {"base": pytest.approx(0.95), "adapted": pytest.approx(0.45)}
    known = SimpleNamespace(names={1: "ball"})
    assert shared_labels(known, labels, before=before, after=after, whose=whose)["lost"]
    data, base = trained
    monkeypatch.setattr(method, "score", lambda model, case, **k: {} if model is base else {"ball": 0.0})
    record = transfer(base, data, tmp_path / "model", steps=4, device="cpu").provenance["transfer"]
    assert (record["kept"], record["base"], record["adapted"]) == ("base", 1.0, 0.0)
