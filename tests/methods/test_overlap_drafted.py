"""Bundles that overlap: drafted by atlases that vote on each of them, and by a model made to measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from crossing import GRID, crossing, write_case, write_crossings
from phantom import SMALL
from typer.testing import CliRunner

from fewscan import api
from fewscan.cli import app
from fewscan.data import dataset as datasets
from fewscan.data.bundles import SEGMENTATIONS, bundle_files, read_bundle, write_bundles
from fewscan.data.io import write_labelmap
from fewscan.errors import ConfigError, DataError
from fewscan.judge.metrics import dice
from fewscan.learn import atlases
from fewscan.learn.answers import certain, chosen
from fewscan.learn.batches import Prepared, labelled_as, on_plan
from fewscan.learn.hardware import pick
from fewscan.learn.overlap import mask
from fewscan.methods import personalize, voting
from fewscan.methods.evidence import mean_dice, met
from fewscan.methods.pairwise import RegisterConfig
from fewscan.methods.personalize import PersonalizeConfig, Personalizer
from fewscan.methods.voting import Voter
from fewscan.space import affine
from fewscan.space.deformable import DeformConfig
from fewscan.space.volume import IGNORE, Volume
from fewscan.tracts.bundles import case_folders

SOON = RegisterConfig(deform=DeformConfig(shrink=(2, 1), steps=(25, 10)))
QUICK = PersonalizeConfig(views=1, rounds=1, steps=6, atlases=2)
BOX = (5, 6, 7)


def write_white(root: Path, *, labelled: int, unlabelled: int) -> Path:
    """Crossings whose first map shows both bundles, as FA does: scans are aligned and compared by it."""
    write_crossings(root, labelled=labelled, unlabelled=unlabelled)
    for i in range(labelled + unlabelled):
        image = crossing(i)[0]
        image[0] += image[1] - 0.2
        write_case(root / f"case_{i}", image, None)
    return root


def masks_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: read_bundle(file)[0] for name, file in bundle_files(folder).items()}


def voters(seed: int, *, drawn: frozenset[int] | None = None) -> list[Voter]:
    """Three atlases of two bundles each, in a table of all combinations; the second was not looked at everywhere."""
    rng = np.random.default_rng(seed)
    table = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=bool)
    found = []
    for i in range(3):
        label = rng.integers(0, 4, BOX).astype(np.uint16)
        if i == 1:
            label[:2] = IGNORE
        image = torch.from_numpy(rng.normal(size=(1, *BOX)).astype(np.float32))
        found.append(Voter(f"a{i}", image, label, drawn if i == 2 else None, table=table))
    return found


def prepared(model: api.Model, seed: int) -> Prepared:
    """A scan as the model sees it, without labels."""
    image = on_plan(Volume(crossing(seed)[0], GRID, GRID, model.plan.channels), model.plan).numpy()
    return Prepared("scan", image, None, (), (0,) * 3, np.ones(3, bool))


def without(case: Prepared, k: int) -> Prepared:
    """The case as if nobody had looked for a bundle."""
    assert case.label is not None
    assert case.table is not None
    table = case.table & (np.arange(3) != k)
    return labelled_as(replace(case, drawn=np.arange(3) != k), case.label, table=table)


# -------------------------------------------------------------------------------------------------------------- votes


def test_each_bundle_has_its_own_share_of_the_votes_of_those_who_were_asked() -> None:
    asked = voters(0, drawn=frozenset({0, 2}))
    target = torch.randn(1, *BOX, generator=torch.Generator().manual_seed(1))
    weights = voting.vote_weights(target, torch.stack([v.image[0] for v in asked]), fusion="local").numpy()
    found = voting.shares(target, asked, classes=3).numpy()
    for place in np.ndindex(BOX):
        for k in (1, 2):
            yes = total = 0.0
            for i, v in enumerate(asked):
                value = int(v.label[place])
                if value != IGNORE and (v.drawn is None or k in v.drawn):
                    total += weights[(i, *place)]
                    yes += weights[(i, *place)] * bool(v.table is not None and v.table[value, k])
            assert found[(k, *place)] == pytest.approx(yes / total, abs=1e-5)
        assert found[(0, *place)] == pytest.approx(1 - found[(slice(1, None), *place)].max(), abs=1e-6)


@pytest.mark.parametrize("fusion", ["local", "joint", "majority"])
def test_a_draft_holds_what_more_than_half_of_the_vote_is_for(
    fusion: voting.Fusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = voters(3)
    target = torch.randn(1, *BOX, generator=torch.Generator().manual_seed(1))
    label, sure = voting.fuse(target, asked, fusion=fusion)
    assert label.shape == (2, *BOX)
    assert 0.5 <= sure.min() <= sure.max() <= 1 + 1e-5
    if fusion == "local":
        shares = voting.shares(target, asked, classes=3)[1:]
        np.testing.assert_array_equal(label, (shares > 0.5).numpy())
        np.testing.assert_allclose(sure, torch.maximum(shares, 1 - shares).amin(0).numpy(), atol=1e-6)
    monkeypatch.setattr(voting, "SLAB_VALUES", 1)  # plane by plane
    np.testing.assert_array_equal(voting.fuse(target, asked, fusion=fusion)[0], label)


def test_labels_that_never_meet_are_voted_on_alike_either_way() -> None:
    rng, table = np.random.default_rng(5), np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=bool)
    single = [v._replace(label=rng.integers(0, 3, BOX).astype(np.uint16), table=None) for v in voters(5)]
    target = torch.zeros(1, *BOX)
    apart = [v._replace(table=table) for v in single]
    torch.testing.assert_close(
        voting.shares(target, apart, classes=3)[1:], voting.shares(target, single, classes=3)[1:]
    )


def test_where_nobody_was_asked_the_vote_tells_nothing() -> None:
    told = voting.asked_for([v._replace(drawn=frozenset({0, 2})) for v in voters(0)], classes=3)
    assert told.flatten().tolist() == [True, False, True]
    single = voting.asked_for([v._replace(drawn=frozenset({0}), table=None) for v in voters(0)], classes=3)
    assert single.flatten().tolist() == [True, False, False]


def test_answers_are_compared_bundle_by_bundle(crossed: tuple[Path, api.Model]) -> None:
    plan, case = crossed[1].plan, prepared(crossed[1], 0)
    shape = case.image.shape[1:]
    one, other = (np.zeros((2, *shape), bool) for _ in range(2))
    one[0, :4], other[0, 2:6] = True, True
    assert mean_dice(torch.from_numpy(one), torch.from_numpy(other)) == 0.5
    assert mean_dice(torch.from_numpy(one) & False, torch.from_numpy(other) & False) == 1
    index = np.where(one[0], 1, 0).astype(np.int16)
    index[:, 0] = -1
    both = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    known = labelled_as(replace(case, drawn=np.array([True, True, False])), index, table=both)
    answer = torch.stack([torch.zeros(shape), torch.from_numpy(one[0]).float(), torch.zeros(shape)])
    everything = torch.ones(3, 1, 1, 1, dtype=torch.bool)
    assert met(answer, known, plan=plan, asked=everything) == 1  # the second bundle was not looked for
    assert met(answer, replace(known, drawn=np.ones(3, bool)), plan=plan, asked=everything) == 0.5
    truth = chosen(certain(known), plan).numpy()
    np.testing.assert_array_equal(truth, np.stack([mask(index, both, k=k) for k in (1, 2)]))


# ------------------------------------------------------------------------------------------------------------- drafts


def test_a_draft_recovers_bundles_that_cross_and_writes_their_layout(tmp_path: Path) -> None:
    data, out, run = write_white(tmp_path / "data", labelled=2, unlabelled=1), tmp_path / "out", CliRunner()
    truth = crossing(2)[1]
    for _ in range(2):  # the second time over the first
        record = api.draft(data, out, config=SOON, device="cpu")
        found = masks_in(out / "labels" / "case_2")
        assert min(dice(found[name], truth[name]) for name in truth) > 0.6
        assert (found["CST"] & found["CC"])[truth["CST"] & truth["CC"]].mean() > 0.5
    assert sorted(p.name for p in (out / "labels").iterdir()) == ["case_2"]
    assert (out / "sure" / "case_2.nii.gz").is_file()
    assert set(record["cases"]["case_2"]["sha256"]) == {
        f"labels/case_2/{SEGMENTATIONS}/{name}.nii.gz" for name in truth
    }
    write_bundles({"mine": truth["CC"]}, out / "labels" / "case_2", native=GRID)
    with pytest.raises(ConfigError, match=r"mine\.nii\.gz: is not as it was drafted"):
        api.draft(data, out, config=SOON, device="cpu")
    (out / "labels" / "case_2" / SEGMENTATIONS / "mine.nii.gz").unlink()
    rows = record["leave_one_out"]["cases"]
    assert {name: sorted(row) for name, row in rows.items()} == {f"case_{i}": ["CC", "CST"] for i in range(2)}
    assert record["leave_one_out"]["dice"] > 0.6
    assert 0.5 < record["cases"]["case_2"]["sure"] <= 1
    write_case(tmp_path / "truth" / "case_2", *crossing(2))
    told = run.invoke(
        app, ["tracts", "evaluate", str(out / "labels"), str(tmp_path / "truth"), "-o", str(tmp_path / "f")]
    )
    assert told.exit_code == 0, told.output
    page = run.invoke(app, ["report", str(out), "-o", str(tmp_path / "report.html")])
    assert page.exit_code == 0, page.output
    assert "Dice CST" in (tmp_path / "report.html").read_text()


def test_a_bundle_that_no_atlas_was_asked_for_is_neither_drafted_nor_judged(tmp_path: Path) -> None:
    data = write_white(tmp_path / "data", labelled=2, unlabelled=1)
    (data / "case_1" / SEGMENTATIONS / "CC.nii.gz").unlink()
    record = api.draft(data, tmp_path / "out", config=SOON, device="cpu")
    assert {case: sorted(row) for case, row in record["leave_one_out"]["cases"].items()} == {
        "case_0": ["CST"], "case_1": ["CST"],
    }  # fmt: skip
    found = masks_in(tmp_path / "out" / "labels" / "case_2")
    assert dice(found["CC"], crossing(2)[1]["CC"]) > 0.5  # by the only atlas that was asked for it
    alone = datasets.select(datasets.find(data), labelled=["case_1"], unlabelled=["case_2"])
    api.draft(alone, tmp_path / "out", config=SOON, device="cpu")
    assert list(masks_in(tmp_path / "out" / "labels" / "case_2")) == ["CST"]


# ---------------------------------------------------------------------------------------------------- personalisation


def test_a_shifted_scan_keeps_both_bundles_and_the_model_stays_equal(
    crossed: tuple[Path, api.Model], tmp_path: Path
) -> None:
    data, model = crossed
    assert model.path is not None
    files = {p.name: p.read_bytes() for p in model.path.iterdir() if p.is_file()}
    weights = {k: v.clone() for k, v in model.segmenter.state_dict().items()}
    image, truth = crossing(40)
    image = np.roll(0.5 * image + 0.3, 2, axis=1)
    truth = {name: np.roll(inside, 2, axis=0) for name, inside in truth.items()}
    folder = write_case(tmp_path / "new", image, None)
    [done] = api.personalize(
        model, folder, tmp_path / "out", atlases=data, mode="always", config=QUICK, budget_per_case=None, device="cpu",
        probabilities=True,
    )  # fmt: skip
    assert done.personalized is not None
    assert done.personalized["kept"] == "after"
    assert done.path == tmp_path / "out" / "new" / SEGMENTATIONS
    found = masks_in(done.path)
    assert done.before is not None
    assert done.before.path == tmp_path / "out" / "before" / "new" / SEGMENTATIONS
    own = masks_in(done.before.path)
    assert done.before.dice == pytest.approx({name: dice(found[name], own[name]) for name in own})
    unlike = np.any([found[name] != own[name] for name in own], axis=0).sum()
    assert done.before.voxels_changed == unlike / np.any([*found.values(), *own.values()], axis=0).sum() > 0
    assert list(case_folders(tmp_path / "out")) == ["new"]
    page = api.report(tmp_path / "out", tmp_path / "report.html").read_text()
    assert 'class="overlays compared"' in page
    assert "No picture" not in page
    assert "of the labelled voxels changed" in page
    assert min(dice(found[name], truth[name]) for name in truth) > 0.6
    assert (found["CST"] & found["CC"])[truth["CST"] & truth["CC"]].mean() > 0.6
    assert {p.name: p.read_bytes() for p in model.path.iterdir() if p.is_file()} == files
    assert all(torch.equal(value, weights[name]) for name, value in model.segmenter.state_dict().items())


@pytest.fixture
def _of_any_height(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crossing is the same along one axis, so that by images alone an atlas is of any height."""
    monkeypatch.setattr(affine, "MOST_SCALE", 100.0)


@pytest.mark.usefixtures("_of_any_height")
def test_a_bundle_that_no_atlas_was_asked_for_is_left_to_the_model(
    crossed: tuple[Path, api.Model], tmp_path: Path
) -> None:
    data, model = crossed
    known = atlases.atlases_of(datasets.find(data), model.plan, folder=tmp_path)
    half = [without(case, 1) for case in known]
    assert [case.counts[1] for case in half] == [0, 0, 0]
    maker = Personalizer(model, half, config=QUICK, hardware=pick("cpu"))
    found, truth = maker(prepared(model, 41), mode="always"), crossing(41)[1]
    assert found.kept == "after"
    assert maker.known.worth > 0.6
    for name, inside in zip(model.plan.names.values(), chosen(found.probs, model.plan).numpy(), strict=True):
        assert dice(inside, truth[name]) > 0.6, name


@pytest.mark.slow
@pytest.mark.usefixtures("_of_any_height")
def test_what_the_guard_refuses_is_what_predict_answers(
    crossed: tuple[Path, api.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personalize, "objection", lambda evidence: "not today")
    data, model = crossed
    folder = write_case(tmp_path / "new", crossing(42)[0], None)
    [done] = api.personalize(model, folder, tmp_path / "auto", atlases=data, config=QUICK, device="cpu")
    assert done.personalized is not None
    assert done.personalized["reason"] == "not today"
    api.predict(model, folder, tmp_path / "plain", device="cpu")
    for name, inside in masks_in(tmp_path / "plain" / "new").items():
        np.testing.assert_array_equal(inside, masks_in(done.path)[name])


def test_kept_atlases_come_back_with_their_tables(
    crossed: tuple[Path, api.Model], trained: tuple[Path, api.Model], tmp_path: Path
) -> None:
    data = write_crossings(tmp_path / "data", labelled=2, unlabelled=1)
    (data / "case_1" / SEGMENTATIONS / "CC.nii.gz").unlink()
    settings = SMALL | {"network.widths": "4,8"}
    model = api.train(data, tmp_path / "model", steps=2, settings=settings, device="cpu", keep_atlases=True)
    (tmp_path / "grid").mkdir()
    fresh = atlases.atlases_of(datasets.find(data), model.plan, folder=tmp_path / "grid")
    for one, other in zip(atlases.load_atlases(model), fresh, strict=True):
        np.testing.assert_array_equal(one.label, other.label)
        assert one.table is not None
        assert other.table is not None
        np.testing.assert_array_equal(one.table, other.table)
        assert one.counts == other.counts
        assert one.drawn.tolist() == other.drawn.tolist()
    command = ["predict", str(tmp_path / "model"), str(data / "case_2"), "-o", str(tmp_path / "out"), "--personalize"]
    told = CliRunner().invoke(app, [*command, "auto"])
    assert told.exit_code == 0, told.output
    assert list(bundle_files(tmp_path / "out" / "case_2")) == ["CC", "CST"]
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert "kept" in record[0]["personalized"]
    (tmp_path / "single").mkdir()
    known = atlases.atlases_of(datasets.find(trained[0]), trained[1].plan, folder=tmp_path / "single")
    with safetensors.safe_open(atlases.save_atlases(known, tmp_path / "single", plan=trained[1].plan), "np") as archive:
        assert {key.split(".")[1] for key in archive.keys()} == {"image", "label", "drawn", "patient"}  # noqa: SIM118


def test_atlases_must_overlap_where_the_model_does(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    image, truth = crossing(0)
    write_case(tmp_path / "single" / "case_0", image, None)
    label = np.where(truth["CST"], 2, truth["CC"]).astype(np.uint8)
    write_labelmap(label, tmp_path / "single" / "case_0" / "labels.nii.gz", native=GRID)
    (tmp_path / "single" / "dataset.json").write_text(
        json.dumps({"channel_kind": "scalar", "labels": {"CC": 1, "CST": 2}})
    )
    with pytest.raises(DataError, match="holds one label a voxel, the model gives labels that overlap"):
        api.personalize(crossed[1], crossed[0] / "case_3", tmp_path / "out", atlases=tmp_path / "single", device="cpu")
