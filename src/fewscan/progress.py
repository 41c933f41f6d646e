"""What a terminal shows while something runs: one live line, or plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fewscan.quantity import show_duration

if TYPE_CHECKING:  # the engine imports torch
    from fewscan.learn.engine import Status

PLAIN_EVERY_S = 10.0


@contextmanager
def display(title: str, *, console: Console | None = None) -> Iterator[Callable[[Status | str], None]]:
    """Show the events of a run; the value is what to hand over as ``observe``.

    A string is printed as a line of its own. A status moves the bar; without a terminal it becomes a plain line, at
    most one in ten seconds, so that logs stay short.

    Parameters
    ----------
    title : str
        What runs, in one word.
    console : Console, optional
        Where to show it; standard error when left out, so that results can be piped.
    """
    console = console or Console(stderr=True, highlight=False)
    if console.is_terminal:
        with _bar(console) as bar:
            yield _Live(title, bar)
    else:
        yield _Plain(title, console)


def describe(status: Status) -> str:
    """What a status says, without the bar.

    Parameters
    ----------
    status : Status
        As the engine reports it.
    """
    training = status.loss == status.loss  # prediction has no loss: NaN
    steps = f"{'step' if training else 'scan'} {status.step}" + (f"/{status.steps}" if status.steps else "")
    loss = f"loss {status.loss:.3f}" if training else ""
    known = status.seconds_left == status.seconds_left  # not before the first scan is through
    parts = [steps, loss, f"{show_duration(status.seconds_left)} left" if known else "", status.note]
    return " · ".join(part for part in parts if part)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} % · {task.fields[text]}"),
    )
    return Progress(*columns, console=console, refresh_per_second=4, transient=True)


class _Live:
    """A bar at the bottom of a terminal; a message takes its place until the next status."""

    def __init__(self, title: str, bar: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task(title, total=1.0, visible=False, text="")

    def __call__(self, event: Status | str) -> None:
        if isinstance(event, str):
            self.bar.update(self.task, visible=False)
            self.bar.console.print(event, markup=False)
        else:
            self.bar.update(self.task, completed=event.fraction, text=describe(event), visible=True)


class _Plain:
    """Lines for a log file."""

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console, self.last = title, console, -PLAIN_EVERY_S

    def __call__(self, event: Status | str) -> None:
        now = monotonic()
        if isinstance(event, str):
            self._line(event)
        elif event.fraction >= 1 or now - self.last >= PLAIN_EVERY_S:
            self.last = now
            self._line(f"{self.title} {event.fraction:4.0%} · {describe(event)}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
