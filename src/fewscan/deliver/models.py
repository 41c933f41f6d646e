"""Trained models for other programs: ONNX, and MONAI bundles. Each is compared with the model before it is kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

import fewscan
from fewscan.data.io import atomic
from fewscan.errors import ConfigError, ModelError
from fewscan.learn.checkpoint import USE, Model
from fewscan.learn.networks import Absent

LARGEST_DIFFERENCE = 1e-3  # of a logit, between the model and its copy
NEEDS = (
    "exporting to ONNX needs the package {}; install what it takes with: "
    'pip install "onnx>=1.16" "onnxscript>=0.5" "onnxruntime>=1.20"'
)
PARTS = (
    "errors",
    "learn.intensity",
    "learn.networks",
    "learn.windows",
    "space.combinations",
    "space.geometry",
    "space.volume",
    "deliver.bundle",
)
"""Modules that a bundle carries: `fewscan.deliver.bundle` and what it imports."""


def write_onnx(model: Model, path: Path) -> float:
    """Write the segmenter as ONNX: normalised windows in, logits out, any batch and any size its strides divide.

    Labels, grid, normalisation and use stand in the file's metadata as JSON.

    Parameters
    ----------
    model : Model
        Trained.
    path : Path
        File to write; not renamed into place, see `fewscan.data.io.atomic`.

    Returns
    -------
    float
        Largest difference of a logit between ONNX Runtime and the model, on noise of two sizes.

    Raises
    ------
    ConfigError
        If a package is missing.
    ModelError
        If the model has no segmenter, takes directions or gives labels that overlap, or ONNX Runtime's answer differs.
    """
    network = _segmenter(model)
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ModuleNotFoundError as error:
        raise ConfigError(NEEDS.format(error.name)) from None
    windows = torch.zeros(2, len(model.plan.channels), *model.plan.patch)
    free = torch.export.Dim.DYNAMIC
    with _quiet():
        program = torch.onnx.export(
            network, (windows,), dynamo=True, external_data=False, verbose=False, input_names=["image"],
            output_names=["logits"], dynamic_shapes=({0: free, 2: free, 3: free, 4: free},),
        )  # fmt: skip
        written: Any = program.model_proto if program is not None else None
    for node in written.graph.node:
        del node.metadata_props[:]  # where on this machine the code lies
    onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in _card(model).items()})
    path.write_bytes(written.SerializeToString())
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return _compare(network, lambda x: session.run(None, {"image": x})[0], model, what="ONNX Runtime")


def write_monai(model: Model, folder: Path) -> float:
    """Write the model as a MONAI bundle that needs MONAI, torch and safetensors, but not fewscan.

    Parameters
    ----------
    model : Model
        Trained.
    folder : Path
        Empty; see `fewscan.exporting`.

    Returns
    -------
    float
        Largest difference of a logit between the bundle's network and the model, on noise of two sizes.

    Raises
    ------
    ModelError
        If the model has no segmenter, takes directions or gives labels that overlap, or the bundle's network answers
        otherwise.
    """
    network = _segmenter(model)
    for part in ("configs", "models", "docs", "scripts"):
        (folder / part).mkdir(parents=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    with atomic(folder / "models" / "weights.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary)
    source = Path(fewscan.__file__).parent
    for name in PARTS:
        target = folder / "scripts" / f"{name.replace('.', '/')}.py"
        target.parent.mkdir(exist_ok=True)
        code = (source / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        target.write_text(code.replace("from fewscan.", "from scripts."), encoding="utf-8")
    for made in {folder / "scripts", *(p.parent for p in (folder / "scripts").rglob("*.py"))}:
        (made / "__init__.py").write_text('"""Parts of fewscan, as they were when this bundle was written."""\n')
    for name, content in (("metadata", _metadata(model)), ("inference", _inference(model))):
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "docs" / "README.md").write_text(_readme(model), encoding="utf-8")
    copy = type(network)(**_build(model)).eval()
    copy.load_state_dict(safetensors.torch.load_file(folder / "models" / "weights.safetensors"))
    return _compare(network, lambda x: copy(torch.from_numpy(x)).detach().numpy(), model, what="the bundle")


def _segmenter(model: Model) -> nn.Module:
    if isinstance(model.segmenter, Absent):
        raise ModelError(
            f"{model.path}: this model only registers, there is no segmenter to export; train one with --method segment"
        )
    if model.plan.kind != "scalar":
        raise ModelError(
            f"{model.path}: it takes directions, which no other program turns into its input; use fewscan predict"
        )
    if model.plan.overlapping:
        raise ModelError(
            f"{model.path}: its labels overlap, and other programs would take one a voxel of its answers; "
            "use fewscan predict"
        )
    return model.segmenter.to("cpu").eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about itself and about packages that it would like."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.inference_mode()
def _compare(network: nn.Module, other: Any, model: Model, *, what: str) -> float:
    """Largest difference of a logit; refuses a copy that differs."""
    factor = np.prod(np.array(model.plan.strides), axis=0)
    larger = tuple(int(n + f) for n, f in zip(model.plan.patch, factor, strict=True))
    noise, worst = np.random.default_rng(0), 0.0
    for shape in (model.plan.patch, larger):
        window = noise.standard_normal((1, len(model.plan.channels), *shape)).astype(np.float32)
        worst = max(worst, float(np.abs(other(window) - network(torch.from_numpy(window)).numpy()).max()))
    if not worst <= LARGEST_DIFFERENCE:
        raise ModelError(f"{what} differs from the model by {worst:.3g} in a logit; nothing was kept, report this")
    return worst


def _build(model: Model) -> dict[str, Any]:
    plan = model.plan
    return {
        "channels": len(plan.channels),
        "classes": plan.classes,
        "widths": list(plan.widths),
        "kernels": [list(k) for k in plan.kernels],
        "strides": [list(s) for s in plan.strides],
        "finest": model.settings.network.finest,
    }


def _card(model: Model) -> dict[str, Any]:
    """What a program must know to use the network."""
    plan = model.plan
    return {
        "labels": {"0": "background"} | {str(k): name for k, name in enumerate(plan.names.values(), start=1)},
        "label_values": [0, *plan.names],
        "channels": list(plan.channels),
        "orientation": "RAS",
        "spacing_mm": list(plan.spacing),
        "window": list(plan.patch),
        "divisible_by": [int(n) for n in np.prod(np.array(plan.strides), axis=0)],
        "scaling": [dataclasses.asdict(s) for s in plan.scaling],
        "fewscan": version("fewscan"),
        "use": USE,
    }


def _metadata(model: Model) -> dict[str, Any]:
    plan, card = model.plan, _card(model)
    data = {"type": "image", "format": "magnitude", "dtype": "float32", "is_patch_data": True}
    shape = [f"{d}*n" for d in card["divisible_by"]]
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": f"written by fewscan {version('fewscan')}"},
        "monai_version": "1.5.0",
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"safetensors": "0.4.0", "nibabel": "5.2.0"},
        "name": f"fewscan {model.provenance.get('method', 'segment')} model",
        "task": f"segmentation of {', '.join(model.names.values())}",
        "description": model.describe(),
        "authors": "see the model's own record",
        "copyright": "see the model's own record",
        "intended_use": USE,
        "network_data_format": {
            "inputs": {
                "image": data
                | {
                    "modality": "n/a",
                    "num_channels": len(plan.channels),
                    "spatial_shape": shape,
                    "value_range": [],
                    "channel_def": {str(i): name for i, name in enumerate(plan.channels)},
                }
            },
            "outputs": {
                "pred": data
                | {
                    "format": "segmentation",
                    "num_channels": plan.classes,
                    "spatial_shape": shape,
                    "value_range": [0, 1],
                    "channel_def": card["labels"],
                }
            },
        },
    }


def _inference(model: Model) -> dict[str, Any]:
    card = _card(model)
    return {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/labels'",
        "datalist": "$[{'image': f} for f in sorted(glob.glob(@dataset_dir + '/*.nii.gz'))]",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "scripts.deliver.bundle.load_network",
            "weights": "$@bundle_root + '/models/weights.safetensors'",
            "name": model.settings.network.name,
            "build": _build(model),
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {
                    "_target_": "scripts.deliver.bundle.Prepared",
                    "keys": "image",
                    "scaling": card["scaling"],
                    "spacing": card["spacing_mm"],
                },
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "collate_fn": "$lambda x: x"},
        "inferer": {
            "_target_": "scripts.deliver.bundle.Windows",
            "patch": card["window"],
            "strides": _build(model)["strides"],
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "scripts.deliver.bundle.Restored", "keys": "pred", "values": card["label_values"]},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "",
                    "separate_folder": False,
                    "resample": True,
                    "mode": "nearest",
                    "output_dtype": "$__import__('numpy').uint16",
                },
            ],
        },
        "segment": "$lambda d: @postprocessing({**d, 'pred': @inferer(d['image'][None].to(@device), @network)[0]})",
        "run": ["$[@segment(d) for batch in @dataloader for d in batch]"],
    }


def _readme(model: Model) -> str:
    names = "\n".join(f"- {value}: {name}" for value, name in model.names.items())
    return f"""# {model.describe()}

Written by fewscan {version("fewscan")}. For {USE}: it is no medical device.

Put scans as `.nii.gz` into `images/` of this folder, and run there:

    pip install "monai[fire,nibabel]" safetensors
    python -m monai.bundle run run --config_file configs/inference.json

Labels are written to `labels/`, on each scan's own grid:

{names}

`scripts/` holds the parts of fewscan that the network needs, so fewscan itself is not required. Labels are those
of `fewscan predict` in full precision, except that small specks are kept.
"""
