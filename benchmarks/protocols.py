"""How much the protocols differ: the same predictors on OSIE, scored under each of them.

    MLNET_DATA=... python benchmarks/protocols.py

Predictors are fitted on the fixations of observers 1 to 7 and scored on those of observers 8 to
15, so that a real difference between people is what separates prediction and truth:

* peaky: the first observers' fixations blurred with one degree, plus 1 % centre bias;
* broad: the same density, 15 %, plus 85 % centre bias.

Prints Markdown tables and writes ``results/benchmarks/protocols.json``. Only scores leave this
script; the fixations stay where they are.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from mlnet_utils import metrics
from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.data.readers.osie import read_osie
from mlnet_utils.experiments.evaluation import protocol_truth
from mlnet_utils.metrics import baselines
from mlnet_utils.metrics.summary import format_table
from mlnet_utils.runtime import data_root, progress, versions, write_json

ROOT = Path(__file__).resolve().parent.parent
SIGMA = 24.0  # pixels: one degree, OSIE's own ground truth
TRAINING = 500  # photos whose fixations give the centre bias; the next ones are scored
SHARES = {"peaky": 0.01, "broad": 0.85}  # of the centre bias in the predictor


def only(photo: Photo, observers: np.ndarray) -> Photo:
    """The photo with the fixations of some observers."""
    keep = np.isin(photo.observers, observers)
    return replace(
        photo,
        fixations=photo.fixations[keep],
        observers=photo.observers[keep],
        durations=photo.durations[keep],
    )


def eight_bit(prediction: Tensor) -> Tensor:
    """What comes back from a PNG file."""
    return (255 * prediction / prediction.max()).round()


def score(photo: Photo, prediction: Tensor, others, centre: Tensor, protocol: str) -> dict:
    """All metrics of one prediction under one protocol, with the protocol's own ground truth."""
    extra = {"mit300": ["AUC-Judd", "AUC-Borji"], "salicon": ["sAUC-grid"], "salicon2015": []}
    osie = Prepared(data_root() / "osie", [photo], {"root": ".", "sigma_px": SIGMA})
    defined = [name for name in metrics.METRICS if name in metrics.DEFINITIONS[protocol]]
    return metrics.score_all(
        prediction[None],
        **protocol_truth(photo, others, osie, protocol),
        baseline=centre[None],
        protocol=protocol,
        metrics=defined + extra[protocol],
        names=[photo.stem],
    )


def measure(count: int) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """{predictor: {protocol: {metric: one value per photo}}}."""
    photos = read_osie(data_root() / "osie")
    centre = baselines.CentreBias.fit(photos[:TRAINING])(photos[0].height, photos[0].width)
    chosen = photos[TRAINING : TRAINING + count]
    truths = [only(photo, np.arange(7, 15)) for photo in chosen]
    others = baselines.LeaveOneOut(truths)
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for photo, truth in progress(list(zip(chosen, truths, strict=True)), "protocols"):
        seen = only(photo, np.arange(7)).fixations
        blurred = density_from_points(seen, photo.height, photo.width, SIGMA)
        for name, share in SHARES.items():
            prediction = (1 - share) * blurred + share * centre
            variants = {protocol: (prediction, protocol) for protocol in metrics.PROTOCOLS}
            variants["mit300, 8 bits"] = (eight_bit(prediction), "mit300")
            for variant, (maps, protocol) in variants.items():
                found = score(truth, maps, others, centre, protocol)
                for metric, value in found.items():
                    rows = values.setdefault(name, {}).setdefault(variant, {})
                    rows.setdefault(metric, []).append(value.item())
    return {
        name: {
            variant: {metric: np.array(column) for metric, column in columns.items()}
            for variant, columns in by_variant.items()
        }
        for name, by_variant in values.items()
    }


def number(value: float) -> float | str:
    """JSON has no infinity."""
    return float(value) if np.isfinite(value) else str(value)


def table(by_variant: dict[str, dict[str, np.ndarray]]) -> str:
    """Markdown: one row per protocol, one column per metric; infinities stay in the mean."""
    names = [*metrics.METRICS, "AUC-Judd", "AUC-Borji", "sAUC-grid"]
    means = {
        variant: {name: column.mean() for name, column in columns.items()}
        for variant, columns in by_variant.items()
    }
    return format_table(pd.DataFrame(means, index=names).T.rename_axis("protocol"))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=200)
    arguments = parser.parse_args()
    measured = measure(arguments.photos)
    for name, by_variant in measured.items():
        print(f"\n{name}\n\n{table(by_variant)}")
    write_json(
        ROOT / "results" / "benchmarks" / "protocols.json",
        {
            "command": f"python benchmarks/protocols.py --photos {arguments.photos}",
            "photos": arguments.photos,
            "means": {
                name: {
                    variant: {metric: number(column.mean()) for metric, column in columns.items()}
                    for variant, columns in by_variant.items()
                }
                for name, by_variant in measured.items()
            },
            "photos_with_infinite_information_gain": {
                f"{name}, {variant}": int(np.isinf(columns["IG"]).sum())
                for name, by_variant in measured.items()
                for variant, columns in by_variant.items()
                if "IG" in columns
            },
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
