"""Everything about this engine that only a GPU can tell, in one command of at most 9 minutes.

    python benchmarks/on_a_gpu.py --data data
    python benchmarks/on_a_gpu.py --smoke     # seconds, also on a CPU, to see that it works

Memory and speed of training the preset ``paper`` (480x640, batch 10, nothing frozen), the cost of
each option, a resume, the batch-size finder, prediction, and, in the time left, a training of the
preset ``osie`` with its scores on the validation photos. ``--data`` is the folder of the datasets
(its ``osie/`` is used; photos that were made smaller are brought back to their size). Nothing is
downloaded: weights are random where ``--weights`` gives none.

The record is written after every row, so that it keeps what it has when it is cut off. A row that
fails, or takes longer than its section may, is recorded as such and the next one begins.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import measure
import torch
import training
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

from mlnet_utils.config import Config, load_config, packaged_file
from mlnet_utils.data import preparation
from mlnet_utils.data.readers import osie
from mlnet_utils.experiments.evaluation import MODEL, evaluate
from mlnet_utils.model import checkpoints
from mlnet_utils.model.network import MLNet
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.runtime import SHIPPED, cpu_count, set_determinism, write_json
from mlnet_utils.training.trainer import Trainer, fit, make_accelerator

DEVICE = training.DEVICE
OUT = measure.RESULTS / "on_a_gpu.json"
SCORING = 60  # seconds that are kept for the scores of the last section

Row = Callable[[], object]
Sections = dict[str, tuple[float, dict[str, Row]]]  # name -> seconds it may take, its rows


class OutOfTime(Exception):
    """A row took longer than it may."""


# ---- rows, one after the other -------------------------------------------------------------------
def run_sections(sections: Sections, record: dict, out: Path, seconds: float) -> None:
    """Fill ``record["sections"]`` row by row and write it after each.

    An error's row is its traceback under ``error``; a row that no time is left for says so under
    ``skipped``.
    """
    started = time.monotonic()
    for section, (allowed, rows) in sections.items():
        found = record["sections"].setdefault(section, {})
        begun = time.monotonic()
        for name, row in rows.items():
            now = time.monotonic()
            try:
                tidy()
                with at_most(min(begun + allowed, started + seconds) - time.monotonic()):
                    value = row()
            except OutOfTime as error:
                value = {"skipped": str(error)}
            except Exception:
                value = {"error": traceback.format_exc()}
            took = time.monotonic() - now
            found[name] = value
            record["seconds"][section] = time.monotonic() - begun
            write_json(out, record)
            print(f"{section}: {name}: {brief(value)} [{took:.0f} s]", flush=True)
    record["complete"] = True
    write_json(out, record)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` when the block takes longer."""

    def late(number: int, frame: object) -> None:
        raise OutOfTime(f"not done in the {seconds:.0f} s that were left for it")

    if seconds <= 0:
        raise OutOfTime("no time was left for it")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy() -> None:
    """Take what the row before has left: memory, determinism, compiled code."""
    set_determinism(False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def brief(value: object) -> str:
    """A row in a line."""
    if isinstance(value, list):
        return f"{len(value)} rows"
    if "error" in value:
        return "FAILED: " + value["error"].strip().splitlines()[-1]
    plain = {k: v for k, v in value.items() if not isinstance(v, list | dict)}
    return ", ".join(f"{key} {measure.show(number)}" for key, number in plain.items())


def gigabytes(kind: str) -> float | None:
    """A figure of torch's allocator, e.g. ``max_memory_allocated``; None on a CPU."""
    return getattr(torch.cuda, kind)() / 1e9 if DEVICE == "cuda" else None


def first_of_each(rows: dict[str, Row]) -> dict[str, Row]:
    """Of rows that call the same function, the first."""
    kept = {}
    for name, row in rows.items():
        kept.setdefault(getattr(row, "func", row), (name, row))
    return dict(kept.values())


# ---- what is measured ----------------------------------------------------------------------------
class Measurements:
    """The rows of all sections; ``deadline`` is when the last one has to end."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.folder, self.data, self.weights = folder, options.data, options.weights
        self.smoke, self.deadline = options.smoke, time.monotonic() + 60 * options.minutes
        self.size, self.small, self.batch = (480, 640), (240, 320), 10
        self.updates, self.rounds, self.photos = 20, 3, 400
        if self.smoke:
            self.size, self.small, self.batch = (80, 80), (80, 80), 2
            self.updates, self.rounds, self.photos = 1, 1, 2
        self.matrix_rate: float | None = None  # TFLOP/s
        self.numbers = itertools.count()

    def sections(self) -> Sections:
        """All rows, the most important first, and the seconds that each section may take.

        For the smoke test a row of each kind.
        """
        half = {"precision": "bf16"}
        frozen = {"freeze": training.FROZEN}
        precisions = {name: {"precision": name} for name in ("bf16", "fp16", "fp32")}
        if DEVICE == "cpu":
            del precisions["fp16"]
        recomputed = {
            f"{name}, checkpointing": {**precisions[name], "checkpointing": True}
            for name in ("bf16", "fp32")
        }
        options = {
            "bf16, deterministic": {**half, "deterministic": True},
            "fp32, deterministic": {"precision": "fp32", "deterministic": True},
            "bf16, checkpointing": recomputed["bf16, checkpointing"],
            "bf16, channels_last off": {**half, "channels_last": False},
            "bf16, lower layers frozen": {**half, **frozen},
        }
        call = functools.partial
        sections = {
            "matrix": (30, {"product": self.matrix_product}),
            "memory": (
                90,
                {
                    name: call(self.memory, **changes)
                    for name, changes in {**precisions, **recomputed}.items()
                },
            ),
            "training": (
                150,
                {
                    **{
                        name: call(self.speed, self.paper(**changes))
                        for name, changes in {**precisions, **options}.items()
                    },
                    "bf16, batch 32": call(self.speed, self.paper(**half, batch=32)),
                    "bf16, from files": call(self.from_files, self.paper(**half, workers=-1)),
                    "preset osie": call(self.speed, self.osie_config(backbone_weights="none")),
                },
            ),
            "resume": (
                90,
                {
                    **{f"{name}, deterministic": call(self.resume, name) for name in precisions},
                    "fp32, not deterministic": call(self.resume, "fp32", deterministic=False),
                },
            ),
            "batch-size finder": (30, {"half of the memory": self.finder}),
            "prediction": (
                80,
                {
                    "the package's network": self.predict,
                    "paper": call(self.predict, "paper"),
                    "network alone": call(
                        training.forward, self.size, self.batch, self.rounds, "wall"
                    ),
                },
            ),
            "parts": (
                40,
                {
                    "convolutions": call(layers, self.size, self.batch, self.rounds),
                    "operators": self.operators,
                },
            ),
            "MLNet-Pytorch": (
                30,
                {
                    "its loop": self.its_speed,
                    "this engine": call(
                        self.speed, self.paper(**half, **frozen, size=self.small, batch=16)
                    ),
                },
            ),
            "compile": (90, {"bf16": self.compiled}),
            "osie": (float("inf"), {"training": self.train}),
        }
        if self.smoke:
            return {name: (most, first_of_each(rows)) for name, (most, rows) in sections.items()}
        return sections

    def paper(
        self, size: tuple[int, int] | None = None, batch: int = 0, **changes: object
    ) -> Config:
        """The recipe of the paper at the benchmark's size; no weight moves, none can die."""
        batch = min(batch or self.batch, 2) if self.smoke else batch or self.batch
        return training.our_config(
            size or self.size, batch, **{"micro_batch": 0, "lr": 0.0, **changes}
        )

    def osie_config(self, **changes: object) -> Config:
        """The preset ``osie``, or something as small as the smoke test wants."""
        return load_config("tiny" if self.smoke else "osie", **changes)

    def new_folder(self) -> Path:
        return self.folder / str(next(self.numbers))

    def matrix_product(self) -> dict:
        """The rate of a large product in bf16: what the hardware gives."""
        n = 512 if self.smoke else 8192
        a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.matrix_rate = 2 * n**3 / seconds_per_call(lambda: a @ b, self.rounds) / 1e12
        return {"size": n, "TFLOP/s": self.matrix_rate}

    def memory(self, **changes: object) -> dict:
        """The most that torch allocates: in the first update, and in those after it."""
        before = gigabytes("memory_allocated")
        trainer = measure.make_trainer(self.paper(**changes), self.new_folder())
        update = measure.one_update(trainer)
        update()
        first = gigabytes("max_memory_allocated")
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(min(3, self.updates)):
            update()
        return {
            "peak GB": gigabytes("max_memory_allocated"),
            "first update's peak GB": first,  # cuDNN tries its algorithms
            "reserved GB": gigabytes("max_memory_reserved"),
            "before GB": before,
        }

    def speed(self, config: Config) -> dict:
        """Photos per second of updates on a batch that is in the computer's memory."""
        trainer = measure.make_trainer(config, self.new_folder())
        batch = next(iter(trainer.train_loader))
        with FlopCounterMode(display=False) as counter:
            trainer.losses(batch, trainer.model).sum().backward()
        trainer.optimizer.zero_grad(set_to_none=True)

        def several() -> None:
            for _ in range(self.updates):
                trainer.batch = 0
                trainer.step(batch)
            trainer.read_losses()  # waits for the device

        started = time.monotonic()
        several()
        first = time.monotonic() - started
        times = measure.seconds({"updates": several}, self.rounds)["updates"]
        rate = self.updates * config.batch_size / measure.median(times)
        work = counter.get_total_flops() / config.batch_size / 1e12
        return {
            "images/s": rate,
            "TFLOP per photo": work,
            "TFLOP/s": rate * work,
            "of the matrix rate": self.matrix_rate and rate * work / self.matrix_rate,
            "batch": config.batch_size,
            "size": [config.height, config.width],
            "precision": trainer.accelerator.mixed_precision,
            "peak GB": gigabytes("max_memory_allocated"),
            "first updates' seconds": first,
            "seconds of each round": times,
        }

    def from_files(self, config: Config) -> dict:
        """Photos per second of whole epochs, decoding in the loader's processes included."""
        trainer = measure.make_trainer(config, self.new_folder(), self.photos + 1)
        rates = []
        for _ in range(3):  # the first one starts the processes
            started = time.monotonic()
            trainer.batch = 0
            trainer.train_epoch()
            rates.append(self.photos / (time.monotonic() - started))
        return {"images/s": measure.median(rates[1:]), "first epoch's images/s": rates[0]} | {
            "workers": trainer.train_loader.num_workers
        }

    def its_speed(self) -> dict:
        """Photos per second of MLNet-Pytorch's own loop."""
        batch = 2 if self.smoke else 16
        update = training.its_update(*self.small, batch)
        times = measure.seconds({"update": update}, max(self.updates, self.rounds))["update"]
        return {"images/s": batch / measure.median(times)}

    def resume(self, precision: str, deterministic: bool = True) -> dict:
        """A training that is stopped in its second epoch and goes on, beside one that is not."""
        config = load_config(
            "tiny", precision=precision, deterministic=deterministic, epochs=3, checkpoint_every=2,
            limit=12 if self.smoke else 32,
        )  # fmt: skip
        data = self.folder / "drawings"
        if not data.exists():
            preparation.prepare(config, data, data)
        runs, states, scales = {}, {}, []
        for name in ("whole", "resumed"):
            runs[name] = self.new_folder()
            runs[name].mkdir()
            (runs[name] / "data").symlink_to(data, target_is_directory=True)
            accelerator = make_accelerator(config)
            if accelerator.scaler:  # the scale moves often enough to be lost
                accelerator.scaler.set_growth_interval(4)
            trainer = Trainer(config, runs[name], accelerator)
            if name == "resumed":
                stop_after(trainer, trainer.total_updates // 2)
                with contextlib.suppress(KeyboardInterrupt):
                    trainer.run()
                if trainer.finished:
                    raise AssertionError("the training did not stop")
                fit(config, runs[name])
            else:
                trainer.run()
            content = checkpoints.load_checkpoint(runs[name] / "checkpoints" / "last.pt")
            states[name] = {key: content[key] for key in ("model", "optimizer", "scaler")}
            scales.append(content["scaler"].get("scale"))
        logs = [(run / "log.csv").read_text() for run in runs.values()]
        return {
            "same log": logs[0] == logs[1],
            "same state": largest_difference(*states.values()) == 0,
            "largest difference": largest_difference(*states.values()),
            "scale": scales[0],
            "logs": [] if logs[0] == logs[1] else logs,
        }

    def finder(self) -> dict:
        """``micro_batch=-1`` where half of the memory that a whole batch takes is allowed."""
        if DEVICE == "cpu":
            return {"skipped": "a CPU has no memory of its own"}
        needed = self._needed()
        tidy()
        total = torch.cuda.get_device_properties(0).total_memory / 1e9
        torch.cuda.set_per_process_memory_fraction(needed / 2 / total)
        try:
            config = self.paper(precision="bf16", micro_batch=-1)
            trainer = measure.make_trainer(config, self.new_folder())
            trainer.fit_into_memory()
            update = measure.one_update(trainer)
            times = measure.seconds({"update": update}, self.rounds)["update"]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return {
            "needed GB": needed,
            "allowed GB": needed / 2,
            "photos at once": trainer.micro_batch or trainer.share,
            "of": config.batch_size,
            "peak GB": gigabytes("max_memory_allocated"),
            "images/s": config.batch_size / measure.median(times),
        }

    def _needed(self) -> float:
        """Gigabytes of a whole batch."""
        trainer = measure.make_trainer(self.paper(precision="bf16"), self.new_folder())
        update = measure.one_update(trainer)
        update()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        update()
        return gigabytes("max_memory_allocated")

    def predict(self, preset: str = "") -> dict:
        """Photos per second of ``predict`` on a folder of JPEGs, files written included."""
        checkpoint, size = SHIPPED, (96, 128) if self.smoke else (768, 1024)
        if preset:
            config = self.paper()
            checkpoint = self.new_folder() / "random.pt"
            state = MLNet(config).state_dict()
            checkpoints.save_checkpoint(checkpoint, replace(config, head="density"), state)
        photos = self.folder / "photos"
        if not photos.exists():
            measure.make_photos(photos, self.photos, *size)
        some = sorted(photos.iterdir())[:2]
        predict_folder(checkpoint, some, self.new_folder())  # starts the device
        started = time.monotonic()
        result = predict_folder(checkpoint, [photos], self.new_folder(), batch_size=32)
        seconds = time.monotonic() - started
        return {
            "images/s": len(result.done) / seconds,
            "photos": len(result.done),
            "photo": list(size),
            "failed": len(result.failed),
            "peak GB": gigabytes("max_memory_allocated"),
        }

    def operators(self) -> list[dict]:
        """Operators by their share of the device's time in an update."""
        config = self.paper(precision="bf16")
        trainer = measure.make_trainer(config, self.new_folder())
        update = measure.one_update(trainer)
        update()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
        with profile(activities=kinds) as profiler:
            for _ in range(min(3, self.updates)):
                update()
        key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
        found = {
            event.key: (getattr(event, key), event.count)
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CPU and getattr(event, key) > 0
        }
        total = sum(microseconds for microseconds, _ in found.values())
        return [
            {"operator": name, "share": microseconds / total, "calls": calls}
            for name, (microseconds, calls) in sorted(found.items(), key=lambda item: -item[1][0])
        ][:25]

    def compiled(self) -> dict:
        """Speed with ``compile``; the first updates' seconds are those of compiling."""
        if self.smoke:
            return {"skipped": "takes a compiler, and minutes on a CPU"}
        return self.speed(self.paper(precision="bf16", compile=True))

    def train(self) -> dict:
        """Train the preset ``osie`` on its data; the log, and the scores on validation photos."""
        root, config = self.folder, self.osie_config(workers=-1)
        if not self.smoke:
            root = self._osie_root()
            if root is None:
                return {"skipped": f"{self.data} holds no osie/data/stimuli and osie/data/eye"}
            weights = self.weights or packaged_file(config.backbone) or "none"
            config = self.osie_config(workers=-1, backbone_weights=weights)
        run = self.new_folder()
        prepared = preparation.prepare(config, root, run / "data")
        trainer = Trainer(config, run, make_accelerator(config))
        until = self.deadline - SCORING
        step = trainer.step

        def step_in_time(batch: dict[str, Tensor]) -> None:
            if time.monotonic() > until:
                raise OutOfTime("the training was cut off")
            step(batch)

        trainer.step = step_in_time
        started = time.monotonic()
        with contextlib.suppress(OutOfTime):
            trainer.run()
        del trainer.step  # a circle of references would keep the loader's workers alive
        found = {
            "finished": trainer.finished,
            "seconds": time.monotonic() - started,
            "backbone": config.backbone,
            "backbone_sha256": trainer.model.backbone.sha256 or "random weights",
            "photos": prepared.meta["photos"],
            "log": trainer.history,
            "times": (run / "times.csv").read_text().split() if trainer.history else [],
        }
        best = run / "checkpoints" / "best.pt"
        if best.is_file():
            rows = evaluate(run, best, "val", models=(MODEL,))["rows"]
            found["scores"] = rows[0]["metrics"]
            means = {name: found["scores"][name]["mean"] for name in ("CC", "NSS", "KL")}
            found |= means
        return found

    def _osie_root(self) -> Path | None:
        """A folder with ``osie/`` in it, its photos at their own size; None without the data."""
        source = next(
            (
                folder
                for folder in (self.data / "osie", self.data)
                if (folder / "data" / "stimuli").is_dir() and (folder / "data" / "eye").is_dir()
            ),
            None,
        )
        if source is None:
            return None
        root = self.folder / "datasets"
        stimuli = root / "osie" / "data" / "stimuli"
        stimuli.mkdir(parents=True)
        (stimuli.parent / "eye").symlink_to((source / "data" / "eye").resolve())

        def bring_back(path: Path) -> None:
            with Image.open(path) as photo:
                if photo.size == osie.SIZE:
                    (stimuli / path.name).symlink_to(path.resolve())
                else:
                    whole = photo.convert("RGB").resize(osie.SIZE, Image.Resampling.BICUBIC)
                    whole.save(stimuli / path.name, quality=95)

        with ThreadPoolExecutor(cpu_count()) as pool:
            list(pool.map(bring_back, sorted((source / "data" / "stimuli").glob("*.jpg"))))
        return root


def stop_after(trainer: Trainer, updates: int) -> None:
    """Let the trainer believe, after some updates, that a cluster wants it to stop."""
    step = trainer.step

    def step_and_stop(batch: dict[str, Tensor]) -> None:
        step(batch)
        if trainer.updates == updates:
            trainer.signals.received = "SIGTERM"

    trainer.step = step_and_stop


def largest_difference(a: object, b: object) -> float:
    """Of all numbers in two nested states; infinite where these are not alike."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max((largest_difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return max(map(largest_difference, a, b), default=0.0)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(abs(a - b))
    return 0.0 if a == b else float("inf")


def seconds_per_call(call: Callable[[], object], rounds: int) -> float:
    """Median over rounds of many calls each: a single one may be shorter than its start."""
    many = 20 if DEVICE == "cuda" else 1

    def calls() -> None:
        for _ in range(many):
            call()

    return measure.median(measure.seconds({"": calls}, rounds)[""]) / many


def layers(size: tuple[int, int], batch: int, rounds: int) -> list[dict]:
    """Rate of every convolution in bf16, forward and backward, beside a large matrix product's."""
    n = 8192 if DEVICE == "cuda" else 256
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    a, b = (torch.randn(n, n, **kind) for _ in range(2))
    product = seconds_per_call(lambda: a @ b, rounds)
    peak = 2 * n**3 / product / 1e12
    rows = [{"layer": f"matrix product {n}", "ms": 1000 * product, "TFLOP/s": peak}]
    height, width = size
    convolutions, inside = {}, 3
    for place, layer in enumerate(make_layers(cfgs["D"])[:30]):
        if isinstance(layer, nn.MaxPool2d) and place != 23:
            height, width = height // 2, width // 2
        if isinstance(layer, nn.Conv2d):
            convolutions[f"features.{place}"] = (layer, height, width)
    convolutions["encode"] = (nn.Conv2d(1280, 64, 3, padding=1), height, width)
    for name, (layer, height, width) in convolutions.items():
        inside, outside = layer.in_channels, layer.out_channels
        layer = layer.to(**kind, memory_format=torch.channels_last)
        x = torch.randn(batch, inside, height, width, **kind)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(inside > 3)
        wanted = [layer.weight, layer.bias, *([x] if x.requires_grad else [])]
        gradient = torch.ones_like(layer(x))

        def call(layer: nn.Module = layer, x: Tensor = x, wanted=wanted, gradient=gradient) -> None:
            torch.autograd.grad(layer(x), wanted, gradient)

        taken = seconds_per_call(call, rounds)
        passes = 3 if x.requires_grad else 2  # a photo needs no gradient
        work = passes * 2 * 9 * inside * outside * height * width * batch
        where = f"{name} {inside}->{outside} at {height}x{width}"
        rows.append({"layer": where, "ms": 1000 * taken, "TFLOP/s": work / taken / 1e12})
    return [{**row, "of the product's": row["TFLOP/s"] / peak} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with osie/ in it")
    parser.add_argument("--weights", type=Path, help="of the backbone of preset osie")
    parser.add_argument("--minutes", type=float, default=9, help="that all may take together")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="leave out others")
    parser.add_argument("--smoke", action="store_true", help="small and short")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name} in results/benchmarks/")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Deterministic products ask for it, and cuBLAS reads it once, before the first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.smoke and options.out is None:
        parser.error("--smoke writes no record of this machine: name a file with --out")
    if options.weights:
        try:  # now, and not when the time is nearly over
            MLNet(load_config("osie", backbone_weights=options.weights))
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
    content = {"device": DEVICE, "complete": False, "seconds": {}, "sections": {}}
    record = measure.record("on_a_gpu", content)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        measurements = Measurements(options, Path(name).resolve())
        sections = measurements.sections()
        unknown = set(options.only) - set(sections)
        if unknown:
            parser.error(f"no section {', '.join(unknown)}: use {', '.join(sections)}")
        kept = {k: v for k, v in sections.items() if not options.only or k in options.only}
        run_sections(kept, record, options.out or OUT, 60 * options.minutes)


if __name__ == "__main__":
    main()
