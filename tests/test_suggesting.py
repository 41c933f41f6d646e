"""`fewscan suggest` on phantoms: what is ranked first, what is skipped, where a learning curve comes from."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom import SMALL, phantom, write_dataset
from typer.testing import CliRunner

import fewscan
from fewscan import api, cli, forecasting, runs, suggesting
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.errors import ConfigError, DataError, ModelError
from fewscan.learn import checkpoint
from fewscan.learn.networks import Absent
from fewscan.suggesting import suggest

SMALL_WORDS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three labelled phantoms, four plain ones, and two inverted ones that are nearly the same scan."""
    root = write_dataset(tmp_path_factory.mktemp("suggest") / "data", labelled=3, unlabelled=4)
    image, _, geometry = phantom(5)
    for name, noise in (("odd_a", 0.0), ("odd_b", 0.1)):
        other = 300 - image + np.random.default_rng(0).normal(0, noise, image.shape).astype(np.float32)
        write_image(other, root / "images" / f"{name}.nii.gz", native=geometry)
    return root


def test_the_planted_outlier_is_first_and_its_twin_last(data, trained):
    found = suggest(trained[1], data, device="cpu")
    names = [one.id for one in found.ranked]
    assert len(names) == 6
    assert {names[0], names[-1]} == {"odd_a", "odd_b"}
    assert "unlike every labelled scan" in found.ranked[0].reason
    assert f"much like {names[0]}" in found.ranked[-1].reason
    assert found.ranked[0].unlike > 3 * found.ranked[1].unlike
    assert (found.labelled, found.skipped, found.late, found.curve) == (3, {}, 0, None)


def test_the_same_comes_out_each_time_and_whatever_the_order_of_reading(data, trained):
    first = suggest(trained[1], data, device="cpu", seed=0)
    assert suggest(trained[1], data, device="cpu", seed=0).ranked == first.ranked
    assert suggest(trained[1], data, device="cpu", seed=3).ranked == first.ranked


def test_a_scan_that_cannot_be_read_is_one_line_and_the_rest_is_ranked(data, trained, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "images" / "broken.nii.gz").write_bytes(b"nonsense")
    said = []
    found = suggest(trained[1], copy, out=tmp_path / "next", device="cpu", observe=said.append)
    assert list(found.skipped) == ["broken"]
    assert len(found.ranked) == 6
    lines = [line for line in said if isinstance(line, str)]
    assert len(lines) == 1
    assert lines[0].startswith("skipped broken: ")
    assert "\n" not in lines[0]
    assert [s.fraction for s in said if not isinstance(s, str)] == sorted(
        s.fraction for s in said if not isinstance(s, str)
    )
    assert str(tmp_path) not in (tmp_path / "next" / "suggest.json").read_text()


def test_a_scan_that_takes_too_much_memory_is_one_line_and_the_rest_is_ranked(data, trained, monkeypatch):
    look, calls = suggesting.doubt, itertools.count()

    def large(*args, **how):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return look(*args, **how)

    monkeypatch.setattr(suggesting, "doubt", large)
    found = suggest(trained[1], data, device="cpu")
    assert len(found.ranked) == 5
    assert ["ran out of memory" in reason for reason in found.skipped.values()] == [True]


def test_nothing_unlabelled_is_one_clear_sentence(trained, tmp_path):
    root = write_dataset(tmp_path / "all", labelled=2)
    with pytest.raises(DataError, match=r"none of its 2 scans is unlabelled.*--images FOLDER"):
        suggest(trained[1], root, device="cpu")
    with pytest.raises(DataError, match="none of its 2 scans"):  # its own scans are not taken twice
        suggest(trained[1], root, images=[root / "images"], device="cpu")


def test_scans_may_lie_elsewhere(trained, tmp_path):
    root, more = write_dataset(tmp_path / "all", labelled=2), tmp_path / "more"
    image, _, geometry = phantom(7)
    write_image(image, more / "new.nii.gz", native=geometry)
    assert [one.id for one in suggest(trained[1], root, images=[more], device="cpu").ranked] == ["new"]
    write_image(image, more / "case_00.nii.gz", native=geometry)
    with pytest.raises(DataError, match="another scan named case_00"):
        suggest(trained[1], root, images=[more], device="cpu")


def test_a_budget_that_is_too_small_says_how_many_scans_were_left(data, trained):
    found = suggest(trained[1], data, budget=1e-6, device="cpu")
    assert len(found.ranked) == 1
    assert (found.late, found.unseen) == (5, 2)
    assert found.remarks()[0].startswith(
        "1 of 3 labelled scans were looked at: what is unlike them may be like another"
    )
    assert "no time for 5 scan(s)" in found.remarks()[1]
    assert "every labelled scan" not in found.ranked[0].reason.replace("every labelled scan that was looked at", "")


def test_models_and_options_that_do_not_fit_are_refused(data, trained, untrained):
    with pytest.raises(ModelError, match="only registers"):
        suggest(replace(untrained, segmenter=Absent()), data, device="cpu")
    two = replace(untrained, plan=replace(untrained.plan, channels=("t1", "t2")))
    with pytest.raises(DataError, match=r"has the channels image, the model takes t1, t2"):
        suggest(two, data, device="cpu")
    with pytest.raises(ConfigError, match="-o DIR"):
        suggest(trained[1], data, curve=True)
    with pytest.raises(ConfigError, match="--curve"):
        suggest(trained[1], data, steps=3)


def test_subsets_grow_and_keep_patients_together(tmp_path):
    data = api.open(write_dataset(tmp_path / "data", labelled=9))
    cases = tuple(
        replace(case, patient=f"p{i // 2}" if i < 6 else case.id) for i, case in enumerate(data.cases)
    )  # three patients with two scans, three with one
    data = replace(data, cases=cases)
    for seed in range(5):
        plan, test = forecasting.subsets(data, seed=seed)
        assert len(plan) == 3  # of 1, 2 and 3 patients; three are judged on
        assert all(set(a) < set(b) for a, b in itertools.pairwise(plan))
        patients = {case.id: case.patient for case in cases}
        assert not {patients[c] for c in plan[-1]} & {patients[c] for c in test}
        assert sorted([*plan[-1], *test]) == sorted(patients)
    with pytest.raises(DataError, match=r"1 labelled patient.*learning curve"):
        forecasting.subsets(replace(data, cases=cases[:2]), seed=0)


def test_a_curve_is_trained_judged_kept_and_read_back(trained, tmp_path):
    root = write_dataset(tmp_path / "data", labelled=6)
    options = {"out": tmp_path / "next", "curve": True, "steps": 4, "settings": SMALL, "device": "cpu"}
    first = suggest(trained[1], root, **options)
    assert [(p.labels, p.scans) for p in first.curve.measured] == [(1, 3), (2, 3), (3, 3)]
    assert [p.labels for p in first.curve.expected] == [6, 12, 24]
    assert all(math.isfinite(p.low) for p in first.curve.expected)
    for k in (1, 2, 3):
        model = json.loads((tmp_path / "next" / f"size_{k}" / "model" / "model.json").read_text())
        judged = json.loads((tmp_path / "next" / f"size_{k}" / "evaluation.json").read_text())["cases"]
        assert len(model["labelled"]) == k
        assert not {case["id"] for case in judged} & set(model["labelled"])
    said = []
    again = suggest(trained[1], root, observe=said.append, **options)
    assert again.curve == first.curve
    assert said == []  # nothing was trained
    with pytest.raises(ConfigError, match="belongs to another"):
        suggest(trained[1], root, **(options | {"steps": 5}))
    page = api.report(tmp_path / "next", tmp_path / "report.html").read_text()
    assert first.curve.sentence in page
    assert 'class="curve growth"' in page


def test_a_transferred_model_has_the_curve_of_the_method_it_began_with(trained, tmp_path, monkeypatch):
    root, ways = write_dataset(tmp_path / "data", labelled=2, unlabelled=1), []
    monkeypatch.setattr(forecasting, "by_training", lambda data, out, *, how: ways.append(how.method) or [])
    record = {"from": {"method": "joint"}}
    for made, overlapping, method in (
        ({"method": "joint"}, False, "joint"),
        ({"method": "transfer", "transfer": record}, False, "joint"),
        ({"method": "transfer", "transfer": record}, True, "segment"),  # joint knows one label a voxel only
        ({"method": "transfer", "transfer": {"from": {"method": "segment"}}}, False, "segment"),
        ({"method": "transfer", "transfer": {"from": {"method": "transfer"}}}, False, "joint"),  # as train would
    ):
        data = replace(api.open(root), overlapping=overlapping)
        model = replace(trained[1], provenance=trained[1].provenance | made)
        found = suggest(model, data, curve=True, out=tmp_path / "next", device="cpu")
        assert ways.pop() == method
        begun = f"The curve's models are trained by {method} from nothing: "
        assert found.remarks()[-1].startswith(begun) == ("transfer" in made)


def test_a_curve_goes_by_the_first_of_several_transfers_and_is_joint_only_with_unlabelled_scans(
    trained, tmp_path, monkeypatch
):
    whole, ways = api.open(write_dataset(tmp_path / "data", labelled=2, unlabelled=1)), []
    monkeypatch.setattr(forecasting, "by_training", lambda data, out, *, how: ways.append(how.method) or [])
    first = {"method": "transfer", "transfer": {"from": {"method": "joint"}}}
    third = {"method": "transfer", "transfer": {"from": {"method": "transfer", "from": {"method": "segment"}}}}
    drawn = replace(whole, cases=whole.labelled)
    for made, data, method in (
        (first, whole, "joint"),
        (first, drawn, "segment"),  # two labelled scans make a pair, the one of the first size makes none
        ({"method": "joint"}, drawn, "segment"),
        (third, whole, "segment"),
    ):
        model = replace(trained[1], provenance=trained[1].provenance | made)
        suggest(model, data, curve=True, out=tmp_path / "next", device="cpu")
        assert ways.pop() == method


def test_folds_give_a_curve_only_where_they_have_sizes_enough(trained, tmp_path):
    root = write_dataset(tmp_path / "data", labelled=4, unlabelled=1)
    options = {"steps": 3, "settings": SMALL, "device": "cpu"}
    for name, folds in (("two", 2), ("loo", "loo")):
        runs.crossval(root, tmp_path / name, folds=folds, **options)
    one = suggest(trained[1], root, folds=[tmp_path / "loo"], device="cpu")
    assert "1 size(s)" in one.curve.sentence
    assert [p.labels for p in one.curve.measured] == [3]
    assert one.ranked
    both = suggest(trained[1], root, folds=[tmp_path / "loo", tmp_path / "two"], device="cpu")
    assert [(p.labels, p.scans) for p in both.curve.measured] == [(2, 4), (3, 4)]
    assert "2 size(s)" in both.curve.sentence
    runs.crossval(root, tmp_path / "longer", folds=2, **(options | {"steps": 4}))
    with pytest.raises(ConfigError, match="trained with steps"):
        suggest(trained[1], root, folds=[tmp_path / "loo", tmp_path / "longer"], device="cpu")
    other = replace(api.open(root), names={1: "ball", 2: "liver"})
    with pytest.raises(DataError, match=r"loo: judged on ball, rod, the data set holds ball, liver; give folds"):
        suggest(trained[1], other, folds=[tmp_path / "loo"], device="cpu")
    with pytest.raises(DataError, match="no finished fold"):
        suggest(trained[1], root, folds=[root], device="cpu")


def test_the_verb_shows_the_first_few_and_keeps_all(data, trained, tmp_path):
    words = ["suggest", str(trained[1].path), str(data), "--device", "cpu"]
    shown = CliRunner().invoke(cli.app, [*words, "--top", "2", "-o", str(tmp_path / "next")])
    assert shown.exit_code == 0, shown.output
    record = json.loads((tmp_path / "next" / "suggest.json").read_text())
    ranked = [row["id"] for row in record["ranked"]]
    assert len(ranked) == 6
    assert all((name in shown.stdout) == (i < 2) for i, name in enumerate(ranked))
    plain = CliRunner().invoke(cli.app, [*words, "--json", "-"])
    assert [row["id"] for row in json.loads(plain.stdout)["ranked"]] == ranked


def test_the_verb_says_when_a_curve_cannot_be_drawn(trained, tmp_path):
    root = write_dataset(tmp_path / "data", labelled=2)
    words = ["suggest", str(trained[1].path), str(root), "--device", "cpu", "--curve", "--steps", "2", *SMALL_WORDS]
    shown = CliRunner().invoke(cli.app, [*words, "-o", str(tmp_path / "next")])
    assert shown.exit_code == 0, shown.output
    assert "No scan is unlabelled" in shown.stdout
    assert "with fewer than 3 nothing can be said" in shown.stdout


def test_the_report_shows_order_reasons_and_what_was_skipped(data, trained, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "images" / "broken.nii.gz").write_bytes(b"nonsense")
    found = fewscan.suggest(trained[1], copy, out=tmp_path / "next", device="cpu")
    page = api.report(tmp_path / "next", tmp_path / "report.html").read_text()
    assert f"Label {found.ranked[0].id} next" in page
    places = [page.index(f">{one.id}<") for one in found.ranked]
    assert places == sorted(places)
    assert "Could not be used." in page
    assert str(tmp_path) not in page


def test_images_are_read_with_the_names_of_the_model(data, trained, tmp_path):
    """A scan with more channels than the model takes is skipped, not silently cut."""
    image = read_image(data / "images" / "case_05.nii.gz")
    write_image(np.concatenate([image.data, image.data]), tmp_path / "more" / "two.nii.gz", native=image.geometry)
    found = suggest(trained[1], data, images=[tmp_path / "more"], device="cpu")
    assert list(found.skipped) == ["two"]


def test_channels_are_put_in_the_order_of_the_model(untrained, tmp_path):
    root, geometry = tmp_path / "data", phantom(0)[2]
    for i in range(3):
        for name, image in (("flair", phantom(i)[0]), ("t1", 500 - 2 * phantom(i + 9)[0])):
            write_image(image, root / f"case_{i}" / f"{name}.nii.gz", native=geometry)
        if i == 0:
            write_labelmap(phantom(0)[1], root / "case_0" / "seg.nii.gz", native=geometry)
    found = api.open(root)
    assert found.channels == ("flair", "t1")
    both = replace(untrained.plan, channels=("t1", "flair"), scaling=untrained.plan.scaling * 2)
    network = checkpoint.build_segmenter(both, untrained.settings, seed=0)
    model = replace(untrained, plan=both, segmenter=network)
    turned = replace(both, channels=("flair", "t1"))
    with torch.no_grad():
        other = checkpoint.build_segmenter(turned, untrained.settings, seed=0)
        other.load_state_dict(network.state_dict())
        first = next(p for p in other.parameters() if p.ndim == 5)
        first.copy_(first.flip(1))
    twin = replace(untrained, plan=turned, segmenter=other)
    doubts = [{one.id: one.unsure for one in suggest(m, found, device="cpu").ranked} for m in (model, twin)]
    assert doubts[0] == pytest.approx(doubts[1], rel=1e-3)
    assert len(doubts[0]) == 2
