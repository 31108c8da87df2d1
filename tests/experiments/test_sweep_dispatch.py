"""Dispatch: every job with its error, whatever ends one; closed, nothing new begins."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from mlnet_utils.experiments import dispatch
from mlnet_utils.runtime import StopSignals


def act(word: str) -> None:
    """A job that ends as it is told to."""
    if word == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "is interrupted":
        raise KeyboardInterrupt("saved; continue with the same command")
    if word == "fails":
        raise ValueError("a reason")
    if word == "fails without a word":
        raise MemoryError


def work_until_stopped(folder: Path) -> None:
    """A job like training: it works on until a signal comes, and saves then."""
    with StopSignals() as signals:
        (folder / "begun").touch()
        while folder.name != "short" and not signals.received:
            time.sleep(0.01)
    (folder / "saved").touch()


def test_one_job_s_end_is_its_own():
    words = ["fails", "is killed", "is interrupted", "fails without a word", "succeeds"]
    ended = dict(dispatch.in_processes(act, words, workers=2))
    assert "killed (exit code -9); if memory ran out, use fewer workers" in ended.pop("is killed")
    assert ended.pop("is interrupted") == "saved; continue with the same command"
    assert ended == {"fails": "a reason", "fails without a word": "MemoryError", "succeeds": ""}
    here = ["fails", "fails without a word", "succeeds"]
    assert dict(dispatch.one_by_one(act, here)) == ended


def test_an_interruption_of_this_process_is_no_job_s_failure():
    with pytest.raises(KeyboardInterrupt, match="saved"):
        list(dispatch.one_by_one(act, ["is interrupted", "succeeds"]))


def test_closed_nothing_new_begins_and_what_runs_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "GRACE_SECONDS", 0)
    folders = [tmp_path / name for name in ("short", "long", "longer", "never", "nor this")]
    for folder in folders:
        folder.mkdir()
    with contextlib.closing(dispatch.in_processes(work_until_stopped, folders, 2)) as results:
        assert next(results) == (folders[0], "")
        assert [(f / "begun").exists() for f in folders[2:]] == [False, False, False]
        deadline = time.monotonic() + 60
        while not (folders[1] / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False, False, False]
    assert not any((folder / "begun").exists() for folder in folders[2:])
