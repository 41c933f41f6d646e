"""What every method does around its phases: read, plan, cache, measure, train, log, save.

A method opens a session, builds its networks and phases from it, calls `Session.fit` and ends with `Session.finish`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fewscan.data.dataset import load
from fewscan.data.label_checks import how_to_label
from fewscan.errors import ConfigError, DataError, FewscanError, ResourceError
from fewscan.learn import checkpoint
from fewscan.learn.batches import Prepared, prepare
from fewscan.learn.channels import said
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import to_dict
from fewscan.learn.engine import Limits, Phase, Status, fit, step_generator
from fewscan.learn.folder import CACHE, claimed, command, let_go, trim_history
from fewscan.learn.hardware import keep_freed_memory, memory_told, require_disk
from fewscan.learn.memory import make_plan, peak_bytes
from fewscan.learn.plan import LARGEST_GRID, Plan, plan_from_dict
from fewscan.learn.request import Request, counted
from fewscan.learn.state import State

SAVE_EVERY_SECONDS = 30.0
LOG_EVERY_SECONDS = 1.0
COMPLETE = 0.97  # share of a run that counts as all of it: a method may keep the last moments for judging


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
        self._unsaved = False
        self._bounds = Limits(steps=1)
        self._origin = request.started

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        base, data = self.request.base, self.request.dataset
        return {
            **({} if base is None else {"base": base.provenance.get("sha256")}),
            "method": self.request.method,
            "plan": self.plan.to_dict(),
            "settings": to_dict(self.settings),
            "seed": self.request.seed,
            "precision": self.hardware.precision,
            "device": self.hardware.device.type,
            "labels": dict(data.names),  # the plan of a run that goes on is the old one: it reads values as it did
            "ignore": data.ignore,
            "channels": list(data.channels),
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

    def fit(
        self, phases: Sequence[Phase], *, until: float = 1.0, annealed: float = 1.0, later: Sequence[nn.Module] = ()
    ) -> State:
        """Train, writing history and state as it goes; several calls are parts of one run.

        Parameters
        ----------
        phases : sequence of Phase
            Of the run, or of this part of it.
        until : float
            Share of the run at which this part ends.
        annealed : float
            Share at which the learning rate ends, the same for all parts.
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
                self._save(current)
                clock["save"] = time.monotonic()

        with (folder / "history.jsonl").open("ab", buffering=0) as history:  # nothing is held back that could fail late

            def observe(status: Status) -> None:
                if status.seconds - clock["log"] >= LOG_EVERY_SECONDS or status.step == 1:
                    clock["log"] = status.seconds
                    line = {"step": status.step, "seconds": round(status.seconds, 2), "phase": status.note}
                    line |= {"loss": status.loss, "lr": status.lr, "terms": status.terms}
                    with suppress(OSError):  # a disk that is full must not end the run
                        history.write((json.dumps(line) + "\n").encode())
                    if self.request.observe is not None:
                        self.request.observe(status)

            fit(
                phases, state, limits=replace(self._bounds, until=until, annealed=annealed), config=self.settings.train,
                seed=self.request.seed, started=self._origin + state.seconds, observe=observe, save=save,
            )  # fmt: skip
        self.interrupted = state.interrupted
        if not self.interrupted:
            self._save(state)
        return state

    def _save(self, state: State) -> None:
        """Write the state; where that fails, say so once and go on, because what was learnt is in memory still."""
        try:
            checkpoint.save_state(state, self.request.out, identity=self.identity)
            self._unsaved = False
        except (FewscanError, OSError) as error:
            if not self._unsaved:
                self.request.say(f"warning: the run goes on, but its state was not saved, for --resume: {error}")
            self._unsaved = True

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
            left = f"{whole - state.seconds:.3g} s"
            raise ResourceError(
                f"reading and preparing the scans took {spent:.0f} s, all of the budget ({left}); "
                f"give a longer {'--budget' if request.extend is None else '--extend'}"
            )
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
                "give a longer --budget or --steps with --resume" + self._or(", or --extend 10m")
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
            on = "" if self._unsaved else "; go on with --resume" + self._or(", or for longer with --extend 10m")
            request.say(f"stopped after {provenance['steps']} steps; {request.out} is usable as it is{on}")
        return model

    def _or(self, advice: str) -> str:
        """What only `fewscan train` can do: what starts from another model has no --extend."""
        return advice if self.request.base is None else ""


@contextmanager
def open_session(
    request: Request, *, unlabelled: int = 0, labels: bool = True, plan_of: Callable[[Request], Plan] = make_plan
) -> Iterator[Session]:
    """Prepare folder, plan and cache; the cache goes when the session ends, or by `folder.drop_cache` after the method.

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
        raise DataError(f"{request.dataset.root}: no labelled case to learn from; {how_to_label(request.dataset)}")
    keep_freed_memory()
    fix = "bound it with --max-memory, such as 4GiB, in a new run"
    with claimed(request.out, going_on=request.going_on, say=request.say), memory_told(fix=fix):
        cache = request.out / CACHE
        cache.mkdir(exist_ok=True)
        try:
            stored = checkpoint.stored_identity(request.out) if request.going_on else None
            hardware = request.hardware
            if stored is not None and stored.get("device", hardware.device.type) == hardware.device.type:
                hardware = replace(hardware, precision=stored.get("precision", hardware.precision))
                request = replace(request, hardware=hardware)  # what was measured once may be measured otherwise today
            plan = plan_of(request) if stored is None else plan_from_dict(stored["plan"])
            cases = _cases(request, plan, unlabelled=unlabelled, stored=stored)
            labelled = [p for p in cases if p.label is not None and any(len(places) for places in p.places)]
            if labels and not any(len(places) for p in labelled for places in p.places[1:]):
                root = request.dataset.root
                raise DataError(f"no labelled voxel in {len(labelled)} case(s) of {root}; nothing to learn")
            yield Session(request, plan, labelled=labelled, unlabelled=[p for p in cases if p.label is None])
        finally:
            let_go(request.out)


def _cases(request: Request, plan: Plan, *, unlabelled: int, stored: Mapping[str, Any] | None) -> list[Prepared]:
    """All labelled cases, and at most so many others, on the plan's grid."""
    others = list(request.dataset.unlabelled)
    if stored is None or not unlabelled:
        drawn = np.random.default_rng(request.seed).permutation(len(others))[:unlabelled]
        others = [others[i] for i in sorted(drawn.tolist())]
    else:  # those of the run that goes on, whatever its budget now
        others = [case for case in others if case.id in set(stored["unlabelled"])]
    cache, files = request.out / CACHE, [*request.dataset.labelled, *others]
    voxels = plan.patch[0] * plan.patch[1] * plan.patch[2] * LARGEST_GRID
    require_disk(cache, len(files) * voxels * (4 * plan.width + 2) // 4)  # scans differ; a quarter is usual
    each = counted(files, request.observe, doing="preparing")
    return [prepare(load(case, request.dataset), plan, folder=cache) for case in each]
