"""What a user asks of a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fewscan.data.dataset import Dataset
from fewscan.learn.checkpoint import Model
from fewscan.learn.config import Settings
from fewscan.learn.engine import Status
from fewscan.learn.hardware import Hardware

Observer = Callable[[Status | str], None]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked to train.

    Parameters
    ----------
    dataset : Dataset
        Found cases.
    out : Path
        Model folder.
    method : str
        Name for the record.
    settings : Settings
        The preset, or what replaced it.
    hardware : Hardware
        Where to run.
    budget, steps : float or int, optional
        Seconds or steps; one of them.
    extend : float, optional
        Seconds to add to a finished run.
    seed : int
        Of everything random.
    base : Model, optional
        Trained model to start from, for methods that do.
    resume : bool
        Go on from the state in ``out``.
    max_memory : int, optional
        Bytes that training may take; the patch shrinks to fit.
    dry_run : bool
        Say the plan, speed measured, and train nothing.
    observe : callable, optional
        Gets messages and a `Status` from time to time.
    started : float
        ``time.monotonic()`` from which the budget counts.
    """

    dataset: Dataset
    out: Path
    method: str
    settings: Settings
    hardware: Hardware
    budget: float | None = None
    steps: int | None = None
    extend: float | None = None
    seed: int = 0
    base: Model | None = None
    resume: bool = False
    max_memory: int | None = None
    dry_run: bool = False
    observe: Observer | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def going_on(self) -> bool:
        """Whether the run continues one that is in the folder."""
        return self.resume or self.extend is not None

    def say(self, message: str) -> None:
        """Pass a message on."""
        if self.observe is not None:
            self.observe(message)


def counted(items: Sequence[T], observe: Observer | None, *, doing: str) -> Iterator[T]:
    """Scans one after another, with word to an observer of how many are done.

    Parameters
    ----------
    items : sequence
        One for each scan.
    observe : callable, optional
        Gets a `Status` before the first scan and after each but the last.
    doing : str
        What is done to them, in a word.
    """
    tell = telling(observe, total=len(items), doing=doing)
    for done, item in enumerate(items, start=1):
        yield item
        tell(done, len(items))


def telling(observe: Observer | None, *, total: int, doing: str) -> Callable[[int, int], None]:
    """What to call with the number of scans done and of all; it passes that on, as does this, of none.

    Parameters
    ----------
    observe : callable, optional
        Gets a `Status`.
    total : int
        Number of scans.
    doing : str
        What is done to them, in a word.
    """
    begin = time.monotonic()

    def tell(done: int, of: int) -> None:
        if observe is not None and done < of:
            spent = time.monotonic() - begin
            left = spent * (of - done) / done if done else math.nan
            observe(Status(done + 1, of, done / of, spent, left, math.nan, {}, 0.0, doing))

    tell(0, total)
    return tell
