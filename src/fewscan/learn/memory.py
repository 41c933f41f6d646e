"""Memory of a run: what it would take, what it may take, and the plan that stays below."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from fewscan.data.dataset import load
from fewscan.errors import DataError, ResourceError
from fewscan.learn.config import Settings
from fewscan.learn.hardware import Hardware, free_device_bytes
from fewscan.learn.plan import Plan, derive
from fewscan.learn.request import Request, counted

SMALLEST_PATCH_VOXELS = 16_000
MARGIN = 0.9  # of a GPU's free memory: its allocator rounds up, and its libraries want work space


def make_plan(request: Request) -> Plan:
    """Derive the plan, with a patch that fits the memory allowed.

    Parameters
    ----------
    request : Request
        Data, settings, hardware, memory.

    Raises
    ------
    ResourceError
        If even the smallest patch needs more memory than allowed.
    """
    allowed = allowed_bytes(request)
    settings = request.settings
    plan = _derive(request, settings)
    while allowed is not None and estimate_bytes(plan) > allowed:
        whole = plan.patch[0] * plan.patch[1] * plan.patch[2]
        voxels = int((settings.train.patch_voxels or whole) * 0.7)
        if voxels < SMALLEST_PATCH_VOXELS:
            raise ResourceError(
                f"training needs about {estimate_bytes(plan) / 2**30:.1f} GiB even with the smallest patch, "
                f"{allowed / 2**30:.1f} GiB {_which(request, allowed)}, or learn fewer labels"
            )
        settings = replace(settings, train=replace(settings.train, patch_voxels=voxels))
        plan = _derive(request, settings)
    return plan


def _which(request: Request, allowed: int) -> str:
    """What bounds the memory, and what to do about it."""
    if allowed == request.max_memory:
        return "are allowed; raise --max-memory"
    device = request.hardware.device
    return "are free; close other programs" if device.type == "cpu" else f"are free on {device}; use --device cpu"


def allowed_bytes(request: Request) -> int | None:
    """Memory that training may take; None where nothing limits it.

    Parameters
    ----------
    request : Request
        Hardware, and the limit asked for.
    """
    device = request.hardware.device
    free = free_device_bytes(device)
    if free is None:
        return request.max_memory
    return min(free if device.type == "cpu" else int(MARGIN * free), request.max_memory or sys.maxsize)


def _derive(request: Request, settings: Settings) -> Plan:
    data = request.dataset
    if not data.cases:
        raise DataError(f"{data.root}: no case to learn from; put at least one image there")
    return derive(
        (load(case, data) for case in counted(data.labelled or data.unlabelled, request.observe, doing="planning")),
        names=data.names, channels=data.channels, modality=data.modality,
        settings=settings, gpu=request.hardware.device.type != "cpu", kind=data.kind, overlapping=data.overlapping,
    )  # fmt: skip


def estimate_bytes(plan: Plan) -> int:
    """Memory that training takes beyond the imported libraries, from patch, widths and classes.

    Parameters
    ----------
    plan : Plan
        Of the run.
    """
    voxels = float(plan.patch[0] * plan.patch[1] * plan.patch[2] * plan.batch)
    total = voxels * plan.classes * 4 * 8  # logits, probabilities, targets, source masks, and their gradients
    for width, stride in zip(plan.widths, plan.strides, strict=True):
        voxels /= stride[0] * stride[1] * stride[2]
        total += voxels * width * 4 * 14
    return int(total) + (200 << 20)


def peak_bytes(hardware: Hardware) -> int:
    """Largest memory this process has held so far: resident on a CPU, allocated on a GPU.

    Parameters
    ----------
    hardware : Hardware
        Which of the two.
    """
    if hardware.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(hardware.device))
    if sys.platform == "win32":
        return 0  # not told without further packages
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
