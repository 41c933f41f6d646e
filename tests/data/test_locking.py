"""Locks that are files: one holder at a time, who is known to live, and nobody removes that of somebody else."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from fewscan.data import locking
from fewscan.data.locking import locked
from fewscan.errors import DataError


@pytest.fixture
def lock(tmp_path):
    return tmp_path / ".record.json.lock"


def file_of(lock):
    return lock.with_name("record.json")


def refused(*_, **__):
    raise PermissionError(13, "in use")


def test_a_holder_that_lives_is_waited_for_however_long_it_takes(lock):
    order = []

    def second():
        with locked(file_of(lock), abandoned=0.6):
            order.append("second")

    with locked(file_of(lock), abandoned=0.6):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(lock.parent.iterdir())


def test_the_lock_of_another_is_left_alone_at_the_end(lock):
    with locked(file_of(lock)):
        lock.write_text(json.dumps({"token": "of another"}))
    assert json.loads(lock.read_text()) == {"token": "of another"}


def test_the_lock_of_another_is_not_kept_alive(lock):
    with locked(file_of(lock), abandoned=0.1):
        lock.write_text(json.dumps({"token": "of another"}))
        time.sleep(0.05)  # for a touch that was on its way
        then = lock.stat().st_mtime_ns
        time.sleep(0.2)
        assert lock.stat().st_mtime_ns == then


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("sign", ["touched", "written"])
def test_a_lock_that_has_changed_since_it_was_judged_is_put_back(lock, monkeypatch, links, sign):
    if not links:
        monkeypatch.setattr(os, "link", refused)
    lock.write_text("dead")
    judged = locking._look(lock)
    lock.write_text("dead" if sign == "touched" else "alive")
    os.utime(lock, ns=(judged[0] + 10**9,) * 2)
    locking._remove(lock, judged)
    assert locking._look(lock) == (judged[0] + 10**9, b"dead" if sign == "touched" else b"alive")
    assert list(lock.parent.iterdir()) == [lock]
    locking._remove(lock, locking._look(lock))
    assert not list(lock.parent.iterdir())


def test_nobodys_place_is_taken_by_a_lock_that_is_put_back(lock, monkeypatch):
    look = locking._look

    def third(path):
        if path != lock:
            lock.write_text("third")
        return look(path)

    lock.write_text("second")
    monkeypatch.setattr(locking, "_look", third)
    locking._remove(lock, (0, b"first"))
    assert lock.read_text() == "third"
    assert list(lock.parent.iterdir()) == [lock]


def test_a_lock_that_was_left_behind_and_cannot_be_removed_is_named(lock, monkeypatch):
    lock.touch()
    monkeypatch.setattr(Path, "rename", refused)
    told = pytest.raises(DataError, match=r"\.record\.json\.lock was left behind .*cannot be removed \(in use\); del")
    with told, locked(file_of(lock), abandoned=0.1):
        pytest.fail("it is somebody else's")
    assert lock.exists()


def test_a_lock_that_cannot_be_removed_at_the_end_undoes_nothing(lock, monkeypatch):
    with monkeypatch.context() as patch, locked(file_of(lock)):
        patch.setattr(Path, "rename", refused)
        file_of(lock).write_text("done")
    assert file_of(lock).read_text() == "done"
    assert lock.exists()
    with locked(file_of(lock), abandoned=0.1):
        file_of(lock).write_text("done again")
    assert not lock.exists()


def test_a_lock_that_cannot_be_written_is_not_left(lock, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(ValueError, match=r"record\.json: the disk is full"), locked(file_of(lock)):
        pytest.fail("there is no lock")
    assert not lock.exists()
