"""All photos of a dataset in five folds, each scored by a network that never saw it.

    python benchmarks/folds.py --data-root ~/data --keep runs/folds --out results/osie/folds.json

Trains a preset five times and scores by our protocol and by protocol "A" of DeepGaze's scanpath
experiments (``mlnet_utils/experiments/folds.py``). The same command continues what was interrupted.
Beside the record lie both tables by photo; the photos with the lowest CC are printed.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import measure
import pandas as pd

from mlnet_utils.experiments import folds
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.runtime import data_root

WORST = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="osie")
    parser.add_argument(
        "--data-root", default="", help="raw datasets (default: $MLNET_DATA, data/)"
    )
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--keep", type=Path, help="folder of the trainings, to continue later")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/folds.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        root = data_root(options.data_root)
        found = folds.cross_validate(options.preset, folder, root, options.workers)
        measure.print_table(
            [
                {"protocol": "ours", "model": folds.MODEL, **_intervals(found["ours"])},
                *(
                    {
                        "protocol": "A",
                        "model": model,
                        **dict.fromkeys(METRICS, ""),
                        **_intervals(row),
                    }
                    for model, row in found["a"].items()
                ),
            ]
        )
        photos = pd.read_csv(folder / "per_image.csv", dtype={"stem": str})
        print(f"\nlowest CC:\n{photos.nsmallest(WORST, 'CC').to_string(index=False)}")
        path = measure.save("folds", {"preset": options.preset, **found}, options.out)
        for table in ("per_image.csv", folds.PER_IMAGE_A):
            shutil.copy(folder / table, path.with_name(f"{path.stem}_{table}"))


def _intervals(row: dict) -> dict[str, str]:
    return {m: "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found) for m, found in row.items()}


if __name__ == "__main__":
    main()
