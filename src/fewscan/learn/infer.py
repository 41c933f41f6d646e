"""Prediction of whole scans in bounded memory.

Windows slide over the plan's grid row by row along the first axis. Only the rows that windows still reach are held as
logits; what is finished is resampled to the scan's own grid, reduced to labels and forgotten. Scans whose rows are too
large for the memory allowed are cut into tiles along the second axis; windows across a cut are computed twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewscan.learn.answers import Segmented, decided, empty, keep_sole_pieces, shares
from fewscan.learn.batches import swap_sides
from fewscan.learn.channels import entry
from fewscan.learn.checkpoint import Model
from fewscan.learn.hardware import Hardware, free_device_bytes
from fewscan.learn.plan import Plan
from fewscan.learn.windows import bell, starts, window_shape
from fewscan.space import directions
from fewscan.space.geometry import Shape, with_spacing
from fewscan.space.volume import Volume, axis_weights, resample_by

WORKING_MEMORY = 1 << 30
FREE = 0.5  # of a GPU's free memory that sums of logits may take: the network wants some too

Predictor = Callable[[Tensor], Tensor]


def torch_predictor(model: Model, hardware: Hardware, *, tta: bool = False) -> Predictor:
    """Windows (B, C, X, Y, Z) to logits (B, K, X, Y, Z) by torch.

    Parameters
    ----------
    model : Model
        Its segmenter is moved to the device.
    hardware : Hardware
        Device and precision.
    tta : bool
        Average with the mirrored window, where the plan allows mirroring.
    """
    plain = _Plain(model.segmenter.to(hardware.device).eval(), hardware)
    return _Mirrored(plain, model.plan) if tta and model.plan.mirror else plain


def network_predictor(network: nn.Module, hardware: Hardware) -> Predictor:
    """Windows to logits by a network as it is.

    Parameters
    ----------
    network : nn.Module
        On the device, in the mode wanted.
    hardware : Hardware
        Device and precision.
    """

    return _Plain(network, hardware)


@dataclass(frozen=True, eq=False)
class _Plain:
    """A network as it is; its answer comes to where the windows lie."""

    network: nn.Module
    hardware: Hardware

    @property
    def device(self) -> torch.device:
        return self.hardware.device

    @torch.inference_mode()
    def __call__(self, windows: Tensor) -> Tensor:
        with self.hardware.autocast():
            answer: Tensor = self.network(windows.to(self.device)).float().to(windows.device)
        return answer


@dataclass(frozen=True, eq=False)
class _Mirrored:
    """A network averaged with its answer to the mirrored window."""

    plain: _Plain
    plan: Plan

    @property
    def device(self) -> torch.device:
        return self.plain.device

    def __call__(self, windows: Tensor) -> Tensor:
        flipped = windows.flip(2)
        other = self.plain(flipped if self.plan.kind == "scalar" else directions.mirrored(flipped)).flip(2)
        everywhere = torch.ones(len(windows), dtype=torch.bool)
        return (self.plain(windows) + swap_sides(other, everywhere, pairs=self.plan.pairs)) / 2


def summed_on(predictor: Predictor, values: int) -> torch.device:
    """Where the logits of windows are added up: on the predictor's GPU where they fit, else on the CPU.

    Parameters
    ----------
    predictor : callable
        Windows to logits.
    values : int
        Numbers in 32 bits that are held at a time.
    """
    place = getattr(predictor, "device", torch.device("cpu"))
    free = free_device_bytes(place) if place.type == "cuda" else None
    return place if free is not None and FREE * free > 4 * values else torch.device("cpu")


def probabilities(image: Tensor, plan: Plan, *, predictor: Predictor) -> Tensor:
    """Class probabilities (K, X, Y, Z) of a scan that is on the plan's grid and normalised already, held whole.

    Parameters
    ----------
    image : (C, X, Y, Z) float
        As `batches.prepare` leaves it.
    plan : Plan
        Windows.
    predictor : callable
        Windows to logits.
    """
    grid: Shape = (image.shape[1], image.shape[2], image.shape[3])
    window = window_shape(grid, plan)
    margin = [max(0, w - n) for w, n in zip(window, grid, strict=True)]
    pad = [side for m in reversed(margin) for side in (m // 2, m - m // 2)]
    padded = F.pad(image[None].float(), pad, mode="replicate") if any(pad) else image[None].float()
    place = summed_on(predictor, 3 * plan.classes * padded[0, 0].numel())  # the sum, its share, and a window's
    padded = padded.to(place)
    total = torch.zeros(plan.classes, *padded.shape[2:], device=place)
    weight = torch.zeros(padded.shape[2:], device=place)
    profile = bell(window).to(place)
    for corner in itertools.product(*[starts(n, w) for n, w in zip(padded.shape[2:], window, strict=True)]):
        box = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        total[(slice(None), *box)] += shares(predictor(padded[(slice(None), slice(None), *box)])[0], plan) * profile
        weight[box] += profile
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(margin, grid, strict=True))
    total = total[(slice(None), *inside)]
    return (total / (weight[inside] if plan.overlapping else total.sum(0))).cpu()


def labels_from(probs: Tensor, plan: Plan, *, shape: Shape, probabilities: bool = False) -> Segmented:
    """Labels on the scan's own grid from class probabilities on the plan's.

    Parameters
    ----------
    probs : (K, X, Y, Z) float
        On the plan's grid.
    plan : Plan
        Classes.
    shape : (X, Y, Z) int
        Of the scan's own grid.
    probabilities : bool
        Keep the probabilities too; they take a byte per class and voxel.
    """
    label = empty(shape, plan)
    kept = np.zeros((len(probs), *shape), dtype=np.uint8) if probabilities else None
    wx, wy, wz = (axis_weights(n, m) for n, m in zip(probs.shape[1:], shape, strict=True))
    rows = max(1, 8_000_000 // (len(probs) * shape[1] * shape[2]))
    for low in range(0, shape[0], rows):
        high = min(low + rows, shape[0])
        first, last, part = _support(wx, low, high)
        piece = resample_by(probs[:, first:last], [part, wy, wz])
        label[..., low:high, :, :] = decided(piece, plan, half=0.5)
        if kept is not None:
            kept[:, low:high] = (piece * 255).round().to(torch.uint8).numpy()
    return Segmented(keep_sole_pieces(label, plan), kept)


class _Scan:
    """A scan on the plan's grid, padded to at least one window, with the way back to its own grid."""

    def __init__(self, volume: Volume, plan: Plan) -> None:
        data, native = volume.data, volume.geometry.shape
        self.native = native
        self.grid = with_spacing(volume.geometry, plan.spacing).shape
        self.window = window_shape(self.grid, plan)
        self.back = [axis_weights(n, m) for n, m in zip(self.grid, native, strict=True)]
        there = [axis_weights(n, m) for n, m in zip(native, self.grid, strict=True)]
        seen = entry(volume, plan)
        large = int(np.prod(self.grid)) > 20_000_000
        self.image = torch.empty((plan.width, *self.grid), dtype=torch.float16 if large else torch.float32)
        rows = max(1, 4_000_000 // max(1, int(np.prod(native[1:]))))
        for low in range(0, self.grid[0], rows):
            high = min(low + rows, self.grid[0])
            first, last, wx = _support(there[0], low, high)
            self.image[:, low:high] = resample_by(seen(data[:, first:last]), [wx, there[1], there[2]])
        self.before = [max(0, w - n) // 2 for w, n in zip(self.window, self.grid, strict=True)]

    def windows(self, places: Sequence[tuple[int, int, int]]) -> Tensor:
        """Windows (B, C, X, Y, Z) at these first voxels; the border is repeated where the scan is smaller."""
        picked = []
        for place in places:
            index = [
                (torch.arange(p, p + w) - b).clamp(0, n - 1)
                for p, w, b, n in zip(place, self.window, self.before, self.grid, strict=True)
            ]
            if all(n >= w for n, w in zip(self.grid, self.window, strict=True)):
                box = tuple(slice(p, p + w) for p, w in zip(place, self.window, strict=True))
                picked.append(self.image[(slice(None), *box)])
            else:
                picked.append(self.image[:, index[0]][:, :, index[1]][:, :, :, index[2]])
        return torch.stack(picked).float()


def _support(weights: Tensor | None, low: int, high: int) -> tuple[int, int, Tensor | None]:
    """Input range that output rows ``low`` to ``high`` read, and the weights between the two."""
    if weights is None:
        return low, high, None
    columns = torch.nonzero(weights[low:high].sum(0) > 0)[:, 0]
    first, last = int(columns[0]), int(columns[-1]) + 1
    return first, last, weights[low:high, first:last]


def _tiles(scan: _Scan, classes: int, memory: int) -> list[tuple[int, int]]:
    """Ranges of the scan's own second axis, each small enough for the memory allowed."""
    bytes_per_row = classes * scan.window[0] * max(scan.grid[2], scan.window[2]) * 2 * 2  # half precision; two buffers
    rows = max(scan.window[1], int(memory * 0.6 / bytes_per_row))
    count = max(1, math.ceil(scan.grid[1] / rows))
    edges = [round(i * scan.native[1] / count) for i in range(count + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def _rows(
    scan: _Scan, predictor: Predictor, *, classes: int, span: tuple[int, int], batch: int, tick: Callable[[float], None]
) -> Iterator[tuple[int, Tensor]]:
    """Finished logits, as (first row, (K, rows, span, Z)), for a range of the grid's second axis."""
    (wx, wy, wz), (a, b) = scan.window, span
    first, second, third = (starts(n, w) for n, w in zip(scan.grid, scan.window, strict=True))
    second = [y for y in second if y < b + scan.before[1] and y + wy > a + scan.before[1]]
    low = min(second)
    height, depth = max(second) + wy - low, max(scan.grid[2], wz)
    dtype = torch.float32 if classes * wx * height * depth < 30_000_000 else torch.float16
    place = summed_on(predictor, 3 * classes * wx * height * depth)  # the sum, what of it is ready, a copy as it moves
    total = torch.zeros((classes, wx, height, depth), dtype=dtype, device=place)
    weight = torch.zeros((wx, height, depth), device=place)
    profile = bell(scan.window).to(place)
    for i, x in enumerate(first):
        places = [(x, y, z) for y in second for z in third]
        for j in range(0, len(places), batch):
            chosen = places[j : j + batch]
            for (_, y, z), logits in zip(chosen, predictor(scan.windows(chosen).to(place)), strict=True):
                total[:, :, y - low : y - low + wy, z : z + wz] += (logits * profile).to(dtype)
                weight[:, y - low : y - low + wy, z : z + wz] += profile
            tick((i + (j + len(chosen)) / len(places)) / len(first))
        done = first[i + 1] - x if i + 1 < len(first) else wx
        ready = total[:, :done].float() / weight[:done]
        before = scan.before
        ys = slice(a + before[1] - low, b + before[1] - low)
        ready = ready[:, :, ys, before[2] : before[2] + scan.grid[2]]
        start = x - before[0]
        keep = slice(max(0, -start), max(0, min(done, scan.grid[0] - start)))
        yield max(0, start), ready[:, keep].cpu()
        if i + 1 < len(first):
            total[:, : wx - done] = total[:, done:].clone()
            weight[: wx - done] = weight[done:].clone()
            total[:, wx - done :] = 0
            weight[wx - done :] = 0


def segment(
    model: Model,
    volume: Volume,
    *,
    predictor: Predictor,
    probabilities: bool = False,
    memory: int = WORKING_MEMORY,
    batch: int = 1,
    observe: Callable[[float], None] | None = None,
) -> Segmented:
    """Predict one scan.

    Parameters
    ----------
    model : Model
        Its plan rules grid and normalisation.
    volume : Volume
        The scan.
    predictor : callable
        Windows to logits, see `torch_predictor`.
    probabilities : bool
        Keep the probabilities too; they take a byte per class and voxel.
    memory : int
        Bytes for logits; the scan itself and the answer come on top.
    batch : int
        Windows at a time.
    observe : callable, optional
        Called with the share that is done.
    """
    plan = model.plan
    scan = _Scan(volume, plan)
    label = empty(scan.native, plan)
    probs = np.zeros((plan.classes, *scan.native), dtype=np.uint8) if probabilities else None
    tiles = _tiles(scan, plan.classes, memory)
    for i, (a, b) in enumerate(tiles):

        def tick(share: float, before: int = i) -> None:
            if observe is not None:
                observe((before + share) / len(tiles))

        span_low, span_high, wy = _support(scan.back[1], a, b)
        rows = _rows(scan, predictor, classes=plan.classes, span=(span_low, span_high), batch=batch, tick=tick)
        for low, high, logits in _to_native(scan, rows, wy=wy, width=b - a):
            label[..., low:high, a:b, :] = decided(logits, plan, half=0.0)
            if probs is not None:
                probs[:, low:high, a:b] = (shares(logits, plan) * 255).round().to(torch.uint8).numpy()
    return Segmented(keep_sole_pieces(label, plan), probs)


def _to_native(
    scan: _Scan, rows: Iterator[tuple[int, Tensor]], *, wy: Tensor | None, width: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Finished rows of the plan's grid to rows of the scan's own, as (first, last, (K, rows, width, Z))."""
    held: Tensor | None = None
    held_from, next_row = 0, 0
    for start, ready in rows:
        held = ready if held is None else torch.cat([held, ready], 1)
        end = start + ready.shape[1]
        while next_row < scan.native[0]:
            chunk = max(1, 8_000_000 // (ready.shape[0] * width * scan.native[2]))
            high = min(next_row + chunk, scan.native[0])
            while high > next_row and _support(scan.back[0], next_row, high)[1] > end:
                high -= 1
            if high == next_row:
                break
            first, last, wx = _support(scan.back[0], next_row, high)
            piece = held[:, first - held_from : last - held_from]
            yield next_row, high, resample_by(piece, [wx, wy, scan.back[2]])
            next_row = high
        if next_row < scan.native[0]:
            needed = _support(scan.back[0], next_row, next_row + 1)[0]
            held, held_from = held[:, max(0, needed - held_from) :].clone(), max(needed, held_from)


def fastest_predictor(model: Model, hardware: Hardware, *, tta: bool = False) -> Predictor:
    """OpenVINO on a CPU where the ``[fast]`` extra is installed, torch elsewhere.

    Parameters
    ----------
    model : Model
        To run.
    hardware : Hardware
        Device and precision.
    tta : bool
        As for `torch_predictor`.
    """
    if hardware.device.type == "cpu" and hardware.precision == "bf16" and not tta:
        from fewscan.learn import openvino_backend

        if openvino_backend.available():
            return openvino_backend.predictor(model)
    return torch_predictor(model, hardware, tta=tta)
