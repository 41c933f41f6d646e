"""What a MONAI bundle of a model runs: its network, and the way of a scan to the model's grid and back.

`fewscan.deliver.models` copies this file and what it imports into each bundle, so that a bundle works where fewscan is
not installed. It needs MONAI, which fewscan itself does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor, nn

from fewscan.learn import networks
from fewscan.learn.intensity import Scaling, normalise
from fewscan.learn.windows import bell, starts, window_shape
from fewscan.space.geometry import Geometry, with_spacing
from fewscan.space.volume import resample

GRID = "native_grid"  # key of the scan's own grid, RAS+ order


def load_network(weights: str | Path, *, name: str, build: Mapping[str, Any]) -> nn.Module:
    """The segmenter with its weights, ready to predict.

    Parameters
    ----------
    weights : path
        safetensors file.
    name : str
        Key of `networks.NETWORKS`.
    build : mapping
        What its builder takes.
    """
    network = networks.NETWORKS[name](**build)
    network.load_state_dict(safetensors.torch.load_file(weights))
    return network.eval().requires_grad_(False)


class Prepared(MapTransform):  # type: ignore[misc]
    """A scan in RAS+ order, normalised and on the model's grid.

    Parameters
    ----------
    keys : str or sequence of str
        Of the scan, (C, X, Y, Z).
    scaling : sequence of mapping
        Fields of `Scaling`, one per channel.
    spacing : sequence of float
        Of the model's grid, mm.
    """

    def __init__(self, keys: Any, scaling: Sequence[Mapping[str, Any]], spacing: Sequence[float]) -> None:
        super().__init__(keys)
        self.scaling = [Scaling(**one) for one in scaling]
        self.spacing = (float(spacing[0]), float(spacing[1]), float(spacing[2]))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with the scan replaced, and its own grid noted."""
        done = dict(data)
        for key in self.key_iterator(done):
            image = done[key]
            shape = tuple(image.shape[1:])
            native = Geometry((shape[0], shape[1], shape[2]), np.asarray(image.affine, dtype=np.float64))
            grid = with_spacing(native, self.spacing)
            ready = resample(torch.from_numpy(normalise(np.asarray(image), self.scaling)), grid.shape)
            done[key] = MetaTensor(ready, affine=torch.from_numpy(grid.affine.copy()), meta=image.meta)
            done[GRID] = native
        return done


class Windows(Inferer):  # type: ignore[misc]
    """Logits of a whole scan from overlapping windows, placed and weighted as `fewscan predict` does.

    Parameters
    ----------
    patch : sequence of int
        Of training, voxels.
    strides : sequence of (3,) int
        Of each level of the network.
    """

    def __init__(self, patch: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.patch = (patch[0], patch[1], patch[2])
        self.strides = strides

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **how: Any) -> Tensor:
        """(B, C, X, Y, Z) scans to (B, K, X, Y, Z) logits."""
        grid = (inputs.shape[2], inputs.shape[3], inputs.shape[4])
        window = window_shape(grid, self)
        margin = [max(0, w - n) for w, n in zip(window, grid, strict=True)]
        pad = [side for m in reversed(margin) for side in (m // 2, m - m // 2)]
        padded = F.pad(inputs, pad, mode="replicate") if any(pad) else inputs
        profile = bell(window).to(inputs)
        total, weight = torch.zeros(()).to(inputs), torch.zeros(padded.shape[2:]).to(inputs)
        for corner in itertools.product(*(starts(n, w) for n, w in zip(padded.shape[2:], window, strict=True))):
            box = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
            logits = network(padded[(slice(None), slice(None), *box)], *args, **how)
            if total.ndim == 0:
                total = total.new_zeros((*logits.shape[:2], *padded.shape[2:]))
            total[(slice(None), slice(None), *box)] += logits * profile
            weight[box] += profile
        inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(margin, grid, strict=True))
        return (total / weight)[(slice(None), slice(None), *inside)]


class Restored(MapTransform):  # type: ignore[misc]
    """Logits on the model's grid to label values on the scan's own.

    Parameters
    ----------
    keys : str or sequence of str
        Of the logits, (K, X, Y, Z).
    values : sequence of int
        Label value of each class, background first.
    """

    def __init__(self, keys: Any, values: Sequence[int]) -> None:
        super().__init__(keys)
        self.values = torch.tensor(values, dtype=torch.int32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with the logits replaced by one channel of label values."""
        done = dict(data)
        native = done[GRID]
        for key in self.key_iterator(done):
            logits = torch.as_tensor(done[key]).cpu().float()
            label = self.values[resample(logits, native.shape).argmax(0)]
            meta = getattr(done[key], "meta", None) or getattr(done.get("image"), "meta", None)
            done[key] = MetaTensor(label[None], affine=torch.from_numpy(native.affine.copy()), meta=meta)
        return done
