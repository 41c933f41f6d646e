"""The shift card: injected differences are named, chance is not, lesions are told apart, the page is whole."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import benches
import numpy as np
import pytest
from phantom import phantom, write_dataset
from torch import nn

from fewscan import api, shifting, surroundings
from fewscan.data import dataset as datasets
from fewscan.data.io import write_image, write_labelmap
from fewscan.deliver import card
from fewscan.errors import ConfigError, DataError
from fewscan.judge import lesions, looks, shift
from fewscan.judge.shift import Distance, Systematic
from fewscan.learn import infer
from fewscan.learn.hardware import pick
from fewscan.methods.scores import score
from fewscan.shifting import shift as make_card
from fewscan.space.volume import IGNORE, Case, Labelmap, Volume

bench = benches.load("shift")


def named(*kinds, value=3.0, p=0.001):
    found = {kind: Distance(value=value, low=-1.0, high=1.0, p=p) for kind in kinds}
    return Systematic(kinds=found, distances={}, named=tuple(kinds))


@pytest.fixture(scope="module")
def normaliser(untrained):
    """A model without an encoder: what differs is named without features."""
    return replace(untrained, segmenter=nn.Identity())


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return api.open(bench.synthetic(tmp_path_factory.mktemp("scans"), 24))


def test_injected_shifts_are_named_in_most_of_twenty_cases(scans, normaliser):
    told = [bench.run(scans, normaliser, seed=seed, kind=kind, each=8) for seed, kind in bench.cases(20)]
    assert sum(row["right"] for row in told) >= 18, told


def test_nothing_is_named_where_nothing_was_done(scans, normaliser):
    told = [bench.run(scans, normaliser, seed=100 + seed, kind="none", each=6)["named"] for seed in range(10)]
    assert told.count("nothing") >= 9, told


def test_two_patients_show_nothing_however_far_apart(scans, normaliser):
    images = [datasets.load(case, scans).image for case in scans.cases[:4]]
    first = [looks.look(image, normaliser, case=str(i)) for i, image in enumerate(images[:2])]
    rng = np.random.default_rng(0)
    second = [
        looks.look(bench.inject(i, "spacing", rng=rng), normaliser, case=f"t{n}") for n, i in enumerate(images[2:])
    ]
    assert shift.systematic(first, second).named == ()


def test_many_scans_of_one_patient_count_as_one(scans, normaliser):
    image = datasets.load(scans.cases[0], scans).image
    rng = np.random.default_rng(0)
    others = [datasets.load(case, scans).image for case in scans.cases[1:7]]
    source = [looks.look(i, normaliser, case=f"s{n}") for n, i in enumerate(others)]
    target = [
        looks.look(bench.inject(image, "blur", rng=rng), normaliser, case=f"t{n}", patient="one") for n in range(8)
    ]
    assert shift.systematic(source, target).named == ()


def test_features_tell_noisy_scans_from_others(scans, untrained):
    rng = np.random.default_rng(0)
    images = [datasets.load(case, scans).image for case in scans.cases[:18]]
    source = [looks.look(i, untrained, case=f"s{n}") for n, i in enumerate(images[:9])]
    target = [looks.look(bench.inject(i, "noise", rng=rng), untrained, case=f"t{n}") for n, i in enumerate(images[9:])]
    found = shift.systematic(source, target).distances
    assert set(found) == {"intensity, Wasserstein", "features, MMD", "features, Fréchet"}
    assert min(found["features, MMD"].p, found["features, Fréchet"].p) < 0.05


def test_a_lesion_hides_only_what_is_near_it(untrained):
    image, _, geometry = phantom(0, shape=(40, 40, 40))
    lesion = np.zeros(image.shape, bool)
    lesion[2:8, 2:8, 2:8] = True
    lit = np.where(lesion, 5000, image).astype(np.float32)
    clean = looks.look(Volume(image[None], geometry, geometry), untrained, case="a", lesion=lesion)
    bright = looks.look(Volume(lit[None], geometry, geometry), untrained, case="b", lesion=lesion)
    np.testing.assert_allclose(bright.numbers["fine detail"], clean.numbers["fine detail"], atol=0.3)


def test_dice_near_and_far_from_a_lesion():
    lesion = np.zeros((40, 8, 8), bool)
    lesion[0] = True
    away = looks.distance_mm(lesion, (1.0, 1.0, 1.0))
    truth = np.ones(lesion.shape, bool)
    found = away > lesions.NEAR_MM
    assert lesions.near_and_far_dice(found, truth, away=away) == (0.0, 1.0)
    near, far = lesions.near_and_far(found.astype(float), away, mask=truth)
    assert (near, far) == (0.0, 1.0)


def test_only_structures_with_enough_on_both_sides_of_a_lesions_surroundings_have_a_dice():
    lesion = np.zeros((40, 8, 8), bool)
    lesion[0] = True
    away = looks.distance_mm(lesion, (1.0, 1.0, 1.0))
    sliver = np.zeros(lesion.shape, bool)
    sliver[15:, :5, :5] = True  # 25 of its voxels are near, and all of these are missed
    assert np.isnan(lesions.near_and_far_dice(sliver & (away > lesions.NEAR_MM), sliver, away=away)).all()
    sliver[13:, :5, :5] = True
    assert lesions.near_and_far_dice(sliver & (away > lesions.NEAR_MM), sliver, away=away) == (0.0, 1.0)


def test_three_and_three_patients_cannot_show_what_three_and_four_can(scans, normaliser):
    rng = np.random.default_rng(0)
    images = [datasets.load(case, scans).image for case in scans.cases[:7]]
    source = [looks.look(i, normaliser, case=f"s{n}") for n, i in enumerate(images[:3])]
    target = [
        looks.look(bench.inject(i, "spacing", rng=rng), normaliser, case=f"t{n}") for n, i in enumerate(images[3:])
    ]
    few, more = shift.systematic(source, target[:3]), shift.systematic(source, target)
    assert min(found.p for found in few.kinds.values()) >= 0.1
    assert (few.named, more.named[:1]) == ((), ("voxel size",))


@pytest.mark.parametrize(
    ("found", "more", "said"),
    [
        (named(), {"told": False}, "Too few patients to tell whether the populations differ: compare at least 3 and 4"),
        (named(), {"told": False, "lost": 0.28}, "Dice is 0.28 lower on the target, and there are too few patients to"),
        (named(), {"lost": 0.28}, "Dice is 0.28 lower on the target, and nothing measured here explains it: look at"),
        (named(), {"lost": 0.05}, "use the model as it is"),
        (named(), {"deformed": True}, "; tissue around lesions may be deformed."),
        (named("contrast"), {}, "Contrast differs: fine-tuning with about 5 labelled cases may repair part of this; how"
         " much only a test shows."),
        (named("intensity scale"), {}, "Only the intensity scale differs, which the model's normalisation takes away"),
        (named("fine detail", "contrast", value=9.0), {}, "Fine detail and contrast differ: fine-tuning with about 10"),
        (named("contrast"), {"deformed": True}, "; tissue around lesions may be deformed, which it repairs in part"),
        (named("contrast"), {"review": ["a", "b"]}, "; a and b need a human."),
        (
            named("contrast"),
            {"pushed": {"AF": 3.4, "CST": 6.2, "UF": 1.0}, "review": ["a"]},
            "; it repairs the deformation around lesions in part at best: CST and 1 more may be pushed by up to 6 mm;",
        ),
        (named(), {"lost": 0.28, "pushed": {"CST": 6.2}}, "; it repairs the deformation around lesions in part"),
        (named(), {"pushed": {"CST": 6.2}}, "; around lesions CST may be pushed by up to 6 mm."),
        (named(), {"pushed": {"CST": 6.2}, "deformed": True}, "; around lesions CST may be pushed by up to 6 mm."),
        (named(), {"pushed": {"CST": 2.9}}, "check its first answers."),
    ],
)  # fmt: skip
def test_the_advice_is_one_plain_sentence(found, more, said):
    text = shift.advice(found, normalised=True, **more)
    assert said in text
    assert text.count(". ") == 0


def test_looking_at_many_distances_finds_no_more_than_looking_at_one(monkeypatch):
    """Ten measures that tell nothing, each a number drawn for each way to deal the scans out."""
    monkeypatch.setattr(shift, "PERMUTATIONS", 199)
    scans = [
        looks.Look(id=str(i), patient=str(i), numbers={"contrast": np.ones(1)}, quantiles=np.ones((1, 1)),
                   features=np.ones((1, 1))) for i in range(12)
    ]  # fmt: skip
    told = []
    for seed in range(60):

        def numbers(draw, name, seed=seed):
            return np.random.default_rng([seed, name, *np.packbits(draw)]).random()

        monkeypatch.setattr(shift, "_of_features", lambda looks: {str(n): partial(numbers, name=n) for n in range(10)})
        found = shift.systematic(scans[:6], scans[6:], seed=seed).distances
        told.append(min(distance.p for distance in found.values()) <= shift.RARE)
    assert sum(told) <= 8  # one in twenty; without a correction two in five
    np.testing.assert_allclose(shift._as_far(np.array([3.0, 1.0, 2.0, 3.0])), [0.5, 1.0, 0.75, 0.5])


def test_chance_deals_whole_patients_around_lesions_too():
    healthy, ill = [1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 1.9, 2.0]
    assert shift.difference(healthy, ill).p < 0.05
    found = shift.difference(healthy, ill, patients=(["a", "b", "a", "b"], ["x", "x", "y", "y"]))
    assert found.value == pytest.approx(1.0)
    assert found.p > 0.05  # two and two patients: one way in three is as far apart


def card_of(model, source, target=None):
    return shifting._Card(model, source, target or source, {}, pick("cpu"), 0, None, 0.0)


def test_what_nobody_looked_for_is_the_predictions(untrained, monkeypatch):
    monkeypatch.setattr(lesions, "ENOUGH", 20)
    grid = phantom(0)[2]
    ball, rod, lesion = (np.zeros(grid.shape, bool) for _ in range(3))
    ball[2:6, 2:10, 2:6], rod[2:6, 14:18, 2:6], lesion[14:18, 14:18, 2:6] = True, True, True
    answers = {1: ball, 5: rod}
    answer = SimpleNamespace(mask=lambda value, plan: answers[value])
    label = np.where(ball, 1, 0).astype(np.uint16)
    label[:, 8:] = IGNORE  # half of the ball, and all of the rod, where nobody looked
    image = Volume(phantom(0)[0][None], grid, grid)
    truth = Labelmap(label, grid, {1: "ball", 2: "rod"})
    case = Case("case_00", image, truth, drawn=frozenset({1}))
    found = surroundings.structures(case, lesion, answer=answer, model=untrained)
    assert (found["dice_near"], found["dice_far"]) == (1.0, 1.0)
    assert found["distance_mm"]["rod"] == pytest.approx(9.0)
    assert found["distance_mm"]["ball"] == pytest.approx(np.hypot(9.0, 5.0))  # of the part that nobody looked at
    assert found["pushed_mm"]["rod"] > 0
    asked = surroundings.structures(replace(case, drawn=None), lesion, answer=answer, model=untrained)
    assert asked["dice_far"] == 1.0  # the rod lies where nobody looked
    missed = Case("case_00", image, Labelmap(np.where(ball, 1, 0).astype(np.uint16), grid, truth.names))
    found = surroundings.structures(missed, lesion, answer=answer, model=untrained)
    assert (found["dice_near"], found["dice_far"]) == (1.0, 1.0)  # a rod that is not there has no near and far


def test_channels_belong_together_by_name(untrained, tmp_path):
    image, _, grid = phantom(0)
    (tmp_path / "images").mkdir()
    write_image(np.stack([image, 2 * image]), tmp_path / "images" / "case_00.nii.gz", native=grid)
    data = replace(api.open(tmp_path), channels=("T2", "T1"))
    model = replace(untrained, plan=replace(untrained.plan, channels=("T1", "T2")))
    case = shifting._load(card_of(model, data), data.cases[0], data)
    assert case.image.channels == ("T1", "T2")
    np.testing.assert_array_equal(case.image.data, np.stack([2 * image, image]))
    with pytest.raises(DataError, match="has the channels T2, FLAIR, the model takes T1, T2; name the channels alike"):
        make_card(model, replace(data, channels=("T2", "FLAIR")), data, tmp_path / "card.html")


def test_another_population_may_number_its_cases_alike(trained, tmp_path):
    data, model = trained
    new = api.open(write_dataset(tmp_path / "new", labelled=3))
    work = card_of(model, api.open(data), new)
    assert shifting._dice(work, work.source, 0.0)["trained"] is True
    found = shifting._dice(work, new, 0.0)
    assert (found["trained"], sorted(found["cases"])) == (False, ["case_00", "case_01", "case_02"])


def test_tissue_near_a_lesion_that_counts_after_all_is_said(untrained):
    image, _, geometry = phantom(0, shape=(40, 40, 40))
    volume, lesion = Volume(image[None], geometry, geometry), np.zeros(image.shape, bool)
    lesion[2:8, 2:8, 2:8] = True
    assert not looks.look(volume, untrained, case="a", lesion=lesion).near
    lesion[4::8, 4::8, 4::8] = True
    assert looks.look(volume, untrained, case="a", lesion=lesion).near
    assert not looks.look(volume, untrained, case="a").near
    [said] = card._caveats({"near_lesions": ["p1", "p2"]})
    assert said.startswith("Less than 1000 voxels of tissue lie more than 10 mm away from the lesion in p1, p2: all")


def test_what_is_only_named_as_trained_on_is_said_so(trained, tmp_path):
    _, model = trained
    copy, more = (api.open(write_dataset(tmp_path / str(n), labelled=n)) for n in (3, 5))
    found = shifting._dice(card_of(model, copy), copy, 0.0)
    assert (found["trained"], found["left_out"]) == (True, 0)
    assert "scans named as those it was trained on" in card._dice({"source": found})
    found = shifting._dice(card_of(model, more), more, 0.0)
    assert (found["trained"], found["left_out"], sorted(found["cases"])) == (False, 3, ["case_03", "case_04"])
    assert "2 labelled scans, without 3 named as it was trained on" in card._dice({"source": found})


def test_the_card_is_one_page_with_its_numbers_beside(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(shifting, "TEMPLATES", 1)
    monkeypatch.setattr(shifting, "MOST_LESIONS", 1)
    data, model = write_dataset(tmp_path / "source", labelled=4), untrained
    target = write_dataset(tmp_path / "target", labelled=4, spacing=(2.0, 2.0, 2.0))
    (tmp_path / "masks").mkdir()
    geometry = phantom(0, spacing=(2.0, 2.0, 2.0))[2]
    lesion = np.zeros(geometry.shape, np.uint8)
    lesion[14:18, 4:8, 6:10] = 1
    for case in ("case_00", "case_02", "case_03"):
        write_labelmap(lesion, tmp_path / "masks" / f"{case}.nii.gz", native=geometry)
    predicted, segment = [], infer.segment
    monkeypatch.setattr(infer, "segment", lambda m, image, **how: predicted.append(image) or segment(m, image, **how))
    record = make_card(model, data, target, tmp_path / "card.html", lesions=tmp_path / "masks")
    assert len(predicted) == 4 + 4  # a case with a lesion and labels is predicted once for both
    fresh = api.open(target)
    whole = {c.id: score(model, datasets.load(c, fresh), hardware=pick("cpu")) for c in fresh.labelled}
    means = {case: np.mean(list(scores.values())) for case, scores in whole.items()}
    assert record["dice"]["target"]["cases"] == pytest.approx(means, abs=1e-6)
    assert json.loads((tmp_path / "card.json").read_text()) == json.loads(json.dumps(record))
    assert record["systematic"]["named"][0] == "voxel size"
    rows = record["lesion"]["cases"]
    assert sorted(rows) == ["case_00", "case_02", "case_03"]
    assert all(len(row["pushed_mm"]) == len(row["distance_mm"]) == len(model.names) for row in rows.values())
    assert [row["volume change"] > 0 for row in rows.values() if "volume change" in row] == [True]
    assert record["lesion"]["registered"] == len(record["lesion"]["control"]) == 1
    page = (tmp_path / "card.html").read_text()
    assert record["advice"] in page
    for text in (
        "voxel size",
        "log det J",
        "Dice near",
        "pushed, mm",
        "case_00",
        "registered onto 1 of 3",
        "For research use only",
    ):
        assert text in page, text
    assert str(tmp_path) not in page + (tmp_path / "card.json").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    make_card(model, data, data, tmp_path / "card.html")  # its own card it may replace


def test_what_cannot_be_compared_is_refused(untrained, tmp_path):
    data, model = write_dataset(tmp_path / "data", labelled=1), untrained
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        make_card(model, data, data, tmp_path / "card")
    (tmp_path / "evaluation.json").write_text('{"format": "fewscan evaluation 1"}')
    with pytest.raises(ConfigError, match=r"evaluation\.json exists and was not written by fewscan shift"):
        make_card(model, data, data, tmp_path / "evaluation.html")
    with pytest.raises(DataError, match="no such folder; give a folder of masks"):
        make_card(model, data, data, tmp_path / "card.html", lesions=tmp_path / "none")
    (tmp_path / "masks").mkdir()
    write_image(np.ones((4, 4, 4), np.float32), tmp_path / "masks" / "else.nii.gz", native=phantom(0)[2])
    with pytest.raises(DataError, match="none of its 1 files is named like a case"):
        make_card(model, data, data, tmp_path / "card.html", lesions=tmp_path / "masks")
