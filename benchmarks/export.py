"""Size, speed and scores of a trained network in every exported form.

    python benchmarks/export.py --run-dir runs/sample --name export_sample
    python benchmarks/export.py --smoke   # a minute, to see that it works

Exports ``checkpoints/best.pt`` of the run into a temporary folder and scores each form on the
run's test photos. Times are of the network alone, one photo at a time, on the CPU, in turns.
"""

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch

from mlnet_utils.config import load_config
from mlnet_utils.data import preparation
from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.predict.export import export, load_exported
from mlnet_utils.predict.predictor import Predictor, load
from mlnet_utils.runtime import display_path, progress
from mlnet_utils.training import trainer

FORMS = ("torch.export", "ONNX", "ONNX, 8 bits")


def train_tiny(folder: Path) -> Path:
    """A run of a minute's work, whose scores mean nothing."""
    config = load_config("tiny", epochs=1)
    preparation.prepare(config, folder, folder / "data")
    trainer.fit(config, folder)
    return folder


def score(predictor: Predictor, data: TestSet, limit: int, name: str) -> dict:
    """Every metric's mean over the photos of a split; ``limit`` 0 = all."""
    photos = data.photos[:limit] if limit else data.photos
    scores = [
        data.score(photo, predictor.predict(data.image(photo)), predictor.config.protocol)
        for photo in progress(photos, f"scoring {name}", unit="photo")
    ]
    return {metric: float(np.nanmean([row[metric] for row in scores])) for metric in METRICS}


@torch.inference_mode()
def milliseconds(
    predictors: Mapping[str, Predictor], photo: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median time of one (3, H, W) uint8 photo through each network."""
    image, _ = next(iter(predictors.values())).prepare(photo)
    passes = {name: partial(model.model, image[None]) for name, model in predictors.items()}
    times = measure.seconds(passes, rounds)
    return {name: 1e3 * measure.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, help="a trained run")
    parser.add_argument("--checkpoint", type=Path, help="default: the run's checkpoints/best.pt")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="to calibrate with")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, default=0, help="photos to score, 0 = all")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and onnxruntime")
    parser.add_argument("--rounds", type=int, default=100, help="timed passes of every form")
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--name", default="export", help="of the record in results/benchmarks/")
    options = parser.parse_args()
    if not (options.run_dir or options.smoke):
        parser.error("name a trained run with --run-dir")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.smoke:
            options.run_dir, options.limit, options.rounds = train_tiny(folder / "run"), 2, 2
            options.photos = [options.run_dir / "data" / "images"]
        checkpoint = options.checkpoint or options.run_dir / "checkpoints" / "best.pt"
        write = partial(export, checkpoint, photos=options.photos)
        reports = [
            write(folder / "network.pt2", format="torch-export"),
            write(folder / "network.onnx"),
            write(folder / "small.onnx", int8=True),
        ]
        predictors = {"PyTorch": load(checkpoint, "cpu")}
        for form, report in zip(FORMS, reports, strict=True):
            predictors[form] = load_exported(report.path, options.threads)
        data = TestSet(options.run_dir, options.split)
        times = milliseconds(predictors, data.image(data.photos[0]), options.rounds)
        # A checkpoint also holds what is needed for nothing but training.
        weights = sum(value.nbytes for value in predictors["PyTorch"].model.state_dict().values())
        sizes = [weights, *(report.path.stat().st_size for report in reports)]
        rows = [
            {
                "form": form,
                "MB": size / 1e6,
                "ms": times[form],
                "speed": times["PyTorch"] / times[form],
                **score(predictor, data, options.limit, form),
            }
            for (form, predictor), size in zip(predictors.items(), sizes, strict=True)
        ]
        config = predictors["PyTorch"].config
    measure.print_table(rows)
    changes = [
        {
            "against PyTorch": row["form"],
            "deviation": report.deviation,
            "lowest CC": report.correlation,
            **{metric: row[metric] - rows[0][metric] for metric in METRICS},
        }
        for row, report in zip(rows[1:], reports, strict=True)
    ]
    print()
    measure.print_table(changes)
    if not options.smoke:
        content = {
            "checkpoint": display_path(checkpoint),
            "dataset": data.prepared.meta["title"],
            "backbone": config.backbone,
            "size": [config.height, config.width],
            "split": options.split,
            "photos": options.limit or len(data.photos),
            "forms": rows,
            "changes": changes,
        }
        out = measure.RESULTS / f"{options.name}.json"
        measure.save("export", content, out)


if __name__ == "__main__":
    main()
