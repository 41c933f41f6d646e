"""What outlives a call of the training loop, and its form on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewscan.learn.config import TrainConfig


class State:
    """What outlives a call of `engine.fit`: optimisers, averaged networks, position.

    Parameters
    ----------
    networks : sequence of nn.Module
        Those that a run trains; one listed twice counts once.
    config : TrainConfig
        Optimiser settings.
    """

    def __init__(self, networks: Sequence[nn.Module], config: TrainConfig) -> None:
        self.networks = list({id(n): n for n in networks}.values())
        self.averages = [copy.deepcopy(n).requires_grad_(False) for n in self.networks]
        self.optimizers = [
            torch.optim.AdamW(n.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
            for n in self.networks
        ]
        self.first: dict[int, int] = {}  # place of a network to the step at which it was first trained
        self.step = 0
        self.seconds = 0.0
        self.interrupted = False

    def place_of(self, network: nn.Module) -> int:
        """Which of the networks it is."""
        return [id(n) for n in self.networks].index(id(network))

    def average_of(self, network: nn.Module) -> nn.Module:
        """The moving average of one of the trained networks."""
        return self.averages[self.place_of(network)]


def state_tensors(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in a state as named tensors and plain numbers, for a checkpoint without pickle.

    Parameters
    ----------
    state : State
        Of a run.
    """
    tensors: dict[str, Tensor] = {}
    for i, (network, average, optimizer) in enumerate(
        zip(state.networks, state.averages, state.optimizers, strict=True)
    ):
        tensors |= {f"{i}.network.{k}": v for k, v in network.state_dict().items()}
        tensors |= {f"{i}.average.{k}": v for k, v in average.state_dict().items()}
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.optimizer.{j}.{k}": torch.as_tensor(v) for k, v in moments.items()}
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {
        "step": state.step,
        "seconds": state.seconds,
        "first": {str(place): step for place, step in state.first.items()},
    }


def restore_state(state: State, tensors: Mapping[str, Tensor], *, numbers: Mapping[str, Any]) -> None:
    """Undo `state_tensors` on a state of the same networks.

    Parameters
    ----------
    state : State
        Fresh, of the same networks; changed in place.
    tensors : mapping of str to Tensor
        From the checkpoint.
    numbers : mapping
        From the checkpoint.
    """
    for i, (network, average, optimizer) in enumerate(
        zip(state.networks, state.averages, state.optimizers, strict=True)
    ):
        for part, module in (("network", network), ("average", average)):
            prefix = f"{i}.{part}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        prefix = f"{i}.optimizer."
        for key, value in tensors.items():
            if key.startswith(prefix):
                j, name = key[len(prefix) :].split(".", 1)
                moments.setdefault(int(j), {})[name] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    state.step, state.seconds = int(numbers["step"]), float(numbers["seconds"])
    first = numbers.get("first", dict.fromkeys(map(str, range(len(state.networks))), 0))  # all at once, once
    state.first = {int(place): int(step) for place, step in first.items()}
