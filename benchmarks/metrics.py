"""Time and memory of the metrics, beside pysaliency, on maps of OSIE's size.

    python benchmarks/metrics.py                # table and results/benchmarks/metrics.json
    python benchmarks/metrics.py --images 20    # a quick look

Both sides score the same maps in the same run, turn by turn, so that a busy moment hits both.
pysaliency is called as its documentation shows, with all maps in memory, and runs on one core; the
package scores as many images at a time as ``OMP_NUM_THREADS`` says. Real fixations are used where
``MLNET_DATA`` holds OSIE, simulated ones elsewhere. Needs the extra ``parity`` (pysaliency).
"""

import argparse
import os
import resource
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import measure
import numpy as np
import torch
from torch import Tensor

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.osie import SIZE, read_osie
from mlnet_utils.metrics import baselines
from mlnet_utils.runtime import data_root

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
    starts = range(0, len(maps["prediction"]), BATCH)

    def batches(function: Callable, *kinds: str) -> Callable[[], Tensor]:
        given = ("prediction", *kinds)
        return lambda: torch.cat(
            [function(*(maps[kind][s : s + BATCH] for kind in given)) for s in starts]
        )

    def everything(*given: Tensor) -> Tensor:
        return torch.stack(list(metrics.score_all(*given).values()), 1)

    return {
        "AUC": batches(metrics.auc, "fixations"),
        "CC": batches(metrics.cc, "density"),
        "KL": batches(metrics.kl_divergence, "density"),
        "sAUC": batches(metrics.auc_shuffled, "fixations", "negatives"),
        "IG": batches(metrics.information_gain, "fixations", "baseline"),
        "NSS": batches(metrics.nss, "fixations"),
        "SIM": batches(metrics.similarity, "density"),
        "total": batches(everything, "fixations", "density", "negatives", "baseline"),
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
    }


# ---- measurements ------------------------------------------------------------------------------
def compare(maps: dict[str, Tensor], ours: dict, theirs: dict, rounds: int) -> list[dict]:
    """Milliseconds per image of both sides, metric by metric, and their largest difference."""
    sides = {"pysaliency": theirs, "here": ours}
    calls = {(side, name): call for side, one in sides.items() for name, call in one.items()}
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # np.trapz inside pysaliency
        times = {clock: measure.seconds(calls, rounds, clock) for clock in ("wall", "cpu")}
        found = {key: call() for key, call in calls.items() if key[1] != "total"}
    rows = []
    for name in (*metrics.METRICS, "total"):
        row = {"metric": name}
        for clock, seconds in times.items():
            median = {
                side: sum(measure.median(seconds[side, part]) for part in parts)
                for side, parts in (
                    ("pysaliency", metrics.METRICS if name == "total" else [name]),
                    ("here", [name]),
                )
            }
            row |= {
                f"{side} {clock} ms": 1e3 * value / len(maps["prediction"])
                for side, value in median.items()
            }
            row[f"{clock} ratio"] = median["pysaliency"] / median["here"]
        if name != "total":
            gap = found["here", name].numpy() - np.asarray(found["pysaliency", name])
            row["largest difference"] = float(np.abs(gap).max())
        rows.append(row)
    rows[-1]["largest difference"] = max(row["largest difference"] for row in rows[:-1])
    return rows


def peak_memory(chosen: list[Photo], others: baselines.LeaveOneOut, centre: Tensor) -> float:
    """Peak resident memory of this process, in MB, once it scored the photos batch by batch.

    To be measured before all the maps are made and pysaliency is imported.
    """
    for start in range(0, len(chosen), BATCH):
        metrics.score_all(**inputs(chosen[start : start + BATCH], others, centre))
    scale = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write the record")
    options = parser.parse_args()
    load = os.getloadavg()[0]  # of a machine with nothing else to do: about 1
    chosen, source = photos(options.images)
    centre = baselines.CentreBias.fit(chosen)(chosen[0].height, chosen[0].width)
    others = baselines.LeaveOneOut(chosen)
    memory = peak_memory(chosen, others, centre)
    maps = inputs(chosen, others, centre)
    rows = compare(maps, our_calls(maps), pysaliency_calls(chosen, maps), options.rounds)
    measure.print_table(rows)
    print(f"{source} fixations; peak memory of {len(chosen)} images here: {memory:.0f} MB")
    record = {
        "fixations": source,
        "images": len(chosen),
        "rounds": options.rounds,
        "load_average": load,
        "rows": rows,
        "peak_memory_mb": memory,
        "pysaliency": version("pysaliency"),
    }
    measure.save("metrics", record, options.out)


if __name__ == "__main__":
    main()
