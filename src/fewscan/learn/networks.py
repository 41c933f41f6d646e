"""Networks. A new one is one builder and one line in `NETWORKS`.

Why the U-Net is ours rather than a library's stands in decisions/001-own-unet.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewscan.errors import ConfigError, ModelError

Triple = tuple[int, int, int]


def block(channels: int, width: int, *, kernel: Triple, stride: Triple, convolutions: int) -> nn.Sequential:
    """Convolutions, each followed by instance normalisation and a leaky ReLU; the first one takes the stride.

    Parameters
    ----------
    channels, width : int
        Input and output channels.
    kernel, stride : (3,) int
        Odd kernel; stride of the first convolution.
    convolutions : int
        How many.
    """
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layers.append(
            nn.Conv3d(
                channels if i == 0 else width,
                width,
                kernel,
                stride=stride if i == 0 else 1,
                padding=(kernel[0] // 2, kernel[1] // 2, kernel[2] // 2),
                bias=False,
            )
        )
        layers += [nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Plain U-Net: strided convolutions down, transposed ones up, concatenated skips.

    Parameters
    ----------
    channels, classes : int
        Input channels and output channels.
    widths : sequence of int
        Filters per level, finest first.
    kernels, strides : sequence of (3,) int
        Kernel and stride of each level; the first stride is 1.
    finest : int
        Convolutions per block at the finest level, where they cost most; two elsewhere.
    """

    ENTRY = "down.0.0.weight"
    HEAD = ("head.weight", "head.bias")
    DECODER = ("up.", "merge.", "head.")

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        widths: Sequence[int],
        kernels: Sequence[Triple],
        strides: Sequence[Triple],
        finest: int = 2,
    ) -> None:
        super().__init__()
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True)):
            convolutions = finest if i == 0 else 2
            before = channels if i == 0 else widths[i - 1]
            self.down.append(block(before, width, kernel=kernel, stride=stride, convolutions=convolutions))
            if i > 0:
                self.up.append(nn.ConvTranspose3d(width, before, stride, stride=stride, bias=False))
                self.merge.append(
                    block(
                        2 * before,
                        before,
                        kernel=kernels[i - 1],
                        stride=(1, 1, 1),
                        convolutions=finest if i == 1 else 2,
                    )
                )
        self.head = nn.Conv3d(widths[0], classes, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, X, Y, Z) to the features (B, D, X', Y', Z') of the coarsest level."""
        for down in self.down:
            x = down(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, X, Y, Z) to logits (B, K, X, Y, Z); X, Y, Z must be multiples of the product of strides."""
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def layers(network: nn.Module, which: str) -> frozenset[str]:
    """Names of the weights in a part of a network.

    Parameters
    ----------
    network : nn.Module
        With the names ``ENTRY``, ``HEAD`` and ``DECODER`` of its parts.
    which : {"all", "decoder", "last", "norms"}
        The part: everything; what comes after the bottleneck; the last layer; scale and shift of every normalisation.
    """
    names = [name for name, _ in network.named_parameters()]
    if which == "all":
        return frozenset(names)
    if which == "norms":
        owners = [name for name, part in network.named_modules() if isinstance(part, nn.InstanceNorm3d)]
        return frozenset(n for n in names if n.rpartition(".")[0] in owners)
    parts = {"decoder": network.DECODER, "last": network.HEAD}[which]
    return frozenset(n for n in names if n.startswith(parts))  # type: ignore[arg-type]


class Absent(nn.Module):
    """Stands where a model that only registers has no segmenter."""

    def forward(self, x: Tensor) -> Tensor:
        """Refuse."""
        raise ModelError("this model only registers; train one with --method joint or segment to predict labels")


NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet}


def build(
    name: str,
    channels: int,
    *,
    classes: int,
    widths: Sequence[int],
    kernels: Sequence[Triple],
    strides: Sequence[Triple],
    finest: int,
    seed: int,
) -> nn.Module:
    """Build a network with weights drawn from the seed, leaving torch's global generator as it was.

    Parameters
    ----------
    name : str
        Key of `NETWORKS`.
    channels, classes : int
        Input and output channels.
    widths : sequence of int
        Filters per level.
    kernels, strides : sequence of (3,) int
        Kernel and stride of each level.
    finest : int
        Convolutions per block at the finest level.
    seed : int
        Of the initial weights.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in NETWORKS:
        raise ConfigError(f"unknown network {name!r}; known are {', '.join(sorted(NETWORKS))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](channels, classes, widths=widths, kernels=kernels, strides=strides, finest=finest)
