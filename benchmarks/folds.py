"""All photos of a dataset in five folds, each scored by a network that never saw it.

    python benchmarks/folds.py --data-root ~/data --keep runs/folds --out results/osie/folds.json

Trains a preset five times and scores by our protocol and by protocol "A" of
github.com/matthias-k/DeepGaze, ``experiments/scanpath/README.md`` (2026): the first fixation of
each scanpath is left out, the baseline of IG is a kernel density of all the other photos'
fixations, and scores are means per photo, then over photos. AUC and NSS are pysaliency's, which
those of ``mit300`` equal. The same command continues what was interrupted. Beside the record lie
both tables by photo; the photos with the lowest CC are printed.
"""

import argparse
import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch

from mlnet_utils import runtime
from mlnet_utils.data.geometry import fixation_counts
from mlnet_utils.data.photos import NOBODY, Photo, Prepared
from mlnet_utils.data.preparation import FOLDS
from mlnet_utils.experiments import sweep
from mlnet_utils.experiments.evaluation import CENTRE, Predict
from mlnet_utils.metrics import METRICS, score_all
from mlnet_utils.metrics.baselines import CentreBias
from mlnet_utils.metrics.summary import summary
from mlnet_utils.predict.predictor import MODEL, load

A_METRICS = ("IG", "AUC", "NSS")
PER_IMAGE_A = "per_image_a.csv"
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
        root = runtime.data_root(options.data_root)
        found = cross_validate(options.preset, folder, root, options.workers)
        measure.print_table(
            [
                {"protocol": "ours", "model": MODEL, **_intervals(found["ours"])},
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
        photos = pd.read_csv(folder / sweep.PER_IMAGE, dtype={"stem": str})
        print(f"\nlowest CC:\n{photos.nsmallest(WORST, 'CC').to_string(index=False)}")
        path = measure.save("folds", {"preset": options.preset, **found}, options.out)
        for table in (sweep.PER_IMAGE, PER_IMAGE_A):
            shutil.copy(folder / table, path.with_name(f"{path.stem}_{table}"))


def cross_validate(preset: str, folder: Path, data_root: Path, workers: int) -> dict:
    """Train the five folds of a dataset without a split of its own; score all its photos.

    What is done is not done again, as in ``sweep.run_sweep``; its ``per_image.csv`` holds the
    scores by our protocol; ``per_image_a.csv`` beside it those of protocol "A". Returns ``photos``;
    ``fixations`` of protocol "A"; ``ours``: metric -> the ``summary`` over all photos; ``a``: model
    -> the same.

    Raises:
        ValueError: the dataset has its own split, or see :func:`score_a`.
        RuntimeError: a training failed; the others are done.
    """
    cells = {f"fold {number}": {"fold": number} for number in range(FOLDS)}
    grid = sweep.Grid("folds", preset, cells)
    if failed := sweep.run_sweep(grid, folder, data_root, workers):
        raise RuntimeError("; ".join(f"{title}: {error}" for title, error in failed.items()))
    runs, photos = {}, []
    for job in sweep.jobs_of(grid, folder, data_root):
        prepared = Prepared.read(job.data)
        photos += prepared.split("test")
        runs |= {photo.stem: job.folder for photo in prepared.split("test")}
    network = functools.lru_cache(maxsize=1)(load)

    def predict(photo: Photo) -> np.ndarray:
        predictor = network(runs[photo.stem] / "checkpoints" / "best.pt")
        return predictor.predict(prepared.root / photo.image)

    photos = sorted(photos, key=lambda photo: (str(runs[photo.stem]), photo.stem))
    scores = score_a(photos, {MODEL: predict})
    with runtime.locked(folder / PER_IMAGE_A):
        runtime.write_text(folder / PER_IMAGE_A, scores.to_csv(index=False))
    ours = pd.read_csv(folder / sweep.PER_IMAGE, dtype={"stem": str})
    return {
        "photos": len(photos),
        "fixations": int(scores.loc[scores["model"] == CENTRE, "fixations"].sum()),
        "ours": {metric: summary(ours[metric]) for metric in METRICS},
        "a": {
            model: {metric: summary(part[metric]) for metric in A_METRICS}
            for model, part in scores.groupby("model", sort=False)
        },
    }


def score_a(photos: Sequence[Photo], predict: Mapping[str, Predict]) -> pd.DataFrame:
    """Protocol "A": a row per model and photo, columns model, stem, fixations, IG, AUC, NSS.

    ``photos`` are all of the dataset; the functions of ``predict`` give a photo's (H, W) density,
    None where it is not to be scored. The cross-validated centre bias is scored on every photo.
    Raises ValueError: see :func:`without_first`; or fewer than two photos have fixations.
    """
    later, rows = [without_first(photo) for photo in photos], []
    bias = CentreBias.fit(later)
    for photo in runtime.progress(later, "protocol A", unit="photo"):
        fixations = fixation_counts(photo.fixations, photo.height, photo.width)[None]
        centre = bias.without(photo)(photo.height, photo.width)
        maps = {CENTRE: centre, **{model: each(photo) for model, each in predict.items()}}
        for model, density in maps.items():
            if density is not None:
                truth = {"fixations": fixations, "baseline": centre[None], "names": [photo.stem]}
                prediction = torch.as_tensor(density).double()[None]
                found = score_all(prediction, **truth, metrics=A_METRICS)
                scores = {metric: value.item() for metric, value in found.items()}
                row = {"model": model, "stem": photo.stem, "fixations": len(photo.fixations)}
                rows.append(row | scores)
    return pd.DataFrame(rows)


def without_first(photo: Photo) -> Photo:
    """A photo without the first fixation of each scanpath on it.

    Raises ValueError: its fixations are published without observers, so that they have no order.
    """
    if NOBODY in photo.observers:
        raise ValueError(f"photo {photo.stem}: fixations without observers have no first one")
    _, first = np.unique(photo.observers, return_index=True)  # an observer's are in viewing order
    return photo.only(np.delete(np.arange(len(photo.observers)), first))


def _intervals(row: dict) -> dict[str, str]:
    return {m: "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found) for m, found in row.items()}


if __name__ == "__main__":
    main()
