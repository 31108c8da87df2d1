"""The surroundings of a run: device, versions, folders, atomic writes, progress.

Nothing here knows about saliency; nothing here imports torch until it must.
"""

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import filelock
import yaml

SHIPPED = Path(__file__).parent / "weights" / "mlnet.safetensors"  # comes with the package
SEAL = "content_sha256"  # key of JSON files: see write_json
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
REPORTED_PACKAGES = ("mlnet-utils", "torch", "torchvision", "timm", "accelerate", "numpy", "scipy")


# ---- optional packages -------------------------------------------------------------------------
def require(module: str, extra: str) -> ModuleType:
    """Import a module, or raise an ImportError with the command that installs its ``extra``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        install = f"pip install 'mlnet-utils[{extra}]' (in a checkout: -e '.[{extra}]')"
        message = f"this needs the package {error.name!r}: {install}"
        raise ImportError(message, name=error.name) from error


# ---- folders -----------------------------------------------------------------------------------
def checkout_root() -> Path | None:
    """The repository this package is imported from, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def chosen_folder(value: str | Path) -> Path:
    """A folder as users write it: ``~`` is home, ``drive:`` is Google Drive.

    Colab mounts the user's Drive below the working folder; elsewhere that is a RuntimeError.
    """
    text = str(value)
    if not text.startswith("drive:"):
        return Path(value).expanduser()
    folder = Path.cwd() / "drive" / "MyDrive"
    if not folder.is_dir():  # a process that the notebook starts finds it mounted
        try:
            from google.colab import drive
        except ModuleNotFoundError:
            raise RuntimeError(f"{text}: this is not Google Colab; name a folder here") from None
        drive.mount(str(folder.parent))
    return folder / text.removeprefix("drive:").lstrip("/")


def on_drive(folder: str | Path) -> bool:
    """True below the user's Google Drive, as Colab mounts it."""
    return "MyDrive" in Path(folder).parts


def data_root(value: str | Path = "") -> Path:
    """Folder of the raw datasets: ``value``, else ``$MLNET_DATA``, else ``data/``.

    ``data/`` is the checkout's (by hand, papermill and nbval alike), else the working folder's.
    """
    chosen = str(value) or os.environ.get("MLNET_DATA", "")
    return chosen_folder(chosen) if chosen else (checkout_root() or Path.cwd()) / "data"


def run_dir(value: str | Path = "", preset: str = "sample") -> Path:
    """Folder of one run: ``value``, else ``$MLNET_RUNS/<preset>``, else ``runs/<preset>``.

    ``preset`` may be the path of a YAML file; the folder then remembers it, in ``preset.txt``, and
    another file of the same name and with other content is a ValueError.
    """
    if str(value):
        return chosen_folder(value)
    folder = runs_root() / Path(preset).stem
    note, path = folder / "preset.txt", Path(preset).resolve()
    content = path.read_bytes() if path.suffix in (".yaml", ".yml") and path.is_file() else b""
    noted = note.read_text(encoding="utf-8", errors="replace") if note.is_file() else ""
    before = Path(noted.strip() or path)
    if before != path and before.is_file() and before.read_bytes() != content:
        said = f"the run of the preset {before}, and {str(preset)!r} has the same name"
        raise ValueError(f"{folder} is {said}, but other content: rename one, or set a run folder")
    if content and not (note.is_file() and before == path):
        with locked(note):
            write_text(note, f"{path}\n")
    return folder


def runs_root() -> Path:
    """Folder of the runs and of the ``features`` that they share: ``$MLNET_RUNS`` or ``runs/``."""
    base = os.environ.get("MLNET_RUNS", "")
    return Path(base).expanduser() if base else (checkout_root() or Path.cwd()) / "runs"


def refuse_run(out: Path) -> None:
    """Raise a ValueError where the folder to write into is a run, which has such files itself."""
    if (out / "checkpoints").is_dir() or (out / "data" / "meta.json").is_file():
        raise ValueError(f"'{out}' is a run, and would lose files of its own: set another out")


def display_path(path: str | Path) -> str:
    """A path without this machine: relative to the checkout, the working folder or home."""
    path = Path(path).resolve()
    for base, prefix in ((checkout_root(), ""), (Path.cwd(), ""), (Path.home(), "~/")):
        if base is not None and path.is_relative_to(base):
            return prefix + path.relative_to(base).as_posix()
    return path.as_posix()


# ---- files -------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_path(path: str | Path, lasting: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` only on success.

    A full disk or a kill leaves the old file intact, and no reader sees half a file. So does a
    power cut if the file is ``lasting``, which takes time. Raises an OSError with the name of a
    file that could not be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept because writers such as Pillow and NumPy choose the format by it.
    temporary = path.with_name(f"{_temporary_stem(path)}.{os.getpid()}.tmp{path.suffix}")
    try:
        with writing(path):
            yield temporary
            if lasting:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Rename a file or folder, so that nothing is found there and nothing is lost."""
    if path.exists():
        names = (f"{path.name}.before{number or ''}" for number in itertools.count())
        before = next(other for other in map(path.with_name, names) if not other.exists())
        path.rename(before)
        print(f"{display_path(path)} was renamed to {before.name}", flush=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file or folder in an OSError that names none, as those of a full disk do."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        advice = "is the disk full? Make room and run the same command again"
        raise OSError(f"'{path}' could not be written ({error}); {advice}") from error


def need_space(folder: Path, needed: int, purpose: str, remedy: str) -> None:
    """Raise an OSError where the folder's disk has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        missing = f"{purpose} needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB"
        raise OSError(f"{missing}: free some, or {remedy}")


def _temporary_stem(path: Path) -> str:
    """The beginning of a file's temporaries: short, for names may be as long as the disk allows."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}"


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Delete the leftovers of these files that killed processes made in :func:`atomic_path`.

    Call it inside :func:`locked`: then no other process is writing them.
    """
    wanted = {path.with_name(_temporary_stem(path)) for path in paths}
    for folder in {path.parent for path in wanted}:  # looking for each file by itself is slow
        for leftover in list(folder.glob(".*.tmp*")):
            if leftover.with_name(f".{leftover.name.split('.')[1]}") in wanted:
                leftover.unlink(missing_ok=True)


def first_of_launch() -> bool:
    """True in the first process of a launch, which writes for all, and outside of launches."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def locked(target: str | Path) -> Iterator[None]:
    """Keep other processes out of a file or folder that this process is writing.

    The second process waits, and prints the name of the first. A killed process keeps nobody
    waiting, and its leftovers are deleted. Of the processes of one launch the first holds the lock
    for all: let them meet after it is taken. A thread must not take it twice.
    """
    if not first_of_launch():
        yield
        return
    path, target = Path(target), Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(file)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        with contextlib.suppress(OSError):
            holder = " ".join(file.read_text("utf-8").split())
            print(f"waiting for {holder}, which uses {display_path(target)}", flush=True)
        lock.acquire()
    # On a disk without flock the file itself is the lock, and filelock needs its content.
    free = not isinstance(lock, filelock.SoftFileLock)
    try:
        with contextlib.suppress(OSError):  # a full disk, or Windows, where locked is unreadable
            holder = f"process {os.getpid()} on {platform.node()} ({given_command()})"
            if free:
                file.write_text(holder, encoding="utf-8")
        remove_temporaries([path])
        yield
    finally:
        # Still locked: a process that waits for this very file notices that it is gone.
        with contextlib.suppress(OSError):
            if free:
                file.unlink()
        lock.release()


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically; bytes of names that are no text are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any, sealed: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically; ``sealed`` adds a digest of it, ``SEAL``."""
    if sealed:
        value = {**value, SEAL: digest_of(value)}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def reading(path: str | Path, expected: str, remedy: str = "get it again") -> Iterator[None]:
    """Turn any error while a file is read into an error that a user can act on.

    It names the file, the ``expected`` content ("a photo") and the ``remedy``. An ImportError, a
    wrong name in the code, and a ValueError that names the file already stay as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, not readable, damaged, or something else than expected.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist: expected {expected}; {remedy}")
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("it is a folder, a pipe or a device")
        yield
    # Readers check little of their files: struct.error, IndexError, zlib.error, BadZipFile...
    except Exception as error:
        named = isinstance(error, ValueError) and str(path) in str(error)
        if named or isinstance(error, ImportError) or _is_mistake(error):
            raise
        said = isinstance(error, ValueError | OSError)
        reason = textwrap.shorten(str(error) if said else f"{type(error).__name__}: {error}", 300)
        problem = f"'{path}' cannot be read ({reason})"
        raise ValueError(f"{problem}: expected {expected}; {remedy}") from error


def _is_mistake(error: Exception) -> bool:
    """True for a name that the code has wrong, which no file can cause.

    Attributes that a list or None lacks are a file's fault, and so are assertions: of libraries.
    """
    if isinstance(error, AttributeError):
        of = error.obj
        return isinstance(of, ModuleType) or type(of).__module__.startswith(__package__)
    return type(error) is NameError  # not UnboundLocalError, which input may cause in a library


def digest_of(value: Any) -> str:
    """SHA-256 of a value as it is written in JSON, whatever the order of its keys."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)  # keys as they are read
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: str | Path, made_by: str, *keys: str) -> dict[str, Any]:
    """Read a JSON file of an object with at least ``keys``; errors of :func:`reading`.

    Where a digest seals the object, it is compared, and left out.
    """
    remedy = f"{'delete it and ' if Path(path).exists() else ''}run {made_by}"
    with reading(path, f"the JSON that {made_by} writes", remedy):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not set(keys) <= set(value):
            raise ValueError(f"it is no object with {', '.join(keys) or 'keys'}")
        if value.pop(SEAL, None) not in (None, digest_of(value)):
            raise ValueError("its SHA-256 is another")
    return value


class _SingleKeys(yaml.SafeLoader):
    """YAML with each key there once: PyYAML itself keeps the last of equal keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                said = f"{key.value!r} is there twice"
                raise yaml.MarkedYAMLError(None, None, said, key.start_mark)
            seen.append(key.value)
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of a mapping with text as keys, each once; an empty file is ``{}``.

    Raises the errors of :func:`reading`.
    """
    with reading(path, "a mapping in YAML, UTF-8", "mend it or name another"):
        values = _SingleKeys(Path(path).read_text(encoding="utf-8")).get_single_data()
        values = {} if values is None else values
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ValueError("it holds something else")
    return values


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- machine -----------------------------------------------------------------------------------
def set_determinism(on: bool) -> None:
    """Choose bit-reproducible GPU kernels, or the fastest; a CPU is reproducible either way."""
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it
    if torch.are_deterministic_algorithms_enabled() != on:  # the call imports half of torch
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = not on


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for new tensors; True if it can.

    glibc gives every block above 32 MB back to the system, which fills it with zeros, page by
    page, at the next use: up to a third of a training step on a CPU. The choice holds for the rest
    of the process; without glibc nothing changes.
    """
    try:
        option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(option(M_MMAP_MAX, 0) and option(M_TRIM_THRESHOLD, -1))


def keyed_seed(*key: int) -> int:
    """A 63-bit seed that depends on every part of a key such as (seed, update, process).

    Randomness drawn from it depends on no earlier draw: a checkpoint needs no generator state.
    """
    import numpy as np

    # NumPy ignores zeros at the end of a key: with its length in front, (0,) and (0, 0) differ.
    sequence = np.random.SeedSequence((len(key), *key))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def pick_device() -> str:
    """``"cuda"`` where available, else ``"mps"``, else ``"cpu"``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def native_precision(device: str) -> str:
    """The fastest precision that a device computes in, by accelerate's name.

    On a GPU bf16, on older GPUs fp16. On a CPU bf16 only with native instructions (AVX512-BF16 or
    AMX; measured: twice as fast as fp32 for VGG-16), because emulated it is slower than fp32;
    else, and on Apple GPUs, ``"no"``: fp32.
    """
    import torch

    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device == "cpu" and native else "no"


def versions() -> dict[str, str]:
    """Python, the packages that decide the numbers, and the hardware, for run records."""
    import torch

    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    cpu = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return found


def package_digest() -> str:
    """SHA-256 over the code that results depend on: all of it but ``running`` and the verbs."""
    here = Path(__file__).resolve().parent
    files = {path.relative_to(here).as_posix(): path for path in here.rglob("*.py")}
    unused = ("running/", "__main__.py")
    used = {name: sha256_file(files[name]) for name in files if not name.startswith(unused)}
    return digest_of(used)


def given_command() -> str:
    """The command line that led here, also to a notebook; ``Python`` where there was none."""
    return os.environ.get("MLNET_COMMAND", "Python")


def cpu_count() -> int:
    """Cores this process may use (a container or a cluster job often grants fewer than exist)."""
    some = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if some else os.cpu_count() or 1


def processes() -> Any:
    """accelerate's PartialState: this process among those of its launch, and its device.

    A process may take hours longer than another: the others wait for up to seven days.
    """
    from accelerate import PartialState

    return PartialState(cpu=pick_device() == "cpu", timeout=timedelta(days=7))


def leave_processes() -> None:
    """Close this process's connections to the others of its launch, if it has any."""
    if "torch.distributed" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # nobody hangs up while another still listens
            distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End the interpreter with an exit code."""
    # A process of several is not taken apart first: gloo's threads outlive a closed group and can
    # abort a process that has done its work (pytorch/pytorch pull request 179291).
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopSignals:
    """Note Ctrl-C and SIGTERM (a cluster's warning), so that work in hand is finished and saved.

    ``received`` is the signal's name, or ``""``. A second Ctrl-C acts at once. Outside the main
    thread, where Python delivers no signals, nothing changes.
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
    """Iterate with a bar on a terminal (stderr), and with lines (stdout) elsewhere.

    The lines come after 15 s, and then twice as long after each other, up to 5 minutes: notebooks
    and log files hold no redrawn bars, no stderr, few lines, and nothing of short loops.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(iterable, desc=description, total=total, unit=unit, leave=False)
        return
    started = last = time.monotonic()
    pause, of, done, said = 15, f"/{total}" if total else f" {unit}", 0, 0
    line = "{}: {}{}, {:.0f} s".format
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= pause:
            pause, last, said = min(2 * pause, 300), now, done
            print(line(description, done, of, now - started), flush=True)
    if 0 < said < done:  # lines that end halfway look like work that did
        print(line(description, done, of, now - started), flush=True)
