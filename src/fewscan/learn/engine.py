"""The one training loop.

A method hands `fit` its phases. A phase is an objective (batch -> raw terms), the weights of those terms, a source of
batches and the network to train. `fit` alternates the phases, freezes whatever a phase does not train, bounds the run
by wall clock or steps, keeps moving averages of the weights, logs raw terms, saves its state and can go on from it.

Every step draws its randomness from a generator seeded by (seed, step) alone. So there is no random state or batch
position to restore: a resumed run repeats an uninterrupted one bit for bit wherever the arithmetic itself does (CPU).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from fewscan.errors import ConfigError, ResourceError
from fewscan.learn.config import TrainConfig
from fewscan.learn.state import State

Terms = dict[str, Tensor]
COOL_DOWN_SECONDS = 10.0
FLOOR = 1e-3  # of the peak learning rate, so that the last steps still move


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One kind of step; the whole extension point of the engine.

    Parameters
    ----------
    name : str
        For the log.
    objective : callable
        Batch to raw, unweighted terms.
    weights : mapping of str to float
        One per term; the key sets must match.
    batches : callable
        Generator to batch, a pure function.
    train : nn.Module
        The network this phase trains; all others are frozen meanwhile.
    steps : int
        Steps in a row before the next phase's turn.
    lr : float
        Peak learning rate.
    learns : frozenset of str, optional
        Names of the network's weights that this phase changes; all of them when None.
    """

    name: str
    objective: Callable[[Any], Terms]
    weights: Mapping[str, float]
    batches: Callable[[Generator], Any]
    train: nn.Module
    steps: int = 1
    lr: float
    learns: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop; exactly one of the two.

    Parameters
    ----------
    seconds : float, optional
        Wall clock, counted from `started`.
    steps : int, optional
        Steps in total, those before a resume included.
    until : float
        Share of the run at which `fit` returns.
    annealed : float
        Share of the run at which the learning rate has reached its end, where a method keeps the rest for judging.

    Raises
    ------
    ConfigError
        If both or none are given, or one is not positive.
    """

    seconds: float | None = None
    steps: int | None = None
    until: float = 1.0
    annealed: float = 1.0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ConfigError("give either a budget or a number of steps, not both and not neither")
        if (self.seconds is not None and self.seconds <= 0) or (self.steps is not None and self.steps < 1):
            raise ConfigError(f"a run must be longer than nothing, got {self.seconds or self.steps}")

    def fraction(self, steps: int, seconds: float) -> float:
        """Share of the run that is done, 0 to 1."""
        done = seconds / self.seconds if self.seconds is not None else steps / (self.steps or 1)
        return float(min(done, 1.0))


class Status(NamedTuple):
    """What an observer sees after a step.

    Parameters
    ----------
    step : int
        Steps done.
    steps : int, optional
        Steps in total, where that is the limit.
    fraction : float
        Share of the run that is done.
    seconds, seconds_left : float
        Spent, and still to come by the pace so far.
    loss : float
        Weighted sum of the terms.
    terms : mapping of str to float
        Raw.
    lr : float
        Learning rate of the step.
    note : str
        The phase, or that the run is stopping.
    """

    step: int
    steps: int | None
    fraction: float
    seconds: float
    seconds_left: float
    loss: float
    terms: dict[str, float]
    lr: float
    note: str


def learning_rate(fraction: float, step: int, *, config: TrainConfig, peak: float) -> float:
    """Polynomial decay after a short linear rise, as a function of the fraction done.

    Parameters
    ----------
    fraction : float
        Share of the run that is done.
    step : int
        Steps done since the network was first trained.
    config : TrainConfig
        Length of the rise.
    peak : float
        Largest learning rate.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return float(peak * rise * max(FLOOR, (1 - fraction) ** 0.9))


def step_generator(seed: int, step: int) -> Generator:
    """Source of randomness of one step, from seed and position alone.

    Parameters
    ----------
    seed, step : int
        Of the run.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**62))


def phase_at(step: int, phases: Sequence[Phase]) -> Phase:
    """The phase whose turn it is.

    Parameters
    ----------
    step : int
        Steps done.
    phases : sequence of Phase
        In order.
    """
    position = step % sum(p.steps for p in phases)
    for phase in phases:
        if position < phase.steps:
            return phase
        position -= phase.steps
    raise AssertionError("unreachable: position is within the cycle")


@contextmanager
def only_training(
    network: nn.Module, networks: Sequence[nn.Module], *, learns: frozenset[str] | None = None
) -> Iterator[None]:
    """Freeze every network but one, and restore gradients and modes afterwards.

    Parameters
    ----------
    network : nn.Module
        To train.
    networks : sequence of nn.Module
        All that take part.
    learns : frozenset of str, optional
        Names of its weights that change; all of them when None.
    """
    before = [(p, p.requires_grad) for n in networks for p in n.parameters()]
    modes = [(n, n.training) for n in networks]
    try:
        for n in networks:
            n.train(n is network)
            for name, p in n.named_parameters():
                p.requires_grad_(n is network and (learns is None or name in learns))
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
        for n, mode in modes:
            n.train(mode)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for s in before:
        signal.signal(s, ask)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Ahead:
    """Draws the next batch in a thread while the device works; in place where the CPU is the device."""

    def __init__(self, phases: Sequence[Phase], seed: int, threaded: bool) -> None:
        self.phases, self.seed = phases, seed
        self.pool = ThreadPoolExecutor(1) if threaded else None
        self.next: tuple[int, Future[Any]] | None = None

    def draw(self, step: int) -> Any:
        return phase_at(step, self.phases).batches(step_generator(self.seed, step))

    def __call__(self, step: int) -> Any:
        if self.pool is None:
            return self.draw(step)
        batch = self.next[1].result() if self.next is not None and self.next[0] == step else self.draw(step)
        self.next = (step + 1, self.pool.submit(self.draw, step + 1))
        return batch

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


def fit(
    phases: Sequence[Phase],
    state: State,
    *,
    limits: Limits,
    config: TrainConfig,
    seed: int,
    started: float | None = None,
    observe: Callable[[Status], None] | None = None,
    save: Callable[[State, bool], None] | None = None,
) -> State:
    """Train until the limits are reached or a signal asks to stop.

    On a signal the state is saved as it is, so that a resumed run goes on as planned; then the learning rate falls to
    nothing within a few seconds, so that the model left behind is annealed.

    Parameters
    ----------
    phases : sequence of Phase
        Taken in turns.
    state : State
        Fresh, or restored by `checkpoint.load_state`; changed in place and returned.
    limits : Limits
        When to stop.
    config : TrainConfig
        Optimiser settings.
    seed : int
        Of every random draw.
    started : float, optional
        ``time.monotonic()`` from which the budget counts; now when None.
    observe : callable, optional
        Called with a `Status` after each step.
    save : callable, optional
        Called with the state after each step, when it may choose to wait, and on a signal, when it must not: the second
        argument says that it is urgent.

    Raises
    ------
    ConfigError
        If an objective's terms and a phase's weights do not have the same names.
    ResourceError
        If the loss is not finite.
    """
    begin = (time.monotonic() if started is None else started) - state.seconds
    device = next(phases[0].train.parameters()).device
    ahead = _Ahead(phases, seed, threaded=device.type == "cuda")
    cooling: tuple[float, float] | None = None  # second at which it began, seconds it lasts
    with stop_on_signals() as stop:
        try:
            while True:
                seconds = time.monotonic() - begin
                fraction = limits.fraction(state.step, seconds)
                if fraction >= limits.until or (cooling and seconds - cooling[0] >= cooling[1]):
                    break
                if stop.is_set() and cooling is None:
                    if save is not None:
                        save(state, True)
                    state.interrupted = True
                    cooling = (seconds, min(COOL_DOWN_SECONDS, 0.1 * seconds))
                    continue
                phase = phase_at(state.step, phases)
                place = state.place_of(phase.train)
                age = state.step - state.first.setdefault(place, state.step)
                lr = learning_rate(min(fraction / limits.annealed, 1.0), age, config=config, peak=phase.lr)
                if cooling:
                    lr *= 1 - (seconds - cooling[0]) / max(cooling[1], 1e-9)
                loss, terms = _step(phase, ahead(state.step), state, config, lr)
                state.step += 1
                state.seconds = time.monotonic() - begin
                if observe is not None:
                    left = state.seconds * (1 - fraction) / max(fraction, 1e-9)
                    note = "stopping: annealing what there is" if cooling else phase.name
                    observe(Status(state.step, limits.steps, fraction, state.seconds, left, loss, terms, lr, note))
                if save is not None and cooling is None:
                    save(state, False)
        finally:
            ahead.close()
    return state


def _step(phase: Phase, batch: Any, state: State, config: TrainConfig, lr: float) -> tuple[float, dict[str, float]]:
    """One optimiser step and one step of the moving average."""
    which = state.place_of(phase.train)
    optimizer = state.optimizers[which]
    for group in optimizer.param_groups:
        group["lr"] = lr
    with only_training(phase.train, state.networks, learns=phase.learns):
        terms = phase.objective(batch)
        if terms.keys() != phase.weights.keys():
            raise ConfigError(
                f"objective returned terms {sorted(terms)}, weights are given for {sorted(phase.weights)}"
            )
        loss = torch.stack([phase.weights[name] * term for name, term in terms.items()]).sum()
        if not bool(torch.isfinite(loss)):
            raise ResourceError(
                f"the loss is no longer finite after {state.step} steps; lower the learning rate, for example with "
                f"--set train.lr={phase.lr / 3:.2g}"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(phase.train.parameters(), config.clip)
        optimizer.step()
    age = state.step - state.first[which]
    decay = min(config.average, (age + 1) / (age + 10))
    with torch.no_grad():
        slow, fast = list(state.averages[which].parameters()), list(phase.train.parameters())
        torch._foreach_lerp_([p.data for p in slow], [p.data for p in fast], 1 - decay)
    return float(loss.detach()), {name: float(term.detach()) for name, term in terms.items()}
