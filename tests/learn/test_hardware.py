"""What the machine is asked, on systems that are not this one."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fewscan.errors import ConfigError
from fewscan.learn import hardware

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3000.
Pages active:                            200000.
Pages inactive:                            5000.
Pages speculative:                         1000.
Pages throttled:                              0.
"""


@pytest.fixture
def elsewhere(monkeypatch):
    """A system without the files of Linux."""
    monkeypatch.setattr(hardware, "_free_of_linux", lambda: None)
    monkeypatch.setattr(hardware, "_free_of_cgroup", lambda: None)

    def pretend(platform):
        monkeypatch.setattr(sys, "platform", platform)

    return pretend


@pytest.mark.parametrize(("commit_left", "told"), [(9 << 30, 6 << 30), (2 << 30, 2 << 30)])
def test_windows_tells_what_is_free(elsewhere, monkeypatch, commit_left, told):
    def answer(pointer):
        status = pointer._obj
        assert status.size == ctypes.sizeof(status) == 64, "the system refuses any other"
        status.free, status.commit_left = 6 << 30, commit_left
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=answer)
    monkeypatch.setattr(ctypes, "WinDLL", lambda name: kernel, raising=False)
    elsewhere("win32")
    assert hardware.free_memory_bytes() == told
    kernel.GlobalMemoryStatusEx = lambda pointer: 0
    assert hardware.free_memory_bytes() == 4 << 30


def test_macos_tells_what_is_free(elsewhere, monkeypatch):
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: 16384 if name == "SC_PAGE_SIZE" else pytest.fail(name))
    text = [VM_STAT]
    monkeypatch.setattr(subprocess, "run", lambda *words, **how: SimpleNamespace(stdout=text[0]))
    elsewhere("darwin")
    assert hardware.free_memory_bytes() == 9000 * 16384
    text[0] = "Pages free: many"
    assert hardware.free_memory_bytes() == 4 << 30


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"built without CUDA.*pip install .*torch --index-url https:.*--device cpu"):
        hardware.pick("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(ConfigError, match=r"sees no CUDA.*driver, or use --device cpu") as told:
        hardware.pick("cuda")
    assert "pip" not in str(told.value)


def test_scans_are_not_registered_on_an_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert hardware.pick("mps").device.type == "mps"
    with pytest.raises(ConfigError, match=r"'mps' asked for, but scans are not registered.*use --device cpu"):
        hardware.pick("mps", deforms=True)
