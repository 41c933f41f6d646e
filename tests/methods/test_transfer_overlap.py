"""From one label a voxel to masks that overlap, and back: the same answers before anything is learnt, then transfer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crossing import GRID, crossing, write_case, write_crossings
from numpy.typing import NDArray
from phantom import SMALL, phantom

from fewscan import api
from fewscan.data.bundles import bundle_files
from fewscan.data.io import write_labelmap
from fewscan.learn import checkpoint, grafting, infer
from fewscan.learn.checkpoint import PRIOR
from fewscan.learn.hardware import pick
from fewscan.learn.plan import Plan
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume
from fewscan.transferring import transfer

Pair = tuple[Path, api.Model]


def moved(base: checkpoint.Model, plan: Plan) -> tuple[checkpoint.Model, grafting.Grafted]:
    """The base's weights in a network of another plan, nothing learnt since."""
    network = checkpoint.build_segmenter(plan, base.settings, seed=1)
    grafted = grafting.graft(network, base, plan=plan)
    return replace(base, segmenter=network, plan=plan), grafted


def answer(model: checkpoint.Model, image: NDArray[np.float32], grid: Geometry) -> NDArray[np.generic]:
    scan = Volume(image.reshape(-1, *grid.shape), grid, grid, model.plan.channels)
    return infer.segment(model, scan, predictor=infer.torch_predictor(model, pick("cpu", precision="fp32"))).label


def test_masks_from_classes_are_those_of_the_argmax_where_none_overlap(trained: Pair) -> None:
    base = replace(trained[1], plan=replace(trained[1].plan, sole=()))
    names = {1: "rod", 2: "ball"}
    model, grafted = moved(base, replace(base.plan, overlapping=True, weights=(), names=names))
    image, _, grid = phantom(7)
    before, masks = answer(base, image, grid), answer(model, image, grid)
    patch = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 16, 16, 16))).float()
    with torch.no_grad():
        logits, old = model.segmenter(patch), base.segmenter(patch)
    torch.testing.assert_close(logits[:, 1:], old[:, [2, 1]] - old[:, :1], rtol=1e-4, atol=1e-4)
    alone = masks.sum(0) < 2
    assert alone.mean() > 0.95
    for mask, name in zip(masks, names.values(), strict=True):
        value = next(v for v, n in base.names.items() if n == name)
        assert (mask == (before == value))[alone].mean() > 0.9999
        assert mask[before == value].mean() > 0.9999  # who wins all beats background
    assert {"head.weight", "head.bias"} == set(grafted.adapted)
    assert not grafted.new
    assert grafted.labels == {"rod": "rod", "ball": "ball"}


def test_classes_from_masks_are_the_masks_where_none_overlap(crossed: Pair) -> None:
    base = replace(crossed[1], plan=replace(crossed[1].plan, sole=()))
    model, grafted = moved(base, replace(base.plan, overlapping=False))
    image, _ = crossing(21)
    masks, after = answer(base, image, GRID), answer(model, image, GRID)
    alone = masks.sum(0) < 2
    assert (~alone).any()
    assert masks.any()
    for k, mask in enumerate(masks, start=1):
        assert (mask == (after == list(base.names)[k - 1]))[alone].mean() > 0.9999
    assert (after[~alone] > 0).all()
    assert {"head.weight", "head.bias"} == set(grafted.adapted)
    again, _ = moved(model, base.plan)
    for name, weight in base.segmenter.state_dict().items():
        kept = slice(1, None) if name.startswith("head") else slice(None)
        assert torch.equal(again.segmenter.state_dict()[name][kept], weight[kept]), name


def test_labels_that_the_model_does_not_know_start_rare(crossed: Pair, untrained: api.Model) -> None:
    base, rare = crossed[1], float(np.log(PRIOR / (1 - PRIOR)))
    single, _ = moved(base, replace(base.plan, overlapping=False, names={1: "CC", 2: "cyst"}))
    bias = single.segmenter.state_dict()["head.bias"]
    assert bias[0] == 0
    assert bias[2] == pytest.approx(rare)
    several, _ = moved(untrained, replace(untrained.plan, overlapping=True, names={1: "rod", 2: "cyst"}))
    assert several.segmenter.state_dict()["head.bias"][2] == pytest.approx(rare)
    for model, overlapping in ((base, False), (untrained, True)):
        plan = replace(model.plan, overlapping=overlapping, names={1: "new"})
        assert {"head.weight", "head.bias"} == set(moved(model, plan)[1].new)


def singles(root: Path, *, first: int = 0) -> Path:
    """The crossing bundles of two people as label maps: where they cross, one of them was drawn."""
    for i in (first, first + 1):
        image, masks = crossing(i)
        folder = write_case(root / f"case_{i}", image, None)
        write_labelmap(
            np.where(masks["CC"], 1, 2 * masks["CST"]).astype(np.uint8), folder / "labels.nii.gz", native=GRID
        )
    (root / "labels.json").write_text(json.dumps({"1": "CC", "2": "CST"}))
    (root / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    return root


def test_a_model_of_label_maps_is_transferred_to_bundles(tmp_path: Path) -> None:
    base = api.train(singles(tmp_path / "old"), tmp_path / "base", steps=60, settings=SMALL, device="cpu")
    assert not base.plan.overlapping
    said: list[object] = []
    data, guard = write_crossings(tmp_path / "data", labelled=2), {"transfer.guard": "false"}
    adapted = transfer(
        base, data, tmp_path / "model", steps=40, device="cpu", settings=guard, keep_atlases=True, observe=said.append
    )
    record = api.load(tmp_path / "model").provenance["transfer"]
    assert adapted.plan.overlapping
    assert record["weights"]["labels"] == {"CC": "CC", "CST": "CST"}
    assert {"head.weight", "head.bias"} <= set(record["weights"]["adapted"])
    change = "labels that overlap instead of one label a voxel, as in the data: each mask starts from its class"
    assert change in record["changes"]
    assert change in said
    assert change in api.report(tmp_path / "model", tmp_path / "report.html").read_text()
    [done] = api.predict(adapted, data / "case_0", tmp_path / "out", device="cpu")
    assert list(bundle_files(done.path)) == ["CC", "CST"]


def test_a_model_of_bundles_is_transferred_to_label_maps(crossed: Pair, tmp_path: Path) -> None:
    said: list[object] = []
    model = transfer(
        crossed[1], singles(tmp_path / "data", first=40), tmp_path / "model", steps=4, device="cpu",
        source=crossed[0], keep_atlases=True, observe=said.append,
    )  # fmt: skip
    record = model.provenance["transfer"]
    assert (record["by"], record["folds"]) == ("cross-validation", 2)
    assert min(record["base"], record["adapted"]) > 0.3
    assert model.plan.overlapping == (record["kept"] == "base")
    assert any("no atlases were left" in str(line) for line in said) == (record["kept"] == "base")
    assert (tmp_path / "model" / "atlases.safetensors").is_file() == (record["kept"] == "adapted")
    assert record["source"]["before"] > 0.5
