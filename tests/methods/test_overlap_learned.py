"""Bundles that overlap: both are found where they cross, and every verb takes them or says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from crossing import GRID, crossing, write_case, write_crossings
from phantom import SMALL
from typer.testing import CliRunner

from fewscan import api, runs
from fewscan.cli import app
from fewscan.data.bundles import SEGMENTATIONS, bundle_files, read_bundle
from fewscan.data.io import write_labelmap
from fewscan.deliver.report import read_run
from fewscan.deliver.scenes import scenes
from fewscan.errors import ConfigError, DataError, FewscanError, ModelError
from fewscan.judge.doubt import doubt
from fewscan.judge.metrics import dice
from fewscan.learn import infer
from fewscan.learn.answers import keep_sole_pieces
from fewscan.learn.batches import on_plan
from fewscan.learn.checkpoint import PRIOR, build_segmenter, load_model
from fewscan.learn.hardware import pick
from fewscan.shifting import shift
from fewscan.space.volume import Volume
from fewscan.suggesting import suggest
from fewscan.transferring import transfer


def path_of(model: api.Model) -> Path:
    assert model.path is not None
    return model.path


def scan(seed: int, model: api.Model) -> Volume:
    return Volume(crossing(seed)[0], GRID, GRID, model.plan.channels)


def test_both_bundles_are_found_where_they_cross(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    image, truth = crossing(20)
    folder = write_case(tmp_path / "new", image, None)
    [done] = api.predict(crossed[1], folder, tmp_path / "out", device="cpu")
    files = bundle_files(tmp_path / "out" / "new")
    found = {name: read_bundle(file)[0] for name, file in files.items()}
    assert min(dice(found[name], truth[name]) for name in truth) > 0.7
    shared = truth["CST"] & truth["CC"]
    assert (found["CST"] & found["CC"])[shared].mean() > 0.8
    assert done.path == tmp_path / "out" / "new" / SEGMENTATIONS
    assert done.volumes_ml == pytest.approx({name: mask.sum() / 1000 for name, mask in found.items()})


def test_a_model_says_that_its_labels_overlap_and_others_do_not(
    crossed: tuple[Path, api.Model], untrained: api.Model
) -> None:
    plan = load_model(path_of(crossed[1])).plan
    assert plan.overlapping
    assert json.loads((path_of(crossed[1]) / "model.json").read_text())["plan"]["overlapping"] is True
    assert plan.weights == ()
    assert "overlapping" not in untrained.plan.to_dict()


def test_labels_start_as_rare_as_bundles_are(crossed: tuple[Path, api.Model]) -> None:
    model = crossed[1]
    network = build_segmenter(model.plan, model.settings, seed=3)
    x, y, z = model.plan.patch
    with torch.no_grad():
        first = network(torch.randn(1, model.plan.width, x, y, z))[:, 1:].sigmoid()
    assert PRIOR / 5 < first.mean() < 5 * PRIOR


def test_windows_and_tiles_change_no_mask(crossed: tuple[Path, api.Model]) -> None:
    """Streamed in several tiles, as a whole, and by way of probabilities held whole."""
    model, image = crossed[1], scan(21, crossed[1])
    small = dataclasses.replace(model, plan=dataclasses.replace(model.plan, patch=(16, 16, 16)))
    predictor = infer.torch_predictor(small, pick("cpu"))
    once = infer.segment(small, image, predictor=predictor, probabilities=True)
    tiled = infer.segment(small, image, predictor=predictor, memory=1)
    assert (once.label != tiled.label).mean() < 1e-3
    assert once.probs is not None
    chances = once.probs.astype(int)
    np.testing.assert_array_equal(once.label[:, ...], chances[1:] > 127)
    assert np.abs(chances[0] - (255 - chances[1:].max(0))).max() <= 1
    held = infer.probabilities(on_plan(image, small.plan), small.plan, predictor=predictor)
    assert float(held.max()) <= 1
    kept = infer.labels_from(held, small.plan, shape=GRID.shape, probabilities=True)
    assert kept.label.shape == (2, *GRID.shape)
    assert (kept.label != once.label).mean() < 0.01


def test_specks_go_where_a_bundle_was_one_piece(crossed: tuple[Path, api.Model]) -> None:
    label = np.zeros((2, 9, 9, 9), bool)
    label[:, 1:6, 1:6, 1:6] = True
    label[:, 8, 8, 8] = True
    plan = dataclasses.replace(crossed[1].plan, sole=(2,))
    kept = keep_sole_pieces(label.copy(), plan)
    assert (kept[0].sum(), kept[1].sum()) == (126, 125)


def test_large_parts_of_a_bundle_that_was_one_piece_stay(crossed: tuple[Path, api.Model]) -> None:
    label = np.zeros((2, 20, 9, 9), bool)
    label[:, 1:11, 1:6, 1:6] = True  # 250 voxels, and what lies beyond a tumour: 36
    label[:, 14:18, 1:4, 1:4] = True
    label[:, 19, 8, 8] = True
    plan = dataclasses.replace(crossed[1].plan, sole=(1, 2))
    assert [int(mask.sum()) for mask in keep_sole_pieces(label, plan)] == [286, 286]


def test_the_command_line_writes_tractsegs_layout_and_reads_it(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    model, out, run = str(path_of(crossed[1])), tmp_path / "out", CliRunner()
    for seed, name in ((22, "p1"), (23, "p2")):
        write_case(tmp_path / "new" / name, crossing(seed)[0], crossing(seed)[1])
    told = run.invoke(app, ["predict", model, str(tmp_path / "new"), "-o", str(out), "--tta", "--probabilities"])
    assert told.exit_code == 0, told.output
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*.nii.gz") if f.parent.name == SEGMENTATIONS) == [
        f"{case}/{SEGMENTATIONS}/{name}.nii.gz" for case in ("p1", "p2") for name in ("CC", "CST")
    ]
    record = json.loads((out / "predictions.json").read_text())
    assert [row["path"] for row in record["predictions"]] == [f"p1/{SEGMENTATIONS}", f"p2/{SEGMENTATIONS}"]
    judged = run.invoke(app, ["tracts", "evaluate", str(out), str(tmp_path / "new"), "-o", str(tmp_path / "figures")])
    assert judged.exit_code == 0, judged.output
    assert run.invoke(app, ["report", str(tmp_path / "figures"), "-o", str(tmp_path / "figures.html")]).exit_code == 0
    assert "<image " in (tmp_path / "figures.html").read_text(), "outlines lie over the scan"
    other = run.invoke(app, ["evaluate", str(out), str(tmp_path / "new")])
    assert "judge them with `fewscan tracts evaluate`" in str(other.exception)
    before = bundle_files(out / "p1")["CC"].stat().st_mtime_ns
    again = run.invoke(app, ["predict", model, str(tmp_path / "new"), "-o", str(out), "--skip-existing"])
    assert "0 written" in again.output, again.output
    assert bundle_files(out / "p1")["CC"].stat().st_mtime_ns == before
    assert run.invoke(app, ["predict", model, str(tmp_path / "new"), "-o", str(out)]).exit_code == 0
    assert bundle_files(out / "p1")["CC"].stat().st_mtime_ns > before
    shown = run.invoke(app, ["report", str(out), "-o", str(tmp_path / "report.html")])
    assert shown.exit_code == 0, shown.output
    assert "CST, mL" in (tmp_path / "report.html").read_text()
    content = scenes(read_run(out))[0].load()
    assert [layer.name for layer in content.layers] == ["scan", "prediction"]
    masks = {name: read_bundle(file)[0] for name, file in bundle_files(out / "p1").items()}
    shown = content.layers[1].data
    assert content.names == {1: "CC", 2: "CST"}
    np.testing.assert_array_equal(shown > 0, masks["CC"] | masks["CST"])
    np.testing.assert_array_equal(shown[masks["CC"] & ~masks["CST"]], 1)
    assert any("Bundles overlap" in line for line in content.remarks)


def test_nothing_that_is_not_a_prediction_is_overwritten(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    folder = write_case(tmp_path / "data" / "p1", *crossing(22))
    with pytest.raises(ConfigError, match="is where the scans are"):
        api.predict(crossed[1], folder, tmp_path / "data", device="cpu")
    write_case(tmp_path / "other" / "p1", *crossing(22))
    with pytest.raises(ConfigError, match="exists and is not a prediction of fewscan"):
        api.predict(crossed[1], folder, tmp_path / "other", device="cpu")


def test_bundles_that_are_not_there_are_written_empty(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    folder = write_case(tmp_path / "new", np.full((3, *GRID.shape), 0.2, np.float32), None)
    network = build_segmenter(crossed[1].plan, crossed[1].settings, seed=0)
    torch.nn.init.zeros_(network.head.weight)  # type: ignore[union-attr]
    nothing = dataclasses.replace(crossed[1], segmenter=network)
    [done] = api.predict(nothing, folder, tmp_path / "out", device="cpu")
    assert done.volumes_ml == {"CC": 0.0, "CST": 0.0}
    assert [int(read_bundle(file)[0].sum()) for file in bundle_files(done.path).values()] == [0, 0]


def test_bundles_are_learnt_from_directions(tmp_path: Path) -> None:
    for i in range(2):
        vectors = np.random.default_rng(i).normal(0, 0.5, (9, *GRID.shape)).astype(np.float32)
        write_case(tmp_path / "data" / f"case_{i}", vectors, crossing(i)[1])
    model = api.train(tmp_path / "data", tmp_path / "model", steps=3, settings=SMALL, device="cpu")
    assert (model.plan.kind, model.plan.overlapping) == ("peaks", True)
    [done] = api.predict(model, tmp_path / "data" / "case_0", tmp_path / "out", tta=True, device="cpu")
    assert list(bundle_files(done.path)) == ["CC", "CST"]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = write_crossings(tmp_path / "data", labelled=2)
    settings = SMALL | {"network.widths": "4,8"}
    whole = api.train(data, tmp_path / "whole", steps=6, settings=settings, device="cpu")
    told: list[object] = []
    api.train(data, tmp_path / "parts", steps=6, settings=settings, device="cpu", observe=told.append)
    assert any("labels overlap, each answered for itself" in str(line) for line in told)
    again = load_model(tmp_path / "parts")
    for name, weight in whole.segmenter.state_dict().items():
        assert torch.equal(weight, again.segmenter.state_dict()[name]), name


def test_each_bundle_has_signs_of_doubt(crossed: tuple[Path, api.Model]) -> None:
    model = crossed[1]
    found = doubt(scan(24, model), model.plan, predictor=infer.torch_predictor(model, pick("cpu")))
    assert found is not None
    assert {name: min(signs.values()) > 0.5 for name, signs in found.signs.items()} == {"CC": True, "CST": True}


def test_crossval_judges_the_bundles_that_were_looked_for(tmp_path: Path) -> None:
    data = write_crossings(tmp_path / "data", labelled=3)
    (data / "case_1" / SEGMENTATIONS / "CC.nii.gz").unlink()
    settings = SMALL | {"network.widths": "4,8"}
    found = runs.crossval(data, tmp_path / "folds", folds="loo", steps=3, settings=settings, device="cpu")
    assert {case.id: sorted(case.labels) for case in found.cases} == {
        "case_0": ["CC", "CST"], "case_1": ["CST"], "case_2": ["CC", "CST"],
    }  # fmt: skip
    assert (tmp_path / "folds" / "evaluation.json").is_file()
    api.report(tmp_path / "folds", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "No picture" not in page
    assert page.count('class="prediction"') >= 9


@pytest.mark.parametrize("layers", ["all", "decoder", "last", "norms"])
def test_a_model_is_transferred_to_bundles_with_a_new_one(
    crossed: tuple[Path, api.Model], tmp_path: Path, layers: str
) -> None:
    data = tmp_path / "data"
    for i in (30, 31):
        image, masks = crossing(i)
        write_case(data / f"p{i}", image, masks | {"core": masks["CST"] & masks["CC"]})
    (data / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    adapted = transfer(crossed[1], data, tmp_path / "model", layers=layers, steps=12, device="cpu")  # type: ignore[arg-type]
    verdict = adapted.provenance["transfer"]
    assert verdict["weights"]["labels"] == {"CC": "CC", "CST": "CST", "core": ""}
    assert verdict["base"] > 0.3
    assert set(verdict["labels"]) == {"CC", "CST", "core"}
    done = api.predict(adapted, data / "p30", tmp_path / "out", device="cpu")
    assert {"CC", "CST"} <= bundle_files(done[0].path).keys()


def test_one_case_is_judged_by_signs(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    data = write_crossings(tmp_path / "data", labelled=1, unlabelled=1)
    adapted = transfer(crossed[1], data, tmp_path / "model", steps=4, device="cpu")
    assert 0 <= adapted.provenance["transfer"]["signs"]["consistency"]["base"] <= 1


def test_the_shift_card_and_suggestions_take_bundles(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    data, model = crossed
    new = write_crossings(tmp_path / "new", labelled=4)
    lesion = np.zeros(GRID.shape, np.uint8)
    lesion[:2, :2, :2] = 1
    write_labelmap(lesion, tmp_path / "lesions" / "case_0.nii.gz", native=GRID)
    record = shift(model, data, new, tmp_path / "card.html", lesions=tmp_path / "lesions", device="cpu")
    assert record["dice"]["target"]["mean"] > 0.6
    assert set(record["lesion"]["cases"]["case_0"]["distance_mm"]) == {"CC", "CST"}
    assert record["lesion"]["cases"]["case_0"]["dice_near"] > 0.6
    assert [row.id for row in suggest(model, data, device="cpu").ranked] == ["case_3"]


def test_what_takes_one_label_a_voxel_says_so(crossed: tuple[Path, api.Model], tmp_path: Path) -> None:
    data, model = crossed
    said: dict[str, FewscanError] = {}
    tried = {
        "joint": lambda: api.train(data, tmp_path / "joint", method="joint", steps=2, device="cpu"),
        "nnunet": lambda: api.export(data, tmp_path / "nnunet", kind="nnunet"),
        "onnx": lambda: api.export(path_of(model), tmp_path / "model.onnx", kind="onnx"),
    }
    for name, attempt in tried.items():
        with pytest.raises((DataError, ModelError), match="overlap") as caught:
            attempt()
        said[name] = caught.value
    assert "one label a voxel" in str(said["joint"])
    assert not (tmp_path / "joint").exists()
    api.check(data)
    with pytest.raises(DataError, match="masks of bundles are not repaired"):
        api.check(data, fix=tmp_path / "fixed")
