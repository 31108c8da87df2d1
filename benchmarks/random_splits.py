"""Preset ``osie`` on random splits of its photos: 450 train, 50 choose the epoch, 200 to score.

    python benchmarks/random_splits.py --data-root ~/data --keep runs/random

500 and 200 random photos are how others split OSIE. The seed draws the split and begins the
training. The same command continues what was interrupted.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np

from mlnet_utils.config import load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.photos import Prepared
from mlnet_utils.experiments.evaluation import MODEL, evaluate
from mlnet_utils.metrics import METRICS
from mlnet_utils.runtime import data_root
from mlnet_utils.training import trainer

TRAIN, LEARN = 450 / 700, 500 / 700  # shares: those to train on, and these with the validation's


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default="", help="raw data (default: $MLNET_DATA, data/)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder of the trainings, to continue later")
    parser.add_argument("--smoke", action="store_true", help="drawings, tiny, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/random_splits.json")
    options = parser.parse_args()
    preset, changes = ("tiny", {"limit": 6, "epochs": 1}) if options.smoke else ("osie", {})
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        config = load_config(preset, **changes)
        photos = preparation.ensure(config, data_root(options.data_root), folder / "data")
        rows = []
        for seed in options.seeds[: 1 if options.smoke else None]:
            split_at_random(photos, seed, folder / str(seed) / "data")
            trainer.fit(load_config(preset, seed=seed, **changes), folder / str(seed))
            scores = evaluate(folder / str(seed), split="test")["rows"]
            rows += [{"seed": seed, **row} for row in scores]
    ours = [row for row in rows if row["model"] == MODEL]
    shown = [
        {"seed": r["seed"]} | {m: f"{r['metrics'][m]['mean']:.3f}" for m in METRICS} for r in ours
    ]
    measure.print_table(shown)
    if not options.smoke:
        measure.save("random_splits", {"preset": preset, "rows": rows}, options.out)


def split_at_random(prepared: Prepared, seed: int, folder: Path) -> None:
    """Write the prepared photos with another split."""
    count = len(prepared.photos)
    ends = {"train": int(count * TRAIN), "val": int(count * LEARN), "test": count}
    photos = list(prepared.photos)
    for place, index in enumerate(np.random.default_rng(seed).permutation(count)):
        split = next(name for name, end in ends.items() if place < end)
        photos[index] = replace(photos[index], split=split)
    meta = {**prepared.meta, "root": str(prepared.root.resolve())}
    Prepared(folder, photos, meta).write()


if __name__ == "__main__":
    main()
