"""Joint training: both networks come out, one labelled case is enough, a killed run goes on, the guard guards."""

import json
from types import SimpleNamespace

import pytest
import torch
from phantom import SMALL, write_dataset
from torch import nn

from fewscan import api
from fewscan.data.dataset import patient_of
from fewscan.learn.hardware import pick
from fewscan.learn.registrar import Registrar
from fewscan.methods import evidence, joint
from fewscan.methods.pseudo import Rating

TINY = SMALL | {"pair.widths": "8,8,8"}
DECIDES = SimpleNamespace(joint=SimpleNamespace(decide=True))


@pytest.fixture(autouse=True)
def _lenient(monkeypatch):
    """A handful of steps fits nothing."""
    monkeypatch.setattr(joint, "FITTED", 0.0)
    real = joint._fit
    monkeypatch.setattr(joint, "_fit", lambda both, state, *, held=False: 0.0 if held else real(both, state) + 0.1)


def rows(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_one_labelled_case_teaches_both_networks(tmp_path, monkeypatch):
    monkeypatch.setattr("fewscan.learn.session.LOG_EVERY_SECONDS", 0.0)
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=2)
    settings = TINY | {"joint.apart": "0.3"}
    model = api.train(data, tmp_path / "model", steps=150, settings=settings, device="cpu", seed=1, method="joint")
    assert model.provenance["method"] == "joint"
    loaded = api.load(tmp_path / "model")
    assert isinstance(loaded.others["registrar"], Registrar)
    assert loaded.provenance["guard"]["kept"] in ("apart", "joint")
    assert {"segment", "register", "anatomy"} == {row["phase"] for row in rows(tmp_path / "model")}
    api.predict(loaded, data / "images" / "case_01.nii.gz", tmp_path / "out", device="cpu")
    again = api.register_config(similarity="lncc", optimise=3)
    images = sorted((data / "images").iterdir())
    report = api.register(images[0], images[1], tmp_path / "reg", model=loaded, config=again, device="cpu")
    assert report["folding"] < 0.01


def test_a_run_in_two_parts_equals_one_in_a_single_part(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    settings = TINY | {"joint.apart": "0.4", "joint.rounds": "1"}
    monkeypatch.setattr(joint, "FITTED", 0.0)
    whole = api.train(data, tmp_path / "whole", steps=70, settings=settings, device="cpu", method="joint")

    def stop(event):
        if not isinstance(event, str) and event.step >= 40:
            raise KeyboardInterrupt

    import fewscan.learn.session as sessions

    before, sessions.SAVE_EVERY_SECONDS = sessions.SAVE_EVERY_SECONDS, 0.0
    log, sessions.LOG_EVERY_SECONDS = sessions.LOG_EVERY_SECONDS, 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            api.train(data, tmp_path / "parts", steps=70, settings=settings, device="cpu", method="joint", observe=stop)
    finally:
        sessions.SAVE_EVERY_SECONDS, sessions.LOG_EVERY_SECONDS = before, log
    monkeypatch.setattr(joint, "FITTED", 1.1)  # what was decided once stays so
    parts = api.train(data, tmp_path / "parts", resume=True, settings=settings, device="cpu", method="joint")
    for a, b in zip(whole.segmenter.parameters(), parts.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.others["registrar"].parameters(), parts.others["registrar"].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("teach", ["segmenter", "registrar"])
def test_help_can_go_one_way_only(tmp_path, teach):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    settings = TINY | {"joint.teach": teach, "joint.apart": "0.3", "joint.rounds": "1"}
    api.train(data, tmp_path / "model", steps=60, settings=settings, device="cpu", method="joint")


def test_without_unlabelled_scans_auto_segments_and_joint_still_runs(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2)
    plain = api.train(data, tmp_path / "auto", steps=3, settings=TINY, device="cpu")
    assert plain.provenance["method"] == "segment"
    both = api.train(data, tmp_path / "joint", steps=20, settings=TINY, device="cpu", method="joint")
    assert "registrar" in both.others


def test_a_segmenter_that_fits_not_even_the_drawn_labels_is_taught_with_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "FITTED", 1.1)
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    said = []
    how = {"settings": TINY, "device": "cpu", "method": "joint", "observe": said.append}
    model = api.train(data, tmp_path / "model", steps=40, **how)
    texts = [text for text in said if isinstance(text, str)]
    assert any("the drawn labels are not fitted yet" in text for text in texts)
    assert not any("labelling up to" in text for text in texts)
    assert not [text for text in texts if "unlabelled scans can help" in text]
    assert not model.others, "a network that was not trained"
    assert not model.provenance["guard"]


def test_who_wants_both_networks_gets_both(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "FITTED", 2.0)
    data = write_dataset(tmp_path / "data", labelled=3, unlabelled=1)
    settings = TINY | {"joint.decide": "no", "joint.rounds": "1"}
    model = api.train(data, tmp_path / "model", steps=30, settings=settings, device="cpu", method="joint")
    assert isinstance(model.others["registrar"], Registrar)
    assert model.provenance["scans"] == {"help": True}


@pytest.mark.parametrize(("drafted", "assumed"), [(False, False), (True, True), (True, False)])
def test_atlases_are_held_against_the_segmenter_only_where_both_were_measured(drafted, assumed):
    said = []
    session = SimpleNamespace(unlabelled=["u"], hardware=pick("cpu"), request=SimpleNamespace(say=said.append))
    rating = Rating(0.9, 0.5, 0.45, assumed=assumed)
    labeller = SimpleNamespace(drafted=lambda case: drafted, rating=lambda cases: rating)
    found = joint._compared(SimpleNamespace(session=session), labeller, Constant(3, 0))
    measured = drafted and not assumed
    assert found == ({"atlases": 0.9, "segmenter": 0.5} if measured else {})
    assert bool(said) == measured


def test_a_registrar_that_starts_late_is_as_fresh_as_one_that_starts_first(tmp_path, monkeypatch):
    monkeypatch.setattr("fewscan.learn.session.LOG_EVERY_SECONDS", 0.0)
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    settings = TINY | {"joint.apart": "0.5", "joint.rounds": "1", "train.warmup_steps": "10"}
    api.train(data, tmp_path / "model", steps=100, settings=settings, device="cpu", method="joint")
    rates = [row["lr"] for row in rows(tmp_path / "model") if row["phase"] == "register"]
    assert rates[0] < 0.2 * rates[9]
    assert rates[9] > rates[14]


@pytest.mark.parametrize(("early", "helped"), [(0.5, False), (0.65, True)])
def test_scans_kept_from_the_segmenter_tell_whether_others_can_help(tmp_path, monkeypatch, early, helped):
    answers = iter((early, 0.8, 0.7))  # half-way; then on seen scans and on those kept away: a gap of 0.1
    monkeypatch.setattr(joint, "_fit", lambda both, state, *, held=False: next(answers))
    monkeypatch.setattr("fewscan.learn.session.LOG_EVERY_SECONDS", 0.0)
    data = write_dataset(tmp_path / "data", labelled=3, unlabelled=1)
    said = []
    settings = TINY | {"joint.apart": "0.5", "joint.rounds": "1"}
    how = {"settings": settings, "device": "cpu", "method": "joint", "observe": said.append}
    model = api.train(data, tmp_path / "m", steps=80, **how)
    told = [text for text in said if isinstance(text, str) and "on 1 kept from it" in text]
    assert len(told) == 1
    assert ("unlabelled scans can help" in told[0]) == helped
    phases = [row["phase"] for row in rows(tmp_path / "m")]
    assert ("register" in phases) == ("registrar" in model.others) == helped


def case(name, counts):
    return SimpleNamespace(id=name, counts=counts, whose=patient_of(name))


def test_no_scan_is_kept_away_that_alone_holds_a_label():
    session = SimpleNamespace(
        labelled=[case("a", (9, 1, 1)), case("b", (9, 1, 0)), case("c", (9, 1, 0))], unlabelled=[case("u", ())],
        request=SimpleNamespace(seed=0), plan=SimpleNamespace(classes=3), settings=DECIDES,
    )  # fmt: skip
    for seed in range(5):
        session.request.seed = seed
        assert joint._held(session) < {"b", "c"}
        assert len(joint._held(session)) == 1
    session.labelled = session.labelled[:2]
    assert not joint._held(session)


def test_all_scans_of_a_patient_are_kept_away_together():
    names = ("p1_frame01", "p1_frame12", "p2_frame01", "p2_frame12", "p3_frame01", "p3_frame12")
    session = SimpleNamespace(
        labelled=[case(name, (9, 1)) for name in names], unlabelled=[case("u", ())],
        request=SimpleNamespace(seed=0), plan=SimpleNamespace(classes=2), settings=DECIDES,
    )  # fmt: skip
    assert {frozenset(name[:2] for name in joint._held(session)) for session.request.seed in range(9)} <= {
        frozenset({p}) for p in ("p1", "p2", "p3")
    }
    assert len(joint._held(session)) == 2


def test_a_run_that_is_extended_has_seen_the_scans_that_were_kept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "_fit", lambda both, state, *, held=False: 0.7)  # no gap
    data = write_dataset(tmp_path / "data", labelled=3, unlabelled=1)
    said = []
    settings = TINY | {"joint.apart": "0.4", "joint.rounds": "1"}
    how = {"settings": settings, "device": "cpu", "method": "joint", "observe": said.append}
    first = api.train(data, tmp_path / "m", steps=20, **how)
    assert first.provenance["scans"]["seen"] == 0.7
    assert not first.provenance["scans"]["help"]
    said.clear()
    again = api.train(data, tmp_path / "m", resume=True, steps=60, **how)
    assert again.provenance["scans"]["help"]
    assert "registrar" in again.others
    assert not [text for text in said if isinstance(text, str) and "kept from it" in text]
    assert any("labelling up to" in text for text in said if isinstance(text, str))


def test_who_stops_while_scans_are_labelled_loses_none_of_them(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=2)
    settings = TINY | {"joint.apart": "0.4", "joint.rounds": "1"}
    how = {"settings": settings, "device": "cpu", "method": "joint"}
    whole = api.train(data, tmp_path / "whole", steps=40, **how)
    real = joint._label

    def stopped(both, state, labeller, turn):
        both.stop.set()
        return real(both, state, labeller, turn)

    monkeypatch.setattr(joint, "_label", stopped)
    part = api.train(data, tmp_path / "parts", steps=40, **how)
    assert part.provenance["interrupted"]
    assert part.provenance["steps"] < 40
    monkeypatch.setattr(joint, "_label", real)
    parts = api.train(data, tmp_path / "parts", resume=True, **how)
    assert not parts.provenance["interrupted"]
    for a, b in zip(whole.segmenter.parameters(), parts.segmenter.parameters(), strict=True):
        assert torch.equal(a, b)


class Constant(nn.Module):
    """Answers with one class everywhere."""

    def __init__(self, classes, k):
        super().__init__()
        self.classes, self.k = classes, k

    def forward(self, x):
        out = torch.zeros(len(x), self.classes, *x.shape[2:])
        out[:, self.k] = 5
        return out


def test_the_guard_keeps_the_earlier_segmenter_when_the_later_one_collapsed(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    seen = {}
    real = joint.guard

    def broken(session, *, before, after, held):
        seen.update(real(session, before=before, after=Constant(session.plan.classes, 0), held=held))
        return dict(seen)

    monkeypatch.setattr(joint, "guard", broken)
    settings = TINY | {"joint.apart": "0.9", "joint.rounds": "1"}
    model = api.train(data, tmp_path / "model", steps=130, settings=settings, device="cpu", method="joint")
    assert seen["kept"] == "apart"
    assert model.provenance["guard"]["kept"] == "apart"
    assert "guard: kept the segmenter of apart training" in seen["reason"]


def test_the_guard_asks_on_scans_that_both_have_learnt_from(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "fit", lambda case, *rest, **how: asked.append(case.id) or 0.9)
    monkeypatch.setattr(evidence, "consistency", lambda *rest, **how: 0.9)
    cases = [SimpleNamespace(id=name) for name in "abc"]
    session = SimpleNamespace(labelled=cases, unlabelled=cases[:1], hardware=pick("cpu"))
    network = Constant(3, 0)
    evidence.guard(session, before=network, after=network, held=frozenset("a"))
    assert asked == ["b", "c", "b", "c"]


def test_nothing_of_the_unlabelled_scans_stays_in_the_model(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    settings = TINY | {"joint.apart": "0.4", "joint.rounds": "3"}
    api.train(data, tmp_path / "model", steps=60, settings=settings, device="cpu", method="joint")
    assert not (tmp_path / "model" / "pseudo").exists()
    assert not (tmp_path / "model" / "cache").exists()


def test_a_run_that_goes_on_keeps_its_scans_whatever_the_budget_is_now(tmp_path, monkeypatch):
    monkeypatch.setattr("fewscan.methods.register.SECONDS_A_SCAN", 2)
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=4)
    first = api.train(data, tmp_path / "model", budget=4, settings=TINY, device="cpu", method="register")
    assert len(first.provenance["unlabelled"]) == 2
    again = api.train(data, tmp_path / "model", extend=2, settings=TINY, device="cpu", method="register")
    assert again.provenance["unlabelled"] == first.provenance["unlabelled"]


def test_auto_goes_on_with_the_method_that_began(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1, unlabelled=1)
    api.train(data, tmp_path / "model", steps=6, settings=TINY, device="cpu", method="joint")
    model = api.train(data, tmp_path / "model", steps=9, resume=True, settings=TINY, device="cpu")
    assert model.provenance["method"] == "joint"
    assert model.provenance["steps"] == 9


def test_auto_is_joint_where_there_are_unlabelled_scans(tmp_path):
    methods = []
    for name, unlabelled in (("with", 1), ("without", 0)):
        data = write_dataset(tmp_path / name, labelled=2, unlabelled=unlabelled)
        model = api.train(data, tmp_path / "m", settings=TINY, device="cpu", dry_run=True)
        methods.append(model.provenance["method"])
    assert methods == ["joint", "segment"]
