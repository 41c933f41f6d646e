"""Atlases in the shape of a scan, and what personalisation does where they are of no use to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from phantom import SMALL, write_dataset

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.errors import GeometryError
from fewscan.learn.alignment import grid_of
from fewscan.learn.atlases import atlases_of
from fewscan.learn.batches import labelled_as
from fewscan.learn.hardware import pick
from fewscan.methods import personalize, shaping
from fewscan.methods.evidence import Known
from fewscan.methods.personalize import PersonalizeConfig, Personalizer
from fewscan.methods.shaping import Shaper
from fewscan.space.volume import IGNORE, one_hot

QUICK = PersonalizeConfig(views=1, rounds=1, steps=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that knows little, its three atlases and a fourth scan as the model sees it."""
    root = tmp_path_factory.mktemp("shaping")
    data = datasets.find(write_dataset(root / "data", labelled=4))
    model = api.train(data, root / "model", steps=30, settings=SMALL, device="cpu")
    (root / "grid").mkdir()
    *atlases, other = atlases_of(data, model.plan, folder=root / "grid")
    return model, atlases, other


def mask_of(case):
    """As sure as can be."""
    return one_hot(torch.from_numpy(np.array(case.label)).long()[None], 3)[0]


def test_without_refinement_the_answer_is_what_atlases_and_model_say_whatever_the_memory(trained):
    model, atlases, other = trained
    answers = [
        Personalizer(model, atlases, config=replace(QUICK, steps=0, memory=memory), hardware=pick("cpu"))(
            other, mode="always"
        ).after
        for memory in (0.0, 0.5)
    ]
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_change_is_made_as_far_as_the_evidence_says(trained, monkeypatch, share):
    model, atlases, other = trained
    maker = Personalizer(model, atlases, config=replace(QUICK, steps=0), hardware=pick("cpu"))
    whole = maker(other, mode="always")
    assert whole.evidence["strength"] == maker.known.strength(whole.evidence["agreement"])
    monkeypatch.setattr(Known, "strength", lambda known, agreement: share)
    found = maker(other, mode="always")
    far = (whole.after - whole.before) / whole.evidence["strength"]
    torch.testing.assert_close(found.after, found.before + share * far, atol=1e-4, rtol=0)


def test_an_atlas_has_a_say_by_masks_only_on_structures_that_it_shows_whole(trained):
    model, atlases, other = trained
    sparse = np.array(atlases[0].label)
    sparse[..., ::2] = -1
    known = [labelled_as(atlases[0], sparse), replace(atlases[1], drawn=np.array([True, True, False])), atlases[2]]
    maker = Personalizer(model, known, config=QUICK, hardware=pick("cpu")).shaper
    mask = mask_of(other)
    own = grid_of(other, model.plan.spacing)
    fixed, moving = maker._masks(mask, [(atlas, np.eye(4)) for atlas in known], grid=own)
    order = mask[1:].sum((1, 2, 3)).argsort(descending=True).tolist()  # of ball and rod, the largest first
    said = [[False, False], [True, False], [True, True]]
    for maps in (fixed, moving):
        assert [[bool(one[order.index(k)].any()) for k in (0, 1)] for one in maps] == said
    assert fixed.is_contiguous()


@pytest.mark.parametrize("blank", [1, 3])
def test_atlases_whose_drawn_slices_lie_beyond_the_scan_teach_nothing(trained, monkeypatch, blank):
    model, atlases, other = trained
    maker, real, taught = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu")), Shaper.shaped, []

    def shaped(self, aligned, *, mask):
        found = real(self, aligned, mask=mask)
        return [v._replace(label=np.full_like(v.label, IGNORE)) for v in found[:blank]] + found[blank:]

    def supervised(lessons, *args, **options):
        taught.append([lesson.id for lesson in lessons])
        return phase(lessons, *args, **options)

    phase = personalize.segment.supervised
    monkeypatch.setattr(personalize.segment, "supervised", supervised)
    monkeypatch.setattr(Shaper, "shaped", shaped)
    found = maker(other, mode="always")
    assert found.kept == "after"
    assert ("steps" in found.evidence) == (blank < 3)
    assert [len(lessons) for lessons in taught] == ([2 * (3 - blank)] * 2 if blank < 3 else [])


def test_atlases_that_lie_elsewhere_or_are_of_another_size_are_left_out(trained, monkeypatch):
    model, atlases, other = trained
    real = shaping.affine.fit

    def fit(fixed, moving, **how):
        if torch.equal(moving[:1], torch.from_numpy(np.array(atlases[0].guide[:1]))):
            raise GeometryError("the two images do not overlap")
        matrix = real(fixed, moving, **how)
        if torch.equal(moving[:1], torch.from_numpy(np.array(atlases[1].guide[:1]))):
            matrix = matrix @ np.diag([1.5, 1.5, 1.5, 1.0])  # 3.4 times the volume
        return matrix

    monkeypatch.setattr(shaping.affine, "fit", fit)
    shaper = Shaper(model, atlases, most=3, anatomy=0.2, hardware=pick("cpu"))
    aligned = shaper.aligned(torch.from_numpy(np.array(other.guide)), grid_of(other, model.plan.spacing))
    assert [atlas.id for atlas, _ in aligned.atlases] == [atlases[2].id]
    assert len(aligned.moving) == 1
    found = Personalizer(model, atlases[:2], config=QUICK, hardware=pick("cpu"))(other, mode="always")
    assert (found.kept, torch.equal(found.probs, found.before)) == ("before", True)
    assert "no atlas can be laid onto this scan" in found.reason


def test_a_refinement_that_diverges_costs_a_scan_its_change_alone(trained, monkeypatch):
    model, atlases, other = trained
    real = personalize.segment.supervised

    def supervised(*args, **options):
        phase = real(*args, **options)
        return replace(phase, objective=lambda batch: {k: v * np.inf for k, v in phase.objective(batch).items()})

    monkeypatch.setattr(personalize.segment, "supervised", supervised)
    found = Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(other, mode="always")
    assert (found.kept, torch.equal(found.probs, found.before)) == ("before", True)
    assert "no longer finite" in found.reason
    assert "--set" not in found.reason


def test_progress_goes_on_through_the_refinement(trained):
    model, atlases, other = trained
    seen = []
    Personalizer(model, atlases, config=QUICK, hardware=pick("cpu"))(other, mode="always", tick=seen.append)
    assert seen == sorted(seen)
    refining = [share for share in seen if share > 0.5]
    assert refining == pytest.approx([0.5 + 0.5 * step / QUICK.steps for step in range(1, QUICK.steps + 1)])


def test_slices_left_blank_do_not_stretch_an_atlas_to_fill_the_mask(trained):
    """Taken for background they would: half of each structure would seem to be missing."""
    model, atlases, other = trained
    mask = mask_of(other)
    guide, own = torch.from_numpy(np.array(other.guide)), grid_of(other, model.plan.spacing)
    half = np.array(atlases[0].label)
    half[half.shape[0] // 2 :] = -1
    maker = Personalizer(
        model, [labelled_as(atlases[0], half)], config=replace(QUICK, anatomy=4.0), hardware=pick("cpu")
    ).shaper
    aligned = maker.aligned(guide, own)
    [free], [pulled] = maker.shaped(aligned, mask=None), maker.shaped(aligned, mask=mask)
    assert torch.equal(free.image, pulled.image)
