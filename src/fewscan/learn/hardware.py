"""What this machine can do: device, precision, threads, memory. Measured where guessing would be wrong."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fewscan.errors import ConfigError, ResourceError, out_of_memory

CUDA_BUILD = "https://download.pytorch.org/whl/cu126"  # where wheels with CUDA are; on Windows those of PyPI have none


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where and how the networks run.

    Parameters
    ----------
    device : torch.device
        CPU, CUDA or MPS device.
    precision : {"bf16", "fp32"}
        Arithmetic of the networks; weights, losses and optimiser stay in 32 bits.
    """

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which a network's forward pass runs in this precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def pick(device: str = "auto", *, precision: str = "auto", deforms: bool = False) -> Hardware:
    """Choose device and precision.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Device; auto takes a GPU where there is one.
    precision : {"auto", "bf16", "fp32"}
        Arithmetic; auto times both on the CPU, because bf16 without hardware support is slower than fp32.
    deforms : bool
        Whether scans are going to be registered, which nothing does on an Apple GPU.

    Raises
    ------
    ConfigError
        If the device is not there, or the words are unknown.
    """
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} asked for, but {_without_cuda()}")
    if kind == "mps" and deforms:
        raise ConfigError("device 'mps' asked for, but scans are not registered on an Apple GPU; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' asked for, but torch sees no Apple GPU; use --device cpu")
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision must be auto, bf16 or fp32, got {precision!r}")
    if kind == "cuda" and ":" in name:
        index = name.split(":")[1]
        if not index.isdecimal() or int(index) >= torch.cuda.device_count():
            raise ConfigError(f"device {device!r} asked for, but {torch.cuda.device_count()} GPU(s) are there")
    if precision == "auto":
        if kind == "cpu":
            precision = "bf16" if _bf16_pays_on_cpu() else "fp32"
        elif kind == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        else:
            precision = "fp32"
    return Hardware(device=torch.device(name), precision=precision)


def _without_cuda() -> str:
    """Why there is no CUDA, and what helps."""
    if torch.version.cuda is None:
        return (
            f"this torch {torch.__version__} was built without CUDA; install one that was built with it: "
            f"pip install --force-reinstall torch --index-url {CUDA_BUILD}, or use --device cpu"
        )
    return f"torch {torch.__version__} sees no CUDA; update the GPU's driver, or use --device cpu"


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks, so that large tensors are not mapped and cleared anew in every training step.

    Does nothing with another C library. Its own limits are in mallopt(3): blocks below 32 MiB come from the heap, which
    shrinks no more and grows 64 MiB at a time.
    """
    trim, top_pad, mmap = -1, -2, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for name, value in ((trim, 2**31 - 1), (top_pad, 64 << 20), (mmap, 32 << 20)):
            mallopt(name, value)


def _bf16_pays_on_cpu() -> bool:
    """Time one convolution in both precisions; the best of three each."""
    x, w = torch.randn(1, 32, 24, 24, 24), torch.randn(32, 32, 3, 3, 3)
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), w.to(dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            F.conv3d(a, b, padding=1)
            times.append(time.perf_counter() - start)
        best[dtype] = min(times[1:])
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


def free_memory_bytes() -> int:
    """Memory that a new process could take without swapping, cgroup limits included; 4 GiB where nothing tells."""
    asked = (ask() for ask in (_free_of_linux, _free_of_cgroup, _free_of_windows, _free_of_mac))
    return min((free for free in asked if free is not None), default=4 << 30)


def _free_of_linux() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_of_cgroup() -> int | None:
    try:
        with open("/sys/fs/cgroup/memory.max") as top, open("/sys/fs/cgroup/memory.current") as used:
            left = int(top.read()) - int(used.read())
        with open("/sys/fs/cgroup/memory.stat") as file:
            stat = dict(line.split() for line in file)
        return left + int(stat.get("inactive_file", 0))  # the page cache gives way
    except (OSError, ValueError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "commit_limit", "commit_left", "v", "v_left", "more")),
    )


def _free_of_windows() -> int | None:
    """Physical memory, and no more than may still be promised to processes."""
    if sys.platform != "win32":
        return None
    status = _MemoryStatus(size=ctypes.sizeof(_MemoryStatus))
    try:
        told = ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    except (OSError, AttributeError):
        return None
    return min(status.free, status.commit_left) if told else None


def _free_of_mac() -> int | None:
    """Pages that are free, and those that macOS gives away before it swaps."""
    if sys.platform != "darwin":
        return None
    try:
        text = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True, timeout=5).stdout
        pages = dict(re.findall(r"^Pages (free|inactive|speculative):\s+(\d+)", text, re.M))
        return os.sysconf("SC_PAGE_SIZE") * sum(int(pages[kind]) for kind in ("free", "inactive", "speculative"))
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        return None


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that this process could take, its own cache included; None of a device that does not tell.

    Parameters
    ----------
    device : torch.device
        CPU, CUDA or MPS device.
    """
    if device.type == "cpu":
        return free_memory_bytes()
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + cached)


@contextmanager
def memory_told(*, fix: str) -> Iterator[None]:
    """Turn an allocation that failed into one sentence.

    Parameters
    ----------
    fix : str
        What to do about it; whose GPU is too small is told of the CPU besides.

    Raises
    ------
    ResourceError
        In place of the error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = out_of_memory(error, fix=fix)
        if told is None:
            raise
        raise told from None


def require_disk(folder: str | os.PathLike[str], needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Parameters
    ----------
    folder : path
        Existing folder on the disk in question.
    needed : int
        Bytes about to be written.

    Raises
    ------
    ResourceError
        If less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{folder} has {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB are needed; "
            "free some or write elsewhere"
        )
