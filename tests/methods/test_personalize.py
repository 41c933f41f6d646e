"""Personalisation: atlases in the shape of a scan, a refined copy, and a guard that may refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom import SMALL, write_dataset

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.errors import ConfigError
from fewscan.learn.alignment import grid_of
from fewscan.learn.atlases import atlases_of
from fewscan.learn.batches import labelled_as
from fewscan.learn.hardware import pick
from fewscan.learn.networks import layers
from fewscan.methods import personalize, shaping
from fewscan.methods.evidence import mean_dice, objection
from fewscan.methods.personalize import PersonalizeConfig, Personalizer
from fewscan.methods.shaping import Shaper
from fewscan.methods.voting import shares

QUICK = PersonalizeConfig(views=1, rounds=1, steps=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, its three atlases and a fourth scan as the model sees it."""
    root = tmp_path_factory.mktemp("personalize")
    data = datasets.find(write_dataset(root / "data", labelled=4))
    seen = datasets.select(data, labelled=[c.id for c in data.labelled[:3]], unlabelled=[])
    model = api.train(seen, root / "model", steps=60, settings=SMALL, device="cpu")
    (root / "grid").mkdir()
    *atlases, other = atlases_of(data, model.plan, folder=root / "grid")
    return model, atlases, other


def dice(probs, case):
    return mean_dice(probs.argmax(0), torch.from_numpy(np.array(case.label)).long())


def test_a_badly_segmented_scan_gains_and_the_model_stays_equal_to_the_bit(trained):
    model, atlases, other = trained
    weights = {k: v.clone() for k, v in model.segmenter.state_dict().items()}
    foggy = replace(other, image=(0.4 * other.image).astype(np.float32))  # another contrast
    found = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(foggy, mode="always")
    assert found.kept == "after"
    assert dice(found.probs, other) > dice(found.before, other)
    assert dice(found.probs, other) > 0.8
    torch.testing.assert_close(found.probs.sum(0), torch.ones(found.probs.shape[1:]), atol=1e-3, rtol=0)
    for name, value in model.segmenter.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not any(p.requires_grad and p.grad is not None for p in model.segmenter.parameters())


def test_it_is_the_same_each_time(trained):
    model, atlases, other = trained
    maker = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))
    assert torch.equal(maker(other, mode="always").after, maker(other, mode="always").after)


def test_the_guard_refuses_what_the_atlases_do_not_fit(trained):
    model, atlases, other = trained
    maker = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))
    rng = np.random.default_rng(0)
    noise = replace(other, image=rng.normal(size=other.image.shape).astype(np.float32))
    truth = torch.from_numpy(np.array(other.label)).long()
    sure = torch.nn.functional.one_hot(truth, 3).permute(3, 0, 1, 2).float()
    maker._views = lambda image, network: (sure, sure, 1.0)  # a first mask that is no reason by itself
    found = maker(noise, mode="auto")
    assert found.kept == "before"
    assert torch.equal(found.probs, found.before)
    assert "fit the scan by" in found.reason


def test_auto_accepts_a_scan_that_atlases_fit(trained):
    model, atlases, other = trained
    found = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(other, mode="auto")
    assert (found.kept, found.reason) == ("after", personalize.FITTING)
    assert dice(found.probs, other) > dice(found.before, other) - 0.01
    assert (found.evidence["rounds"], found.evidence["steps"]) == (QUICK.rounds, QUICK.steps)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"reached": 0.49}, "the atlases reach 49% of the structures only"),
        ({"likeness": 0.39}, "the deformed atlases fit the scan by 0.390"),
        ({"agreement": 0.59}, "agree by a Dice of 0.59 only, where the atlases are worth 0.80"),
        ({"agreement": 0.59, "consistency": 0.9}, ""),  # the first mask is unsteady: sound atlases are to correct it
        ({"agreement": 0.39, "consistency": 0.5}, "agree by a Dice of 0.39 only"),
        ({"agreement": 0.59, "atlases_worth": 0.7}, ""),  # registration is bad at this organ: so much is to be expected
    ],
)
def test_each_objection_has_its_bound(changed, said):
    sound = {"reached": 1.0, "likeness": 0.5, "likeness_floor": 0.4, "agreement": 0.7, "atlases_worth": 0.8}
    sound |= {"consistency": 0.975}
    found = objection(sound | changed)
    assert found.startswith(said) if said.startswith("the") else said in found
    assert bool(found) == bool(said)


def test_an_empty_first_mask_is_left_alone(trained):
    model, atlases, other = trained
    blank = replace(other, image=np.zeros_like(np.array(other.image)))
    maker = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))
    empty = torch.eye(3)[0].view(3, 1, 1, 1).expand(3, *blank.image.shape[1:])
    maker._views = lambda image, network: (empty, empty, 1.0)
    found = maker(blank, mode="always")
    assert (found.kept, found.evidence) == ("before", {})
    assert "empty" in found.reason


def test_one_atlas_alone_is_enough(trained):
    model, atlases, other = trained
    found = Personalizer(model, atlases[:1], config=QUICK, hardware=pick("cpu"))(other, mode="always")
    assert dice(found.probs, other) > 0.7
    assert found.evidence["likeness_floor"] == 0.0


def test_auto_refuses_where_nothing_could_be_calibrated(trained):
    """One atlas, or several scans of one patient: nobody knows how well atlases usually fit."""
    model, atlases, other = trained
    for few in (atlases[:1], [replace(atlas, patient="p") for atlas in atlases]):
        maker = Personalizer(model, few, config=QUICK, hardware=pick("cpu"))
        found = maker(other, mode="auto")
        assert found.kept == "before"
        assert "nothing was calibrated" in found.reason
        assert maker.known.likeness == ()
    forced = Personalizer(model, atlases[:1], config=replace(QUICK, steps=0), hardware=pick("cpu"))(
        other, mode="always"
    )
    assert forced.kept == "after"
    assert "nothing was calibrated" in forced.reason


def test_all_scans_of_a_patient_are_left_out_together(trained, monkeypatch):
    model, atlases, _ = trained
    twins = [replace(a, id=f"{a.id} {side}", patient=a.id) for a in atlases for side in "LR"]
    lines, voted = [], []
    config = replace(QUICK, atlases=4)
    maker = Personalizer(model, twins, config=config, hardware=pick("cpu"), say=lines.append)

    def shaped(self, aligned, *, mask):
        voted.append({atlas.patient for atlas, _ in aligned.atlases})
        return []

    monkeypatch.setattr(Shaper, "shaped", shaped)
    assert maker.known.likeness == ()
    everyone = {a.id for a in atlases}
    left_out = [everyone - seen for seen in voted]
    assert [len(row) for row in left_out] == [1] * 4
    assert set.union(*left_out[:3]) == everyone  # each patient once before one comes a second time
    assert len(lines) == 4
    assert "4 of 4" in lines[-1]


def test_of_many_atlases_only_those_that_look_like_the_scan_are_fitted(trained, monkeypatch):
    model, atlases, other = trained
    rng = np.random.default_rng(0)
    strangers = [
        replace(atlases[0], id=f"noise {i}", image=rng.normal(size=other.image.shape).astype(np.float32))
        for i in range(8)
    ]
    fitted = []
    real = shaping.affine.fit

    def fit(fixed, moving, **how):
        fitted.append(moving)
        return real(fixed, moving, **how)

    monkeypatch.setattr(shaping, "MOST_FITTED", 3)
    monkeypatch.setattr(shaping.affine, "fit", fit)
    maker = Personalizer(model, [*strangers, *atlases], config=replace(QUICK, atlases=3), hardware=pick("cpu"))
    guide = torch.from_numpy(np.array(other.guide))
    found = maker.shaper.aligned(guide, grid_of(other, model.plan.spacing))
    assert len(fitted) == 3
    assert {atlas.id for atlas, _ in found.atlases} == {atlas.id for atlas in atlases}


def test_a_mask_supervises_the_deformation(trained):
    """Where the image says nothing, the mask alone brings the atlases there."""
    model, atlases, other = trained
    shifted = np.roll(np.array(other.label), 3, axis=0)
    mask = torch.nn.functional.one_hot(torch.from_numpy(shifted).long(), 3).permute(3, 0, 1, 2).float()
    flat = torch.from_numpy(np.array(other.image)) * 0.01
    overlap = {}
    for weight in (0.0, 4.0):
        maker = Personalizer(model, atlases, config=replace(QUICK, anatomy=weight), hardware=pick("cpu"))
        voters = maker.shaper.shaped(maker.shaper.aligned(flat, grid_of(other, model.plan.spacing)), mask=mask)
        overlap[weight] = mean_dice(shares(flat, voters, classes=3).argmax(0), mask.argmax(0))
    assert overlap[4.0] > overlap[0.0] + 0.02


def test_a_budget_leaves_out_what_does_not_fit(trained, monkeypatch):
    model, atlases, other = trained
    maker = Personalizer(model, atlases, config=replace(QUICK, rounds=3, steps=100_000), hardware=pick("cpu"))
    found = maker(other, mode="always", seconds=1e-3)
    assert found.kept == "after"
    assert (found.evidence["rounds"], "steps" in found.evidence) == (1, False)
    now = [0.0]
    monkeypatch.setattr(personalize.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    found = maker(other, mode="always", seconds=60)
    assert found.evidence["rounds"] == 3
    assert personalize.TRIED < found.evidence["steps"] < 100


def undrawn(case, k):
    """The case as if nobody had looked for a label: its voxels are background."""
    index = np.array(case.label)
    kept = labelled_as(case, np.where(index == k, 0, index).astype(np.int16))
    return replace(kept, drawn=np.arange(len(case.drawn)) != k)


def test_an_atlas_votes_on_what_was_drawn_in_it_only(trained):
    model, atlases, other = trained
    (k,) = [k for k, name in enumerate(model.names.values(), start=1) if name == "rod"]
    partly = [undrawn(atlases[0], k), undrawn(atlases[1], k), atlases[2]]
    truth = torch.from_numpy(np.array(other.label)).long()
    for known in (partly, [undrawn(a, k) for a in atlases[:2]]):
        maker = Personalizer(model, known, config=QUICK, hardware=pick("cpu"))
        found = maker(other, mode="always")
        assert mean_dice(found.after.argmax(0) == k, truth == k) > 0.6
        torch.testing.assert_close(found.after.sum(0), torch.ones(found.after.shape[1:]), atol=1e-3, rtol=0)
        assert maker.known.worth > 0.6


def test_what_is_found_out_once_is_on_no_scans_budget(trained, monkeypatch):
    model, atlases, other = trained
    maker, now = Personalizer(model, atlases, config=replace(QUICK, rounds=3, steps=0), hardware=pick("cpu")), [0.0]
    monkeypatch.setattr(personalize.time, "monotonic", lambda: now[0])
    real = Personalizer.known.fget

    def known(self):
        if self._known is None:
            now[0] += 100
        return real(self)

    monkeypatch.setattr(Personalizer, "known", property(known))
    rounds = []
    shaped = Shaper.shaped
    monkeypatch.setattr(
        Shaper, "shaped", lambda self, *a, **k: rounds.append(k["mask"] is None) or shaped(self, *a, **k)
    )
    maker(other, mode="always", seconds=60)
    assert rounds.count(False) == 2


@pytest.mark.parametrize(
    "wrong", [{"layers": "head"}, {"atlases": 0}, {"rounds": 0}, {"memory": 1.0}, {"lr": 0.0}, {"steps": -1}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        PersonalizeConfig(**wrong)


def lesioned(other):
    """A ball that no atlas has, across a structure and what lies around it."""
    image, label = np.array(other.image), np.array(other.label)
    centre = np.argwhere(label == 1).mean(0) + 3
    inside = sum((g - c) ** 2 for g, c in zip(np.indices(label.shape), centre, strict=True)) < 4**2
    return replace(other, image=np.where(inside, image.max() * 1.3, image).astype(np.float32))


def inverted(other):
    return replace(other, image=(np.array(other.image).max() - np.array(other.image)).astype(np.float32))


def elsewhere(other):
    """Another field of view: what is there lies on its head, half of it out of sight."""
    image = np.array(other.image)[:, ::-1, :, ::-1].copy()
    image[:, : image.shape[1] // 2] = image.min()
    return replace(other, image=image)


@pytest.mark.parametrize("change", [lesioned, inverted, elsewhere])
def test_auto_leaves_what_atlases_cannot_know_no_worse(trained, change):
    model, atlases, other = trained
    found = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(change(other), mode="auto")
    lost = dice(found.before, other) - dice(found.probs, other)
    assert lost < 0.02, (found.kept, found.reason, found.evidence)


def test_a_refined_copy_that_is_less_steady_is_refused(trained, monkeypatch):
    model, atlases, other = trained
    maker, real = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu")), Personalizer._views

    def shaky(self, image, network):
        first, mean, steady = real(self, image, network)
        return first, mean, steady if network is self.segmenter else steady - 0.1

    monkeypatch.setattr(Personalizer, "_views", shaky)
    found = maker(other, mode="auto")
    assert (found.kept, torch.equal(found.probs, found.before)) == ("before", True)
    assert "less steady" in found.reason
    assert maker(other, mode="always").kept == "after"


def test_refinement_changes_the_part_it_is_told_to(trained, monkeypatch):
    model, atlases, other = trained
    taught = []
    real = Personalizer._refined

    def spy(self, *args, **options):
        taught.append(real(self, *args, **options))
        return taught[-1]

    monkeypatch.setattr(Personalizer, "_refined", spy)
    config = replace(QUICK, layers="norms")
    Personalizer(model, atlases, config=config, hardware=pick("cpu"))(other, mode="always")
    before = dict(model.segmenter.named_parameters())
    refined, steps = taught[0]
    assert steps == QUICK.steps
    moved = {name for name, value in refined.named_parameters() if not torch.equal(value, before[name])}
    assert moved
    assert moved <= layers(model.segmenter, "norms")


def test_the_mask_is_renewed_while_the_copy_is_refined(trained, monkeypatch):
    model, atlases, other = trained
    labelled = []
    real = Personalizer._lessons
    monkeypatch.setattr(
        Personalizer,
        "_lessons",
        lambda self, case, voters, mask: labelled.append(mask) or real(self, case, voters, mask),
    )
    Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(other, mode="always")
    first, second = labelled
    assert float((first - second).abs().max()) > 0
    torch.testing.assert_close(second.sum(0), torch.ones(second.shape[1:]), atol=1e-3, rtol=0)


def test_the_first_mask_guides_the_affine_part(trained):
    """Where the image says nothing, an atlas still comes to lie on the mask."""
    model, atlases, other = trained
    own, truth = grid_of(other, model.plan.spacing), torch.from_numpy(np.array(other.label)).long()
    mask = torch.nn.functional.one_hot(truth.roll(4, dims=1), 3).permute(3, 0, 1, 2).float()
    flat = torch.from_numpy(np.array(other.image)) * 0
    overlap = {}
    for known in (None, mask):
        maker = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))
        voters = maker.shaper.shaped(maker.shaper.aligned(flat, own, mask=known), mask=None)
        overlap[known is mask] = mean_dice(shares(flat, voters, classes=3).argmax(0), mask.argmax(0))
    assert overlap[True] > overlap[False] + 0.1


def test_what_was_not_drawn_in_an_atlas_is_not_taken_for_background(trained):
    """The scan's mask is cut down to the classes of the atlas; voxels nobody looked at leave the image alone."""
    _, atlases, other = trained
    truth = torch.from_numpy(np.array(other.label)).long()
    mask = torch.nn.functional.one_hot(truth, 3).permute(3, 0, 1, 2).float()
    here, there = shaping._structures(mask, undrawn(atlases[0], 2))
    assert torch.equal(here[0] > 0, truth == 1)
    assert torch.equal(there[0] > 0, torch.from_numpy(np.array(atlases[0].label)) == 1)
    sparse = np.array(atlases[0].label)
    sparse[..., ::2] = -1
    assert shaping._structures(mask, labelled_as(atlases[0], sparse)) is None
    nothing = replace(atlases[0], drawn=np.array([True, False, False]))
    assert shaping._structures(mask, nothing) is None
