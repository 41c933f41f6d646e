"""The measured fast paths under warping and registration, their gradients, and their fallbacks.

On a CPU the loops of `compiled` run, one slab of the volume per thread; on a GPU, or where numba is missing, plain
torch gives the same numbers to 1e-4. `path` says which one it is. `sample` and `lncc` are differentiable.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fewscan.space.exactness import exactly

try:
    from fewscan.space import compiled
except ImportError:  # no numba for this Python yet: the torch path, which `path` reports
    compiled = None  # type: ignore[assignment]

KEEP = (0.9, 0.99)  # shares of the running means that a step keeps
TINY = 1e-12
LNCC_EPS = 1e-5  # of the product of two variances; images have a standard deviation near 1
_log = logging.getLogger(__name__)


def path(device: torch.device | str = "cpu") -> str:
    """Which implementation runs on a device: "compiled" or "torch".

    Parameters
    ----------
    device : torch.device or str
        Where the tensors are.
    """
    return "compiled" if torch.device(device).type == "cpu" and compiled is not None else "torch"


@functools.cache
def log_path(device: str) -> None:
    """Say once in the log which implementation runs.

    Parameters
    ----------
    device : str
        Where the tensors are.
    """
    _log.info("registration kernels on %s: %s", device, path(device))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fewscan-kernel")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork, and work given to them would never end
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _slabs(length: int) -> list[tuple[int, int]]:
    """``range(length)`` in as many parts as torch has threads."""
    count = max(1, min(torch.get_num_threads(), length))
    return list(pairwise(round(i * length / count) for i in range(count + 1)))


def _in_slabs(kernel: Callable[..., Any], length: int, *args: Any) -> list[Any]:
    """Run a compiled loop over ``range(length)``, the first slab on this thread."""
    first, *others = _slabs(length)
    jobs = [_pool(len(others) + 1).submit(kernel, *args, *slab) for slab in others]
    return [kernel(*args, *first), *(job.result() for job in jobs)]


def _compilable(*tensors: Tensor) -> bool:
    kind = tensors[0].dtype
    wide = kind in (torch.float32, torch.float64)
    return wide and all(t.dtype == kind and path(t.device) == "compiled" for t in tensors)


def _plain(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().contiguous().numpy()


class _Sample(torch.autograd.Function):
    """`compiled.sample` for a batch, with both gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        image, u = inputs
        ctx.save_for_backward(image, u)
        out = image.new_empty((len(image), image.shape[1], *u.shape[2:]))
        for one, field, target in zip(image, u, out, strict=True):
            _in_slabs(compiled.sample, u.shape[2], _plain(one), _plain(field), target.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        image, u = ctx.saved_tensors
        by_image = by_u = None
        if ctx.needs_input_grad[1]:
            by_u = torch.empty_like(u, memory_format=torch.contiguous_format)
            for one, field, g, target in zip(image, u, upper, by_u, strict=True):
                args = _plain(one), _plain(field), _plain(g), target.numpy()
                _in_slabs(compiled.sample_grad_u, u.shape[2], *args)
        if ctx.needs_input_grad[0]:
            by_image = torch.stack([_grad_image(f, g, o) for f, g, o in zip(u, upper, image, strict=True)])
        return by_image, by_u


def _grad_image(u: Tensor, upper: Tensor, like: Tensor) -> Tensor:
    """Scatter of a gradient back to the image; threads add into buffers of their own."""
    slabs = _slabs(u.shape[1])
    buffers = torch.zeros((len(slabs), *like.shape), dtype=like.dtype)
    field, g = _plain(u), _plain(upper)
    work: list[Any] = [(field, g, own.numpy(), *slab) for own, slab in zip(buffers, slabs, strict=True)]
    jobs = [_pool(len(slabs)).submit(compiled.sample_grad_image, *args) for args in work[1:]]
    compiled.sample_grad_image(*work[0])
    for job in jobs:
        job.result()
    return buffers.sum(0) if len(slabs) > 1 else buffers[0]


def sample(image: Tensor, u: Tensor) -> Tensor:
    """Read ``image`` at ``x + u(x)``, linearly; beyond the border its voxels repeat.

    Parameters
    ----------
    image : (B, C, I, J, K) float
        Any grid that shares its first voxel with that of ``u``.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.

    Examples
    --------
    >>> image = torch.arange(4.0).reshape(1, 1, 4, 1, 1)
    >>> sample(image, torch.full((1, 3, 4, 1, 1), 0.5))[0, 0, :, 0, 0].tolist()
    [0.5, 1.5, 2.5, 3.0]
    """
    if _compilable(image, u):
        answer: Tensor = _Sample.apply(image, u)  # type: ignore[no-untyped-call]
        return answer
    return sample_torch(image, u)


def sample_torch(image: Tensor, u: Tensor, *, mode: str = "bilinear") -> Tensor:
    """`sample` by ``grid_sample``: for GPUs, for users without numba, and for the nearest voxel.

    Parameters
    ----------
    image : (B, C, I, J, K) float
        Any grid.
    u : (B, 3, X, Y, Z) float
        Displacement, voxels.
    mode : {"bilinear", "nearest"}
        Interpolation.
    """
    axes = [torch.arange(n, device=u.device, dtype=u.dtype) for n in u.shape[2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")) + u  # (B, 3, X, Y, Z)
    size = torch.tensor([max(n - 1, 1) for n in image.shape[2:]], device=u.device, dtype=u.dtype)
    places = places * (2 / size).view(1, 3, 1, 1, 1) - 1
    return F.grid_sample(
        image, places.permute(0, 2, 3, 4, 1).flip(-1).to(image.dtype), mode=mode, padding_mode="border",
        align_corners=True,
    )  # fmt: skip


class _Lncc(torch.autograd.Function):
    """Mean squared local correlation of one pair of volumes, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        fixed, warped, weight, radius = inputs
        shape = fixed.shape
        f, w, m = _plain(fixed), _plain(warped), _plain(weight)
        sums = np.empty((5, *shape), f.dtype)
        _in_slabs(compiled.lncc_planes, shape[0], f, w, sums, radius)
        parts = np.empty((3, *shape), f.dtype)
        total = sum(_in_slabs(compiled.lncc_finish, shape[1], sums, m, parts, radius, LNCC_EPS))
        scale = 1 / max(float(weight.sum()), 1e-6)
        ctx.kept = f, w, parts, radius, scale
        return torch.tensor(total * scale, dtype=warped.dtype)

    @staticmethod
    def backward(ctx: Any, upper: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        f, w, parts, radius, scale = ctx.kept
        sums = np.empty_like(parts)
        _in_slabs(compiled.box_planes, f.shape[0], parts, sums, radius)
        grad = np.empty_like(w)
        _in_slabs(compiled.lncc_gradient, f.shape[1], f, w, sums, grad, radius, float(upper) * scale)
        return None, torch.from_numpy(grad), None, None


def lncc(fixed: Tensor, warped: Tensor, *, radius: int = 2, weight: Tensor | None = None) -> Tensor:
    """Mean squared local correlation coefficient, 0 to 1, over cubic windows that are cut off at the border.

    Avants et al. 2008, Medical Image Analysis 12(1), doi 10.1016/j.media.2007.06.004, eq. 6, with variances instead of
    sums of squares. The gradient flows to ``warped`` only.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images with a standard deviation near 1.
    radius : int
        Half width of the window; it has ``2 radius + 1`` voxels a side.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of the window centred on each voxel; all alike when None.
    """
    if _compilable(warped):
        ones = torch.ones(warped.shape[2:], dtype=warped.dtype)
        values = [
            _Lncc.apply(f.to(w.dtype), w, ones if weight is None else weight[b, 0].to(w.dtype), radius)  # type: ignore
            for b, (fs, ws) in enumerate(zip(fixed.detach(), warped, strict=True))
            for f, w in zip(fs, ws, strict=True)
        ]
        return torch.stack(values).mean()
    return lncc_torch(fixed, warped, radius=radius, weight=weight)


def lncc_torch(fixed: Tensor, warped: Tensor, *, radius: int = 2, weight: Tensor | None = None) -> Tensor:
    """`lncc` by separable average pooling.

    Parameters
    ----------
    fixed, warped : (B, C, X, Y, Z) float
        Images.
    radius : int
        Half width of the window.
    weight : (B, 1, X, Y, Z) float, optional
        Weight of each voxel.
    """
    fixed = fixed.detach()
    mean = functools.partial(window_mean, radius=radius)
    mf, mw = mean(fixed), mean(warped)
    vf = (mean(fixed * fixed) - mf * mf).clamp(min=0)
    vw = (mean(warped * warped) - mw * mw).clamp(min=0)
    cross = mean(fixed * warped) - mf * mw
    square = cross * cross / (vf * vw + LNCC_EPS)
    if weight is None:
        return square.mean()
    weight = weight.to(square)
    return ((square * weight).sum((2, 3, 4)) / weight.sum((2, 3, 4)).clamp(min=1e-6)).mean()


def window_mean(image: Tensor, *, radius: int) -> Tensor:
    """Mean over the cubic window around each voxel, cut off at the border; axes may be shorter than the window.

    Parameters
    ----------
    image : (B, C, X, Y, Z) float
        Images.
    radius : int
        Half width of the window.

    Examples
    --------
    >>> window_mean(torch.arange(4.0).reshape(1, 1, 4, 1, 1), radius=1).flatten().tolist()
    [0.5, 1.0, 2.0, 2.5]
    """
    for axis in range(3):
        at = torch.arange(image.shape[2 + axis], device=image.device)
        width = (at + radius).clamp(max=len(at) - 1) - (at - radius).clamp(min=0) + 1
        size, pad, view = [1, 1, 1], [0] * 6, [1] * 5
        size[axis], view[2 + axis] = 2 * radius + 1, -1
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        image = F.avg_pool3d(F.pad(image, pad), size, 1) * (size[axis] / width.to(image.dtype)).view(view)
    return image


def gaussian(field: Tensor, sigma: float) -> Tensor:
    """Smooth with a Gaussian, the border repeated. Not differentiable.

    Parameters
    ----------
    field : (B, C, X, Y, Z) float
        Images or displacements.
    sigma : float
        Standard deviation, voxels; nothing happens at 0.
    """
    if sigma <= 0:
        return field
    with torch.no_grad():
        if _compilable(field):
            weights = _taps(sigma).to(field.dtype).numpy()
            out = torch.empty_like(field, memory_format=torch.contiguous_format)
            for one, target in zip(field, out, strict=True):
                source, between = _plain(one), np.empty(one.shape, weights.dtype)
                _in_slabs(compiled.smooth_planes, source.shape[1], source, between, weights)
                _in_slabs(compiled.smooth_across, source.shape[1], between, target.numpy(), weights)
            return out
        return gaussian_torch(field, sigma)


def _taps(sigma: float) -> Tensor:
    reach = max(1, math.ceil(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return taps / taps.sum()


@exactly()
def gaussian_torch(field: Tensor, sigma: float) -> Tensor:
    """`gaussian` by three convolutions.

    Parameters
    ----------
    field : (B, C, X, Y, Z) float
        Images or displacements.
    sigma : float
        Standard deviation, voxels.
    """
    taps = _taps(sigma).to(field)
    flat = field.reshape(-1, 1, *field.shape[2:])
    for axis in range(3):
        pad, size = [0] * 6, [1, 1, 1]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = len(taps) // 2
        size[axis] = len(taps)
        flat = F.conv3d(F.pad(flat, pad, mode="replicate"), taps.view(1, 1, *size))
    return flat.reshape(field.shape)


def adaptive_step(grad: Tensor, moments: tuple[Tensor, Tensor], *, step: int, floor: float, longest: float) -> Tensor:
    """Displacement uphill: the running mean of the gradient over the running length of it, none above ``longest``.

    Parameters
    ----------
    grad : (B, 3, X, Y, Z) float
        Gradient of what should grow.
    moments : pair of (B, 3, X, Y, Z) and (B, 1, X, Y, Z) float
        Running means of the gradient and of its squared length, zero at first; changed in place.
    step : int
        Number of this step, from 1.
    floor : float
        Share of the root mean square length that is added to every voxel's.
    longest : float
        Largest length, voxels.
    """
    first, second = moments
    up = 1 / (1 - KEEP[0] ** step), 1 / (1 - KEEP[1] ** step)
    if _compilable(grad, first, second) and first.is_contiguous() and second.is_contiguous():
        delta = torch.empty_like(grad, memory_format=torch.contiguous_format)
        for g, m, s, d in zip(grad, first, second[:, 0], delta, strict=True):
            total = sum(_in_slabs(compiled.moments, g.shape[1], _plain(g), m.numpy(), s.numpy(), *KEEP))
            root = floor * math.sqrt(up[1] * total / s.numel()) + TINY
            most = max(_in_slabs(compiled.stride, g.shape[1], m.numpy(), s.numpy(), d.numpy(), *up, root))
            d.mul_(longest / max(math.sqrt(most), 1.0))
        return delta
    first.lerp_(grad, 1 - KEEP[0])
    second.lerp_((grad * grad).sum(1, keepdim=True), 1 - KEEP[1])
    square = second * up[1]
    delta = first * up[0] / (square.sqrt() + floor * square.mean((2, 3, 4), keepdim=True).sqrt() + TINY)
    most = (delta * delta).sum(1, keepdim=True).amax((2, 3, 4), keepdim=True).sqrt()
    return delta * (longest / most.clamp(min=1.0))


def vote_labels(label: np.ndarray[Any, Any], u: Tensor) -> np.ndarray[Any, Any]:
    """The label with the largest linear share around each place, 0 more than half a voxel off the grid.

    Parameters
    ----------
    label : (I, J, K) int
        Label map.
    u : (3, X, Y, Z) float
        Displacement on the CPU, voxels of the label map's grid.
    """
    out = np.zeros(tuple(u.shape[1:]), label.dtype)
    if compiled is not None:
        _in_slabs(compiled.vote_labels, u.shape[1], np.ascontiguousarray(label), _plain(u.float()), out)
        return out
    best = torch.zeros(u.shape[1:])
    for value in np.unique(label):
        share = sample_torch(torch.from_numpy((label == value).astype(np.float32))[None, None], u[None].float())[0, 0]
        out[(share > best + 1e-6).numpy()] = value
        best = torch.maximum(best, share)
    out[outside(u, label.shape).numpy()] = 0
    return out


def outside(u: Tensor, shape: Sequence[int]) -> Tensor:
    """Voxels (X, Y, Z) whose place lies more than half a voxel off a grid.

    Parameters
    ----------
    u : (3, X, Y, Z) float
        Displacement, voxels of that grid.
    shape : (3,) int
        Of that grid.
    """
    out = torch.zeros(u.shape[1:], dtype=torch.bool)
    for axis, n in enumerate(shape):
        view = [1, 1, 1]
        view[axis] = -1
        at = u[axis] + torch.arange(u.shape[1 + axis], dtype=u.dtype).view(view)
        out |= (at < -0.5) | (at > n - 0.5)
    return out
