"""Trainings in processes of their own, and the accidents that can happen to them.

They are forked from a server that has imported torch once, with the environment that torchrun
would give them.
"""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from conftest import tiny_config

from mlnet_utils import runtime
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.training import trainer

PATIENCE = 600  # seconds, for a machine that does other things


# ---- accidents, in the other process -----------------------------------------------------------
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number: int) -> None:
    """Kill this process at its ``number``-th call of any function, in Python or C."""
    left = [number]

    def count(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            die()

    sys.setprofile(count)


def signal_at(name: str, number: int, which: int = signal.SIGKILL) -> None:
    """Send this process a signal at the ``number``-th call of a function of ``trainer``."""
    owner, _, attribute = name.rpartition(".")
    owner = getattr(trainer, owner) if owner else trainer
    original, calls = getattr(owner, attribute), []

    def watched(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), which)
        return original(*arguments, **options)

    setattr(owner, attribute, watched)


def die_between_renames() -> None:
    """Kill between ``last -> previous`` and ``next -> last``, the second time it is reached."""
    original, calls = os.replace, []

    def replace(source, target):
        original(source, target)
        if Path(target).name == "previous.pt":
            calls.append(target)
            if len(calls) == 2:
                die()

    os.replace = replace


def die_in_a_write(number: int) -> None:
    """Kill when half of the ``number``-th checkpoint is on disk."""
    original, calls = torch.save, []

    def save(content, path):
        original(content, path)
        calls.append(path)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save


def fill_the_disk(size: int) -> None:
    """No file can grow beyond ``size`` bytes from the second checkpoint on."""
    original, calls = torch.save, []

    def save(content, path):
        calls.append(path)
        if len(calls) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        original(content, path)

    torch.save = save


def not_a_number(update: int) -> None:
    """The loss of an update is not a number."""
    original = trainer.Trainer.losses

    def losses(self, batch):
        return original(self, batch) * (float("nan") if self.updates == update else 1.0)

    trainer.Trainer.losses = losses


def record_keys() -> None:
    """Write down the keys of the updates' random numbers: seed, update, process, photo."""
    original, path = trainer.keyed_seed, Path(f"keys{os.environ['RANK']}.txt").resolve()

    def keyed_seed(*key):
        if len(key) == 4:
            with open(path, "a") as file:
                print(*key, file=file)
        return original(*key)

    trainer.keyed_seed = keyed_seed


def hide_checkpoints() -> None:
    """As if this machine did not see the storage of the first."""
    trainer.checkpoints.load_latest = lambda *_: None


def small_gpu(photos: int) -> None:
    """As if the device had memory for so many photos."""
    original = trainer.MLNet.forward

    def forward(self, image):
        if len(image) > photos:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return original(self, image)

    trainer.MLNet.forward = forward
    trainer.has_own_memory = lambda device: True


def only_one_writes() -> None:
    """Any file that another process than the first replaces is an error."""

    def replace(source, target):
        raise AssertionError(f"process {os.environ['RANK']} writes {target}")

    if os.environ.get("RANK", "0") != "0":
        runtime.os.replace = checkpoints.os.replace = replace


def train_here(folder: Path, options: dict, environment: dict, accident, events=None) -> None:
    """Train in this process; exit code 1 and ``error<rank>.txt`` if that raises.

    Args:
        folder: of the run.
        options: of the configuration.
        environment: of the process.
        accident: is called before the training.
        events: receives the number of function calls, where it is given.
    """
    # Loader processes from this one, not from another server that first imports torch.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    os.chdir(folder)
    rank = environment.get("RANK", "0")
    if environment:
        trainer.VALIDATION_BATCH = 2  # three batches of validation, which the processes share
    only_one_writes()
    calls = [0]

    def count(frame, event, argument):
        calls[0] += 1

    if events is not None:
        sys.setprofile(count)
    with open(folder / f"output{rank}.txt", "a") as output, contextlib.redirect_stdout(output):
        try:
            if accident:
                accident()
            trainer.fit(tiny_config(**options), folder)
        except BaseException as error:
            (folder / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            (folder / f"traceback{rank}.txt").write_text(traceback.format_exc())
            sys.exit(1)
    if events is not None:
        sys.setprofile(None)
        events.value = calls[0]


# ---- in this process ---------------------------------------------------------------------------
def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def local_environment() -> dict[str, str]:
    """The variables by which processes of this machine find each other without a name service."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": loopback,
        "ACCELERATE_USE_CPU": "true",
    }


@functools.cache
def server():
    """A process that has imported everything, from which each training is forked."""
    context = multiprocessing.get_context("forkserver")
    slow_imports = ["torchvision.transforms.v2", "timm"]  # which happen within functions
    context.set_forkserver_preload(["processes", *slow_imports])
    return context


def train(
    folder: Path, accident=None, rank: int | None = None, world: int = 0, events=None, **options
) -> list[int]:
    """Train in one process, or in ``world`` of them; the exit codes.

    Args:
        folder: of the run.
        accident: happens in the process ``rank``, or in all.
        rank: see ``accident``.
        world: number of processes; 0 = one that knows of no others.
        events: see :func:`train_here`.
        options: of the configuration.
    """
    environments = [{}]
    if world:
        shared = {**local_environment(), "MASTER_PORT": free_port()}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environments = [
            {**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(world)
        ]
    processes = []
    for number, environment in enumerate(environments):
        own = accident if rank in (None, number) else None
        arguments = (folder, options, environment, own, events)
        processes.append(server().Process(target=train_here, args=arguments))
        processes[-1].start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process hangs"
    return codes


def outcome(folder: Path) -> dict:
    """The log and all weights of a finished run."""
    content = {
        name: load_checkpoint(folder / "checkpoints" / name) for name in ("best.pt", "last.pt")
    }
    assert content["last.pt"]["progress"]["finished"]
    states = {name: content[name]["model"] for name in content}
    states["average"] = content["last.pt"]["average"]
    found = {f"{name} {key}": value for name in states for key, value in states[name].items()}
    return {"log": (folder / "log.csv").read_bytes(), **found}


def assert_identical(folder: Path, expected: dict) -> None:
    """The outcome is that of another run, to the bit."""
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert found["log"] == expected["log"]
    different = [k for k in found if k != "log" and not torch.equal(found[k], expected[k])]
    assert different == []
