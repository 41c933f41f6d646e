"""What a training step and a predicted window cost, against fp32 torch of the same network in the same process.

    python benchmarks/speed.py --data ../shared/data/hippocampus_msd

Medians over interleaved repetitions, on two cores with nothing else running. The share of the machine's bf16 rate is
the network's multiply-adds over the time of its forward pass, against a 2048 x 2048 x 2048 bf16 product.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from few_label import draw
from harness import RESULTS, TRAINING, code_hash, load, rows
from torch import nn

from fewscan import api
from fewscan.data import dataset as datasets
from fewscan.learn import infer, losses, openvino_backend
from fewscan.learn.batches import PatchBatches, prepare
from fewscan.learn.checkpoint import build_segmenter
from fewscan.learn.config import Settings
from fewscan.learn.engine import step_generator
from fewscan.learn.hardware import pick
from fewscan.learn.networks import UNet
from fewscan.learn.plan import derive

AT_LEAST = {"ratio": 2.0, "bf16_ratio": 2.5, "openvino_ratio": 3.0}
LARGE = "inference, preset, 64 cubed"  # 2.5 and 3 are not reached there, though 0.8 of the matrix rate is: what is held
AT_LEAST_LARGE = {"bf16_ratio": 1.8, "openvino_ratio": 2.5}
MOST_AUGMENTATION, DICE_UNCHANGED = 0.25, 0.002


def medians(work: Mapping[str, Callable[[int], object]], repeats: int = 9) -> dict[str, float]:
    """Median milliseconds of each, taken in turns so that a slow spell hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats + 2):
        for name, run in work.items():
            begin = time.perf_counter()
            run(i)
            if i >= 2:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: round(statistics.median(t), 2) for name, t in times.items()}


def matmul_gflops() -> float:
    """The machine's bf16 matrix rate."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / 1e6 / medians({"product": lambda i: a @ a})["product"]


def gflop(network: nn.Module, x: torch.Tensor) -> float:
    """Operations of one forward pass of the convolutions."""
    total = 0.0
    hooks = []

    def count(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        nonlocal total
        per_voxel = layer.in_channels * int(np.prod(layer.kernel_size))  # type: ignore[arg-type, operator]
        if isinstance(layer, nn.ConvTranspose3d):
            per_voxel = layer.in_channels
        total += 2 * per_voxel * y.numel() / 1e9

    for layer in network.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            hooks.append(layer.register_forward_hook(count))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return total


def training(data: datasets.Dataset, cache: Path) -> dict[str, float]:
    """One step of the preset on the hippocampus."""
    train, _ = draw([c.id for c in data.labelled], 5, 0)
    chosen = datasets.select(data, labelled=train)
    settings, cases = Settings(), [datasets.load(c, chosen) for c in chosen.labelled]
    plan = derive(cases, names=data.names, channels=data.channels, modality=data.modality, settings=settings, gpu=False)
    batches = PatchBatches(
        [prepare(c, plan, folder=cache) for c in cases], plan, config=settings.augment, batch=plan.batch,
        foreground=settings.train.foreground, device=torch.device("cpu"),
    )  # fmt: skip
    network = build_segmenter(plan, settings, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    still = batches(step_generator(0, 0))

    def step(precision: str, augmented: bool) -> Callable[[int], None]:
        hardware = pick("cpu", precision=precision)

        def run(i: int) -> None:
            batch = batches(step_generator(0, i)) if augmented else still
            with hardware.autocast():
                logits = network(batch.images)
            log_p = losses.log_probs(logits)
            loss = losses.soft_dice(log_p.exp(), batch.labels) + losses.cross_entropy(log_p, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    found = medians({
        "fp32_step_ms": step("fp32", False),
        "step_with_augmentation_ms": step("bf16", True),
        "augmentation_ms": lambda i: batches(step_generator(0, i)),
    })  # fmt: skip
    return found | {
        "ratio": round(found["fp32_step_ms"] / found["step_with_augmentation_ms"], 2),
        "augmentation_share": round(found["augmentation_ms"] / found["step_with_augmentation_ms"], 3),
    }


def inference(network: nn.Module, x: torch.Tensor, model: api.Model) -> dict[str, float]:
    """One window through torch in both precisions and through OpenVINO."""
    network.eval()
    work: dict[str, Callable[[int], object]] = {
        "fp32_ms": lambda i: _forward(network, x, "fp32"),
        "bf16_ms": lambda i: _forward(network, x, "bf16"),
    }
    if openvino_backend.available():
        fast = openvino_backend.predictor(model)
        for _ in range(openvino_backend.PATIENCE + 1):
            fast(x)
        work["openvino_ms"] = lambda i: fast(x)
    found = medians(work)
    rate, operations = matmul_gflops(), gflop(network, x)
    found |= {"bf16_ratio": round(found["fp32_ms"] / found["bf16_ms"], 2)}
    best = min(v for k, v in found.items() if k.endswith("_ms"))
    if "openvino_ms" in found:
        found["openvino_ratio"] = round(found["fp32_ms"] / found["openvino_ms"], 2)
    return found | {
        "gflop": round(operations, 1),
        "matmul_bf16_gflops": round(rate, 0),
        "share_of_matmul_rate": round(operations / best * 1000 / rate, 2),
    }


@torch.inference_mode()
def _forward(network: nn.Module, x: torch.Tensor, precision: str) -> torch.Tensor:
    with pick("cpu", precision=precision).autocast():
        answer: torch.Tensor = network(x)
    return answer


def accuracy(data: datasets.Dataset, work: Path, steps: int) -> dict[str, float]:
    """Dice of one and the same model through fp32, bf16 and OpenVINO."""
    ids = [c.id for c in data.labelled]
    train, test = draw(ids, 5, 0)
    model = api.train(datasets.select(data, labelled=train), work / "model", steps=steps, device="cpu")
    files = [c for c in data.labelled if c.id in test]
    ways = {
        "fp32": infer.torch_predictor(model, pick("cpu", precision="fp32")),
        "bf16": infer.torch_predictor(model, pick("cpu", precision="bf16")),
    }
    if openvino_backend.available():
        ways["openvino"] = openvino_backend.predictor(model)
    found = {}
    for name, predictor in ways.items():
        scores = []
        for case in (datasets.load(c, data) for c in files):
            got = infer.segment(model, case.image, predictor=predictor).label
            assert case.label is not None
            want = case.label.data
            scores += [
                2 * ((got == v) & (want == v)).sum() / ((got == v).sum() + (want == v).sum()) for v in data.names
            ]
        found[f"dice_{name}"] = round(float(np.mean(scores)), 4)
    return found


def main() -> None:
    """Every row that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="of the model whose Dice is compared")
    args = parser.parse_args()
    torch.set_num_threads(2)
    pick("cpu")
    data, code = api.open(args.data), code_hash(parts=TRAINING)
    with tempfile.TemporaryDirectory() as scratch:
        with rows("speed.json", {"what": "training step"}, code=code) as row:
            if row is not None:
                row.update(training(data, Path(scratch)))
                print(row, flush=True)
        with rows("speed.json", {"what": "same labels"}, code=code) as row:
            if row is not None:
                row.update(accuracy(data, Path(scratch), args.steps))
                print(row, flush=True)
        shapes = {"preset, hippocampus window": (40, 56, 48), LARGE.removeprefix("inference, "): (64, 64, 64)}
        for name, shape in shapes.items():
            with rows("speed.json", {"what": f"inference, {name}"}, code=code) as row:
                if row is not None:
                    network = UNet(1, 3, widths=(16, 32, 64, 128), kernels=[(3, 3, 3)] * 4,
                                   strides=[(1, 1, 1)] + [(2, 2, 2)] * 3)  # fmt: skip
                    row.update(inference(network, torch.randn(1, 1, *shape), _bare(network)))
                    print(name, row, flush=True)
    if misses():
        raise SystemExit("; ".join(misses()))


def misses() -> list[str]:
    """Claims that the rows do not bear out."""
    found = []
    for row in load(RESULTS / "speed.json"):
        for name, least in (AT_LEAST_LARGE if row["key"]["what"] == LARGE else AT_LEAST).items():
            if name in row and row[name] < least:
                found.append(f"{row['key']['what']}: {name} {row[name]}, at least {least} claimed")
        if row.get("augmentation_share", 0) > MOST_AUGMENTATION:
            found.append(f"augmentation takes {row['augmentation_share']:.0%} of a step")
        dice = [row[name] for name in row if name.startswith("dice_")]
        if dice and max(dice) - min(dice) > DICE_UNCHANGED:
            found.append(f"Dice differs by {max(dice) - min(dice):.4f} between ways to compute")
    return found


def _bare(network: nn.Module) -> api.Model:
    """A model of which only the network matters."""
    return api.Model(segmenter=network, plan=None, settings=Settings(), provenance={})  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
