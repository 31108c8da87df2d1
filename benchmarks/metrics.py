"""Time and memory of the metrics, beside pysaliency, on maps of OSIE's size.

    python benchmarks/metrics.py                # table, results/benchmarks/metrics.json, figure
    python benchmarks/metrics.py --images 20    # a quick look

Both sides score the same maps in the same run, turn by turn, so that whatever else the machine
does hits both. pysaliency is called as its documentation shows, with all maps in memory. Real
fixations are used where ``MLNET_DATA`` holds OSIE, simulated ones elsewhere.

Needs the extra ``parity`` (pysaliency). Both use the same processor cores; pysaliency's metrics
run on one of them, this module on as many as ``OMP_NUM_THREADS`` says. Besides the time on the
clock, the processor time of both on one thread is compared: on a machine that has other work to do,
where a second thread mostly waits, only that ratio is to be trusted.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.osie import SIZE, read_osie
from mlnet_utils.metrics import baselines
from mlnet_utils.runtime import atomic_path, data_root, versions, write_json

ROOT = Path(__file__).resolve().parent.parent
SIGMA = 24.0  # pixels: one degree, OSIE's own ground truth
BATCH = 10  # images per call; more would only cost memory
EPS = 2.2204e-16


# ---- inputs ------------------------------------------------------------------------------------
def photos(count: int) -> tuple[list[Photo], str]:
    """OSIE's photos where the data are, else simulated viewers of photos of that size."""
    root = data_root() / "osie"
    if (root / "data" / "eye" / "fixations.mat").is_file():
        return read_osie(root)[:count], "OSIE"
    return [simulated(index) for index in range(count)], "simulated"


def simulated(index: int, height: int = SIZE[1], width: int = SIZE[0]) -> Photo:
    """About 140 fixations of 15 observers around four places and the centre."""
    generator = np.random.default_rng(index)
    places = np.vstack([generator.uniform(0.15, 0.85, (4, 2)), [[0.5, 0.5]]])
    observers = np.repeat(np.arange(15, dtype=np.int16), generator.integers(8, 12, 15))
    centre = places[generator.integers(0, 5, len(observers))]
    points = (centre + generator.normal(0, 0.07, centre.shape)).clip(0, 0.999)
    fixations = (points * (width, height) - 0.5).astype(np.float32)
    return Photo(f"{index:04d}", "", width, height, "", fixations, observers)


def prediction(photo: Photo, centre: Tensor) -> Tensor:
    """A plausible model: what half of the observers looked at, and the centre bias."""
    half = photo.fixations[photo.observers < 8]
    blurred = density_from_points(half, photo.height, photo.width, 1.5 * SIGMA)
    return 0.8 * blurred + 0.2 * centre


def inputs(chosen: list[Photo], others: baselines.LeaveOneOut, centre: Tensor) -> dict[str, Tensor]:
    """The maps of some photos, as the metrics take them."""
    size = (chosen[0].height, chosen[0].width)
    return {
        "prediction": torch.stack([prediction(photo, centre) for photo in chosen]),
        "fixations": torch.stack([fixation_counts(p.fixations, *size) for p in chosen]),
        "density": torch.stack([density_from_points(p.fixations, *size, SIGMA) for p in chosen]),
        "negatives": torch.stack([others(photo) for photo in chosen]),
        "baseline": centre.expand(len(chosen), *size),
    }


# ---- the two sides -----------------------------------------------------------------------------
def our_calls(maps: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Each metric over all the images, batch by batch; ``total`` is the one pass."""
    count = len(maps["prediction"])
    starts = range(0, count, BATCH)

    def batches(function: Callable, *kinds: str) -> Callable[[], Tensor]:
        needed = ("prediction", *kinds)
        return lambda: torch.cat(
            [function(*(maps[kind][s : s + BATCH] for kind in needed)) for s in starts]
        )

    def everything() -> dict[str, Tensor]:
        parts = [
            metrics.score_all(**{kind: value[s : s + BATCH] for kind, value in maps.items()})
            for s in starts
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return {
        "AUC": batches(metrics.auc, "fixations"),
        "CC": batches(metrics.cc, "density"),
        "KL": batches(metrics.kl_divergence, "density"),
        "sAUC": batches(metrics.auc_shuffled, "fixations", "negatives"),
        "IG": batches(metrics.information_gain, "fixations", "baseline"),
        "NSS": batches(metrics.nss, "fixations"),
        "SIM": batches(metrics.similarity, "density"),
        "total": everything,
    }


def pysaliency_calls(chosen: list[Photo], maps: dict[str, Tensor]) -> dict[str, Callable]:
    """The same metrics from pysaliency: per image, as the MIT/Tuebingen benchmark uses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecated imports
        import pysaliency
        from pysaliency.models import SaliencyMapNormalizingModel

    generator = np.random.default_rng(0)
    size = maps["prediction"].shape[1:]
    stimuli = pysaliency.Stimuli([generator.integers(0, 255, size, np.uint8) for _ in chosen])
    n = np.repeat(np.arange(len(chosen)), [len(photo.fixations) for photo in chosen])
    x, y = np.floor(np.concatenate([p.fixations for p in chosen]) + 0.5).astype(int).T
    fixations = pysaliency.Fixations.create_without_history(x, y, n)

    class Given(pysaliency.SaliencyMapModel):
        """A model whose maps are in memory: no time is spent on making or caching them."""

        def __init__(self, values: Tensor):
            super().__init__(caching=False)
            self.values = dict(zip(stimuli.stimulus_ids, values.numpy(), strict=True))

        def saliency_map(self, stimulus):
            identity = pysaliency.datasets.as_stimulus(stimulus).stimulus_id
            return self.values[identity]

        def _saliency_map(self, stimulus):
            raise NotImplementedError("saliency_map is overridden")

    model, truth, centre = (Given(maps[k]) for k in ("prediction", "density", "baseline"))

    def by_image(values: np.ndarray) -> np.ndarray:
        return np.bincount(n, values) / np.bincount(n)

    def density(one: Given) -> SaliencyMapNormalizingModel:
        return SaliencyMapNormalizingModel(one, minimum_value=0)

    regular = {"log_regularization": EPS, "quotient_regularization": EPS, "minimum_value": 0}
    return {
        "AUC": lambda: model.AUC_per_image(stimuli, fixations),
        "CC": lambda: model.CCs(stimuli, truth),
        "KL": lambda: model.image_based_kl_divergences(stimuli, truth, **regular),
        "sAUC": lambda: model.AUC_per_image(stimuli, fixations, nonfixations="shuffled"),
        "IG": lambda: by_image(
            density(model).information_gains(stimuli, fixations, baseline_model=density(centre))
        ),
        "NSS": lambda: by_image(model.NSSs(stimuli, fixations)),
        "SIM": lambda: model.SIMs(stimuli, truth),
        # A second way to the AUC, one sort instead of two and no integration.
        "AUC (AUCs)": lambda: by_image(model.AUCs(stimuli, fixations)),
    }


# ---- measurements ------------------------------------------------------------------------------
def timed(call: Callable) -> tuple[float, float, object]:
    """Seconds on the clock, seconds of processor time of all threads, and the result."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - clock, time.process_time() - processor, result


def compare(chosen: list[Photo], repeats: int) -> tuple[dict, float]:
    """Milliseconds per image of both sides, metric by metric, and how well they agree.

    The second value is a floor: milliseconds per image, on the clock with all threads, of adding up
    every map once, which no exact metric can do without.
    """
    centre = baselines.CentreBias.fit(chosen)(chosen[0].height, chosen[0].width)
    maps = inputs(chosen, baselines.LeaveOneOut(chosen), centre)
    ours, theirs = our_calls(maps), pysaliency_calls(chosen, maps)
    threads = torch.get_num_threads()
    sides = (("pysaliency", theirs, 1), ("ours", ours, threads), ("ours_1_thread", ours, 1))
    clock: dict[tuple[str, str], list[float]] = {}
    processor: dict[tuple[str, str], list[float]] = {}
    found = {}
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # np.trapz inside pysaliency
        for call in (*ours.values(), *theirs.values()):  # pysaliency compiles at the first call
            call()
        for _ in range(repeats):
            for name in (*ours, "AUC (AUCs)"):
                for side, calls, count in sides:
                    if name in calls:
                        torch.set_num_threads(count)
                        on_clock, on_processor, found[side, name] = timed(calls[name])
                        clock.setdefault((side, name), []).append(on_clock)
                        processor.setdefault((side, name), []).append(on_processor)
    torch.set_num_threads(threads)
    per_image = 1e3 / len(chosen)
    floor = min(timed(lambda: [one.sum() for one in maps.values()])[0] for _ in range(repeats))

    def row(theirs: Sequence[str], name: str) -> dict[str, float]:
        """One line of the table: medians of the repeats."""
        clocks = [sum(statistics.median(clock["pysaliency", one]) for one in theirs)]
        clocks += [statistics.median(clock["ours", name])]
        busy = [sum(statistics.median(processor["pysaliency", one]) for one in theirs)]
        busy += [statistics.median(processor["ours_1_thread", name])]
        return {
            "pysaliency_ms": per_image * clocks[0],
            "ours_ms": per_image * clocks[1],
            "ratio": clocks[0] / clocks[1],
            "pysaliency_processor_ms": per_image * busy[0],
            "ours_processor_ms": per_image * busy[1],
            "ratio_processor": busy[0] / busy[1],
        }

    rows = {}
    for name in metrics.METRICS:
        gap = np.abs(found["ours", name].numpy() - np.asarray(found["pysaliency", name])).max()
        rows[name] = row([name], name) | {"largest_difference": float(gap)}
    rows["all seven"] = row(metrics.METRICS, "total")
    faster = ["AUC (AUCs)", *metrics.METRICS[1:]]
    rows["all seven, pysaliency's AUC by AUCs()"] = row(faster, "total")
    return rows, per_image * floor


def scaling(repeats: int) -> dict[str, list[dict]]:
    """Processor seconds of the one pass, on one thread, against images and against pixels."""
    result: dict[str, list[dict]] = {"images": [], "pixels": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    few = [simulated(index) for index in range(80)]
    centre = baselines.CentreBias.fit(few)(SIZE[1], SIZE[0])
    maps = inputs(few, baselines.LeaveOneOut(few), centre)
    for count in (5, 10, 20, 40, 80):
        part = {kind: value[:count] for kind, value in maps.items()}
        call = our_calls(part)["total"]
        result["images"].append(
            {"images": count, "seconds": min(timed(call)[1] for _ in range(repeats))}
        )
    for scale in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2):
        height, width = round(SIZE[1] * scale), round(SIZE[0] * scale)
        few = [simulated(index, height, width) for index in range(4)]
        centre = baselines.CentreBias.fit(few)(height, width)
        call = our_calls(inputs(few, baselines.LeaveOneOut(few), centre))["total"]
        seconds = min(timed(call)[1] for _ in range(repeats)) / len(few)
        result["pixels"].append({"pixels": height * width, "seconds_per_image": seconds})
    torch.set_num_threads(threads)
    return result


def plot(measured: dict[str, list[dict]], path: Path) -> None:
    """Both scalings beside n and n log n through their last points."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, (rows, x, y, xlabel, ylabel) in zip(
        axes,
        (
            (measured["images"], "images", "seconds", "images of 600 x 800", "seconds"),
            (measured["pixels"], "pixels", "seconds_per_image", "pixels", "seconds per image"),
        ),
        strict=True,
    ):
        xs, ys = (np.array([row[key] for row in rows], float) for key in (x, y))
        ax.plot(xs, ys, "o-", label="all seven metrics")
        ax.plot(xs, ys[-1] * xs / xs[-1], "k:", label="n")
        if x == "pixels":  # over three orders of magnitude
            growth = xs * np.log(xs)
            ax.plot(xs, ys[-1] * growth / growth[-1], "k--", lw=0.8, label="n log n")
            ax.set(xscale="log", yscale="log")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    figure.suptitle("Processor time of scoring, one thread")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, metadata={"Software": None})


def peak_memory(count: int) -> float:
    """Peak resident memory, in MB, of a process that scores ``count`` images batch by batch."""
    command = [sys.executable, __file__, "--only-ours", "--images", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only_ours(count: int) -> None:
    """Score images that are made batch by batch; print this process's peak memory in MB."""
    chosen, _ = photos(count)
    centre = baselines.CentreBias.fit(chosen)(chosen[0].height, chosen[0].width)
    others = baselines.LeaveOneOut(chosen)
    for start in range(0, len(chosen), BATCH):
        metrics.score_all(**inputs(chosen[start : start + BATCH], others, centre))
    scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KB elsewhere
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6)


def main() -> None:
    """Measure, print a table, write the record and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only-ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.only_ours:
        only_ours(arguments.images)
        return
    chosen, source = photos(arguments.images)
    # First, while this process is small: Linux counts a parent's memory as its child's.
    memory = peak_memory(arguments.images)
    rows, floor = compare(chosen, arguments.repeats)
    print(
        f"{len(chosen)} images of 600 x 800 ({source} fixations), {torch.get_num_threads()} threads"
    )
    print(
        f"{'metric':40s} {'pysaliency ms':>14s} {'here ms':>9s} {'ratio':>7s} "
        f"{'processor: pysaliency ms':>26s} {'here ms':>9s} {'ratio':>7s} {'difference':>11s}"
    )
    for name, found in rows.items():
        gap = f"{found['largest_difference']:11.1e}" if "largest_difference" in found else ""
        clock = f"{found['pysaliency_ms']:14.2f} {found['ours_ms']:9.2f} {found['ratio']:7.1f}"
        busy = f"{found['pysaliency_processor_ms']:26.2f} {found['ours_processor_ms']:9.2f}"
        print(f"{name:40s} {clock} {busy} {found['ratio_processor']:7.1f} {gap}")
    print(f"adding up every map once takes {floor:.2f} ms per image")
    print(f"peak memory of scoring {len(chosen)} images here: {memory:.0f} MB")
    if arguments.no_write:
        return
    measured = scaling(arguments.repeats)
    plot(measured, ROOT / "figures" / "metrics_scaling.png")
    write_json(
        ROOT / "results" / "benchmarks" / "metrics.json",
        {
            "command": " ".join(["python benchmarks/metrics.py", *sys.argv[1:]]),
            "fixations": source,
            "images": len(chosen),
            "repeats": arguments.repeats,
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],  # of a machine with nothing else to do: about 1
            "milliseconds_per_image": rows,
            "adding_up_every_map_ms": floor,
            "peak_memory_mb": memory,
            "scaling": measured,
            "versions": {**versions(), "pysaliency": pysaliency_version()},
        },
    )


def pysaliency_version() -> str:
    """Version of the reference."""
    from importlib.metadata import version

    return version("pysaliency")


if __name__ == "__main__":
    main()
