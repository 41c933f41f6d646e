"""Progress lines, durations and sizes."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fewscan import progress
from fewscan.errors import ConfigError
from fewscan.quantity import duration, show_duration, size


def status(fraction: float, *, steps: int | None = 100, note: str = "") -> Any:
    return SimpleNamespace(step=5, steps=steps, fraction=fraction, seconds_left=95.0, loss=0.4321, note=note)


def shown(events: list[Any], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)
    with progress.display("train", console=console) as observe:
        for event in events:
            observe(event)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_without_a_terminal_lines_are_sparse_and_the_last_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 9.9, 10.0, 11.0, 12.0])
    monkeypatch.setattr("fewscan.progress.monotonic", lambda: next(clock))
    lines = shown([status(f) for f in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)], terminal=False).splitlines()
    assert [line[:10].split() for line in lines] == [["train", "0%"], ["train", "30%"], ["train", "100%"]]
    assert lines[0].endswith("step 5/100 · loss 0.432 · 1 min 35 s left")


def test_messages_are_shown_as_they_are() -> None:
    assert shown(["plan: [96, 96, 96]"], terminal=False) == "plan: [96, 96, 96]\n"
    assert "plan: [96, 96, 96]" in shown(["plan: [96, 96, 96]", status(0.5)], terminal=True)


def test_a_terminal_gets_a_bar_only_once_something_moves() -> None:
    assert "train" not in shown(["hello"], terminal=True)
    assert "step 5 · loss" in shown([status(0.5, steps=None, note="cooling")], terminal=True)


@given(st.integers(1, 10**7))
def test_a_bare_number_is_seconds_and_bytes(amount: int) -> None:
    assert duration(str(amount)) == amount
    assert size(str(amount)) == amount
    assert size(f"{amount}KiB") == 1024 * amount


@given(st.text(max_size=12))
def test_any_text_is_a_positive_quantity_or_refused(text: str) -> None:
    for parse in (duration, size):
        try:
            amount = parse(text)
        except ConfigError:
            continue
        assert amount > 0


@pytest.mark.parametrize("text", ["", "0", "10x", "m10", "1h 30m x", "-5m", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must look like 90s, 10m or 1h30m"):
        duration(text)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.6, "1 min"), (3600, "1 h"), (90061, "1 d 1 h")])
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text
