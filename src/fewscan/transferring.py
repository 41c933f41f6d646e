"""Transfer of a trained model to another population, as a model folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from fewscan import api, training
from fewscan.errors import ConfigError, DataError
from fewscan.learn import checkpoint
from fewscan.learn.channels import laid
from fewscan.learn.config import TransferConfig, override
from fewscan.learn.hardware import pick
from fewscan.learn.request import Observer, Request
from fewscan.methods import transfer as method
from fewscan.personalization import keep_atlases as keep

DEFAULT_BUDGET = 240.0
Layers = Literal["auto", "all", "decoder", "last", "norms"]


def transfer(
    model: checkpoint.Model | Path | str,
    data: api.Data,
    out: Path | str,
    *,
    layers: Layers = "auto",
    budget: float | str | None = None,
    steps: int | None = None,
    seed: int = 0,
    source: api.Data | None = None,
    resume: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    settings: Mapping[str, str] | None = None,
    keep_atlases: bool = False,
    observe: Observer | None = None,
) -> api.Model:
    """Adapt a trained model to few labelled cases of another population, and keep the better of the two.

    Parameters
    ----------
    model : Model or path
        Trained, with a segmenter; its folder is only read.
    data : Dataset or path
        Labelled cases of the new population; labels belong to the model's by name.
    out : path
        Model folder; must be new unless the run goes on.
    layers : {"auto", "all", "decoder", "last", "norms"}
        Weights that learn; those that the new data call for always do.
    budget : float or str, optional
        Seconds or a duration such as "4m", everything but `source` included; four minutes when neither this nor steps
        is given.
    steps : int, optional
        Steps instead of seconds; repeatable bit for bit on a CPU.
    seed : int
        Of everything random.
    source : Dataset or path, optional
        Labelled cases of the old population: what was forgotten of it is measured on up to eight.
    resume : bool
        Go on from the last saved state.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        Where to run.
    max_memory : int, optional
        Bytes that training may take.
    settings : mapping of str to str, optional
        Dotted names and values that replace the model's.
    keep_atlases : bool
        Leave labelled scans, at most `learn.atlases.MOST_KEPT`, beside the new model, for `personalize`: whoever gets
        the model gets them too.
    observe : callable, optional
        Gets messages and a `learn.engine.Status` from time to time.

    Raises
    ------
    FewscanError
        If model, data, settings, folder or memory do not allow it; the message names the remedy.
    """
    started = time.monotonic()
    if budget is not None and steps is not None:
        raise ConfigError("give either a budget or a number of steps, not both")
    base = model if isinstance(model, checkpoint.Model) else checkpoint.load_model(Path(model))
    if base.path is not None and base.path.resolve() == Path(out).resolve():
        raise ConfigError(f"{out} is the model to start from, and would be overwritten; give another -o")
    fixed = [name for name in settings or {} if name.startswith("network.")]
    if fixed:
        raise ConfigError(f"{fixed[0]} cannot be set: the network is that of {base.path or 'the model'}; leave it out")
    if layers != "auto" and (settings or {}).get("transfer.layers", layers) != layers:
        raise ConfigError(f"--layers {layers} and --set transfer.layers={(settings or {})['transfer.layers']} differ")
    if budget is None and steps is None and not resume:
        budget = DEFAULT_BUDGET
    old = None if source is None else api.dataset_of(source)
    if old is not None and not old.labelled:
        raise DataError(f"{old.root}: no labelled case to measure forgetting on; leave --source out")
    request = Request(
        dataset=api.dataset_of(data), out=Path(out), method="transfer", base=base,
        settings=override(
            replace(base.settings, transfer=TransferConfig()),  # how the base was made is no wish for this time
            {**({"transfer.layers": layers} if layers != "auto" else {}), **(settings or {})},
        ),
        hardware=pick(device), budget=api.seconds(budget), steps=steps, seed=seed, resume=resume,
        max_memory=max_memory, observe=observe, started=started,
    )  # fmt: skip
    adapted = training.run(request, partial(method.run, source=old))
    gives, holds = adapted.plan.overlapping, request.dataset.overlapping
    if keep_atlases and gives == holds:
        keep(adapted, request.dataset, say=request.say)
    elif keep_atlases:
        request.say(f"no atlases were left: the model that was kept gives {laid(gives)}, the data hold {laid(holds)}")
    return api.with_verbs(adapted)
