"""Sampling, local correlation and smoothing: gradients, a naive reference, compiled against torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fewscan.space import kernels

SHAPES = [(9, 7, 5), (1, 6, 5), (5, 2, 7), (6, 5, 1), (1, 1, 4), (2, 2, 2)]
PAIRS = [((9, 7, 5), (9, 7, 5)), ((4, 1, 6), (5, 3, 2)), ((2, 7, 3), (1, 6, 5)), ((1, 1, 1), (3, 2, 2))]


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled", None)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def between_voxels(*shape: int, seed: int = 1) -> Tensor:
    """Displacements that land well inside a cell, where sampling is smooth."""
    made = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, shape, generator=made).double()
    return steps + 0.2 + 0.6 * torch.rand(shape, generator=made, dtype=torch.float64)


def naive_sample(image: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One voxel at a time, (C, I, J, K) and (3, X, Y, Z)."""
    out = np.zeros((len(image), *u.shape[1:]))
    for place in np.ndindex(*u.shape[1:]):
        at = np.clip(np.array(place) + u[(slice(None), *place)], 0, np.array(image.shape[1:]) - 1)
        low = np.floor(at).astype(int)
        for corner in np.ndindex(2, 2, 2):
            share = np.prod(np.where(corner, at - low, 1 - (at - low)))
            x, y, z = np.minimum(low + corner, np.array(image.shape[1:]) - 1)
            out[(slice(None), *place)] += share * image[:, x, y, z]
    return out


@pytest.mark.parametrize(("image_shape", "grid"), PAIRS)
def test_sample_agrees_with_a_naive_loop(image_shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    image, u = noise(2, 2, *image_shape), 2 * noise(2, 3, *grid, seed=1)
    for read in (kernels.sample, kernels.sample_torch):
        for i, answer in enumerate(read(image, u)):
            np.testing.assert_allclose(answer, naive_sample(image[i].numpy(), u[i].numpy()), atol=1e-4)


def test_sample_reads_ahead_of_a_positive_displacement() -> None:
    image = torch.tensor([10.0, 20.0, 40.0]).reshape(1, 1, 1, 3, 1)
    u = torch.zeros(1, 3, 1, 3, 1)
    u[:, 1] = 0.25
    assert kernels.sample(image, u).flatten().tolist() == [12.5, 25.0, 40.0]  # 10 + 10 / 4, 20 + 20 / 4, the border


@pytest.mark.parametrize("image_shape", [(4, 3, 5), (4, 1, 3)])
def test_gradients_of_sample_are_those_of_finite_differences(image_shape: tuple[int, ...]) -> None:
    image = noise(1, 2, *image_shape, dtype=torch.float64).requires_grad_(True)
    u = between_voxels(1, 3, 3, 4, 2).requires_grad_(True)
    assert gradcheck(kernels.sample, (image, u))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_lncc_are_those_of_finite_differences(weighted: bool) -> None:
    fixed = noise(1, 1, 5, 4, 3, dtype=torch.float64)
    warped = (fixed + noise(1, 1, 5, 4, 3, seed=2, dtype=torch.float64)).requires_grad_(True)
    weight = torch.rand(1, 1, 5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert gradcheck(lambda w: kernels.lncc(fixed, w, radius=1, weight=weight if weighted else None), (warped,))


@pytest.mark.parametrize(("image_shape", "grid"), PAIRS)
def test_both_paths_sample_alike_with_alike_gradients(image_shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    answers = []
    for read in (kernels.sample, kernels.sample_torch):
        image = noise(2, 3, *image_shape).requires_grad_(True)
        u = between_voxels(2, 3, *grid).float().requires_grad_(True)
        out = read(image, u)
        out.backward(noise(*out.shape, seed=4))
        answers.append((out.detach(), image.grad, u.grad))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_both_paths_of_lncc_agree(shape: tuple[int, int, int], weighted: bool) -> None:
    fixed = noise(2, 2, *shape)
    weight = noise(2, 1, *shape, seed=6).abs() if weighted else None
    answers = []
    for measure in (kernels.lncc, kernels.lncc_torch):
        warped = (0.5 * fixed + noise(2, 2, *shape, seed=5)).requires_grad_(True)
        value = measure(fixed, warped, weight=weight)
        value.backward()
        answers.append((value.detach(), warped.grad))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_both_paths_smooth_alike(shape: tuple[int, int, int], sigma: float) -> None:
    field = noise(2, 3, *shape)
    torch.testing.assert_close(kernels.gaussian(field, sigma), kernels.gaussian_torch(field, sigma), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("label_shape", "grid"), PAIRS)
@pytest.mark.parametrize("kind", [np.uint16, np.int64])
def test_both_paths_vote_for_the_label_with_the_largest_share(
    label_shape: tuple[int, ...], grid: tuple[int, ...], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = np.random.default_rng(0).choice(np.array([0, 2, 7, 65535], kind), label_shape)
    u = 1.5 * noise(3, *grid, seed=3)
    found = kernels.vote_labels(label, u)
    monkeypatch.setattr(kernels, "compiled", None)
    np.testing.assert_array_equal(found, kernels.vote_labels(label, u))
    shares = np.stack([naive_sample((label == v)[None].astype(float), u.numpy())[0] for v in (0, 2, 7, 65535)])
    clear = np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 1e-4
    wanted = np.where(kernels.outside(u, label_shape), 0, np.array([0, 2, 7, 65535])[shares.argmax(0)])
    np.testing.assert_array_equal(found[clear], wanted[clear])
    assert found.dtype == kind


def test_half_a_voxel_beyond_the_grid_is_outside() -> None:
    u = torch.zeros(3, 4, 1, 1)
    u[0, :, 0, 0] = torch.tensor([-0.6, -1.4, 0.4, 0.6])  # lands at -0.6, -0.4, 2.4, 3.6 of 0 .. 3
    assert kernels.outside(u, (4, 1, 1)).flatten().tolist() == [True, False, False, True]


def test_smoothing_keeps_a_constant_and_the_mean_of_a_point() -> None:
    torch.testing.assert_close(
        kernels.gaussian(torch.full((1, 1, 5, 4, 3), 7.0), 2.0), torch.full((1, 1, 5, 4, 3), 7.0)
    )
    point = torch.zeros(1, 1, 15, 15, 15)
    point[0, 0, 7, 7, 7] = 1
    out = kernels.gaussian(point, 1.0)[0, 0]
    assert float(out.sum()) == pytest.approx(1, abs=1e-5)
    offsets = torch.arange(15.0) - 7
    assert float((out.sum((1, 2)) * offsets**2).sum()) == pytest.approx(1, rel=0.02)  # the variance asked for


def test_no_smoothing_at_all_gives_the_same_field_back() -> None:
    field = noise(1, 3, 4, 4, 4)
    torch.testing.assert_close(kernels.gaussian(field, 0.0), field)


def test_lncc_is_one_for_any_local_scaling_and_small_for_noise() -> None:
    image = noise(1, 1, 12, 12, 12)
    assert float(kernels.lncc(image, 3 - 2 * image)) == pytest.approx(1, abs=1e-3)
    assert float(kernels.lncc(image, noise(1, 1, 12, 12, 12, seed=8))) < 0.1


def test_lncc_counts_only_windows_with_weight() -> None:
    image = noise(1, 1, 12, 6, 6)
    half = torch.cat([image[:, :, :6], noise(1, 1, 6, 6, 6, seed=9)], 2)
    weight = torch.zeros(1, 1, 12, 6, 6)
    weight[:, :, :4] = 1  # windows of radius 2 that end before the noise
    assert float(kernels.lncc(image, half, weight=weight)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_the_answer(shape: tuple[int, int, int]) -> None:
    answers = []
    for count in (1, 2):
        torch.set_num_threads(count)
        image, u = noise(1, 2, *shape).requires_grad_(True), noise(1, 3, *shape, seed=1).requires_grad_(True)
        out = kernels.sample(image, u)
        value = kernels.lncc(noise(1, 2, *shape, seed=2), out)
        value.backward()
        answers.append((out.detach(), value.detach(), image.grad, u.grad, kernels.gaussian(u.detach(), 1.0)))
    for one, two in zip(*answers, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_the_path_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.path() == kernels.path(torch.device("cpu")) == "compiled"
    assert kernels.path("cuda:0") == "torch"
    kernels.log_path.cache_clear()
    with caplog.at_level(logging.INFO, kernels.__name__):
        kernels.log_path("cpu")
        kernels.log_path("cpu")
    assert [record.getMessage() for record in caplog.records] == ["registration kernels on cpu: compiled"]
    monkeypatch.setattr(kernels, "compiled", None)
    assert kernels.path() == "torch"


@pytest.mark.usefixtures("without_numba")
def test_without_numba_torch_does_the_work() -> None:
    image, u = noise(1, 2, 5, 4, 3).requires_grad_(True), between_voxels(1, 3, 5, 4, 3).float().requires_grad_(True)
    out = kernels.sample(image, u)
    value = kernels.lncc(noise(1, 2, 5, 4, 3, seed=2), out)
    value.backward()
    np.testing.assert_allclose(
        out[0].detach(), naive_sample(image[0].detach().numpy(), u[0].detach().numpy()), atol=1e-4
    )
    assert "GridSampler" in type(out.grad_fn).__name__
    torch.testing.assert_close(kernels.gaussian(out.detach(), 1.0), kernels.gaussian_torch(out.detach(), 1.0))
    assert image.grad is not None
    assert u.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept_and_inputs_left_alone(dtype: torch.dtype) -> None:
    image, u = noise(1, 1, 6, 5, 4, dtype=dtype), torch.full((1, 3, 6, 5, 4), 0.5, dtype=dtype)
    kept = image.clone(), u.clone()
    assert kernels.sample(image, u).dtype == dtype
    assert kernels.lncc(image, image * 2).dtype == dtype
    assert kernels.gaussian(image, 1.0).dtype == dtype
    torch.testing.assert_close((image, u), kept, atol=0, rtol=0)


def test_tensors_that_are_not_contiguous_are_read_right() -> None:
    image, u = noise(1, 4, 5, 6, 2).permute(0, 4, 1, 2, 3), noise(1, 4, 5, 6, 3, seed=1).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(kernels.sample(image, u), kernels.sample(image.contiguous(), u.contiguous()))
    torch.testing.assert_close(kernels.gaussian(u, 1.0), kernels.gaussian(u.contiguous(), 1.0))
    torch.testing.assert_close(kernels.lncc(image, image * u[:, :2]), kernels.lncc_torch(image, image * u[:, :2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_place_that_is_no_number_reads_and_writes_inside_the_image(value: float) -> None:
    image = torch.ones(1, 1, 3, 3, 3, requires_grad=True)
    u = torch.zeros(1, 3, 3, 3, 3)
    u[0, :, 1, 1, 1] = value
    out = kernels.sample(image, u)
    out.sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(out.detach(), torch.ones(1, 1, 3, 3, 3))
    assert float(image.grad.sum()) == pytest.approx(27)


def test_the_adaptive_step_is_the_same_on_both_paths_and_never_too_long(monkeypatch):
    torch.manual_seed(0)
    grads = [torch.randn(2, 3, 7, 6, 5) for _ in range(3)]
    answers = []
    for _ in range(2):
        moments = torch.zeros(2, 3, 7, 6, 5), torch.zeros(2, 1, 7, 6, 5)
        for i, grad in enumerate(grads, 1):
            delta = kernels.adaptive_step(grad, moments, step=i, floor=0.5, longest=0.4)
            assert float(delta.square().sum(1).sqrt().max()) <= 0.4 + 1e-6
        answers.append(delta)
        monkeypatch.setattr(kernels, "compiled", None)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert float((answers[0] * grads[-1]).sum()) > 0


def test_smoothing_keeps_every_bit_of_a_displacement_and_cudnn_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    convolve = F.conv3d
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(F, "conv3d", lambda *args, **how: seen.append(cudnn.allow_tf32) or convolve(*args, **how))
    for before in (True, False):
        monkeypatch.setattr(cudnn, "allow_tf32", before)
        kernels.gaussian_torch(torch.zeros(1, 3, 4, 4, 4), 1.0)
        assert cudnn.allow_tf32 == before
    assert seen == [False] * 6
