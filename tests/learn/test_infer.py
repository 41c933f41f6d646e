"""Streaming changes nothing but the memory."""

import dataclasses

import numpy as np
import pytest
import torch
from phantom import phantom

from fewscan.learn import answers, infer
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import Hardware, pick
from fewscan.learn.intensity import normalise
from fewscan.space.geometry import Geometry
from fewscan.space.volume import Volume, resample

CPU = Hardware(device=torch.device("cpu"), precision="fp32")


def volume(shape=(40, 44, 36), spacing=(1.0, 1.0, 1.0), seed=5):
    image, label, geometry = phantom(seed, shape=shape, spacing=spacing)
    return Volume(image[None], geometry, geometry), label


@pytest.fixture
def model(trained):
    return trained[1]


def small_window(model, patch=(16, 16, 16), **changes):
    return Model(
        segmenter=model.segmenter, plan=dataclasses.replace(model.plan, patch=patch, **changes),
        settings=model.settings, provenance={},
    )  # fmt: skip


def naive(model, scan):
    """All windows into one array, as a textbook would."""
    plan = model.plan
    data = torch.from_numpy(normalise(scan.data, plan.scaling))
    window = infer.window_shape(scan.geometry.shape, plan)
    total, weight = torch.zeros(plan.classes, *data.shape[1:]), torch.zeros(data.shape[1:])
    bell = infer.bell(window)
    for x in infer.starts(data.shape[1], window[0]):
        for y in infer.starts(data.shape[2], window[1]):
            for z in infer.starts(data.shape[3], window[2]):
                box = (slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2]))
                with torch.no_grad():
                    total[(slice(None), *box)] += model.segmenter(data[(slice(None), *box)][None])[0] * bell
                weight[box] += bell
    return (total / weight).softmax(0).numpy()


def test_streaming_equals_the_textbook(model):
    model, (scan, _) = small_window(model, sole=()), volume()
    got = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU), probabilities=True)
    want = naive(model, scan)
    np.testing.assert_allclose(got.probs / 255, want, atol=0.004)
    assert (got.label == want.argmax(0)).mean() > 0.9999


@pytest.mark.parametrize("memory", [40_000, 100_000, 300_000])
def test_tiles_change_nothing(model, memory):
    model, (scan, _) = small_window(model), volume()
    predictor = infer.torch_predictor(model, CPU)
    whole = infer.segment(model, scan, predictor=predictor)
    tiled = infer.segment(model, scan, predictor=predictor, memory=memory)
    assert len(infer._tiles(infer._Scan(scan, model.plan), 3, memory)) > 1
    assert (whole.label == tiled.label).all()


def test_a_finer_scan_comes_back_on_its_own_grid(model):
    scan, label = volume(shape=(40, 48, 36), spacing=(0.5, 0.5, 0.5), seed=1)
    got = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU)).label
    assert got.shape == label.shape
    for value in (1, 2):
        assert 2 * ((got == value) & (label == value)).sum() / ((got == value).sum() + (label == value).sum()) > 0.6


def test_resampled_streaming_equals_resampling_the_whole(model):
    scan, _ = volume(shape=(40, 44, 36), spacing=(0.7, 0.7, 0.7))
    model = small_window(model, sole=())
    coarse = infer._Scan(scan, model.plan)
    inner = Volume(coarse.image.numpy(), Geometry(coarse.grid, np.eye(4)), Geometry(coarse.grid, np.eye(4)))
    same = dataclasses.replace(
        model.plan, scaling=(dataclasses.replace(model.plan.scaling[0], kind="ct", low=-99, high=99),)
    )
    rows = infer.segment(
        dataclasses.replace(model, plan=same), inner, predictor=infer.torch_predictor(model, CPU), probabilities=True
    )
    back = resample(torch.from_numpy(rows.probs).float(), (40, 44, 36)).argmax(0).numpy()
    got = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU)).label
    assert (back == got).mean() > 0.99


def test_a_scan_smaller_than_the_window_is_padded_and_cropped(model):
    scan, _ = volume(shape=(11, 9, 7))
    got = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU))
    assert got.label.shape == (11, 9, 7)


def test_specks_go_only_where_training_labels_were_one_piece(model):
    label = np.zeros((20, 20, 20), np.uint8)
    label[2:10, 2:10, 2:10] = 1
    label[15, 15, 15] = 1
    label[12:14, 2:4, 2:4] = 2
    label[18, 18, 18] = 2
    plan = dataclasses.replace(model.plan, sole=(1,))
    clean = answers.keep_sole_pieces(label.copy(), plan)
    assert clean[15, 15, 15] == 0
    assert (clean == 1).sum() == 512
    assert clean[18, 18, 18] == 2


def test_mirrored_prediction_of_a_mirrored_scan_is_the_mirror_image(model):
    mirrored = small_window(model, mirror=True)
    predict = infer.torch_predictor(mirrored, CPU, tta=True)
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(predict(x.flip(2)), predict(x).flip(2), atol=1e-4, rtol=1e-4)


def test_bf16_gives_the_same_labels(model):
    scan, _ = volume(shape=(20, 24, 18), seed=2)
    exact = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU)).label
    fast = infer.segment(model, scan, predictor=infer.torch_predictor(model, pick("cpu", precision="bf16"))).label
    assert (exact == fast).mean() > 0.995


def test_openvino_gives_the_same_labels_and_sends_nothing(model, monkeypatch):
    import sys

    from fewscan.learn import openvino_backend

    if not openvino_backend.available():
        pytest.skip("openvino is not installed: the [fast] extra is optional")
    scan, _ = volume(shape=(20, 24, 18), seed=2)
    exact = infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU)).label
    monkeypatch.setattr(openvino_backend, "PATIENCE", 0)
    fast = infer.segment(model, scan, predictor=openvino_backend.predictor(model)).label
    assert (exact == fast).mean() > 0.99
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.parametrize("shape", [(3, 3, 3), (16, 16, 1), (40, 5, 5)])
def test_tiny_and_flat_scans_are_predicted(model, shape):
    scan, _ = volume(shape=shape)
    assert infer.segment(model, scan, predictor=infer.torch_predictor(model, CPU)).label.shape == shape


def test_progress_rises_to_the_end_whatever_the_tiles(model):
    scan, _ = volume()
    for memory in (60_000, infer.WORKING_MEMORY):
        seen = []
        small = small_window(model)
        infer.segment(small, scan, predictor=infer.torch_predictor(small, CPU), memory=memory, observe=seen.append)
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(1.0)
