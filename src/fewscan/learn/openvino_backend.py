"""The ``[fast]`` extra: the segmenter compiled by OpenVINO, bf16 on the CPU, one compiled network per window shape.

Its model converter would report usage statistics through the package ``openvino_telemetry``. It works without that
package, so we hide it before the converter is imported: fewscan sends nothing anywhere.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewscan.learn.checkpoint import Model

PATIENCE = 8  # windows of one shape that torch predicts before compiling, which takes a second, would pay


def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def predictor(model: Model, *, precision: str = "bf16") -> Callable[[Tensor], Tensor]:
    """Windows (B, C, X, Y, Z) to logits (B, K, X, Y, Z), as `learn.infer.torch_predictor` does.

    Parameters
    ----------
    model : Model
        Its segmenter is converted, not changed.
    precision : {"bf16", "f32"}
        Arithmetic hint.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    core = openvino.Core()
    network = model.segmenter.to("cpu").eval()
    compiled: dict[tuple[int, ...], Any] = {}
    asked: Counter[tuple[int, ...]] = Counter()

    @torch.inference_mode()
    def predict(windows: Tensor) -> Tensor:
        shape = tuple(windows.shape)
        asked[shape] += 1
        if asked[shape] <= PATIENCE:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                answer: Tensor = network(windows).float()
            return answer
        if shape not in compiled:
            compiled[shape] = _compile(core, network, shape, precision)
        return torch.from_numpy(compiled[shape](windows.numpy())[0])

    return predict


def _compile(core: Any, network: nn.Module, shape: tuple[int, ...], precision: str) -> Any:
    """Trace and compile for one shape."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        program = torch.export.export(network, (torch.zeros(shape),))
        graph = openvino.convert_model(program)
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return core.compile_model(graph, "CPU", hints)
