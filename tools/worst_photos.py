"""Draw the worst test photos of a run, or of all folds: people's density, and the network's.

The photos themselves are not drawn, so that the figure may be published where they may not.

    python tools/worst_photos.py runs/folds/fold-*/0 --out figures/osie_worst.png
"""

import argparse
from pathlib import Path

import pandas as pd

from mlnet_utils import plots
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import Prepared
from mlnet_utils.predict.predictor import MODEL, load


def main() -> None:
    """Write the figure: a row for each of the photos with the lowest CC, the lowest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that were evaluated")
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    tables = [pd.read_csv(run / "per_image.csv", dtype={"stem": str}) for run in options.runs]
    scores = pd.concat([t.assign(run=run) for run, t in zip(options.runs, tables, strict=True)])
    scores, rows = scores[scores["model"] == MODEL], []
    print(f"{len(scores)} photos, median CC {scores['CC'].median():.2f}")
    for row in scores.nsmallest(options.photos, "CC").itertuples():
        prepared = Prepared.read(row.run / "data")
        photo = next(photo for photo in prepared.photos if photo.stem == row.stem)
        image = read_image(prepared.root / photo.image).permute(1, 2, 0).numpy()
        maps = {
            "fixated by people": prepared.density(photo).numpy(),
            "predicted": load(row.run / "checkpoints" / "best.pt").predict(image),
        }
        rows.append({**maps, "label": f"{row.stem}, CC {row.CC:.2f}"})
    plots.use_style()
    plots.save(plots.plot_panels(rows), options.out)


if __name__ == "__main__":
    main()
