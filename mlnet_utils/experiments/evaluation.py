"""Scores of a trained network and of the baselines, photo by photo, at every photo's own size."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from scipy.ndimage import gaussian_filter, shift
from torch import Tensor

from mlnet_utils import runtime
from mlnet_utils.config import Config
from mlnet_utils.data.geometry import fixation_counts, pixel_indices
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.metrics import METRICS, PROTOCOLS, baselines, score_all
from mlnet_utils.metrics.summary import score_table as format_table  # noqa: F401 (notebook 03)
from mlnet_utils.metrics.summary import summarise
from mlnet_utils.model.checkpoints import warn_of_other_fold
from mlnet_utils.predict.predictor import MODEL, load

UNIFORM, CENTRE = "uniform", "centre bias"
OBSERVERS, GOLD = "inter-observer", "gold standard"
MODELS = (MODEL, UNIFORM, CENTRE, OBSERVERS, GOLD)
PHOTOS_FOR_GOLD = 100  # training photos on which the gold standard's two numbers are chosen
SIGMA_2015 = 19.0  # pixels of the photo, whatever its size: the 2015 SALICON evaluator's blur
INFINITE = "photos with IG = -inf"
EVALUATION_KEYS = ("protocol", "test_flip", "test_scales", "bootstrap")  # unknown to training

# Published scores of ML-Net, each with its own photos, ground truth and evaluator: no ranking, and
# no comparison with this repository's.
PUBLISHED = [
    {"model": "ML-Net (authors; tabulated by Pan et al. 2017, SalGAN)", "data": "SALICON 2015 test",
     "AUC": 0.866, "sAUC": 0.768, "CC": 0.743, "NSS": 2.789},
    {"model": "ML-Net (authors; MIT/Tuebingen leaderboard, 2021)", "data": "MIT300",
     "AUC": 0.8386, "sAUC": 0.7399, "NSS": 1.9748, "CC": 0.6633, "KL": 0.8006, "SIM": 0.5819},
    {"model": "MLNet-Pytorch (its README)", "data": "SALICON 2017 test", "AUC": 0.771, "CC": 0.553,
     "KL": 1.142, "sAUC": 0.619, "IG": -0.380, "NSS": 1.014, "SIM": 0.573},
]  # fmt: skip


PER_IMAGE = "per_image_sha256"  # key of metrics.json: both files are of one evaluation
Predict = Callable[[Photo], Tensor | np.ndarray | None]  # (H, W), or None where it has no map


class TestSet:
    """The photos of one split with everything that scoring needs, at photo size.

    ``folder`` is a run, or a prepared folder itself.
    """

    __test__ = False  # not a pytest class

    def __init__(self, folder: Path, split: str):
        own = (folder / "meta.json").is_file()
        self.prepared = Prepared.read(folder if own else folder / "data")
        self.photos = self.prepared.with_truth(split or self.prepared.scored_split)
        train = self.prepared.split("train")
        if any(len(photo.fixations) for photo in train):
            bias = baselines.CentreBias.fit(train)
        else:
            bias = baselines.CentreBias.fit_densities(map(self.prepared.density, train))
        self.centre_bias, self.negatives = bias, baselines.LeaveOneOut(self.photos)
        several = [photo for photo in train if len(photo.known_observers) > 1][:PHOTOS_FOR_GOLD]
        self.gold_standard = baselines.GoldStandard.fit(several, bias) if several else None

    def image(self, photo: Photo) -> Tensor:
        """(3, H, W) uint8."""
        return read_image(self.prepared.root / photo.image)

    def gold(self, photo: Photo) -> Tensor | None:
        """(H, W) the true density where it is known (synthetic), else :class:`GoldStandard`.

        None where there is neither: a published map of a real photo is its blurred fixations in 8
        bits, which would be compared with itself; a gold standard needs several observers.
        """
        if photo.density and self.prepared.meta["dataset"] == "synthetic":
            return photo.read_density(self.prepared.root)
        return self.gold_standard(photo) if self.gold_standard and len(photo.fixations) else None

    def truth(self, photo: Photo, protocol: str = "mit300") -> dict[str, Tensor]:
        """The ground truth of a photo and the baseline of its information gain, each (1, H, W)."""
        return {
            **protocol_truth(photo, self.negatives, self.prepared, protocol),
            "baseline": self.centre_bias(photo.height, photo.width)[None],
        }

    def describe(self, protocol: str) -> dict[str, str | float]:
        """The photos, and the ground truth of a protocol in words: blur, density, negatives."""
        others = f"the other {len(self.photos) - 1} photos of the split"
        if protocol == "salicon2015":
            sigma, density = SIGMA_2015, "fixated pixels, each once, blurred"
            negatives = f"pixels fixated on {others}, weighted by the number of photos"
        else:
            sigma, density = self.prepared.sigma, "fixations, blurred"
            negatives = f"fixations of {others}"
        density += "; of photos without fixations their density map"
        return {
            "dataset": self.prepared.meta["dataset"],
            "title": self.prepared.meta["title"],
            "split": self.photos[0].split,
            "photos": len(self.photos),
            "fixations": sum(len(photo.fixations) for photo in self.photos),
            "dropped": sum(photo.dropped for photo in self.photos),
            "protocol": protocol,
            "sigma_px": sigma,
            "density": density,
            "negatives": negatives,
            "ig_baseline": self.centre_bias.description,
        }

    def score_models(
        self, predict: Mapping[str, Predict], protocol: str, models: Sequence[str]
    ) -> list[dict]:
        """All metrics of every photo by every model, in the models' order and that of the stems.

        ``models`` are baselines, and keys of ``predict``, which gives the maps of all others.
        A photo for which a model has no map gets no row of it. Of several processes each scores its
        share of the photos, and all return the same rows.
        """
        processes, split = runtime.processes(), self.photos[0].split
        share: Iterable[Photo] = self.photos[processes.process_index :: processes.num_processes]
        if processes.is_main_process:
            share = runtime.progress(share, f"scoring {split}", len(share), unit="photo")
        predict = {
            UNIFORM: lambda photo: baselines.uniform(photo.height, photo.width),
            CENTRE: lambda photo: self.centre_bias(photo.height, photo.width),
            GOLD: self.gold,
            **predict,
        }
        rows: list[dict] = []
        for photo in share:
            several = len(photo.known_observers) > 1
            for model in models:
                if model == OBSERVERS:
                    scores = self.gold_standard and several
                    scores = scores and self.score_observers(photo, protocol)
                else:
                    prediction = predict[model](photo)
                    scores = None if prediction is None else self.score(photo, prediction, protocol)
                if scores:
                    rows.append({"model": model, "stem": photo.stem, **scores})
        rows = gather_object(rows)
        return sorted(rows, key=lambda row: (models.index(row["model"]), row["stem"]))

    def score(
        self, photo: Photo, prediction: Tensor | np.ndarray, protocol: str
    ) -> dict[str, float]:
        """All metrics of one (H, W) prediction; NaN where the protocol defines none."""
        prediction = torch.as_tensor(prediction).double()
        truth = self.truth(photo, protocol)
        found = score_all(prediction[None], **truth, protocol=protocol, names=[photo.stem])
        return {name: float(found[name]) if name in found else math.nan for name in METRICS}

    def score_observers(self, photo: Photo, protocol: str) -> dict[str, float]:
        """Mean over observers of the score that the others' fixations reach as a prediction.

        Only metrics on fixations: an observer's dozen fixations are no density to compare with, so
        CC, KL and SIM would answer another question than in the other rows.
        """
        gold, truth, every = self.gold_standard, self.truth(photo, protocol), []
        del truth["density"]
        blur = (gold.sigma_share * photo.width, truth["baseline"][0], gold.prior_share)
        for _, density, own in baselines.inter_observer(photo, *blur):
            truth["fixations"] = fixation_counts(own, photo.height, photo.width)[None]
            found = score_all(density[None], **truth, protocol=protocol)
            every.append({metric: float(value) for metric, value in found.items()})
        return dict.fromkeys(METRICS, math.nan) | {
            metric: float(np.nanmean([found[metric] for found in every])) for metric in every[0]
        }


def protocol_truth(
    photo: Photo, others: baselines.LeaveOneOut, prepared: Prepared, protocol: str
) -> dict[str, Tensor]:
    """A photo's ground truth by a protocol's own definition (docs/metrics.md).

    ``others`` are the photos of the split; salicon2015 has its own blur, :data:`SIGMA_2015`.
    Returns (1, H, W) ``fixations``, ``density`` and ``negatives``; errors as those of
    ``Prepared.density`` and ``baselines.LeaveOneOut``.
    """
    blurred, sigma = photo, None  # its own or the dataset's
    if protocol == "salicon2015":
        _, once = np.unique(pixel_indices(photo.fixations), axis=0, return_index=True)
        blurred, sigma, negatives = photo.only(once), SIGMA_2015, others.photo_counts(photo)
    else:
        negatives = others(photo)
    return {
        "fixations": fixation_counts(photo.fixations, photo.height, photo.width)[None],
        "density": prepared.density(blurred, sigma)[None],
        "negatives": negatives[None],
    }


def evaluate(
    run_dir: str | Path,
    checkpoint: str | Path | None = None,
    split: str = "",
    protocol: str | None = None,
    models: Sequence[str] = MODELS,
    config: Config | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict:
    """Score the network and the baselines; write ``metrics.json`` and ``per_image.csv``.

    ``checkpoint`` is by default the run's ``checkpoints/best.pt``, ``split`` ``"test"``, or
    ``"val"`` where the test photos' fixations are secret, and ``protocol`` (docs/metrics.md) the
    configuration's. Earlier scores of the run's own network that differ in these are renamed and
    kept. ``models`` are some of ``MODELS``. ``config`` is the run's present configuration: its keys
    of evaluation, which may have changed since the training, count for a checkpoint of its preset.
    ``changes`` are values of such keys that count for every checkpoint. Of several processes
    (torchrun, ``accelerate launch``) each scores its share of the photos, and the first writes the
    files.

    Returns the contents of ``metrics.json``: data, ground truth and checkpoint; per model and
    metric the mean over photos, its 95 % bootstrap interval, and the number of defined values. All
    processes return the same, which is equal to the bit to a single process's.

    Raises:
        FileNotFoundError: prepared data or checkpoint are missing.
        ValueError: the split is empty or has no ground truth, the protocol is unknown, or the
            run's own checkpoint was trained on other data than the run holds now.
    """
    run_dir = Path(run_dir)
    own = run_dir / "checkpoints" / "best.pt"
    checkpoint = Path(checkpoint or own)
    processes = runtime.processes()
    data = TestSet(run_dir, split)  # first: of missing inputs, the earliest is named
    before = runtime.sha256_file(checkpoint) if checkpoint.is_file() else ""
    predictor = load(checkpoint, str(processes.device))
    digest = data.prepared.digest
    if checkpoint.resolve() == own.resolve() and predictor.data not in ("", digest):
        other = f"was trained on other prepared data than {data.prepared.folder} holds now"
        raise ValueError(f"{checkpoint} {other}: train anew (`reproduce --force` does)")
    meta = data.prepared.meta
    warn_of_other_fold(predictor.config.to_dict(), meta["dataset"], meta.get("fold", -1))
    config = replace(as_asked(predictor.config, config), **changes or {})
    if protocol:
        config = replace(config, protocol=protocol)
    predictor.config = config
    inputs = inputs_of(digest, checkpoint, config)  # now: a training may go on meanwhile
    if inputs["checkpoint_sha256"] != before:
        raise ValueError(f"{checkpoint} was written while it was read: run the same command again")
    network = {MODEL: lambda photo: predictor.predict(data.image(photo))}
    rows = data.score_models(network, config.protocol, [m for m in MODELS if m in models])
    report = {
        **data.describe(config.protocol),
        **inputs,
        "checkpoint": runtime.display_path(checkpoint),
        "preset": config.preset,
        "seed": config.seed,
    }
    report = save_scores(run_dir, report, rows, config.bootstrap)
    processes.wait_for_everyone()  # all that return find the files
    return report


def save_scores(folder: Path, report: dict, rows: Sequence[dict], resamples: int) -> dict:
    """Write the rows, ``per_image.csv``, and the report with their means, ``metrics.json``."""
    table = pd.DataFrame(rows, columns=["model", "stem", *METRICS])
    table.insert(0, "dataset", report["dataset"])
    text = table.to_csv(index=False, na_rep="nan", lineterminator="\n")
    means = {"rows": summarise(rows, resamples), "versions": runtime.versions()}
    made_by = {"command": runtime.given_command(), "package": runtime.package_digest()}
    report = {**report, **made_by, PER_IMAGE: sha256_text(text), **means}
    if runtime.first_of_launch():
        files = (folder / "per_image.csv", folder / "metrics.json")
        with runtime.locked(files[1]):  # both files are of one call
            runtime.remove_temporaries(files[:1])
            for file in files if _still_hold(folder, report) else ():
                runtime.set_aside(file)
            runtime.write_text(files[0], text)
            runtime.write_json(files[1], report, sealed=True)
    return report


def _still_hold(folder: Path, report: dict) -> bool:
    """True where a run has scores of its own network, and the new scores are of another kind."""
    try:
        old = runtime.read_json(folder / "metrics.json", "`evaluate`", "checkpoint_sha256")
        own = runtime.sha256_file(folder / "checkpoints" / "best.pt")
    except (FileNotFoundError, ValueError):  # none, or unreadable: nothing to keep
        return False
    keys = ("checkpoint_sha256", "split", "protocol")
    return old[keys[0]] == own and any(old.get(key) != report[key] for key in keys)


def sha256_text(text: str) -> str:
    """SHA-256 of a text as :func:`runtime.write_text` writes it, on any system."""
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def inputs_of(data: str, checkpoint: Path, config: Config) -> dict:
    """The inputs of scores, in the form of ``metrics.json``: equal inputs, equal scores.

    ``data`` is the digest of the prepared data. Beside these the split counts, and the package.
    """
    return {
        **{key: config.to_dict()[key] for key in EVALUATION_KEYS},
        "checkpoint_sha256": runtime.sha256_file(checkpoint),
        "data": data,
    }


def as_asked(trained: Config, now: Config | None) -> Config:
    """The configuration of a training with the keys of evaluation that its preset has now."""
    if now is None or now.preset != trained.preset:
        return trained
    keys = {key: getattr(now, key) for key in EVALUATION_KEYS}
    for key, value in keys.items():
        if value != getattr(trained, key):
            print(f"{key}={value}, as {now.preset} says now, not {getattr(trained, key)}")
    return replace(trained, **keys)


# ---- tables ------------------------------------------------------------------------------------
def long_table(report: dict) -> pd.DataFrame:
    """``metrics.json`` as a table with columns model, metric, mean, low, high, n."""
    rows = [(row["model"], *item) for row in report["rows"] for item in row["metrics"].items()]
    table = pd.DataFrame({"model": m, "metric": metric, **values} for m, metric, values in rows)
    return table.astype({"mean": float, "low": float, "high": float})


def explained_information(report: dict) -> dict[str, float]:
    """Each model's information gain as a share of the gold standard's (Kuemmerer et al. 2015)."""
    gain = {row["model"]: row["metrics"]["IG"]["mean"] for row in report["rows"]}
    top = gain.get(GOLD)
    if not top:
        return {}
    return {model: value / top for model, value in gain.items() if value is not None}


# ---- demonstrations of notebook 03 -------------------------------------------------------------
def compare_protocols(run_dir: str | Path, **which: Any) -> pd.DataFrame:
    """Mean scores of the same predictions: a row per protocol, with its own ground truth.

    ``checkpoint``, ``split`` and ``config`` as those of :func:`evaluate`. Infinite information
    gains stay in the mean, and the column :data:`INFINITE` counts them.
    """
    variants = {protocol: (CHANGES["unchanged"], protocol) for protocol in PROTOCOLS}
    return _mean_scores(variants, run_dir, **which).rename_axis("protocol")


def compare_changes(run_dir: str | Path, **which: Any) -> pd.DataFrame:
    """Mean scores (mit300) of the prediction and of changed copies of it.

    Arguments of :func:`compare_protocols`; KL is negated, so that larger is better everywhere.
    """
    changes = {name: (change, "mit300") for name, change in CHANGES.items()}
    with warnings.catch_warnings():  # rounding to 8 bits is warned of
        warnings.filterwarnings("ignore", "image .* 8-bit", UserWarning)
        means = _mean_scores(changes, run_dir, **which)
    means["KL"] *= -1
    return means.rename(columns={"KL": "-KL"}).rename_axis("prediction")


Change = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (prediction, centre bias) -> prediction

CHANGES: dict[str, Change] = {
    "unchanged": lambda p, centre: p,
    "blurred (5 % of the width)": lambda p, centre: gaussian_filter(p, 0.05 * p.shape[1]),
    "shifted (10 % of the width)": lambda p, centre: shift(
        p, (0, 0.1 * p.shape[1]), order=1, mode="nearest"
    ),
    "half centre bias": lambda p, centre: 0.5 * p / p.sum() + 0.5 * centre,
    "peaky (squared)": lambda p, centre: p**2,
    "flat (square root)": lambda p, centre: np.sqrt(p),
    "8 bits (PNG)": lambda p, centre: np.round(255 * p / p.max()),
}


def _mean_scores(
    variants: dict[str, tuple[Change, str]],
    run_dir: str | Path,
    checkpoint: str | Path | None = None,
    split: str = "",
    config: Config | None = None,
) -> pd.DataFrame:
    """Mean over photos of every variant's defined scores, in the order of ``variants``."""
    run_dir = Path(run_dir)
    predictor = load(checkpoint or run_dir / "checkpoints" / "best.pt")
    predictor.config = as_asked(predictor.config, config)
    data = TestSet(run_dir, split)
    rows = []
    for photo in runtime.progress(data.photos, "comparing", unit="photo"):
        prediction = predictor.predict(data.image(photo)).astype(np.float64)
        centre = data.centre_bias(photo.height, photo.width).numpy()
        for name, (change, protocol) in variants.items():
            changed = torch.from_numpy(np.ascontiguousarray(change(prediction, centre)))
            rows.append({"variant": name, **data.score(photo, changed, protocol)})
    table = pd.DataFrame(rows)
    table[INFINITE] = np.isinf(table["IG"])
    groups = table.groupby("variant", sort=False)
    return groups[list(METRICS)].mean().join(groups[INFINITE].sum())
