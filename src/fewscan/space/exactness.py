"""Arithmetic that places depend on: convolutions in full 32 bits on a GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly() -> Iterator[None]:
    """Keep cuDNN from rounding the factors of convolutions to 10 bits, as it may otherwise do with numbers of 32.

    A displacement of a hundred voxels would be off by up to a twentieth of one. Its other settings stay as they are.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before
