"""Models of directions: they learn what only directions tell, and nothing they answer depends on signs or frames."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fibres import GRID, NAMES, SHAPE, clumps, signed, write_fibres
from phantom import SMALL, write_dataset
from torch import Tensor

from fewscan import api, prediction
from fewscan.data.dataset import find, load
from fewscan.data.io import read_image, write_image, write_labelmap
from fewscan.errors import DataError, ModelError
from fewscan.exporting import export
from fewscan.judge import looks
from fewscan.judge.shift import FLOORS
from fewscan.learn import infer
from fewscan.learn.answers import Segmented
from fewscan.learn.atlases import atlases_of
from fewscan.learn.channels import to_look_at
from fewscan.learn.checkpoint import Model, load_model
from fewscan.learn.hardware import pick
from fewscan.learn.intensity import normalise
from fewscan.learn.views import views
from fewscan.methods import draft, pairwise
from fewscan.methods.personalize import PersonalizeConfig, Personalizer
from fewscan.shifting import shift
from fewscan.space import directions
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume
from fewscan.suggesting import suggest
from fewscan.transferring import transfer

STEPS = 180  # at 100 some seeds have not found the second label yet
SETTINGS = SMALL | {"network.widths": "12,24,24"}
CHANNELS = tuple(f"c{i}" for i in range(9))


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A data set of peaks and a model that has learnt it."""
    root = tmp_path_factory.mktemp("peaks")
    data = write_fibres(root / "data", labelled=4, unlabelled=1)
    model = api.train(data, root / "model", steps=STEPS, settings=SETTINGS, device="cpu", method="segment")
    return data, model


def scan(seed: int, kind: Any = "peaks") -> Volume:
    data = clumps(seed, kind=kind)[0]
    return Volume(data, GRID, GRID, CHANNELS[: len(data)], kind)


def answer(model: Model, image: Volume, *, tta: bool = False) -> Segmented:
    predictor = infer.torch_predictor(model, pick("cpu"), tta=tta)
    return infer.segment(model, image, predictor=predictor, probabilities=True)


def dice(label: np.ndarray, truth: np.ndarray) -> float:
    scores = [2 * ((label == v) & (truth == v)).sum() / ((label == v).sum() + (truth == v).sum()) for v in NAMES]
    return float(np.mean(scores))


def test_a_model_of_peaks_learns_what_no_length_tells(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    _, model = peaks
    with_directions = [dice(answer(model, scan(s)).label, clumps(s)[1]) for s in (10, 11)]
    blind_data = tmp_path / "data"
    for i in range(4):
        image, label = clumps(i)
        lengths = directions.raw_sizes(image, "peaks")
        for k in range(3):
            write_image(lengths[k], blind_data / "images" / f"case_{i:02d}_{k:04d}.nii.gz", native=GRID)
        write_labelmap(label, blind_data / "labels" / f"case_{i:02d}.nii.gz", native=GRID)
    (blind_data / "labels.json").write_text(json.dumps({str(v): n for v, n in NAMES.items()}))
    other = api.train(blind_data, tmp_path / "blind", steps=STEPS, settings=SETTINGS, device="cpu", method="segment")
    blind = []
    for s in (10, 11):
        image = Volume(directions.raw_sizes(clumps(s)[0], "peaks"), GRID, GRID, other.plan.channels)
        blind.append(dice(answer(other, image).label, clumps(s)[1]))
    assert min(with_directions) > 0.85, with_directions
    assert float(np.mean(blind)) < 0.65, blind


@pytest.mark.slow
def test_a_model_of_tensors_learns_too(tmp_path: Path) -> None:
    data = write_fibres(tmp_path / "data", labelled=4, kind="tensor", content="tensor")
    model = api.train(data, tmp_path / "model", steps=STEPS, settings=SETTINGS, device="cpu", method="segment")
    assert (model.plan.kind, model.plan.width, model.plan.guides) == ("tensor", 6, 1)
    assert dice(answer(model, scan(10, "tensor")).label, clumps(10)[1]) > 0.85


def test_the_kind_travels_with_the_model(peaks: tuple[Path, Model]) -> None:
    data, model = peaks
    assert model.path is not None
    again = load_model(model.path)
    assert (again.plan.kind, again.plan.width, again.plan.guides) == ("peaks", 18, 3)
    assert again.plan.channels == find(data).channels
    stored = json.loads((model.path / "model.json").read_text())["plan"]
    assert stored["kind"] == "peaks"


def test_models_of_intensities_are_written_as_before(untrained: Model) -> None:
    assert "kind" not in untrained.plan.to_dict()
    assert untrained.plan.kind == "scalar"


def test_signs_change_no_answer(peaks: tuple[Path, Model]) -> None:
    image = scan(10)
    other = dataclasses.replace(image, data=signed(image.data, 77))
    assert not np.array_equal(image.data, other.data)
    np.testing.assert_array_equal(answer(peaks[1], image).probs, answer(peaks[1], other).probs)


def test_units_of_length_change_no_answer(peaks: tuple[Path, Model]) -> None:
    image = scan(10)
    other = dataclasses.replace(image, data=image.data * np.float32(64))
    np.testing.assert_array_equal(answer(peaks[1], image).label, answer(peaks[1], other).label)


def test_an_oblique_scan_is_answered_like_a_straight_one(peaks: tuple[Path, Model]) -> None:
    """World and components turned together: the same voxels and the same fibres along them."""
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn
    image = scan(10)
    turned = np.einsum("ij,njxyz->nixyz", turn, image.data.reshape(3, 3, *GRID.shape)).reshape(9, *GRID.shape)
    tilted = Geometry(GRID.shape, affine)
    other = Volume(turned.astype(np.float32), tilted, tilted, CHANNELS, "peaks")
    ours, theirs = answer(peaks[1], image), answer(peaks[1], other)
    assert (ours.label == theirs.label).mean() > 0.999
    wrong = dataclasses.replace(other, data=image.data)  # components left as they were would not be the same scan
    assert (answer(peaks[1], wrong).label != ours.label).sum() > (theirs.label != ours.label).sum()


def test_mirrored_windows_are_answered_as_a_mirror_image(peaks: tuple[Path, Model]) -> None:
    model = dataclasses.replace(peaks[1], plan=dataclasses.replace(peaks[1].plan, mirror=True, pairs=()))
    predictor = infer.torch_predictor(model, pick("cpu"), tta=True)
    windows = directions.matrices(torch.from_numpy(scan(10).data[..., :16]), "peaks", axes=np.eye(3))[None, :, :16, :16]
    mirrored = directions.mirrored(windows.flip(2))
    torch.testing.assert_close(predictor(mirrored), predictor(windows).flip(2), atol=1e-4, rtol=1e-4)
    assert float((predictor(windows.flip(2)).flip(2) - predictor(windows)).abs().max()) > 1e-2


def test_turned_views_turn_the_directions(peaks: tuple[Path, Model]) -> None:
    """In every view of a tube its fibres run the way that the tube itself does there."""
    size = 24
    plan = dataclasses.replace(peaks[1].plan, patch=(size,) * 3, spacing=(1.0, 1.0, 1.0))
    way = np.array([1.0, 0.4, -0.3]) / np.linalg.norm([1.0, 0.4, -0.3])
    places = np.indices((size,) * 3) - (size - 1) / 2
    along = np.einsum("i,ixyz->xyz", way, places)
    inside = np.exp(-((places**2).sum(0) - along**2) / 8 - along**2 / 40)
    tube = torch.from_numpy((way.reshape(3, 1, 1, 1) * inside).astype(np.float32)).repeat(3, 1, 1, 1)
    seen: list[Tensor] = []

    def spy(windows: Tensor) -> Tensor:
        seen.append(windows[0, :6])
        return torch.zeros(1, plan.classes, *windows.shape[2:])

    def principal(matrix: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.eigh(matrix)[1][:, -1])

    views(directions.matrices(tube, "peaks", axes=np.eye(3)), plan, predictor=spy, count=3)
    turned = []
    for one in seen:
        weight = directions.sizes(one)[0].numpy().reshape(-1)
        points = places.reshape(3, -1)
        drawn = principal((points * weight) @ points.T)
        fibres = principal(one.sum((1, 2, 3))[[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3).numpy())
        assert abs(drawn @ fibres) > np.cos(0.04)
        turned.append(np.arccos(min(1.0, abs(fibres @ way))))
    assert turned[0] < 0.01
    assert min(turned[1:]) > 0.08


def test_a_deformed_atlas_brings_its_directions_turned(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    data, model = peaks
    atlas = atlases_of(find(data), model.plan, folder=tmp_path)[0]
    way = torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1).expand(3, *atlas.image.shape[1:]).repeat(3, 1, 1, 1)
    image = directions.matrices(way, "peaks", axes=np.eye(3))
    c, s = np.cos(0.5), np.sin(0.5)
    matrix = np.eye(4)
    matrix[:2, :2] = [[c, -s], [s, c]]
    own = Geometry(tuple(atlas.image.shape[1:]), np.diag([*model.plan.spacing, 1.0]))
    moved = draft.voter(
        dataclasses.replace(atlas, image=image.numpy()), torch.zeros(1, 3, 4, 4, 4), matrix=matrix, grids=(own, own)
    )
    back = torch.from_numpy(matrix[:3, :3].T.copy()).float().view(1, 3, 3, 1, 1, 1)
    torch.testing.assert_close(moved.image[None], directions.congruent(image[None], back), atol=1e-3, rtol=0)
    torch.testing.assert_close(moved.guide, directions.sizes(image), atol=1e-4, rtol=0)


def test_a_model_of_directions_personalises(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    data, model = peaks
    found = find(data)
    atlases = atlases_of(found, model.plan, folder=tmp_path)
    config = PersonalizeConfig(atlases=1, views=1, rounds=1, steps=2)
    maker = Personalizer(model, atlases[:2], config=config, hardware=pick("cpu"))
    case = atlases[3]
    done = maker(case, mode="always")
    assert done.kept == "after", done.reason
    assert bool(done.after.isfinite().all())
    assert case.label is not None
    assert dice(done.after.argmax(0).numpy(), np.array(case.label)) > 0.5


def test_scans_of_another_kind_are_refused(peaks: tuple[Path, Model], untrained: Model, tmp_path: Path) -> None:
    data, model = peaks
    with pytest.raises(DataError, match="holds peaks of fibres, the model takes intensities"):
        prediction.predict(untrained, data / "images" / "case_00.nii.gz", tmp_path / "out", device="cpu")
    tensor = write_fibres(tmp_path / "tensor", kind="tensor", content="tensor")
    with pytest.raises(DataError, match="holds a diffusion tensor, the model takes peaks of fibres"):
        prediction.predict(model, tensor / "images" / "case_00.nii.gz", tmp_path / "out", device="cpu")
    other = dataclasses.replace(scan(0), kind="scalar")
    with pytest.raises(DataError, match="the scan holds intensities, the model takes peaks of fibres"):
        answer(model, other)
    with pytest.raises(ModelError, match=r"of a diffusion tensor, the model takes 9 of peaks of fibres"):
        transfer(model, tensor, tmp_path / "moved", steps=2, device="cpu")


def test_what_cannot_turn_directions_refuses_them(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    _, model = peaks
    for kind in ("onnx", "monai"):
        with pytest.raises(ModelError, match="takes directions, which no other program turns into its input"):
            export(str(model.path), tmp_path / kind, kind=kind)
    with pytest.raises(DataError, match=r"fixed scan holds peaks of fibres, the moving one intensities; give two"):
        pairwise.register(scan(0), to_look_at(scan(1)))
    with pytest.raises(DataError, match="hold directions, which cannot be normalised one by one"):
        normalise(scan(0).data, model.plan.scaling)


def noisy(data: Path, root: Path, *, first: int) -> Path:
    """Such scans with every direction turned at random, by about 20 degrees."""
    for i in range(first, first + 4):
        image = clumps(i)[0]
        rng = np.random.default_rng(i)
        image = image + (0.35 * np.linalg.norm(image[:3], axis=0) * rng.normal(size=image.shape)).astype(np.float32)
        write_image(image, root / "images" / f"new_{i:02d}.nii.gz", native=GRID)
    (root / "dataset.json").write_text((data / "dataset.json").read_text())
    return root


def test_noisy_directions_are_named_on_the_shift_card(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    _, model = peaks
    data = write_fibres(tmp_path / "old", labelled=4)
    other = noisy(data, tmp_path / "new", first=20)
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[8:12, 8:12, 8:12] = 1
    write_labelmap(lesion, tmp_path / "lesions" / "new_20.nii.gz", native=GRID)
    record = shift(model, data, other, tmp_path / "card.html", lesions=tmp_path / "lesions", device="cpu")
    kinds = record["systematic"]["kinds"]
    assert set(kinds) == set(FLOORS)
    assert "disorder of directions" in record["systematic"]["named"]
    assert kinds["disorder of directions"]["value"] > 0
    assert list(record["lesion"]["cases"]) == ["new_20"]
    with pytest.raises(DataError, match="holds intensities, the model takes peaks"):
        shift(model, data, write_dataset(tmp_path / "scalar", labelled=1), tmp_path / "c.html", device="cpu")


def test_scans_of_directions_are_suggested(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    data, model = peaks
    noisy(data, tmp_path / "new", first=30)
    (tmp_path / "other" / "images").mkdir(parents=True)
    shutil.copy(tmp_path / "new" / "images" / "new_30.nii.gz", tmp_path / "other" / "images" / "grey.nii.gz")
    (tmp_path / "other" / "dataset.json").write_text(json.dumps({"channel_kind": "scalar"}))
    more = [tmp_path / "new" / "images", tmp_path / "other" / "images" / "grey.nii.gz"]
    found = suggest(model, data, images=more, device="cpu")
    assert {row.id for row in found.ranked} >= {f"new_{i}" for i in range(30, 34)}
    assert list(found.skipped) == ["grey"]
    assert "holds intensities, the model takes peaks" in found.skipped["grey"]


@pytest.mark.parametrize("kind", ["peaks", "tensor"])
def test_disorder_grows_with_the_angles_between_neighbours(kind: Any) -> None:
    found = []
    for noise in (0.0, 0.2, 0.8):
        rng = np.random.default_rng(0)
        way = np.array([1.0, 0, 0]).reshape(3, 1, 1, 1) + noise * rng.normal(size=(3, 8, 8, 8))
        way /= np.linalg.norm(way, axis=0)
        full = np.einsum("ixyz,jxyz->ijxyz", way, way)
        data = way if kind == "peaks" else np.stack([full[i, j] for i in range(3) for j in range(i, 3)])
        grid = Geometry((8, 8, 8), np.eye(4))
        image = Volume(data, grid, grid, tuple(map(str, range(len(data)))), kind)
        found.append(looks.disorder(image, np.ones((8, 8, 8), bool)))
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[0] < found[1] < found[2] < 2 / 3  # two thirds where there is no order at all


def test_a_model_of_directions_is_transferred(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    data = write_fibres(tmp_path / "data", labelled=1)
    adapted = transfer(peaks[1], data, tmp_path / "model", steps=2, device="cpu")
    assert adapted.provenance["transfer"]["weights"]["new"] == []
    assert adapted.plan.kind == "peaks"


def test_both_networks_learn_from_directions_together(tmp_path: Path) -> None:
    data = write_fibres(tmp_path / "data", labelled=2, unlabelled=1)
    settings = SMALL | {"pair.widths": "8,8,8", "joint.apart": "0.6", "joint.rounds": "1", "joint.refine": "4"}
    told: list[object] = []
    model = api.train(
        data, tmp_path / "model", steps=90, settings=settings, device="cpu", method="joint", observe=told.append
    )
    assert model.others["registrar"].spec["channels"] == 3  # lengths alone: nothing in them turns
    assert any("expected Dice of the atlases" in str(line) for line in told), told


def test_drafts_go_by_lengths(tmp_path: Path) -> None:
    data = write_fibres(tmp_path / "data", labelled=2, unlabelled=1)
    record = api.draft(data, tmp_path / "draft", device="cpu")
    assert len(record["cases"]) == 1
    assert record["leave_one_out"]["n"] == 2


def test_files_are_predicted_as_arrays_are(peaks: tuple[Path, Model], tmp_path: Path) -> None:
    data, model = peaks
    [done] = prediction.predict(model, data / "images" / "case_04.nii.gz", tmp_path / "out", device="cpu")
    image = load(find(data).unlabelled[0], find(data)).image
    found = read_image(done.path).data[0]
    np.testing.assert_array_equal(found, infer.segment(
        model, image, predictor=infer.fastest_predictor(model, pick("cpu"))
    ).label)  # fmt: skip
