"""A trained network on another dataset: as it is, adapted in 14 numbers, and fine-tuned.

    python benchmarks/adapting.py --start runs/osie/checkpoints/best.pt --dataset eyecrowd

Of the dataset's training photos, 10, 25 and 50 are drawn several times; both recipes see the same
ones. Preset ``adapt`` fits all of them; ``finetune`` chooses its epoch on a fifth of them. The test
photos are scored, without their mirrored copies. Differences from the network as it is are paired
by photo, each photo's scores averaged over the draws. ``--reference`` is a network that was trained
on the dataset: ``brought back`` is the share of the way to it in IG.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlnet_utils.config import load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.loading import SaliencyDataset
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.metrics import score_all
from mlnet_utils.metrics.summary import summary
from mlnet_utils.model import losses
from mlnet_utils.model.checkpoints import load_start, with_start
from mlnet_utils.model.losses import Objective
from mlnet_utils.model.network import Adaptation, MLNet
from mlnet_utils.predict.predictor import Predictor, load, to_density
from mlnet_utils.runtime import SHIPPED, data_root, display_path, progress, sha256_file
from mlnet_utils.training import trainer

AS_IT_IS, REFERENCE = "as it is", "reference"
METRICS = ("CC", "KL", "IG", "NSS")
Maps = Callable[[Photo], Tensor]  # a photo's (1, 1, h, w) density on the network's grid


class Study:
    """A dataset, the network that meets it, and its maps, which are made once and kept."""

    def __init__(self, folder: Path, start: Path):
        self.folder, self.start, self.prepared = folder, start, Prepared.read(folder / "data")
        self.kept = folder / "maps" / sha256_file(start)[:16]
        self.kept.mkdir(parents=True, exist_ok=True)
        self.predictor = load(start)
        self.config = with_start(load_config("adapt", start_from=start, sigma=self.prepared.sigma))

    def draw(self, count: int, number: int) -> list[Photo]:
        """Training photos at random; a ``number`` draws the fewer photos among the more."""
        train = self.prepared.split("train")
        order = np.random.default_rng(number).permutation(len(train))
        return [train[i] for i in order[:count]]

    def map(self, photo: Photo) -> Tensor:
        """The start's map of a photo."""
        path = self.kept / f"{photo.stem}.pt"
        if not path.is_file():
            torch.save(network_map(self.predictor, self.prepared, photo), path)
        return torch.load(path, weights_only=True)

    def adapt(self, photos: list[Photo]) -> Adaptation:
        """What preset ``adapt`` fits to the photos, on the maps that are kept."""
        network = MLNet(self.config)
        load_start(network, self.config)
        chosen = replace(self.prepared, photos=[replace(p, split="train") for p in photos])
        data = SaliencyDataset(chosen, "train", self.config)
        density, counts = map(torch.stack, zip(*map(data._truth, range(len(data))), strict=True))
        maps = torch.cat([self.map(photo) for photo in data.photos])
        optimizer = trainer.make_optimizer(self.config, network)
        how = (network.adaptation, optimizer, Objective(self.config))
        trainer.fit_adaptation(*how, maps, (density[:, None], counts[:, None]))
        return network.adaptation.eval()

    def finetune(self, photos: list[Photo], run: Path) -> Predictor:
        """What preset ``finetune`` makes of the photos; a fifth of them chooses the epoch."""
        few = len(photos) // 5
        photos = [replace(p, split="val" if i < few else "train") for i, p in enumerate(photos)]
        meta = {**self.prepared.meta, "root": str(self.prepared.root.resolve())}
        Prepared(run / "data", photos, meta).write()
        config = load_config("finetune", start_from=self.start, sigma=self.prepared.sigma)
        return load(trainer.fit(config, run).best)


@torch.inference_mode()
def network_map(predictor: Predictor, prepared: Prepared, photo: Photo) -> Tensor:
    """The density that a network predicts on its grid, (1, 1, h, w)."""
    data = SaliencyDataset(replace(prepared, photos=[photo]), photo.split, predictor.config)
    image = data.image(0)[None].to(predictor.model.mean.device)
    return predictor.model(image).cpu()


@torch.inference_mode()
def score(test: TestSet, models: dict[str, Maps], predictor: Predictor) -> pd.DataFrame:
    """A row per model and test photo: the metrics, at the photo's size."""
    rows = []
    for photo in progress(test.photos, f"scoring {len(models)} networks", unit="photo"):
        truth = test.truth(photo)
        del truth["negatives"]
        _, box = predictor.prepare(test.image(photo))
        for name, maps in models.items():
            density = to_density(maps(photo)[0, 0].double(), predictor.config, box)
            found = score_all(density[None], **truth, metrics=METRICS)
            rows.append(
                {"model": name, "stem": photo.stem} | {k: v.item() for k, v in found.items()}
            )
    return pd.DataFrame(rows)


@torch.inference_mode()
def score_on_grid(study: Study, split: str, models: dict[str, Maps]) -> pd.DataFrame:
    """The same on the network's grid, many times as fast; IG is over a uniform map."""
    data, rows = SaliencyDataset(study.prepared, split, study.config), []
    for index, photo in enumerate(progress(data.photos, f"scoring {len(models)}", unit="photo")):
        truth = [each[None, None] for each in data._truth(index)]
        for name, maps in models.items():
            density = maps(photo)
            gain = np.log(density.numel()) - losses.ce_loss(density, *truth)
            found = {"CC": 1 - losses.cc_loss(density, *truth), "IG": gain / np.log(2)}
            found |= {
                "KL": losses.kl_loss(density, *truth),
                "NSS": -losses.nss_loss(density, *truth),
            }
            rows.append(
                {"model": name, "stem": photo.stem} | {k: v.item() for k, v in found.items()}
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, default=SHIPPED, help="the network that is adapted")
    parser.add_argument("--reference", type=Path, help="a network trained on the dataset")
    parser.add_argument("--dataset", default="eyecrowd")
    parser.add_argument(
        "--data-root", default="", help="raw datasets (default: $MLNET_DATA, data/)"
    )
    parser.add_argument("--photos", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--draws", type=int, default=5, help="of the photos, for `adapt`")
    parser.add_argument("--finetune", type=int, default=1, help="draws for `finetune`")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="that is scored")
    parser.add_argument("--grid", action="store_true", help="score on the network's grid")
    parser.add_argument("--keep", type=Path, help="folder of the runs, to continue later")
    parser.add_argument("--smoke", action="store_true", help="drawings, tiny, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/adapting.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure_all(options, options.keep or Path(name))


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    """Fit, train and score everything; print a table and save the record."""
    if options.smoke:
        options.photos, options.draws, options.finetune = [5], 2, 1
        small = load_config("tiny", limit=6, epochs=1)
        preparation.prepare(small, data_root(), folder / "data")
        options.start = trainer.fit(small, folder).best
    else:
        config = load_config("finetune", dataset=options.dataset)
        preparation.ensure(config, data_root(options.data_root), folder / "data")
    study = Study(folder, options.start)
    models: dict[str, Maps] = {AS_IT_IS: study.map}
    if options.reference:
        other = load(options.reference)
        models[REFERENCE] = lambda photo: network_map(other, study.prepared, photo)
    numbers, groups = {}, {}
    for count in options.photos:
        for number in range(options.draws):
            name = f"adapt {count} {number}"
            found = study.adapt(study.draw(count, number))
            models[name] = lambda photo, found=found: found(study.map(photo))
            numbers[name] = fitted(found)
            groups.setdefault(("adapt", count), []).append(name)
    for count in options.photos:
        for number in range(options.finetune):
            name = f"finetune {count} {number}"
            run = folder / name.replace(" ", "-")
            tuned = study.finetune(study.draw(count, number), run)
            models[name] = lambda photo, tuned=tuned: network_map(tuned, study.prepared, photo)
            groups.setdefault(("finetune", count), []).append(name)
    if options.grid:
        scores = score_on_grid(study, options.split, models)
    else:
        scores = score(TestSet(folder, options.split), models, study.predictor)
    tables = {name: part.set_index("stem")[list(METRICS)] for name, part in scores.groupby("model")}
    before = tables[AS_IT_IS]
    rows = [{"recipe": AS_IT_IS, **means(before)}]
    if options.reference:
        rows.append({"recipe": REFERENCE, **means(tables[REFERENCE], before)})
    for (recipe, count), names in groups.items():
        mean = sum(tables[name] for name in names) / len(names)
        row = {"recipe": recipe, "photos": count, "draws": len(names), **means(mean, before)}
        row["of_each_draw"] = [tables[name].mean().to_dict() for name in names]
        if recipe == "adapt":
            row["numbers"] = [numbers[name] for name in names]
        if options.reference:
            lost = (tables[REFERENCE]["IG"] - before["IG"]).mean()
            row["brought_back"] = row["difference"]["IG"]["mean"] / lost
        rows.append(row)
    measure.print_table([shown(row) for row in rows])
    if not options.smoke:
        content = {
            **{"dataset": options.dataset, "split": options.split},
            "scored": "on the network's grid" if options.grid else "mit300, at the photos' size",
            "start": named(options.start),
            "reference": options.reference and named(options.reference),
            "rows": rows,
        }
        measure.save("adapting", content, options.out)


def named(path: Path) -> dict[str, str]:
    """A checkpoint in the record."""
    return {"file": display_path(path), "sha256": sha256_file(path)}


def means(scores: pd.DataFrame, before: pd.DataFrame | None = None) -> dict:
    """Means over photos with intervals, and those of the differences from the network as it is."""
    found = {"scores": {m: summary(scores[m]) for m in METRICS}}
    if before is not None:
        found["difference"] = {m: summary(scores[m] - before[m]) for m in METRICS}
    return found


def fitted(found: Adaptation) -> dict:
    """The 14 numbers: temperature, blur in cells, bias."""
    bias = (found.bias - found.bias.mean()).detach()[0, 0]
    return {
        "temperature": round(found.temperature.exp().item(), 3),
        "blur_cells": round(found.blur.exp().item(), 3),
        "bias": [[round(value, 3) for value in row] for row in bias.tolist()],
    }


def shown(row: dict) -> dict[str, str]:
    """A row of the printed table: means, and differences with their intervals."""
    cells = {key: str(row.get(key, "")) for key in ("recipe", "photos", "draws")}
    for metric in METRICS:
        cells[metric] = f"{row['scores'][metric]['mean']:.3f}"
        if change := row.get("difference", {}).get(metric):
            cells[metric] += " ({mean:+.3f} [{low:+.3f}, {high:+.3f}])".format(**change)
    back = row.get("brought_back")
    return {**cells, "brought back": "" if back is None else f"{100 * back:.0f} %"}


if __name__ == "__main__":
    main()
