"""The surroundings of a run: seeds, device, versions, folders, atomic writes, progress.

Nothing here knows about saliency; nothing here imports torch until it must.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml

REPORTED_PACKAGES = ("mlnet-utils", "torch", "torchvision", "timm", "accelerate", "numpy", "scipy")


# ---- optional packages -------------------------------------------------------------------------
def require(module: str, extra: str) -> ModuleType:
    """Import a package that only some features need.

    Args:
        module: dotted name, e.g. ``"onnxruntime"``.
        extra: the extra of this project that installs it.

    Raises:
        ImportError: it is not installed; names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs the package {error.name!r}: pip install 'mlnet-utils[{extra}]', or from a "
            f"checkout pip install -e '.[{extra}]'"
        ) from error


# ---- folders -----------------------------------------------------------------------------------
def in_colab() -> bool:
    """True inside Google Colab, whose kernel ships the ``google.colab`` package."""
    try:
        return importlib.util.find_spec("google.colab") is not None
    except ModuleNotFoundError:  # the parent package ``google`` is absent
        return False


def checkout_root() -> Path | None:
    """The repository this package is imported from, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def drive_folder() -> Path:
    """The user's Google Drive, mounted below the working folder (Colab's is ``/content``).

    Raises:
        RuntimeError: this is not Colab.
    """
    if not in_colab():
        raise RuntimeError(
            "a folder that starts with drive: lies on Google Drive, which only Google Colab can "
            "mount; name a folder of this machine instead"
        )
    folder = Path.cwd() / "drive" / "MyDrive"
    if not folder.is_dir():  # a process that the notebook starts finds it mounted
        from google.colab import drive

        drive.mount(str(folder.parent))
    return folder


def chosen_folder(value: str | Path) -> Path:
    """A folder as users write it: ``~`` is home, ``drive:`` is Google Drive (in Colab)."""
    text = str(value)
    if text.startswith("drive:"):
        return drive_folder() / text.removeprefix("drive:").lstrip("/")
    return Path(value).expanduser()


def data_root(value: str | Path = "") -> Path:
    """Folder of the raw datasets: ``value``, else ``$MLNET_DATA``, else ``data/``.

    ``data/`` is the checkout's, or the working folder's where there is no checkout, so that a
    notebook finds the same data by hand (in ``notebooks/``), by papermill and by nbval.
    """
    chosen = str(value) or os.environ.get("MLNET_DATA", "")
    return chosen_folder(chosen) if chosen else (checkout_root() or Path.cwd()) / "data"


def run_dir(value: str | Path = "", preset: str = "sample") -> Path:
    """Folder of one run: ``value``, else ``$MLNET_RUNS/<preset>``, else ``runs/<preset>``."""
    if str(value):
        return chosen_folder(value)
    return _runs() / Path(preset).stem  # a preset may be the path of a YAML file


def feature_root() -> Path:
    """Folder of cached features, shared by all runs: ``$MLNET_RUNS/features``, else ``runs/``."""
    return _runs() / "features"


def _runs() -> Path:
    base = os.environ.get("MLNET_RUNS", "")
    return Path(base).expanduser() if base else (checkout_root() or Path.cwd()) / "runs"


def display_path(path: str | Path) -> str:
    """A path as readers should see it: relative to the checkout, the working folder or home.

    Saved notebooks must not show the machine they ran on.
    """
    path = Path(path).resolve()
    for base, prefix in ((checkout_root(), ""), (Path.cwd(), ""), (Path.home(), "~/")):
        if base is not None and path.is_relative_to(base):
            return prefix + path.relative_to(base).as_posix()
    return path.as_posix()


# ---- files -------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` only on success.

    A reader therefore sees the old file or the new one, never half of either, and a full disk
    or a kill leaves the old one intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers such as Pillow and NumPy choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(path: str | Path) -> None:
    """Delete the leftovers of :func:`atomic_path` of ``path`` in processes that were killed."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
        leftover.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path, made_by: str) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: the file is missing; the message names its maker (``made_by``).
        ValueError: the file is not valid JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is made by {made_by}. Run that first.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and run {made_by}"
        ) from None


class _SingleKeys(yaml.SafeLoader):
    """YAML with each key there once: PyYAML itself keeps the last of equal keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(None, None, f"{key!r} is there twice", mark)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty one is ``{}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not valid YAML, no mapping, or a key that is there twice; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a YAML file that does")
    try:
        values = _SingleKeys(path.read_text(encoding="utf-8")).get_single_data() or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    return values


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- machine -----------------------------------------------------------------------------------
def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(seed)


def set_determinism(on: bool) -> None:
    """Bit-reproducible GPU kernels, or the fastest ones.

    A CPU reproduces its bits either way, with the same number of threads.
    """
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it
    if torch.are_deterministic_algorithms_enabled() != on:  # the call imports half of torch
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def keyed_seed(*key: int) -> int:
    """A 63-bit seed that depends on every part of the key.

    Randomness that is drawn anew from a key such as (seed, update, process) needs no generator
    state in a checkpoint, and does not depend on earlier draws.
    """
    import numpy as np

    # NumPy ignores zeros at the end of a key: with its length in front, (0,) and (0, 0) differ.
    sequence = np.random.SeedSequence((len(key), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def pick_device() -> str:
    """``"cuda"`` if there is one, else ``"mps"``, else ``"cpu"``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache  # every checkpoint stores it
def _versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    else:
        found["device"] = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return found


def versions() -> dict[str, str]:
    """Python, the packages that decide the numbers, and the hardware, for run records."""
    return dict(_versions())


def note_command(arguments: list[str]) -> None:
    """Keep the command line for records, also those of notebooks that it goes on to run."""
    os.environ["MLNET_COMMAND"] = shlex.join(["python", "-m", "mlnet_utils", *arguments])


def given_command() -> str:
    """The command line that led here; without one, the word ``Python``: somebody's own code."""
    return os.environ.get("MLNET_COMMAND", "Python")


def cpu_count() -> int:
    """Cores this process may use (a container or a cluster job often grants fewer than exist)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def leave_processes() -> None:
    """Close this process's connections to the others of its launch, if it has any."""
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # nobody hangs up while another still listens
            distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End the interpreter with an exit code.

    One of several processes is not taken apart first: gloo's threads outlive a closed group (its
    DistributedDataParallel keeps it) and, when they still hold a tensor, now and then abort a
    process whose work is done (pytorch/pytorch pull request 179291).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopSignals:
    """Note Ctrl-C and SIGTERM instead of dying of them, so that work in hand is finished and saved.

    Clusters send SIGTERM before they kill a job. A second Ctrl-C acts at once.
    ``received`` is the signal's name, or ``""``. Outside the main thread, where Python delivers no
    signals, nothing changes.
    """

    def __init__(self):
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


# ---- progress ----------------------------------------------------------------------------------
def progress(
    iterable: Iterable, description: str, total: int | None = None, unit: str = "it"
) -> Iterator:
    """Iterate with a bar on a terminal, and with a plain line every 15 s elsewhere.

    In notebooks and log files a redrawn bar is noise (and breaks saved outputs), and silence is
    worrying; short loops therefore print nothing there. Everything goes to stderr on a terminal
    and to stdout elsewhere, so that a saved notebook holds no stderr.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=description, total=total, unit=unit, leave=False)
        return
    started = last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= 15:
            last = now
            of = f"/{total}" if total else ""
            print(f"{description}: {done}{of} {unit}, {now - started:.0f} s", flush=True)
