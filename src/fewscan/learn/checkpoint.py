"""Models on disk: a folder of safetensors and JSON. Nothing in it is ever executed.

::

    MODEL/
      model.json             what it is: names, plan, settings, provenance, SHA-256 of the weights
      weights.safetensors    one tensor per weight, named ``<network>.<weight>``
      next.safetensors       the same of a model that was taking its place when the run was killed, else not there
      history.jsonl          one line of raw terms every few steps
      curve.png              the same as a picture
      state.safetensors      optimiser and position, for --resume and --extend
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fewscan.data.io import atomic, disk_error, sha256
from fewscan.errors import ConfigError, ModelError
from fewscan.learn import networks
from fewscan.learn.config import Settings, settings_from_dict, to_dict
from fewscan.learn.plan import Plan, plan_from_dict
from fewscan.learn.registrar import build_registrar
from fewscan.learn.state import State, restore_state, state_tensors

FORMAT = 1
WEIGHTS, NEXT = "weights.safetensors", "next.safetensors"
PRIOR = 0.01  # share of a scan that a label which may overlap is taken to fill at first
USE = "research use only"  # said by every record
BUILDERS: dict[str, Callable[..., nn.Module]] = {"registrar": build_registrar}
PACKAGES = ("fewscan", "torch", "numpy", "SimpleITK", "nibabel", "safetensors")


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A trained model in memory.

    Parameters
    ----------
    segmenter : nn.Module
        Images on the plan's grid to logits.
    plan : Plan
        Grid, normalisation, labels.
    settings : Settings
        As resolved for the run.
    provenance : mapping
        Method, seed, steps, seconds, versions, data; everything in ``model.json`` besides plan and settings.
    path : Path, optional
        Folder it was loaded from or saved to.
    others : mapping of str to nn.Module
        Further networks, such as a registrar.
    """

    segmenter: nn.Module
    plan: Plan
    settings: Settings
    provenance: Mapping[str, Any]
    path: Path | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def names(self) -> Mapping[int, str]:
        """Label value to name."""
        return self.plan.names

    def describe(self) -> str:
        """One line for people."""
        p = self.provenance
        return (
            f"{p.get('method', '?')} model of {len(self.names)} label(s), {p.get('steps', '?')} steps, "
            f"spacing {' x '.join(f'{s:.3g}' for s in self.plan.spacing)} mm, "
            f"window {' x '.join(str(n) for n in self.plan.patch)}"
        )


def build_segmenter(plan: Plan, settings: Settings, *, seed: int) -> nn.Module:
    """The network that a plan calls for, with weights drawn from the seed.

    Labels that overlap start as rare as `PRIOR`, after Lin et al. 2017 (Focal loss, ICCV, arXiv 1708.02002, section
    4.1). Started at one half, thin bundles are lost in the first steps, and their Dice has no slope to come back by.

    Parameters
    ----------
    plan : Plan
        Levels, kernels, channels and classes.
    settings : Settings
        Which network.
    seed : int
        Of the initial weights.
    """
    network = networks.build(
        settings.network.name, plan.width, classes=plan.classes, widths=plan.widths, kernels=plan.kernels,
        strides=plan.strides, finest=settings.network.finest, seed=seed,
    )  # fmt: skip
    if plan.overlapping:
        with torch.no_grad():
            network.get_parameter(str(network.HEAD[-1])).fill_(math.log(PRIOR / (1 - PRIOR)))  # type: ignore[index]
    return network


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(data: object, path: Path) -> None:
    """Write JSON to a temporary name and rename.

    Parameters
    ----------
    data : object
        What ``json`` can write, paths shortened to their last part.
    path : Path
        Destination.
    """
    with atomic(path) as temporary:
        Path(temporary).write_text(json.dumps(data, indent=1, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return value.name
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def save_model(model: Model, folder: Path) -> Model:
    """Write weights and description; at every moment the folder holds one model whole, the old or the new one.

    The new weights lie beside the old ones until the description has changed from these to those, see `load_model`.

    Parameters
    ----------
    model : Model
        To write.
    folder : Path
        Made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    tensors: dict[str, Tensor] = {}
    for name, network in {"segmenter": model.segmenter, **model.others}.items():
        tensors |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    weights = folder / NEXT
    with atomic(weights) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    description = {
        "format": FORMAT,
        **model.provenance,
        "plan": model.plan.to_dict(),
        "settings": to_dict(model.settings),
        "segments": not isinstance(model.segmenter, networks.Absent),
        "networks": {name: network.spec for name, network in model.others.items()},
        "sha256": {WEIGHTS: sha256(weights)},
        "versions": versions(),
        "use": USE,
    }
    write_json(description, folder / "model.json")
    try:
        os.replace(weights, folder / WEIGHTS)
    except OSError as error:
        raise disk_error(error, folder / WEIGHTS) from None
    return load_model(folder)


def _settle(folder: Path) -> None:
    """Give the weights that a description means their name, where a run was killed before it could."""
    following = folder / NEXT
    if not following.is_file() or not (folder / "model.json").is_file():
        return
    with suppress(ModelError, OSError):  # of a damaged model nothing is to be saved
        if _weights(folder, read_description(folder)) == following:
            os.replace(following, folder / WEIGHTS)


def load_model(folder: Path) -> Model:
    """Read a model folder.

    Parameters
    ----------
    folder : Path
        As `save_model` left it.

    Raises
    ------
    ModelError
        If it is not one, is damaged, or was changed since.
    """
    description = read_description(folder)
    weights = _weights(folder, description)
    try:
        plan, settings = plan_from_dict(description["plan"]), settings_from_dict(description["settings"])
        tensors = safetensors.torch.load_file(weights)
        segments = description.get("segments", True)
        segmenter = build_segmenter(plan, settings, seed=0) if segments else networks.Absent()
        others = {name: BUILDERS[name](**spec, seed=0) for name, spec in description.get("networks", {}).items()}
        for name, network in {"segmenter": segmenter, **others}.items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            network.load_state_dict(own)
            network.eval()
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{folder} is damaged or foreign: {str(error).splitlines()[0][:300]}") from None
    provenance = {k: v for k, v in description.items() if k not in ("plan", "settings", "networks", "segments")}
    return Model(segmenter=segmenter, plan=plan, settings=settings, provenance=provenance, path=folder, others=others)


def _weights(folder: Path, description: Mapping[str, Any]) -> Path:
    """The file that the description means; the one that was to take its place where a run was killed meanwhile."""
    weights, following = folder / WEIGHTS, folder / NEXT
    wanted = description.get("sha256", {}).get(WEIGHTS)
    if weights.is_file() and sha256(weights) == wanted:
        return weights
    if following.is_file() and sha256(following) == wanted:
        return following
    if not weights.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; train again with --resume, or copy the whole folder")
    raise ModelError(f"{weights} is not the file that model.json describes (SHA-256 differs); copy the folder again")


def read_description(folder: Path) -> dict[str, Any]:
    """``model.json`` of a folder.

    Parameters
    ----------
    folder : Path
        Of a model.

    Raises
    ------
    ModelError
        If it is missing, not JSON or of another format.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise ModelError(f"{folder} is not a model folder: it has no model.json; give the folder that train -o named")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy the folder again") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ModelError(f"{path} has format {found!r}, this version of fewscan reads {FORMAT}; update fewscan")
    return description


def save_state(state: State, folder: Path, *, identity: Mapping[str, Any]) -> None:
    """Write everything that a resumed run needs, as one file.

    Parameters
    ----------
    state : State
        Of the run.
    folder : Path
        Of the model; exists.
    identity : mapping
        What must be the same when the run goes on: plan, settings, seed, data; on the same kind of device the
        precision, too.
    """
    tensors, numbers = state_tensors(state)
    metadata = {"numbers": json.dumps(numbers), "identity": json.dumps(identity)}
    with atomic(folder / "state.safetensors") as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)


def stored_identity(folder: Path) -> dict[str, Any]:
    """What the run that left a state was made of.

    Parameters
    ----------
    folder : Path
        Of the model.

    Raises
    ------
    ModelError
        If the state cannot be read.
    """
    path = folder / "state.safetensors"
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})["identity"])
        return found
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0][:300]}; start without --resume") from None


def load_state(state: State, folder: Path, *, identity: Mapping[str, Any]) -> None:
    """Continue where `save_state` left off.

    Parameters
    ----------
    state : State
        Fresh, of the same phases; changed in place.
    folder : Path
        Of the model.
    identity : mapping
        Of the run that wants to go on.

    Raises
    ------
    ModelError
        If there is no state, or it belongs to another run.
    """
    path = folder / "state.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} holds no state.safetensors to go on from; start without --resume or --extend")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        stored = json.loads(metadata["identity"])
        wanted = json.loads(json.dumps(identity))
        moved = {"device"} if stored.get("device") == wanted.get("device") else {"device", "precision"}
        untold = {"labels", "ignore", "channels"} - stored.keys()  # in states that older versions left
        compared = (stored.keys() | wanted.keys()) - moved - untold  # a GPU's precision may be none of a CPU
        differing = sorted(k for k in compared if stored.get(k) != wanted.get(k))
        if differing:
            raise ModelError(
                f"{path} belongs to another run: {', '.join(differing)} differ; "
                "repeat the original command with --resume, or train into a new folder"
            )
        restore_state(state, tensors, numbers=json.loads(metadata["numbers"]))
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        if isinstance(error, (ModelError, ConfigError)):
            raise
        raise ModelError(f"{path} is damaged: {str(error).splitlines()[0][:300]}; start without --resume") from None
