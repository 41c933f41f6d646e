"""Labels that overlap, from a label map to the targets of a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from crossing import GRID, SHAPE, crossing

from fewscan.learn import augment, overlap
from fewscan.learn.batches import PatchBatches, Prepared, crop, crop_label, prepare, swap_sides
from fewscan.learn.config import AugmentConfig, Settings
from fewscan.learn.plan import Plan, derive, plan_from_dict
from fewscan.space.combinations import combine
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Case, Labelmap, Volume, one_hot

BOX = (16, 16, 24)  # its patches lie on voxels of the source, so that nothing is interpolated
SIDES = {1: "CC", 2: "CST_left", 3: "CST_right"}
STILL = AugmentConfig(**dict.fromkeys(("rotate_deg", "scale", "shift", "elastic", "probability"), 0.0))  # fmt: skip


def case_of(masks: dict[str, np.ndarray], names: dict[int, str], *, drawn: frozenset[int] | None = None) -> Case:
    codes, table = combine([masks[name] for name in names.values()], BOX)
    image = np.sum(list(masks.values()), 0)[None].astype(np.float32)
    grid = Geometry(BOX, np.eye(4))
    return Case("c", Volume(image, grid, grid), Labelmap(codes, grid, names, table), drawn)


def sided() -> dict[str, np.ndarray]:
    """A bar through the middle and one on each side that crosses it, mirror images of each other."""
    masks = {name: np.zeros(BOX, bool) for name in SIDES.values()}
    masks["CC"][2:-2, 6:10, 10:14] = True
    masks["CST_left"][3:6, 5:11, 3:21] = True
    masks["CST_right"][-6:-3, 5:11, 3:21] = True
    return masks


def plan_of(case: Case, names: dict[int, str]) -> Plan:
    return derive(
        [case], names=names, channels=("image",), modality="mr", settings=Settings(), gpu=False, overlapping=True
    )


def test_sides_are_found_where_labels_overlap() -> None:
    plan = plan_of(case_of(sided(), SIDES), SIDES)
    assert (plan.mirror, plan.pairs) == (True, ((2, 3),))
    assert plan.sole == (1, 2, 3)
    assert plan_from_dict(plan.to_dict()) == plan
    lopsided = sided()
    del lopsided["CST_right"]
    names = {1: "CC", 2: "CST_left"}
    assert not plan_of(case_of(lopsided, names), names).mirror


def test_without_names_that_tell_partners_are_found_by_place() -> None:
    names = {1: "bar", 2: "one", 3: "other"}
    masks = dict(zip(names.values(), sided().values(), strict=True))
    assert plan_of(case_of(masks, names), names).pairs == ((2, 3),)


def test_targets_are_the_masks_and_mirroring_exchanges_sides(tmp_path: Path) -> None:
    masks, case = sided(), case_of(sided(), SIDES, drawn=frozenset({1, 2}))
    plan = dataclasses.replace(plan_of(case, SIDES), patch=BOX)
    ready = prepare(case, plan, folder=tmp_path)
    assert ready.counts[1:] == tuple(int(mask.sum()) for mask in masks.values())
    assert ready.counts[0] == int((~np.any(list(masks.values()), 0)).sum())
    batches = PatchBatches(
        [ready], plan, config=STILL, batch=8, foreground=0.5, device=torch.device("cpu")
    )  # fmt: skip
    batch = batches(torch.Generator().manual_seed(1))
    truth = torch.from_numpy(np.stack([np.ones(BOX, bool), *masks.values()])).float()
    mirrored = 0
    for labels, drawn in zip(batch.labels, batch.drawn, strict=True):
        torch.testing.assert_close(labels, truth, atol=1e-4, rtol=0)  # this anatomy is its own mirror image
        assert drawn.tolist() in ([True, True, True, False], [True, True, False, True])
        mirrored += bool(drawn[3])
    assert 0 < mirrored < 8


def test_many_labels_are_moved_as_one_map(tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), {k: f"b{k}" for k in range(1, 13)}
    masks = {name: rng.random(BOX) < 0.3 for name in names.values()}
    case = case_of(masks, names)
    plan = dataclasses.replace(plan_of(case, names), patch=BOX, mirror=False)
    batch = PatchBatches(
        [prepare(case, plan, folder=tmp_path)], plan, config=STILL, batch=1, foreground=1.0, device=torch.device("cpu")
    )(torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(batch.labels[0, 1:].numpy(), np.stack(list(masks.values())))


def test_beyond_the_scan_nobody_looked(tmp_path: Path) -> None:
    case = case_of(sided(), SIDES)
    plan = dataclasses.replace(plan_of(case, SIDES), patch=(24, 16, 24))
    batch = PatchBatches(
        [prepare(case, plan, folder=tmp_path)], plan, config=STILL, batch=1, foreground=1.0, device=torch.device("cpu")
    )(torch.Generator().manual_seed(0))
    assert batch.labels[0, 0, :, 0, 0].tolist() == pytest.approx([0.0] * 4 + [1.0] * 16 + [0.0] * 4)
    assert batch.labels[0, :, :4].sum() == 0


@pytest.mark.parametrize("shape", [(10, 9, 11), (30, 27, 33)])
def test_each_mask_is_resampled_for_itself(shape: tuple[int, int, int]) -> None:
    masks = crossing(0)[1]
    index, table = overlap.coded(*_labels(masks))
    moved, rows = overlap.resampled(index, table, shape=shape)
    for k, (name, mask) in enumerate(masks.items(), start=1):
        alone, own = overlap.coded(*_labels({name: mask}))
        single, single_rows = overlap.resampled(alone, own, shape=shape)
        np.testing.assert_array_equal(overlap.mask(moved, rows, k=k), overlap.mask(single, single_rows, k=1))
        share = overlap.mask(moved, rows, k=k).mean() / mask.mean()
        assert 0.8 < share < 1.25


def test_what_nobody_looked_at_stays_so() -> None:
    label, names = _labels(crossing(0)[1])
    label.data[:8] = 65535
    index, table = overlap.resampled(*overlap.coded(label, names), shape=(10, 9, 11))
    assert (index[:4] == -1).all()
    assert (index[4:] >= 0).all()
    assert not any(overlap.mask(index, table, k=k)[:4].any() for k in range(3))


def test_the_whole_of_a_bundle_in_pieces_is_not_one_piece() -> None:
    masks = {"a": np.zeros(SHAPE, bool), "b": np.zeros(SHAPE, bool)}
    masks["a"][2:4], masks["b"][3:6] = True, True
    masks["b"][10:13] = True
    index, table = overlap.coded(*_labels(masks))
    assert overlap.single(index, table, share=0.995) == {1}


def test_prepared_cases_of_single_labels_have_no_table(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, np.uint16)
    data[4:9] = 3
    case = Case("c", Volume(data[None].astype(np.float32), GRID, GRID), Labelmap(data, GRID, {3: "organ"}))
    plan = derive([case], names={3: "organ"}, channels=("image",), modality="mr", settings=Settings(), gpu=False)
    ready: Prepared = prepare(case, plan, folder=tmp_path)
    assert ready.table is None
    assert "overlapping" not in plan.to_dict()


@pytest.mark.parametrize("classes", [2, 11])
def test_single_labels_are_moved_as_if_no_labels_overlapped(tmp_path: Path, classes: int) -> None:
    """To the bit: what a step saw before there were labels that overlap, written out."""
    data = np.random.default_rng(0).integers(0, classes + 1, SHAPE).astype(np.uint16)
    names = {k: f"label {k}" for k in range(1, classes + 1)}
    case = Case("c", Volume(data[None].astype(np.float32), GRID, GRID), Labelmap(data, GRID, names))
    plan = derive([case], names=names, channels=("image",), modality="mr", settings=Settings(), gpu=False)
    ready, config = prepare(case, plan, folder=tmp_path), AugmentConfig()
    make = PatchBatches([ready], plan, config=config, batch=1, foreground=0.5, device=torch.device("cpu"))
    batch, rng = make(torch.Generator().manual_seed(5)), torch.Generator().manual_seed(5)
    torch.randint(1, (1,), generator=rng)
    centre = make._centre(ready, rng)
    assert ready.label is not None
    image = torch.from_numpy(crop(ready.image, centre, size=make.source))[None]
    index = torch.from_numpy(crop_label(ready.label, centre, size=make.source))[None]
    params = augment.sample(config, rng, batch=1, shape=plan.patch, spacing=plan.spacing, mirror=plan.mirror)
    if classes > 8:
        patch, number = augment.spatial(
            params, image, labels=(index[:, None] + 1).float(), shape=plan.patch, nearest=True
        )
        target = one_hot(number[:, 0].long() - 1, classes + 1)
    else:
        patch, target = augment.spatial(params, image, labels=one_hot(index, classes + 1), shape=plan.patch)
    assert torch.equal(batch.labels, swap_sides(target, params.mirror, pairs=plan.pairs))
    assert torch.equal(batch.images, augment.intensity(params, patch))


def _labels(masks: dict[str, np.ndarray]) -> tuple[Labelmap, dict[int, str]]:
    names = dict(enumerate(masks, start=1))
    codes, table = combine(masks.values(), SHAPE)
    return Labelmap(codes.copy(), Geometry(SHAPE, np.eye(4)), names, table), names
