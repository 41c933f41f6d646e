"""Scans brought onto the grid they share, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blobs import blobs, unit, world

from fewscan.errors import GeometryError
from fewscan.learn.alignment import Alignment, align, grid_of
from fewscan.learn.batches import Prepared
from fewscan.space import affine
from fewscan.space.geometry import Array, Geometry

SPACING = (1.5, 1.5, 2.0)
MIDDLE = np.array([24.0, 24.0, 24.0])
SHARED = (16, 16, 12)


def moved(*, turn: float, shift: tuple[float, float, float]) -> Array:
    """Turn about the third axis through the middle, then a shift, mm."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    matrix[:3, 3] = MIDDLE - matrix[:3, :3] @ MIDDLE + shift
    return matrix


def case(name: str, shape: tuple[int, int, int] = (32, 32, 24), *, matrix: Array, labelled: bool) -> Prepared:
    """The blobs as they lie after the matrix has moved them."""
    back = np.linalg.inv(matrix)
    places = world(Geometry(shape, np.diag([*SPACING, 1.0]))).reshape(3, -1)
    places = (back[:3, :3] @ places + back[:3, 3:] - MIDDLE[:, None]).reshape(3, *shape)
    image = unit(blobs(places)).numpy()
    label = (np.linalg.norm(places - np.array([3.0, -4, 2]).reshape(3, 1, 1, 1), axis=0) < 9).astype(np.int16)
    return Prepared(name, image, label if labelled else None, (), (), np.ones(2, bool))


def two() -> tuple[list[Prepared], list[Alignment]]:
    matrices = moved(turn=0.0, shift=(0, 0, 0)), moved(turn=0.2, shift=(5.0, -4.0, 3.0))
    cases = [case("a", matrix=matrices[0], labelled=True), case("b", matrix=matrices[1], labelled=True)]
    return cases, align(cases, SHARED, spacing=SPACING)


def test_scans_that_lie_differently_come_to_lie_alike() -> None:
    cases, places = two()
    one, other = (p.onto_shared(torch.from_numpy(c.image)) for c, p in zip(cases, places, strict=True))
    raw = torch.from_numpy(cases[1].image - cases[0].image).square().mean()
    assert one.shape == (1, *SHARED)
    assert float((one - other)[:, 2:-2, 2:-2, 2:-2].square().mean()) < 0.1 * float(raw)


def test_labels_go_the_way_of_the_images_and_are_unknown_beyond_the_border() -> None:
    cases, places = two()
    labels = [p.labels_onto_shared(c.label, classes=2) for c, p in zip(cases, places, strict=True)]
    both = (labels[0] == 1) & (labels[1] == 1)
    assert 2 * both.sum() / sum((one == 1).sum() for one in labels) > 0.93
    assert (labels[0] >= 0).all()
    assert 0.02 < (labels[1] == -1).mean() < 0.5


def test_the_most_usual_labelled_size_is_the_shared_block() -> None:
    still = moved(turn=0, shift=(0, 0, 0))
    sizes = {"small": (20, 20, 16), "usual": (32, 32, 24), "unlabelled": (32, 32, 24)}
    cases = [case(k, shape, matrix=still, labelled=k != "unlabelled") for k, shape in sizes.items()]
    places = align(cases, SHARED, spacing=SPACING)
    assert places[0].shared.shape == SHARED
    np.testing.assert_allclose(np.array(places[0].shared.spacing) * SHARED, np.array((32, 32, 24)) * SPACING)
    np.testing.assert_allclose(places[1].matrix, np.eye(4))
    assert grid_of(cases[0], SPACING).shape == (20, 20, 16)


@pytest.mark.parametrize("fails", [True, False])
def test_a_fit_that_fails_or_makes_no_sense_gives_way_to_edge_to_edge(monkeypatch, fails: bool) -> None:
    def fit(*_: object, **__: object) -> Array:
        if fails:
            raise GeometryError("no overlap")
        return np.diag([2.0, 2.0, 2.0, 1.0])

    monkeypatch.setattr(affine, "fit", fit)
    still = moved(turn=0, shift=(0, 0, 0))
    cases = [case("a", matrix=still, labelled=True), case("b", (16, 16, 12), matrix=still, labelled=False)]
    places = align(cases, SHARED, spacing=SPACING)
    np.testing.assert_allclose(places[1].matrix[:3, :3], np.diag([0.5, 0.5, 0.5]), atol=1e-9)
