"""What the benchmarks share: the machine they ran on, a run to train, timing, table and record."""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

try:  # where the package is not installed, that of this checkout
    import mlnet_utils  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlnet_utils.config import Config
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.runtime import cpu_count, sha256_file, versions, write_json
from mlnet_utils.training.trainer import Trainer, make_accelerator

RESULTS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def hardware() -> dict:
    """The machine, as far as it decides speed and memory."""
    found = {
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported(),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_photos(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """JPEGs of smooth noise: ``0.jpg``, ``1.jpg`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)

    def make(number: int) -> Path:
        rng = np.random.default_rng(number)
        noise = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(noise).resize((width, height)).save(path, quality=90)
        return path

    with ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(make, range(count)))


def make_trainer(config: Config, folder: Path, count: int = 0) -> Trainer:
    """A trainer on random photos, the last one for validation; default: of two batches."""
    photos, rng = [], np.random.default_rng(0)
    size = (config.height, config.width)
    paths = make_photos(folder, count or 2 * config.batch_size, *size)
    for path in paths:
        points = rng.uniform(0, (config.width - 1, config.height - 1), (100, 2))
        photos.append(
            Photo(
                path.stem,
                path.name,
                config.width,
                config.height,
                "val" if path == paths[-1] else "train",
                points.astype(np.float32),
                np.zeros(100, np.int16),
                sha256=sha256_file(path),
            )
        )
    meta = {"dataset": "noise", "title": "Noise", "root": str(folder), "sigma_px": 20.0}
    Prepared(folder / "run" / "data", photos, meta).write()
    trainer = Trainer(config, folder / "run", make_accelerator(config))
    trainer.wrapped.train()
    return trainer


def one_update(trainer: Trainer) -> Callable[[], None]:
    """A function that makes one update on a batch that is already loaded, to its very end."""
    batch = next(iter(trainer.train_loader))

    def update() -> None:
        trainer.batch = 0
        trainer.step(batch)
        trainer.read_losses()  # waits for the device

    return update


# Of a machine that does other things, the process's own CPU time is the steadier measure.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(
    functions: dict[str, Callable[[], None]], rounds: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of every function, in turns, so that a busy moment hits all alike.

    Each is called once before the measurement. With ``clock="cpu"``, of all threads together.
    """
    now = CLOCKS[clock]
    times = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            if sys.stderr.isatty():
                print(f"\rround {number}/{rounds}: {name:<60}", end="", file=sys.stderr, flush=True)
            start = now()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(now() - start)
    return times


def median(values: list[float]) -> float:
    """The middle of the measurements."""
    return statistics.median(values)


def print_table(rows: list[dict]) -> None:
    """Rows as aligned text; the keys of the first are the columns."""
    columns = list(rows[0])
    cells = [columns] + [[show(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def show(value: object) -> str:
    """A number as a reader wants it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def record(name: str, content: dict) -> dict:
    """What was measured, on what, with which command."""
    words = sys.argv[1:]
    for option in {"--out", "--figure"} & set(words):  # say nothing about the measurement
        place = words.index(option)
        del words[place : place + 2]
    command = " ".join(["python", f"benchmarks/{name}.py", *words])
    return {"command": command, "hardware": hardware(), "versions": versions(), **content}


def save(name: str, content: dict, out: Path | None = None) -> Path:
    """Write the record."""
    path = out or RESULTS / f"{name}.json"
    write_json(path, record(name, content))
    print(f"\n{path}")
    return path
