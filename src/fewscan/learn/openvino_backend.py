"""The ``[fast]`` extra: the segmenter compiled by OpenVINO, bf16 on the CPU, one compiled network per window shape.

Its model converter would report usage statistics through the package ``openvino_telemetry``. It works without that
package, so we hide it before the converter is imported: fewscan sends nothing anywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from fewscan.learn.checkpoint import Model


def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def predictor(model: Model, *, precision: str = "bf16") -> Any:
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

    def predict(windows: Tensor) -> Tensor:
        shape = tuple(windows.shape)
        if shape not in compiled:
            graph = openvino.convert_model(network, example_input=torch.zeros(shape), input=[list(shape)])
            hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
                     "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
            compiled[shape] = core.compile_model(graph, "CPU", hints)
        return torch.from_numpy(compiled[shape](windows.numpy())[0])

    return predict
