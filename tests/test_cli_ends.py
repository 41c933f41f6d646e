"""How the command line ends: what becomes one line and an exit code, and what keeps its traceback."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from fewscan import cli
from fewscan.errors import DataError


def test_what_is_refused_is_one_line_and_exit_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: str) -> None:
        raise DataError("scan.nii: 3 slices,\n  got 2; export it [again]")

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.REFUSED
    assert capsys.readouterr().err == "scan.nii: 3 slices, got 2; export it [again]\n"


def test_an_interruption_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.INTERRUPTED
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), "this machine"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "this machine"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "the GPU"),
    ],
)
def test_memory_that_runs_out_anywhere_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, wanted: str
) -> None:
    def fail(**_: str) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.REFUSED
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith(f"{wanted} ran out of memory")
    assert "--max-memory" not in said, "not every verb has it"
    assert ("--device cpu" in said) == (wanted == "the GPU")


@pytest.mark.parametrize("kind", [NotImplementedError, RuntimeError, TypeError])
def test_what_an_apple_gpu_cannot_compute_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fail(**_: str) -> None:
        raise kind("The operator 'aten::x' is not implemented for the MPS device. If you want\nmore, set a variable")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.REFUSED
    assert capsys.readouterr().err.endswith("is not implemented for the MPS device); use --device cpu\n")


def test_letters_that_a_code_page_lacks_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(cli, "app", lambda **_: print("Łukasz ≥ 3"))
    cli.main()
    file.flush()
    assert file.buffer.getvalue().split() == [rb"\u0141ukasz", rb"\u2265", b"3"]  # type: ignore[attr-defined]


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: str) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.main()
