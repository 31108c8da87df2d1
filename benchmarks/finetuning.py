"""Fine-tuning on few photos: 50 of OSIE, from random weights, the sample's model and ImageNet.

    python -m mlnet_utils train --preset sample
    python benchmarks/finetuning.py --sample runs/sample/checkpoints/best.pt

Every start sees the same photos in the same order, for the same number of updates, with the
recipe of the preset ``finetune``. Its learning rate is the one of ``RATES`` with the lowest
validation loss (first seed). The published test split is scored; the validation split chooses the
epoch. ``sample model, as it is`` is scored without any training on photos.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import measure
import pandas as pd

from mlnet_utils.config import Config, load_config
from mlnet_utils.data import preparation
from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.metrics.summary import summarise
from mlnet_utils.model import checkpoints
from mlnet_utils.predict.predictor import load
from mlnet_utils.runtime import data_root, display_path, progress, sha256_file
from mlnet_utils.training import trainer

SHOWN = ("CC", "NSS", "KL", "IG", "AUC", "sAUC", "SIM")
RANDOM, SAMPLE, IMAGENET = "random weights", "sample model", "ImageNet backbone"
UNTRAINED = "sample model, as it is"
RATES = {RANDOM: (1e-3, 4e-3), SAMPLE: (3e-4, 1e-3, 4e-3), IMAGENET: (1e-3,)}
TRUNK = ("backbone", "backbone_weights", "backbone_args", "backbone_drop", "channels_last")


def starts(sample: Path) -> dict[str, dict]:
    """What each start sets, beside the preset's recipe."""
    own = checkpoints.with_start(load_config("finetune", start_from=sample))
    same = {"head": own.head, "prior_cells": own.prior_cells, "channels": own.channels}
    nothing = {"start_from": "", "head": "density"}
    mobilenet = {key: getattr(load_config("osie"), key) for key in TRUNK}
    return {
        # Statistics that no data have formed cannot be kept; those of drawings do not fit photos.
        RANDOM: {
            **nothing, **same, "backbone": own.backbone, "backbone_weights": "none",
            "levels": own.levels, "freeze_norm": False,
        },
        SAMPLE: {"start_from": str(sample), "freeze_norm": False},
        IMAGENET: {**nothing, **mobilenet},
    }  # fmt: skip


def train(config: Config, data: Path, run: Path) -> tuple[Path, dict]:
    """Train on the prepared data; the best checkpoint and what the training took."""
    shutil.copytree(data, run / "data", dirs_exist_ok=True)
    result = trainer.fit(config, run)
    best = min(result.history, key=lambda row: row["val_loss"])
    return result.best, {
        "seed": config.seed,
        "lr": config.lr,
        "updates": result.history[-1]["updates"],
        "best_epoch": best["epoch"],
        "val_loss": best["val_loss"],
    }


def score(checkpoint: Path, test: TestSet) -> pd.DataFrame:
    """(photos, metrics) scores of a checkpoint on the test photos."""
    predictor = load(checkpoint)
    photos = progress(test.photos, "scoring", unit="photo")
    rows = {p.stem: test.score(p, predictor.predict(test.image(p)), "mit300") for p in photos}
    return pd.DataFrame.from_dict(rows, orient="index")[list(METRICS)]


def summary(name: str, tables: list[pd.DataFrame], resamples: int) -> dict:
    """Means over photos, each photo's scores averaged over the seeds, and every seed's means."""
    mean = sum(tables) / len(tables)
    rows = [{"model": name, "stem": stem, **row} for stem, row in mean.to_dict("index").items()]
    per_seed = [table[list(SHOWN)].mean().to_dict() for table in tables]
    return {"start": name, "metrics": summarise(rows, resamples)[0]["metrics"], "seeds": per_seed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=Path, default=Path("runs/sample/checkpoints/best.pt"))
    parser.add_argument("--photos", type=int, default=50, help="to train on")
    parser.add_argument("--epochs", type=int, default=load_config("finetune").epochs)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder of the runs, to continue later")
    parser.add_argument("--smoke", action="store_true", help="drawings, tiny, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/finetuning.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure_all(options, options.keep or Path(name))


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    """Train and score every start; print a table and save the record."""
    shared = {"dataset": "osie", "epochs": options.epochs, "precision": "fp32"}
    if options.smoke:
        options.photos = 4
        shared |= {"dataset": "synthetic", "limit": 4, "epochs": 1, "bootstrap": 20}
        options.sample = folder / "sample" / "checkpoints" / "best.pt"
        small = load_config("tiny", dataset="synthetic", limit=4, epochs=1)
        preparation.prepare(small, data_root(), folder / "data")
        train(small, folder / "data", folder / "sample")
    own = checkpoints.with_start(load_config("finetune", start_from=options.sample))
    shared |= {"height": own.height, "width": own.width}
    changes = starts(options.sample)
    if options.smoke:
        changes[IMAGENET]["backbone_weights"] = "none"
    if not (folder / "data" / "meta.json").is_file():
        few = load_config("finetune", train_limit=options.photos, **shared)
        preparation.prepare(few, data_root(), folder / "data")
    rows, runs = [], []
    for start, change in changes.items():
        finished = []
        for seed in range(options.seeds):
            rates = [finished[0][1]["lr"]] if seed else RATES[start]
            tried = []
            for lr in rates:
                config = load_config("finetune", **{**shared, **change, "lr": lr, "seed": seed})
                run = folder / f"{start} {lr} {seed}".replace(" ", "_")
                print(f"{start}, learning rate {lr}, seed {seed}", flush=True)
                tried.append(train(config, folder / "data", run))
                runs.append({"start": start, **tried[-1][1]})
            finished.append(min(tried, key=lambda one: one[1]["val_loss"]))
        rows.append((start, [checkpoint for checkpoint, _ in finished], finished[0][1]["lr"]))
    rows.append((UNTRAINED, [options.sample], None))
    (folder / "test").mkdir(exist_ok=True)
    shutil.copytree(folder / "data", folder / "test" / "data", dirs_exist_ok=True)
    test = TestSet(folder / "test", "test")
    resamples = own.bootstrap if not options.smoke else 20
    results = []
    for start, found, lr in rows:
        print(f"scoring {start}", flush=True)
        results.append(
            {
                "lr": lr,
                "backbone": checkpoints.load_checkpoint(found[0])["config"]["backbone"],
                **summary(start, [score(checkpoint, test) for checkpoint in found], resamples),
            }
        )
    measure.print_table(
        [
            {"start": row["start"], "backbone": row["backbone"], "lr": row["lr"] or "-"}
            | {m: _interval(row["metrics"][m]) for m in SHOWN}
            for row in results
        ]
    )
    if not options.smoke:
        content = {
            "dataset": "osie",
            "photos": test.prepared.meta["photos"],
            "size": [own.height, own.width],
            "batch": own.batch_size,
            "protocol": "mit300",
            "ig_baseline": test.centre_bias.description,
            "sample": {
                "file": display_path(options.sample),
                "sha256": sha256_file(options.sample),
            },
            "rows": results,
            "runs": runs,
        }
        measure.save("finetuning", content, options.out)


def _interval(values: dict) -> str:
    """Mean and 95 % interval."""
    if values["mean"] is None:
        return "-"
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


if __name__ == "__main__":
    main()
