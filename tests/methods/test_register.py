"""Learned registration: it learns, lands in the model folder, and starts a pairwise registration."""

import numpy as np
import pytest
import torch
from phantom import SMALL, phantom, write_dataset

from fewscan import api
from fewscan.errors import DataError, ModelError
from fewscan.learn import regularity
from fewscan.learn.alignment import Alignment
from fewscan.learn.pairs import PairBatches, Whole
from fewscan.learn.registrar import build_registrar, register_images, registration_grid
from fewscan.methods import pairwise, register
from fewscan.methods.pairwise import RegisterConfig
from fewscan.space import field, kernels
from fewscan.space.deformable import DeformConfig
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume

TINY = SMALL | {"pair.widths": "8,8,8"}


def history(model):
    import json

    return [json.loads(line) for line in (model.path / "history.jsonl").read_text().splitlines()]


def test_a_fresh_registrar_is_nearly_the_identity():
    registrar = build_registrar(channels=1, shape=(16, 12, 8), widths=(8, 8), seed=0)
    u = registrar(torch.randn(1, 1, 16, 12, 8), torch.randn(1, 1, 16, 12, 8))
    assert u.shape == (1, 3, 16, 12, 8)
    assert float(u.detach().abs().max()) < 0.1


@pytest.mark.parametrize("extent", [(37, 54, 39), (160, 190, 12), (7, 300, 5), (1, 40, 40)])
def test_the_grid_fits_network_and_budget(extent):
    shape = registration_grid(extent, (1.0, 1.0, 1.0), voxels=60_000, levels=4)
    assert np.prod(shape) <= 60_000 * 1.6
    registrar = build_registrar(channels=2, shape=shape, widths=(8, 8, 8, 8), seed=0)
    assert registrar(torch.randn(1, 2, *shape), torch.randn(1, 2, *shape)).shape == (1, 3, *shape)


def test_it_learns_from_unlabelled_scans_alone_and_starts_a_registration(tmp_path, monkeypatch):
    monkeypatch.setattr("fewscan.learn.session.LOG_EVERY_SECONDS", 0.0)
    data = write_dataset(tmp_path / "data", labelled=0, unlabelled=3)
    model = api.train(data, tmp_path / "model", method="register", steps=60, settings=TINY, device="cpu")
    terms = [row["terms"]["similarity"] for row in history(model)]
    assert np.mean(terms[-15:]) < np.mean(terms[:15])
    loaded = api.load(tmp_path / "model")
    image, _, grid = phantom(7)
    other, _, _ = phantom(8)
    fixed, moving = Volume(image[None], grid, grid), Volume(other[None], grid, grid)
    still = RegisterConfig(deform=DeformConfig(shrink=(1,), steps=(0,)))
    start = register.starter(loaded)
    with_network = pairwise.register(fixed, moving, config=still, start=start).report["similarity"]
    assert with_network["after"] >= with_network["affine"] - 0.02
    assert set(terms and history(model)[0]["terms"]) == {"similarity", "smoothness"}
    registrar = loaded.others["registrar"]
    register.starter(loaded, device=torch.device("meta"))
    assert {p.device.type for p in registrar.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="only registers"):
        api.predict(loaded, data / "images", tmp_path / "out", device="cpu")


def test_labels_and_inverse_consistency_are_terms_of_their_own(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=2, unlabelled=1)
    settings = TINY | {"pair.inverse": "0.5"}
    model = api.train(data, tmp_path / "model", method="register", steps=4, settings=settings, device="cpu")
    assert set(history(model)[0]["terms"]) == {"similarity", "smoothness", "anatomy", "inverse"}


def test_one_scan_is_refused(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1)
    with pytest.raises(DataError, match=r"data: registration needs at least two scans"):
        api.train(data, tmp_path / "model", method="register", steps=4, settings=TINY, device="cpu")


def test_a_model_without_registrar_or_of_other_channels_is_refused(tmp_path):
    data = write_dataset(tmp_path / "data", labelled=1)
    model = api.train(data, tmp_path / "model", method="segment", steps=2, settings=TINY, device="cpu")
    with pytest.raises(ModelError, match="no registration network"):
        register.starter(model)


GRID = Geometry((8, 8, 8), np.eye(4))
PLACE = Alignment(GRID, GRID, np.eye(4))


def make_pairs(**labelled):
    rng = np.random.default_rng(0)
    cases = []
    for i, own in enumerate((True, False, False)):
        image = torch.from_numpy(rng.normal(size=(1, 8, 8, 8)).astype(np.float32))
        label = rng.integers(0, 3, (8, 8, 8)).astype(np.int16) if own or i in labelled.get("pseudo", ()) else None
        cases.append(Whole(f"c{i}", image, label, own, np.ones(3, bool), PLACE))
    return cases


def pair_batches(cases, tmp_path, labelled=0.5):
    from dataclasses import dataclass

    from fewscan.learn.config import AugmentConfig

    @dataclass
    class Plan:
        mirror = False
        pairs = ()
        classes = 3

    return PairBatches(
        cases, Plan(), config=AugmentConfig(), labelled=labelled, spacing=(1.0, 1.0, 1.0), device=torch.device("cpu")
    )


def test_pairs_compare_labels_only_where_both_are_known_and_one_was_drawn(tmp_path):
    cases = make_pairs(pseudo=(1,))
    batches = pair_batches(cases, tmp_path, labelled=0.3)
    seen = set()
    for step in range(60):
        pair = batches(torch.Generator().manual_seed(step))
        assert pair.ids[0] != pair.ids[1]
        known = {"c0", "c1"}
        if set(pair.ids) <= known:
            assert pair.moving_label.shape[1] > 0
        else:
            assert pair.moving_label.shape[1] == 0
        seen.add(pair.ids)
    assert len(seen) >= 5
    again = batches(torch.Generator().manual_seed(3))
    assert torch.equal(again.moving, batches(torch.Generator().manual_seed(3)).moving)


def test_inconsistency_is_zero_for_inverse_translations_and_not_for_others():
    forth, back = torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8)
    forth[:, 0], back[:, 0] = 1, -1
    assert float(regularity.inconsistency(forth, back)) < 1e-8
    assert float(regularity.inconsistency(torch.randn(1, 3, 8, 8, 8), back)) > 0.1


def test_regularity_ignores_translations_and_bending_also_affine_maps():
    constant = torch.ones(1, 3, 6, 6, 6)
    ramp = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(1, 3, 6, 6, 6)
    assert float(regularity.diffusion(constant)) == 0
    assert float(regularity.diffusion(ramp)) > 0
    assert float(regularity.bending(ramp)) == 0
    assert float(regularity.bending(ramp**2)) > 0


def test_images_on_any_grid_are_registered_in_their_own_voxels():
    registrar = build_registrar(channels=1, shape=(8, 8, 8), widths=(8,), seed=0)
    u = register_images(registrar, torch.randn(1, 20, 9, 5), moving=torch.randn(1, 20, 9, 5))
    assert u.shape == (1, 3, 20, 9, 5)
    assert field.folding(u) == 0
    assert kernels.sample(torch.randn(1, 1, 20, 9, 5), u).shape == (1, 1, 20, 9, 5)


def test_labels_that_were_not_looked_for_are_not_compared(tmp_path):
    cases = make_pairs(pseudo=(1,))
    cases[0].drawn = np.array([True, True, False])
    batches = pair_batches(cases, tmp_path, labelled=1.0)
    for step in range(20):
        pair = batches(torch.Generator().manual_seed(step))
        assert pair.moving_label.shape[1] <= 1


def test_unknown_voxels_of_either_scan_do_not_count_as_background():
    from fewscan.learn.pairs import Pair

    label = torch.zeros(1, 1, 6, 6, 6)
    label[..., 2:4, :, :] = 1
    seen = torch.ones(1, 1, 6, 6, 6)
    seen[..., 3:, :, :] = 0
    half = label * seen
    image = torch.randn(1, 1, 6, 6, 6)
    u = torch.zeros(1, 3, 6, 6, 6)
    sparse = Pair(image, image, half, label, seen, torch.ones_like(seen), ("a", "b"))
    assert float(register.anatomy_term(sparse, u)) < 1e-6
    blind = sparse._replace(moving_seen=torch.ones_like(seen))
    assert float(register.anatomy_term(blind, u)) > 0.2
