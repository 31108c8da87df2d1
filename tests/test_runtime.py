"""Folders, atomic writes, records, seeds, signals and progress."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from mlnet_utils import runtime


# ---- folders -----------------------------------------------------------------------------------
def test_folders_prefer_the_argument_then_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("MLNET_DATA", str(tmp_path))
    monkeypatch.setenv("MLNET_RUNS", str(tmp_path))
    assert runtime.data_root("elsewhere") == Path("elsewhere")
    assert runtime.data_root() == tmp_path
    assert runtime.run_dir("mine", "osie") == Path("mine")
    assert runtime.run_dir("", "presets/my.yaml") == tmp_path / "my"
    monkeypatch.delenv("MLNET_DATA")
    monkeypatch.delenv("MLNET_RUNS")
    monkeypatch.chdir(tmp_path)
    for root in (runtime.checkout_root(), tmp_path):
        assert runtime.data_root() == root / "data"
        assert runtime.run_dir("", "osie") == root / "runs/osie"
        monkeypatch.setattr(runtime, "checkout_root", lambda: None)


def test_presets_of_one_file_name_do_not_share_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLNET_RUNS", str(tmp_path / "runs"))
    first, second, run = tmp_path / "a/my.yaml", tmp_path / "b/my.yaml", tmp_path / "runs/my"
    for path in (first, second):
        runtime.write_text(path, "preset: tiny\nlimit: 3\n")
    abandon(run / "preset.txt")
    assert runtime.run_dir("", first) == runtime.run_dir("", first) == run
    assert os.listdir(run) == ["preset.txt"]
    assert runtime.run_dir("", second) == run  # it says the same
    second.write_text("preset: tiny\nlimit: 1\n")
    for preset in (first, "my"):
        with pytest.raises(ValueError, match=rf"{run} .* {second}, .*'?{preset}'"):
            runtime.run_dir("", preset)
    assert runtime.run_dir(tmp_path / "other", first) == tmp_path / "other"
    second.unlink()
    assert runtime.run_dir("", first) == run
    (run / "preset.txt").write_bytes(b"\xff\xfe\n")  # of no file
    assert runtime.run_dir("", first) == run


def test_display_path_hides_where_the_machine_keeps_things(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert runtime.display_path(runtime.checkout_root() / "runs" / "x") == "runs/x"
    assert runtime.display_path(tmp_path / "home" / "data") == "~/data"
    assert runtime.display_path(tmp_path / "x.txt") == (tmp_path / "x.txt").resolve().as_posix()


def test_drive_is_mounted_once_where_colab_keeps_it(monkeypatch, tmp_path):
    mounted = []

    def mount(folder):
        mounted.append(folder)
        (Path(folder) / "MyDrive").mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="drive:mlnet"):
        runtime.run_dir("drive:mlnet")  # outside Colab
    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=mount)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    drive = tmp_path / "drive" / "MyDrive"
    assert runtime.run_dir("drive:mlnet/sample") == drive / "mlnet" / "sample"
    assert runtime.data_root("drive:/data") == drive / "data"
    assert mounted == [str(tmp_path / "drive")]


# ---- files -------------------------------------------------------------------------------------
def write_half(path):
    with runtime.atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.endswith(path.suffix)
        temporary.write_text("half")
        raise KeyboardInterrupt


def abandon(path):
    """Half a file, as a killed writer leaves it; returns its path."""
    before = set(path.parent.glob(".*"))
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(os, "getpid", lambda: 1)
        write_half(path)
    (left,) = set(path.parent.glob(".*")) - before
    return left


def test_atomic_path_replaces_only_on_success(tmp_path):
    path = tmp_path / "new" / "file.csv"
    runtime.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.csv"]
    runtime.write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("old", ["1.5", "second", "NaN"])
def test_a_change_of_sealed_json_is_noticed(tmp_path, old):
    path, value = tmp_path / "x.json", {"first": 1.5, "second": [float("nan")], 3: "é"}
    runtime.write_json(path, value, sealed=True)
    found = runtime.read_json(path, "somebody")
    assert (found["first"], list(found)) == (1.5, ["first", "second", "3"])
    path.write_text(path.read_text("utf-8").replace(old, old[:-1] + "7"), "utf-8")
    with pytest.raises(ValueError, match=r"x\.json"):
        runtime.read_json(path, "somebody")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError("3 of 5 written")])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, error):
    writing = runtime.atomic_path(tmp_path / "x.npy")
    with pytest.raises(OSError, match=rf"x\.npy.*{error}".replace("[", r"\[")), writing:
        raise error


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in ("last.pt", "best.pt", "a.b.pt", "none"):
        abandon(tmp_path / name)
    (tmp_path / "last.pt").write_text("whole")
    runtime.remove_temporaries(tmp_path / name for name in ("last.pt", "a.b.pt", "none"))
    (left,) = set(tmp_path.iterdir()) - {tmp_path / "last.pt"}
    with runtime.locked(tmp_path / "best.pt"):
        assert not left.exists()


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "é" * 125 + ".png", os.fsdecode(b"caf\xe9")])
def test_any_name_that_the_disk_takes_is_written(tmp_path, name):
    runtime.write_text(tmp_path / name, os.fsdecode(b"caf\xe9"))
    assert os.listdir(tmp_path) == [name]
    runtime.write_json(tmp_path / name, {"name": name})
    assert runtime.read_json(tmp_path / name, "nobody") == {"name": name}


HOLD = """
import sys
from mlnet_utils.runtime import locked
with locked(sys.argv[1]):
    print("taken", flush=True)
    sys.stdin.readline()
    open(sys.argv[1], "a").write("first ")
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the file ``target``, until it is told a line."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "target")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(runtime.__file__).parents[1], **pipes) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_second_process_waits_and_says_for_whom(tmp_path, holder, capsys):
    threading.Timer(0.2, print, ["go on"], {"file": holder.stdin, "flush": True}).start()
    with runtime.locked(tmp_path / "target"):
        assert (tmp_path / "target").read_text() == "first "
    assert f"waiting for process {holder.pid} on " in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["target"]


def test_a_killed_process_keeps_nobody_waiting(tmp_path, holder, capsys, monkeypatch):
    holder.kill()
    holder.wait()
    with runtime.locked(tmp_path / "target"):
        monkeypatch.setenv("RANK", "1")
        with runtime.locked(tmp_path / "target"):  # another process of this one's launch
            pass
    assert capsys.readouterr().out == ""
    assert os.listdir(tmp_path) == []


def test_a_missing_or_damaged_json_says_who_writes_it(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(FileNotFoundError, match=r"record\.json.* notebook 01"):
        runtime.read_json(path, "notebook 01")
    path.write_text("{half")
    with pytest.raises(ValueError, match=r"record\.json.*delete.* notebook 01"):
        runtime.read_json(path, "notebook 01")


# ---- machine -----------------------------------------------------------------------------------
def test_keyed_seeds_depend_on_every_part_of_the_key():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (2**40, 3)]
    seeds = [runtime.keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [runtime.keyed_seed(*key) for key in keys]


def test_freed_memory_is_kept_where_glibc_is_asked_to():
    measure = """
import resource
import torch
from mlnet_utils import runtime

def faults():
    for number in range(12):
        if number == 8:  # until then, blocks may find different places in the heap
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(40 << 20, dtype=torch.uint8)[:: 1 << 14] = 1  # a write in every fourth page
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), runtime.keep_freed_memory(), faults())
"""
    given_back, asked, kept = subprocess.check_output(
        [sys.executable, "-c", measure], text=True
    ).split()
    if asked == "False":
        pytest.skip("not glibc")
    assert int(kept) < int(given_back) / 5


def test_determinism_switch_works_both_ways(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for on in (True, False):
        runtime.set_determinism(on)
        assert torch.are_deterministic_algorithms_enabled() == on
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]


def test_versions_name_what_decides_the_numbers():
    assert {"python", "torch", "timm", "numpy", "device"} <= set(runtime.versions())


def test_cpu_count_respects_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert runtime.cpu_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runtime.cpu_count() == (os.cpu_count() or 1)


# ---- signals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_and_handlers_restored(number):
    before = signal.getsignal(number)
    with runtime.StopSignals() as signals:
        assert signals.received == ""
        for _ in range(1 if number == signal.SIGINT else 2):  # a second SIGTERM says no more
            os.kill(os.getpid(), number)
        assert signals.received == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt):  # Ctrl-C as the second signal acts at once
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_are_left_alone():
    def handler():
        with runtime.StopSignals():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() is signal.getsignal(signal.SIGINT)


def test_on_a_disk_without_flock_the_lock_stays_as_filelock_wrote_it(tmp_path, monkeypatch):
    """There the file itself is the lock: with another content it counts as a dead process's."""
    missing = Mock(side_effect=OSError(errno.ENOSYS, "not implemented"))
    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.warns(UserWarning, match="flock"), runtime.locked(tmp_path / "x"):
        assert (tmp_path / ".x.lock").read_text().split()[0] == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


# ---- reading -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda content: json.laods(content), AttributeError),
        (lambda content: runtime.StopSignals().recieved, AttributeError),
        (lambda content: jsno.loads(content), NameError),  # noqa: F821
        (lambda content: json.loads(content).items(), ValueError),  # a list
    ],
)
def test_a_mistake_of_the_code_is_no_damaged_file(tmp_path, wrong, error):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(error), runtime.reading(path, "an object"):
        wrong(path.read_text())


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    make(tmp_path / "x.png")
    reading = runtime.reading(tmp_path / "x.png", "a map")
    with pytest.raises(ValueError, match=r"x\.png' cannot be read"), reading:
        pytest.fail("reading a pipe would wait for ever")


# ---- progress ----------------------------------------------------------------------------------
def test_progress_prints_lines_for_long_loops_only(monkeypatch, capsys):
    seconds = iter([0, 1, 16, 40, 47, 0, 16, 20])
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        assert list(runtime.progress(range(4), "reading", unit="photo")) == [0, 1, 2, 3]
        assert capsys.readouterr() == ("reading: 2/4, 16 s\nreading: 4/4, 47 s\n", "")
        assert list(runtime.progress(range(2), "reading")) == [0, 1]
        assert capsys.readouterr().out == "reading: 1/2, 16 s\nreading: 2/2, 20 s\n"
    assert list(runtime.progress((i for i in range(3)), "short")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(runtime.progress(range(2), "bar")) == [0, 1]
    out, err = capsys.readouterr()
    assert (out, "bar" in err) == ("", True)


def test_a_missing_package_names_the_extra():
    assert runtime.require("json", "export") is __import__("json")
    with pytest.raises(ImportError, match=r"no_such_package.*mlnet-utils\[export\]"):
        runtime.require("no_such_package.inner", "export")
