"""Trainings in processes of their own, and the accidents that can happen to them.

They are forked from a server that has imported torch once, with the environment that torchrun
would give them.
"""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from conftest import tiny_config

from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.training import trainer

PATIENCE = 600  # seconds, for a machine that does other things


# ---- accidents, in the other process -----------------------------------------------------------
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_event(act) -> None:
    """Call a function with its running number at every call of any other, in Python or C."""
    numbers = itertools.count(1)
    sys.setprofile(lambda *_: act(next(numbers)))


def die_at_event(number: int) -> None:
    on_event(lambda event: die() if event == number else None)


def count_events() -> None:
    """Write down, when the training has ended, how many events it has."""
    latest = collections.deque(maxlen=1)
    on_event(latest.append)

    def counted(call, *_):
        call()
        sys.setprofile(None)
        Path("events.txt").write_text(str(*latest))

    wrap(trainer, "fit", counted)


def wrap(owner, name: str, around) -> None:
    """Replace a function by ``around(call, number, *arguments)``, where ``call()`` calls it."""
    original, numbers = getattr(owner, name), itertools.count(1)

    def wrapper(*arguments, **options):
        call = functools.partial(original, *arguments, **options)
        return around(call, next(numbers), *arguments, **options)

    setattr(owner, name, wrapper)


def signal_at(name: str, number: int, which: int = signal.SIGKILL) -> None:
    """Send this process a signal at the ``number``-th call of a function of ``trainer``."""
    *owner, attribute = name.split(".")

    def watched(call, n, *_, **__):
        if n == number:
            os.kill(os.getpid(), which)
        return call()

    wrap(getattr(trainer, owner[0]) if owner else trainer, attribute, watched)


def die_between_renames() -> None:
    """Kill between ``last -> previous`` and ``next -> last``, the second time it is reached."""
    reached = itertools.count(1)

    def replace(call, _, source, target):
        call()
        if Path(target).name == "previous.pt" and next(reached) == 2:
            die()

    wrap(os, "replace", replace)


def die_in_a_write(number: int) -> None:
    """Kill when half of the ``number``-th checkpoint is on disk."""

    def save(call, n, content, file):
        call()
        if n == number:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    wrap(torch, "save", save)


def fill_the_disk(size: int) -> None:
    """No file can grow beyond ``size`` bytes from the second checkpoint on."""

    def save(call, n, *_):
        if n == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        call()

    wrap(torch, "save", save)


def not_a_number(update: int) -> None:
    """The loss of an update is not a number."""

    def losses(call, _, run, *__):
        return call() * (float("nan") if run.updates == update else 1.0)

    wrap(trainer.Trainer, "losses", losses)


def record_keys() -> None:
    """Write down the keys of the updates' random numbers: seed, update, process, photo."""
    path = Path(f"keys{os.environ['RANK']}.txt").resolve()

    def keyed_seed(call, _, *key):
        if len(key) == 4:
            with open(path, "a") as file:
                print(*key, file=file)
        return call()

    wrap(trainer, "keyed_seed", keyed_seed)


def hide_checkpoints() -> None:
    """As if this machine did not see the storage of the first."""
    trainer.checkpoints.load_latest = lambda *_: None


def small_gpu(photos: int) -> list[int]:
    """As if the device had memory for so many photos; the numbers that are tried."""
    tried = []

    def forward(call, _, network, image):
        tried.append(len(image))
        if len(image) > photos:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return call()

    wrap(trainer.MLNet, "forward", forward)
    trainer.has_own_memory = lambda device: True
    return tried


def train_here(folder: Path, options: dict, environment: dict, accident) -> None:
    """Train after an accident was called; exit code 1 and ``error<rank>.txt`` if that raises."""
    # Loader processes from this one, not from another server that first imports torch.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    os.chdir(folder)
    rank = environment.get("RANK", "0")
    if environment:
        trainer.VALIDATION_BATCH = 2  # three batches of validation, which the processes share

    def only_one_writes(call, _, source, target):
        assert rank == "0", f"process {rank} writes {target}"
        call()

    wrap(os, "replace", only_one_writes)
    with open(folder / f"output{rank}.txt", "a") as output, contextlib.redirect_stdout(output):
        try:
            if accident:
                accident()
            trainer.fit(tiny_config(**options), folder)
        except BaseException as error:
            (folder / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            sys.exit(1)


# ---- in this process ---------------------------------------------------------------------------
def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def local_environment() -> dict[str, str]:
    """The variables by which processes of this machine find each other without a name service."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "ACCELERATE_USE_CPU": "true",
    }


@functools.cache
def server():
    """A process that has imported everything, from which each training is forked."""
    context = multiprocessing.get_context("forkserver")
    # The last two happen within functions.
    slow_imports = ["mlnet_utils.experiments.sweep", "torchvision.transforms.v2", "timm"]
    context.set_forkserver_preload(["processes", *slow_imports])
    return context


def train(folder: Path, accident=None, rank=None, world: int = 0, **options) -> list[int]:
    """Train in one process, or in ``world`` of them that know of each other; the exit codes.

    The accident happens in the process ``rank``, or in all.
    """
    shared = {**local_environment(), "MASTER_PORT": free_port()}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes = []
    for number in range(max(world, 1)):
        own = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)} if world else {}
        arguments = (folder, options, own, accident if rank in (None, number) else None)
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
    best, last = (
        load_checkpoint(folder / "checkpoints" / f"{name}.pt") for name in ("best", "last")
    )
    assert last["progress"]["finished"]
    states = {"best": best["model"], "last": last["model"], "average": last["average"]}
    found = {f"{name} {key}": value for name in states for key, value in states[name].items()}
    return {"log": (folder / "log.csv").read_bytes(), **found}


def assert_identical(folder: Path, expected: dict) -> None:
    """The outcome is that of another run, to the bit."""
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert found["log"] == expected["log"]
    different = [k for k in found if k != "log" and not torch.equal(found[k], expected[k])]
    assert different == []
