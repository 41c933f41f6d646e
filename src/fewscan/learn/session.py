"""What every method does around its phases: read, plan, cache, measure, train, log, save.

A method opens a session, builds its networks and phases from it, calls `Session.fit` and ends with `Session.finish`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fewscan.data.dataset import load
from fewscan.errors import ConfigError, DataError, ResourceError
from fewscan.learn import checkpoint
from fewscan.learn.batches import Prepared, prepare
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import Settings, to_dict
from fewscan.learn.engine import Limits, Phase, Status, fit, step_generator
from fewscan.learn.folder import claim, command, trim_history
from fewscan.learn.hardware import Hardware, free_memory_bytes, keep_freed_memory, require_disk
from fewscan.learn.plan import LARGEST_GRID, Plan, derive, plan_from_dict
from fewscan.learn.request import Request
from fewscan.learn.state import State

SAVE_EVERY_SECONDS = 30.0
LOG_EVERY_SECONDS = 1.0
SMALLEST_PATCH_VOXELS = 16_000
COMPLETE = 0.97  # share of a run that counts as all of it: a method may keep the last moments for judging


def make_plan(request: Request) -> Plan:
    """Derive the plan, with a patch that fits the memory allowed.

    Parameters
    ----------
    request : Request
        Data, settings, hardware, memory.

    Raises
    ------
    ResourceError
        If even the smallest patch needs more memory than allowed.
    """
    allowed = allowed_bytes(request)
    settings = request.settings
    plan = _derive(request, settings)
    while allowed is not None and estimate_bytes(plan) > allowed:
        whole = plan.patch[0] * plan.patch[1] * plan.patch[2]
        voxels = int((settings.train.patch_voxels or whole) * 0.7)
        if voxels < SMALLEST_PATCH_VOXELS:
            raise ResourceError(
                f"training needs about {estimate_bytes(plan) / 2**30:.1f} GiB even with the smallest patch, "
                f"{allowed / 2**30:.1f} GiB are allowed; raise --max-memory, or learn fewer labels"
            )
        settings = replace(settings, train=replace(settings.train, patch_voxels=voxels))
        plan = _derive(request, settings)
    return plan


def allowed_bytes(request: Request) -> int | None:
    """Memory that training may take; None where nothing limits it.

    Parameters
    ----------
    request : Request
        Hardware, and the limit asked for.
    """
    if request.hardware.device.type == "cpu":
        return min(free_memory_bytes(), request.max_memory or sys.maxsize)
    return request.max_memory


def _derive(request: Request, settings: Settings) -> Plan:
    data = request.dataset
    return derive(
        (load(case, data) for case in data.labelled or data.unlabelled),
        names=data.names, channels=data.channels, modality=data.modality,
        settings=settings, gpu=request.hardware.device.type != "cpu", kind=data.kind, overlapping=data.overlapping,
    )  # fmt: skip


def estimate_bytes(plan: Plan) -> int:
    """Memory that training takes beyond the imported libraries, from patch, widths and classes.

    Parameters
    ----------
    plan : Plan
        Of the run.
    """
    voxels = float(plan.patch[0] * plan.patch[1] * plan.patch[2] * plan.batch)
    total = voxels * plan.classes * 4 * 8  # logits, probabilities, targets, source masks, and their gradients
    for width, stride in zip(plan.widths, plan.strides, strict=True):
        voxels /= stride[0] * stride[1] * stride[2]
        total += voxels * width * 4 * 14
    return int(total) + (200 << 20)


def peak_bytes(hardware: Hardware) -> int:
    """Largest memory this process has held so far: resident on a CPU, allocated on a GPU.

    Parameters
    ----------
    hardware : Hardware
        Which of the two.
    """
    if hardware.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(hardware.device))
    if sys.platform == "win32":
        return 0  # not told without further packages
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Session:
    """A run in progress; use `open_session`.

    Parameters
    ----------
    request : Request
        What was asked.
    plan : Plan
        What the data decided.
    labelled, unlabelled : sequence of Prepared
        Cases on the plan's grid.
    """

    def __init__(
        self, request: Request, plan: Plan, *, labelled: Sequence[Prepared], unlabelled: Sequence[Prepared]
    ) -> None:
        self.request, self.plan = request, plan
        self.labelled, self.unlabelled = list(labelled), list(unlabelled)
        self.hardware, self.settings = request.hardware, request.settings
        self.interrupted = False
        self._state: State | None = None
        self._bounds = Limits(steps=1)
        self._origin = request.started

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        base = self.request.base
        return {
            **({} if base is None else {"base": base.provenance.get("sha256")}),
            "method": self.request.method,
            "plan": self.plan.to_dict(),
            "settings": to_dict(self.settings),
            "seed": self.request.seed,
            "precision": self.hardware.precision,
            "labelled": [c.id for c in self.labelled],
            "unlabelled": [c.id for c in self.unlabelled],
        }

    def measure(self, phases: Sequence[Phase]) -> float:
        """Seconds per step of the phases' cycle, from forward and backward passes that change nothing.

        Parameters
        ----------
        phases : sequence of Phase
            Of the run.
        """
        total = 0.0
        for phase in phases:
            times = []
            for trial in range(3):
                begin = time.perf_counter()
                terms = phase.objective(phase.batches(step_generator(self.request.seed, trial)))
                torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
                if self.hardware.device.type == "cuda":
                    torch.cuda.synchronize(self.hardware.device)
                times.append(time.perf_counter() - begin)
                phase.train.zero_grad(set_to_none=True)
            total += min(times) * phase.steps
        return total / sum(p.steps for p in phases)

    def fit(self, phases: Sequence[Phase], *, until: float = 1.0, later: Sequence[nn.Module] = ()) -> State:
        """Train, writing history and state as it goes; several calls are parts of one run.

        Parameters
        ----------
        phases : sequence of Phase
            Of the run, or of this part of it.
        until : float
            Share of the run at which this part ends.
        later : sequence of nn.Module
            With the first call, networks that only other parts train.
        """
        if self._state is None:
            self._state = self._begin(phases, later)
        state, folder = self._state, self.request.out
        if self.request.dry_run or self.interrupted:
            return state
        clock = {"save": time.monotonic(), "log": 0.0}

        def save(current: State, urgent: bool) -> None:
            if urgent or time.monotonic() - clock["save"] >= SAVE_EVERY_SECONDS:
                checkpoint.save_state(current, folder, identity=self.identity)
                clock["save"] = time.monotonic()

        with (folder / "history.jsonl").open("a") as history:

            def observe(status: Status) -> None:
                if status.seconds - clock["log"] >= LOG_EVERY_SECONDS or status.step == 1:
                    clock["log"] = status.seconds
                    line = {"step": status.step, "seconds": round(status.seconds, 2), "phase": status.note}
                    history.write(
                        json.dumps(line | {"loss": status.loss, "lr": status.lr, "terms": status.terms}) + "\n"
                    )
                    history.flush()
                    if self.request.observe is not None:
                        self.request.observe(status)

            fit(
                phases, state, limits=replace(self._bounds, until=until), config=self.settings.train,
                seed=self.request.seed, started=self._origin + state.seconds, observe=observe, save=save,
            )  # fmt: skip
        self.interrupted = state.interrupted
        if not self.interrupted:
            checkpoint.save_state(state, folder, identity=self.identity)
        return state

    def _begin(self, phases: Sequence[Phase], later: Sequence[nn.Module]) -> State:
        """State, fresh or restored; limits; the plan line."""
        request, folder = self.request, self.request.out
        state = State([*(p.train for p in phases), *later], self.settings.train)
        if request.going_on:
            checkpoint.load_state(state, folder, identity=self.identity)
        self._bounds = self._limits(state)
        self._origin = request.started - state.seconds
        spent = time.monotonic() - request.started
        whole = self._bounds.seconds
        unfinished = whole is not None and state.seconds < 0.95 * whole  # else only `finish` is left to do
        if whole is not None and unfinished and state.seconds + spent >= whole and not request.dry_run:
            raise ResourceError(f"reading and preparing the scans took {spent:.0f} s, all of the budget; give more")
        per_step = self.measure(phases)
        request.say(self._plan_line(phases, self._bounds, state, per_step))
        if not request.dry_run:
            trim_history(folder / "history.jsonl", state.step)
        return state

    @property
    def bounds(self) -> Limits:
        """What ends the run; known once `fit` was called."""
        return self._bounds

    def fraction(self) -> float:
        """Share of the run that is done, 0 before the first call of `fit`."""
        if self._state is None:
            return 0.0
        return self._bounds.fraction(self._state.step, time.monotonic() - self._origin)

    def _limits(self, state: State) -> Limits:
        """Limits of this run, remembered in the folder so that --resume needs no repetition of them."""
        request, path = self.request, self.request.out / "run.json"
        if request.extend is not None:
            extended = state.seconds + request.extend
            checkpoint.write_json({"budget": extended, "steps": None}, path)
            return Limits(seconds=extended)
        stored = json.loads(path.read_text()) if request.resume and path.is_file() else {}
        budget, steps = request.budget, request.steps
        if budget is None and steps is None:
            budget, steps = stored.get("budget"), stored.get("steps")
        limits = Limits(seconds=budget, steps=steps)
        if limits.fraction(state.step, state.seconds) >= COMPLETE and (request.out / "model.json").is_file():
            raise ConfigError(
                f"{request.out} is complete ({state.step} steps, {state.seconds:.0f} s); "
                "give a longer --budget or --steps with --resume, or --extend 10m"
            )
        checkpoint.write_json({"budget": budget, "steps": steps}, path)
        return limits

    def _plan_line(self, phases: Sequence[Phase], limits: Limits, state: State, per_step: float) -> str:
        """One line: data, patch, speed, time, memory."""
        plan = self.plan
        left = (limits.seconds or 0) - state.seconds - (time.monotonic() - self.request.started)
        steps = limits.steps - state.step if limits.steps is not None else max(0, int(left / per_step))
        peak = peak_bytes(self.hardware)
        memory = f"{peak / 2**30:.1f} GiB of memory" if peak else "memory not told by this system"
        weights = sum(p.numel() for n in state.networks for p in n.parameters()) / 1e6
        return (
            f"plan: {len(self.labelled)} labelled and {len(self.unlabelled)} unlabelled case(s), "
            f"{len(plan.names)} label(s); patch {'x'.join(map(str, plan.patch))} at "
            f"{'x'.join(f'{s:.3g}' for s in plan.spacing)} mm, batch {plan.batch}, {weights:.1f} M weights, "
            f"{self.hardware.precision} on {self.hardware.device}; {1 / per_step:.1f} steps/s measured, about {steps} "
            f"steps in {steps * per_step / 60:.1f} min; {memory}"
            + ("; left-right mirroring on" if plan.mirror else "")
            + ("" if plan.kind == "scalar" else f"; {said(plan.kind)}, turned with each patch")
            + ("; labels overlap, each answered for itself" if plan.overlapping else "")
        )

    def finish(
        self,
        segmenter: nn.Module,
        *,
        others: Mapping[str, nn.Module] | None = None,
        record: Mapping[str, Any] | None = None,
        plan: Plan | None = None,
    ) -> Model:
        """Write the model folder.

        Parameters
        ----------
        segmenter : nn.Module
            To keep, usually the moving average.
        others : mapping of str to nn.Module, optional
            Further networks to keep.
        record : mapping, optional
            What else the method has to say, for ``model.json``.
        plan : Plan, optional
            Of the segmenter, where it is not the session's.
        """
        request = self.request
        provenance = {
            "method": request.method,
            "seed": request.seed,
            "steps": self._state.step if self._state else 0,
            "seconds": round(self._state.seconds, 1) if self._state else 0.0,
            "interrupted": self.interrupted,
            "device": str(self.hardware.device),
            "precision": self.hardware.precision,
            "threads": torch.get_num_threads(),
            "labelled": [c.id for c in self.labelled],
            "unlabelled": [c.id for c in self.unlabelled],
            "command": command(),
            **(record or {}),
        }
        model = Model(
            segmenter=segmenter, plan=plan or self.plan, settings=self.settings, provenance=provenance,
            others=others or {},
        )  # fmt: skip
        if request.dry_run:
            return model
        model = checkpoint.save_model(model, request.out)
        if self.interrupted:
            request.say(
                f"stopped after {provenance['steps']} steps; {request.out} is usable as it is; "
                f"go on with --resume, or for longer with --extend 10m"
            )
        return model


@contextmanager
def open_session(
    request: Request, *, unlabelled: int = 0, labels: bool = True, plan_of: Callable[[Request], Plan] = make_plan
) -> Iterator[Session]:
    """Prepare folder, plan and cache; the cache goes when the session ends.

    Parameters
    ----------
    request : Request
        What was asked.
    unlabelled : int
        Most scans without labels that the method uses, drawn by the seed where there are more.
    labels : bool
        Whether it needs any with.
    plan_of : callable
        What makes the plan of a run that does not go on.

    Raises
    ------
    DataError
        If nothing is labelled though the method needs it.
    """
    if labels and not request.dataset.labelled:
        raise DataError("no labelled case to learn from; put a label map beside at least one image")
    keep_freed_memory()
    claim(request.out, going_on=request.going_on)
    cache = request.out / "cache"
    cache.mkdir(exist_ok=True)
    try:
        stored = checkpoint.stored_identity(request.out) if request.going_on else None
        plan = plan_of(request) if stored is None else plan_from_dict(stored["plan"])
        others = list(request.dataset.unlabelled)
        if stored is None or not unlabelled:
            drawn = np.random.default_rng(request.seed).permutation(len(others))[:unlabelled]
            others = [others[i] for i in sorted(drawn.tolist())]
        else:  # those of the run that goes on, whatever its budget now
            others = [case for case in others if case.id in set(stored["unlabelled"])]
        cases = [*request.dataset.labelled, *others]
        voxels = plan.patch[0] * plan.patch[1] * plan.patch[2] * LARGEST_GRID
        require_disk(cache, len(cases) * voxels * (4 * plan.width + 2) // 4)  # scans differ; a quarter is usual
        prepared = [prepare(load(case, request.dataset), plan, folder=cache) for case in cases]
        labelled = [p for p in prepared if p.label is not None and any(len(places) for places in p.places)]
        if labels and not any(len(places) for p in labelled for places in p.places[1:]):
            raise DataError(f"no labelled voxel in {len(labelled)} case(s) of {request.dataset.root}; nothing to learn")
        yield Session(request, plan, labelled=labelled, unlabelled=[p for p in prepared if p.label is None])
    finally:
        shutil.rmtree(cache, ignore_errors=True)
