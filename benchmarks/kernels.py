"""One iteration of deformable registration on two cores: our kernels against grid_sample and MONAI's LNCC.

    python benchmarks/kernels.py [--size 128]

An iteration is warp, local correlation in windows of nine voxels a side, diffusion regulariser and the gradient with
respect to the displacement. The peer is what one writes with torch and MONAI: ``grid_sample`` on an identity grid made
beforehand, ``LocalNormalizedCrossCorrelationLoss(kernel_size=9)`` and the same regulariser. Both run in this process in
turns, so that a slow spell hits both; warm-up rounds, in which numba compiles, do not count. Warp and correlation are
also measured alone, each with its gradient. At another size than 128 nothing is written: that is for trying it out.
Needs MONAI beside fewscan (``pip install monai``).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import RESULTS, code_hash, load, rows
from torch import Tensor

from fewscan.space import kernels

RESULT, SIZE = "kernels.json", 128
WINDOW, SMOOTHNESS = 9, 0.1
AT_LEAST = 5.0  # times as fast, best against best and median against median
WARM_UP = 2

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """How to warp an image by a displacement in voxels, and how unlike two images are."""

    warp: Callable[[Tensor, Tensor], Tensor]
    unlike: Loss


def ours() -> Way:
    """The kernels under registration."""
    return Way(kernels.sample, lambda fixed, warped: -kernels.lncc(fixed, warped, radius=WINDOW // 2))


def peer(shape: tuple[int, int, int]) -> Way:
    """torch and MONAI."""
    try:
        from monai.losses import LocalNormalizedCrossCorrelationLoss
    except ImportError as error:
        raise SystemExit("this benchmark compares with MONAI, which is not here: pip install monai") from error
    identity = F.affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=True)
    scale = torch.tensor([2 / (n - 1) for n in reversed(shape)])
    loss = LocalNormalizedCrossCorrelationLoss(kernel_size=WINDOW)

    def warp(image: Tensor, u: Tensor) -> Tensor:
        places = identity + u.flip(1).permute(0, 2, 3, 4, 1) * scale
        return F.grid_sample(image, places, padding_mode="border", align_corners=True)

    return Way(warp, lambda fixed, warped: loss(warped, fixed))


def diffusion(u: Tensor) -> Tensor:
    """Mean squared difference between neighbours, over the three axes."""
    return (
        sum(((u.narrow(a, 1, n - 1) - u.narrow(a, 0, n - 1)) ** 2).mean() for a, n in enumerate(u.shape) if a > 1) / 3
    )


def pieces(way: Way, fixed: Tensor, moving: Tensor, u: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed; each answers the gradient of the last tensor that it starts from."""
    upper = torch.ones_like(fixed)

    def iteration() -> Tensor:
        field = u.detach().requires_grad_(True)
        loss = way.unlike(fixed, way.warp(moving, field)) + SMOOTHNESS * diffusion(field)
        return torch.autograd.grad(loss, field)[0]

    def warp() -> Tensor:
        field = u.detach().requires_grad_(True)
        return torch.autograd.grad(way.warp(moving, field), field, upper)[0]

    def lncc() -> Tensor:
        image = moving.detach().requires_grad_(True)
        return torch.autograd.grad(way.unlike(fixed, image), image)[0]

    return {"iteration": iteration, "warp": warp, "lncc": lncc}


def times(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats + WARM_UP):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if i >= WARM_UP:
                found[name].append(1000 * (time.perf_counter() - begin))
    return found


def compare(mine: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Best and median of both, their ratios, and how alike the two gradients are."""
    found = times({"ours": mine, "peer": theirs}, repeats)
    row: dict[str, float] = {}
    for name, ms in found.items():
        row |= {f"{name}_ms": round(statistics.median(ms), 2), f"{name}_best_ms": round(min(ms), 2)}
    row["ratio"] = round(row["peer_ms"] / row["ours_ms"], 2)
    row["best_ratio"] = round(row["peer_best_ms"] / row["ours_best_ms"], 2)
    row["gradient_cosine"] = round(float(F.cosine_similarity(mine().flatten(), theirs().flatten(), dim=0)), 4)
    return row


def volumes(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two smooth images with deviation 1 and a displacement of a few voxels."""
    torch.manual_seed(0)

    def smooth(channels: int, sigma: float) -> Tensor:
        field = kernels.gaussian(torch.randn(1, channels, size, size, size), sigma)
        return field / field.std()

    fixed = smooth(1, 2.0)
    return fixed, (fixed + smooth(1, 2.0)) / 2**0.5, 2 * smooth(3, 6.0)


def misses() -> list[str]:
    """Claims that the rows do not bear out."""
    return [
        f"{name} of an iteration at {row['key']['size']} cubed is {row[name]}, at least {AT_LEAST:g} claimed"
        for row in load(RESULTS / RESULT)
        for name in ("ratio", "best_ratio")
        if row["key"]["what"] == "iteration" and row[name] < AT_LEAST
    ]


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="voxels a side")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(2)
    images = volumes(args.size)
    both = [pieces(way, *images) for way in (ours(), peer((args.size, args.size, args.size)))]
    for what in both[0]:
        mine, theirs = (part[what] for part in both)
        if args.size != SIZE:
            print(what, compare(mine, theirs, args.repeats), flush=True)
            continue
        with rows(RESULT, {"what": what, "size": SIZE}, code=code_hash(parts=("space/kernels.py",))) as row:
            if row is not None:
                row.update(compare(mine, theirs, args.repeats))
                print(what, row, flush=True)
    if args.size == SIZE and misses():
        raise SystemExit("; ".join(misses()))


if __name__ == "__main__":
    main()
