"""Draw the worst test photos of a run: the density of the fixations, and what the network predicts.

The photos themselves are not drawn, so that the figure may be published where they may not.

    python tools/worst_photos.py runs/osie --out figures/osie_worst.png
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
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    parser.add_argument("--photos", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    prepared = Prepared.read(options.run / "data")
    photos = {photo.stem: photo for photo in prepared.photos}
    scores = pd.read_csv(options.run / "per_image.csv", dtype={"stem": str})
    worst = scores[scores["model"] == MODEL].set_index("stem")["CC"].nsmallest(options.photos)
    network, rows = load(options.run / "checkpoints" / "best.pt"), []
    for stem, cc in worst.items():
        image = read_image(prepared.root / photos[stem].image).permute(1, 2, 0).numpy()
        maps = {
            "fixated by people": prepared.density(photos[stem]).numpy(),
            "predicted": network.predict(image),
        }
        rows.append({**maps, "label": f"{stem}, CC {cc:.2f}"})
    plots.use_style()
    plots.save(plots.plot_panels(rows), options.out)


if __name__ == "__main__":
    main()
