"""The study of notebook 05: the paper's claims as grids of trainings, and verdicts on them.

The name of a cell says its difference from the reference; the reference has three levels, a
learned prior, the density head, the KL divergence and mirrored photos. Comparisons are paired: for
each photo the scores are averaged over the seeds and subtracted, and photos are resampled; the
differences of the single seeds stand beside the interval, which knows nothing of other seeds.
"""

import itertools
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter

from mlnet_utils.config import Config
from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.experiments.sweep import Grid
from mlnet_utils.metrics import METRICS, cc
from mlnet_utils.metrics.summary import bootstrap_interval, summarise
from mlnet_utils.model.network import network_input
from mlnet_utils.runtime import progress, require
from mlnet_utils.training.features import cache_features
from mlnet_utils.training.trainer import Trainer, make_accelerator

REFERENCE = "reference"
OSIE_TRAINING_PHOTOS = 500  # of the published split
LOW_LEVEL = "spectral residual"
UNIFORM_SHARE = 0.01  # mixed into it: one fixation on a zero would make the mean IG -infinity
JUDGED = ("CC", "NSS", "IG")  # metrics of a verdict
ALIVE_CC = 0.1  # a network that learned nothing but the centre bias of OSIE has three times as much
BARELY = 0.001  # of a map above zero: it shows and learns next to nothing
COMPARISON = (
    *("model", "reference", "metric", "mean", "low", "high"),
    *("seeds", "seed_low", "seed_high", "infinite", "side"),
)

Cells = dict[str, dict[str, Any]]
OWN_HEAD = "ML-Net's head"
_OWN = {"head": "paper", "prior_penalty": -1, "loss": "mlnet"}


def ablation(frozen: Sequence[str]) -> dict[str, Cells]:
    """Question -> cells that answer it, for a network of which ``frozen`` parts do not train."""
    return {
        "levels": {"two levels": {"levels": 2}, "last level only": {"levels": 1}},
        "prior": {
            "no prior": {"freeze": [*frozen, "prior"]},  # it stays neutral
            "prior added afterwards": {
                "freeze": ["backbone.*", "encode.*", "to_map.*"],
                "start_from": "no prior",
                "backbone_weights": "none",  # they come with the checkpoint
            },
        },
        "loss": {
            "ML-Net's loss": {"loss": "mlnet"},
            "squared error": {"loss": "mse"},
            # Clipped: correlation is steep where the map is nearly constant, as a new map is.
            "KL + CC + NSS": {"loss": "kl + 0.5*cc + 0.1*nss", "clip_norm": 1},
        },
        "head": {OWN_HEAD: _OWN},
        "mirroring": {"no mirroring": {"flip": 0}},
    }


# ---- on OSIE also ------------------------------------------------------------------------------
_FROZEN = ["backbone.*"]
_AS_THEY_ARE = {"standardise": False}

# Deaths of ML-Net's head: three optimisers, and for each of them a way to keep the head alive.
OPTIMISERS = {
    "the paper's SGD": {"optimizer": "sgd", "schedule": "keras1", "weight_decay": 0},
    "MLNet-Pytorch's Adam": {"optimizer": "adam", "schedule": "constant", "weight_decay": 1e-4},
    "AdamW": {},
}
# EfficientNet-Lite's levels are linear. VGG-16's, on which the paper builds, end in ReLUs.
_RECTIFIED = {**_AS_THEY_ARE, "rectify": True}
WAYS = {
    "levels rectified": _RECTIFIED,
    "rectified and centred": {**_RECTIFIED, "centre": True},
    "rectified and standardised": {"rectify": True},
    "levels as they are": _AS_THEY_ARE,
    "rectified, truth of 1.5 degrees": {**_RECTIFIED, "sigma": 36},  # OSIE: 24 pixels a degree
    "rectified, truth of 2 degrees": {**_RECTIFIED, "sigma": 48},
    "rectified, loss as printed": {**_RECTIFIED, "loss": "mlnet-printed"},
}
DYING, LIVING = {**_OWN, **_RECTIFIED}, {**_OWN, **_RECTIFIED, "centre": True}
_DIVERGENCE = f"{OWN_HEAD} on rectified levels, KL"

# From MLNet-Pytorch as it is to preset osie, one change a rung; each keeps those before it.
LADDER: dict[str, dict[str, Any]] = {
    "MLNet-Pytorch as is": {
        **_OWN, **_AS_THEY_ARE, "compat": "mlnet-pytorch", "prior_penalty": 1,
        "prior_cells": [3, 4], "dropout_at_test": True, "freeze": [*_FROZEN, "prior"],
        **OPTIMISERS["MLNet-Pytorch's Adam"], "batch_size": 16, "epochs": 6, "flip": 0,
    },
    "levels standardised": {"standardise": True},
    "dropout off at test": {"dropout_at_test": False},
    "the prior trained": {"freeze": _FROZEN},
    "its penalty 1/12, not 1": {"prior_penalty": -1},
    "the authors' ReLUs and initialisation": {"compat": ""},
    "prior of 6x8 cells": {"prior_cells": [6, 8]},
    "AdamW, one cycle": {
        "optimizer": "adamw", "schedule": "onecycle", "weight_decay": 1e-2, "batch_size": 10,
        "epochs": 4,
    },
    "density head": {"head": "density", "prior_penalty": 0},
    "KL, not ML-Net's loss": {"loss": "kl"},
    "KL + CC": {"loss": "kl + cc"},
    "mirrored photos in training": {"flip": 0.5},
    "averaged weights": {"ema_decay": 0.98},
    "mirrored photo at test": {"test_flip": True},
    # These three train the backbone: minutes a training, not seconds.
    "backbone fine-tuned": {
        "freeze": [f"backbone.body.{part}.*" for part in ("conv_stem", "bn1", "blocks.[0-2]")],
        "backbone_lr_scale": 0.5, "cache_features": False, "epochs": 5,
    },
    "input of 480x640": {"height": 480, "width": 640},
    "likelihood in the loss: preset osie": {"loss": "kl + cc + 0.5*ce"},
}  # fmt: skip

MORE_ON_OSIE: dict[str, Cells] = {
    # The paper's three claims with the paper's own head, alive.
    "own head": {
        f"{OWN_HEAD}, two levels": {**_OWN, "levels": 2},
        f"{OWN_HEAD}, last level only": {**_OWN, "levels": 1},
        f"{OWN_HEAD}, no prior": {**_OWN, "freeze": [*_FROZEN, "prior"]},
        f"{OWN_HEAD}, squared error": {**_OWN, "loss": "mse"},
        f"{OWN_HEAD}, loss as printed": {**_OWN, "loss": "mlnet-printed"},
        f"{OWN_HEAD}, KL": {**_OWN, "loss": "kl"},
    },
    "its death": {
        f"{way}, {optimiser}": {**_OWN, **WAYS[way], **OPTIMISERS[optimiser]}
        for way in WAYS
        for optimiser in OPTIMISERS
    },
    # A beginning with the divergence keeps the head alive too: the divergence grows without bound
    # where the map nears zero and people looked.
    "begun with KL": {
        _DIVERGENCE: {**_OWN, **_RECTIFIED, "loss": "kl"},
        f"{_DIVERGENCE}, then ML-Net's loss": {
            **_OWN, **_RECTIFIED, "start_from": _DIVERGENCE, "backbone_weights": "none", "lr": 1e-4,
        },
    },
    "ladder": dict(zip(LADDER, itertools.accumulate(LADDER.values(), operator.or_), strict=True)),
    # As many updates as with all 500, 200, but for 350 photos: 210.
    "data": {
        f"{photos} photos": {"train_limit": photos, "epochs": epochs}
        for photos, epochs in ((50, 40), (100, 20), (200, 10), (350, 6))
    },
}  # fmt: skip
QUESTIONS = {preset: ablation(()) for preset in ("sample", "tiny")}
QUESTIONS["osie"] = ablation(tuple(_FROZEN)) | MORE_ON_OSIE

# Claim -> reference -> cells that are compared with it, of both heads.
CLAIMS = {
    "levels": {
        REFERENCE: ("two levels", "last level only"),
        OWN_HEAD: (f"{OWN_HEAD}, two levels", f"{OWN_HEAD}, last level only"),
    },
    "prior": {
        REFERENCE: ("no prior",),
        "no prior": ("prior added afterwards",),
        OWN_HEAD: (f"{OWN_HEAD}, no prior",),
    },
    "loss": {
        REFERENCE: ("ML-Net's loss", "squared error", "KL + CC + NSS"),
        OWN_HEAD: tuple(f"{OWN_HEAD}, {x}" for x in ("squared error", "loss as printed", "KL")),
    },
    "head": {REFERENCE: (OWN_HEAD,)},
    "mirroring": {REFERENCE: ("no mirroring",)},
}


def grid(preset: str, seeds: Sequence[int] = (0, 1, 2)) -> Grid:
    """The trainings of a preset's study.

    Raises ValueError: there is no study of this preset.
    """
    if preset not in QUESTIONS:
        raise ValueError(f"there is a study of {', '.join(QUESTIONS)}, not of {preset!r}")
    common = {
        # Enough to tell cells apart in seconds, not to be good.
        "sample": {"limit": 100, "height": 64, "width": 80, "epochs": 4, "prior_cells": [4, 5]},
        # A frozen backbone: its features are computed once.
        "osie": {
            "height": 240, "width": 320, "freeze": ["backbone.*"], "cache_features": True,
            "backbone_lr_scale": 0.3, "loss": "kl", "epochs": 4, "ema_decay": 0, "test_flip": False,
            "test_scales": [1.0], "checkpoint_every": 1000,
        },
        "tiny": {"epochs": 1},
    }[preset]  # fmt: skip
    cells = {REFERENCE: {}}
    for answers in QUESTIONS[preset].values():
        cells |= answers
    return Grid(f"study-{preset}", preset, cells, tuple(seeds), common=common)


# ---- differences and verdicts -----------------------------------------------------------------
def compare(
    scores: pd.DataFrame, cells: Iterable[str], reference: str = REFERENCE, resamples: int = 2000
) -> pd.DataFrame:
    """Paired differences of cells to the reference, with 95 % bootstrap intervals over photos.

    ``scores`` has columns ``cell``, ``seed``, ``stem`` and a column per metric, as the sweep's
    ``per_image.csv``; cells without any score are left out. Raises ValueError: the reference has
    none.

    Returns columns ``model`` (the cell), ``reference``, ``metric``, ``mean``, ``low``, ``high`` of
    the difference. ``seeds`` is the number of seeds that both have; ``seed_low`` and ``seed_high``
    are a single seed's smallest and largest difference. ``infinite`` is the number of photos with
    an infinite score in either cell; the difference is then NaN: other photos' mean would flatter.
    ``side`` is +1 or -1 for a clear difference of two seeds at least, else 0. Clear: the interval
    leaves out zero and all seeds agree, or only one of the cells has infinite scores.
    """
    table = scores.set_index(["cell", "seed", "stem"])[list(METRICS)].sort_index()
    if reference not in table.index:
        raise ValueError(f"the sweep has no scores of {reference!r}; run it first")
    rows = []
    for cell in (cell for cell in cells if cell in table.index):
        ours, theirs = table.loc[cell], table.loc[reference]
        shared = ours.index.unique("seed").intersection(theirs.index.unique("seed"))
        if len(shared):  # a seed that died in one of the two says nothing of their difference
            ours, theirs = ours.loc[shared], theirs.loc[shared]
        endless = [np.isinf(part).groupby("stem").any() for part in (ours, theirs)]
        ours, theirs = (part.replace([np.inf, -np.inf], np.nan) for part in (ours, theirs))
        difference = ours.groupby("stem").mean() - theirs.groupby("stem").mean()
        by_seed = ours.groupby("seed").mean() - theirs.groupby("seed").mean()
        infinite = (endless[0] | endless[1]).sum()
        # They are all -infinity: clear where only one of the two cells has any.
        better = endless[1].any().astype(int) - endless[0].any()
        for metric in METRICS:
            if infinite[metric]:
                difference[metric] = by_seed[metric] = np.nan
            low, high = bootstrap_interval(difference[metric], resamples=resamples)
            seed_low, seed_high = by_seed[metric].min(), by_seed[metric].max()
            clear = int(min(low, seed_low) > 0) - int(max(high, seed_high) < 0)
            side = int(better[metric]) if infinite[metric] else clear
            side *= len(shared) > 1  # fewer seeds in common cannot agree
            row = (cell, reference, metric, difference[metric].mean(), low, high)
            rows.append((*row, len(shared), seed_low, seed_high, infinite[metric], side))
    return pd.DataFrame(rows, columns=COMPARISON)


def judge(scores: pd.DataFrame, claim: str) -> pd.DataFrame:
    """The differences that speak for or against a claim of ``CLAIMS``, as of :func:`compare`."""
    present = set(scores["cell"])
    pairs = [pair for pair in CLAIMS[claim].items() if pair[0] in present]
    return _together(compare(scores, cells, reference) for reference, cells in pairs)


def _together(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COMPARISON)


def verdicts(differences: pd.DataFrame) -> pd.DataFrame:
    """One row per comparison: the differences in ``JUDGED`` as text, and the ``verdict`` in words.

    A difference is followed by its interval; ° marks an unclear sign.
    """
    rows = []
    for (cell, reference), part in differences.groupby(["model", "reference"], sort=False):
        found = part.set_index("metric").loc[list(JUDGED)]
        texts = {metric: _short(row) for metric, row in found.iterrows()}
        name = {"change": cell, "against": reference}
        rows.append({**name, **texts, "verdict": _verdict(found) or "none from one seed"})
    return pd.DataFrame(rows, columns=["change", "against", *JUDGED, "verdict"])


def _short(row: pd.Series) -> str:
    if row["infinite"]:
        return f"infinite for {row['infinite']:.0f} photos"
    unclear = "" if row["side"] else " °"
    return f"{row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]{unclear}"


def sentence(differences: pd.DataFrame) -> str:
    """One Markdown line per cell: its differences in ``JUDGED``, and the verdict on these."""
    if differences.empty:
        return "*No scores: no such cells in this preset's study, or all their trainings failed.*"
    lines = []
    for (cell, reference), part in differences.groupby(["model", "reference"], sort=False):
        rows = part.set_index("metric").loc[list(JUDGED)]
        numbers = "; ".join(
            f"{metric} infinite for {row['infinite']:.0f} photos"
            if row["infinite"]
            else f"{metric} {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}], "
            f"seeds {row['seed_low']:+.3f} to {row['seed_high']:+.3f}"
            for metric, row in rows.iterrows()
        )
        than = "the reference" if reference == REFERENCE else f"*{reference}*"
        if verdict := _verdict(rows):
            lines.append(f"- **{cell}** is {verdict} than {than}: {numbers}")
        else:
            lines.append(f"- **{cell}** against {than}: {numbers}; no verdict from one seed")
    return "\n".join(lines)


def _verdict(rows: pd.DataFrame) -> str:
    """The verdict in words, from the side of every judged metric (larger is better in all).

    A single seed gives none, ``""``: another seed could turn it round.
    """
    if rows["seeds"].max() == 1:
        return ""
    sides = rows["side"]
    metrics_of = {"better": sides.index[sides > 0], "worse": sides.index[sides < 0]}
    found = [
        word if len(metrics) == len(sides) else f"{word} in {' and '.join(metrics)}"
        for word, metrics in metrics_of.items()
        if len(metrics)
    ]
    return ", ".join(found) or "neither clearly better nor worse"


# ---- deaths of the head ------------------------------------------------------------------------
def survival(scores: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    """The trainings of ``WAYS`` and ``OPTIMISERS``: ``alive``, the number of seeds that learned.

    A head that died has a constant map and no scores, or is zero nearly everywhere: its mean CC is
    then below ``ALIVE_CC``. Columns ``way``, ``optimiser``, ``alive``, ``of`` and the mean ``CC``
    and ``NSS`` of the living (zeros make IG infinite); empty without such cells in the grid.
    """
    by_seed = scores.groupby(["cell", "seed"], sort=False)[["CC", "NSS"]].mean()
    living = by_seed[by_seed["CC"] >= ALIVE_CC].reset_index()
    rows = []
    for way, optimiser in itertools.product(WAYS, OPTIMISERS):
        cell = f"{way}, {optimiser}"
        if cell in grid.cells:
            found = living[living["cell"] == cell]
            means = found[["CC", "NSS"]].mean()
            rows.append((way, optimiser, len(found), len(grid.seeds), *means))
    return pd.DataFrame(rows, columns=["way", "optimiser", "alive", "of", "CC", "NSS"])


def survival_sentence(table: pd.DataFrame) -> str:
    """One Markdown line per way: the optimisers under which the head lived, from `survival`."""
    if table.empty:
        return "*The study of this preset does not ask this.*"
    lines = []
    for way, part in table.groupby("way", sort=False):
        counts = ", ".join(
            f"{row.alive} of {row.of} with {row.optimiser}" for row in part.itertuples()
        )
        lines.append(f"- **{way}**: alive {part['alive'].sum()} of {part['of'].sum()} ({counts})")
    return "\n".join(lines)


def life(config: Config, data: str | Path, updates: int) -> pd.DataFrame:
    """Train for at most an epoch and watch the map: ``update``, ``loss`` and ``above zero``.

    ``data`` is a run's folder of this name; ``loss`` that of the update's photos, ``above zero``
    the share of positive values in the maps of the first validation photos after it. Nothing is
    written into the run.
    """
    rows, trainer = [], Trainer(config, Path(data).parent, make_accelerator(config))
    if config.cache_features:
        cache_features(trainer.model, config, trainer.accelerator, trainer.data.values())
    watched = network_input(next(iter(trainer.val_loader)))
    for update, batch in zip(range(updates + 1), trainer.train_loader, strict=False):
        with torch.inference_mode():
            maps = trainer.model.eval()(**watched)
        trainer.model.train()
        rows.append({"update": update, "above zero": (maps > 0).float().mean().item()})
        before = trainer.loss_sum
        trainer.step(batch)
        trainer.read_losses()
        rows[-1]["loss"] = (trainer.loss_sum - before) / len(batch["index"])
    return pd.DataFrame(rows)


def fate(curve: pd.DataFrame) -> str:
    """The fate, in words, of a map that :func:`life` has watched."""
    above = curve.set_index("update")["above zero"]
    if above.iloc[-1] < BARELY:
        return f"dead, or nearly so: {above.iloc[-1]:.2%} of the map is above zero at the end"
    least = f"the least was {above.min():.2%}, at update {above.idxmin()}"
    return f"alive: {above.iloc[-1]:.0%} of the map is above zero at the end; {least}"


# ---- the ladder, photos, floors and ceilings ---------------------------------------------------
def steps(scores: pd.DataFrame, rungs: Sequence[str]) -> pd.DataFrame:
    """Differences of every rung to the rung below it, rows of :func:`compare`.

    Rungs without scores are passed over.
    """
    present = set(scores["cell"])
    found = [rung for rung in rungs if rung in present]
    pairs = itertools.pairwise(found)
    return _together(compare(scores, [rung], reference=below) for below, rung in pairs)


def ladder_sentence(steps: pd.DataFrame) -> str:
    """The rungs with a clear difference in CC, the largest first, and the others, in Markdown."""
    if steps.empty:
        return "*The study of this preset has no ladder.*"
    found = steps[steps["metric"] == "CC"].sort_values("mean", key=abs, ascending=False)
    clear = [f"{row.model} ({row.mean:+.3f})" for row in found[found["side"] != 0].itertuples()]
    unclear = found[found["side"] == 0]["model"]
    parts = [f"Clear in CC: {', '.join(clear) or 'none'}.", f"Not clear: {', '.join(unclear)}."]
    return " ".join(parts if len(unclear) else parts[:1])


def photos_of(grid: Grid) -> pd.DataFrame:
    """The cells of the question ``data``, with the reference, and their ``training photos``."""
    amounts = {c: v["train_limit"] for c, v in grid.cells.items() if "train_limit" in v}
    if amounts:
        amounts[REFERENCE] = OSIE_TRAINING_PHOTOS
    return pd.DataFrame(amounts.items(), columns=["cell", "training photos"])


def amount_sentence(amounts: pd.DataFrame) -> str:
    """The gain from ten times the photos, in Markdown, from a row per training of a sweep.

    The columns are ``training photos`` and the metrics.
    """
    if amounts.empty:
        return "*The study of this preset does not vary the number of photos.*"
    means = amounts.groupby("training photos")[list(JUDGED)].mean()
    first, last = means.iloc[0], means.iloc[-1]
    gains = ", ".join(f"{m} {first[m]:.3f} → {last[m]:.3f}" for m in JUDGED)
    return f"From {means.index[0]} to {means.index[-1]} training photos: {gains}."


def low_level(run_dir: str | Path, split: str = "test", protocol: str = "mit300") -> dict:
    """Scores of a training-free model: spectral residual (Hou & Zhang, CVPR 2007), by OpenCV.

    Its map is blurred with the dataset's sigma, and mixed with 1 % of a uniform density. Returns a
    row as those of ``metrics.json``: ``model`` and ``metrics``. Raises ImportError: the extra
    ``study`` is not installed.
    """
    model = require("cv2.saliency", "study").StaticSaliencySpectralResidual_create()
    data = TestSet(Path(run_dir), split)

    def predict(photo: Photo) -> np.ndarray:
        bgr = np.ascontiguousarray(data.image(photo).permute(1, 2, 0).numpy()[..., ::-1])
        blurred = gaussian_filter(model.computeSaliency(bgr)[1].astype(float), data.prepared.sigma)
        density = blurred / max(blurred.sum(), 1e-12)
        return (1 - UNIFORM_SHARE) * density + UNIFORM_SHARE / density.size

    rows = data.score_models({LOW_LEVEL: predict}, protocol, [LOW_LEVEL])
    return summarise(rows, 2000)[0]


def reachable_cc(run_dir: str | Path, split: str = "test", draws: int = 5) -> dict[str, float]:
    """The CC that a perfect model could be expected to have: the ground truth is a sample too.

    Each photo's observers are divided at random into halves, ``draws`` times; the halves' densities
    correlate with r. Averaging both halves makes a density of reliability R = 2r / (1 + r)
    (Spearman 1910, Brown 1910), and a perfect prediction correlates with a measurement of
    reliability R as sqrt(R). Returns the means over photos: ``halves`` of r, ``reachable`` of
    sqrt(R). Raises ValueError: the split is empty, or no photo has two known observers.
    """
    prepared = Prepared.read(Path(run_dir) / "data")
    generator, agreements = np.random.default_rng(0), []
    for photo in progress(prepared.split(split), "dividing the observers", unit="photo"):
        observers, found = photo.known_observers, []
        if len(observers) < 2:
            continue
        shape = (photo.height, photo.width, photo.sigma or prepared.sigma)
        for _ in range(draws):
            drawn = np.split(generator.permutation(observers), [len(observers) // 2])
            points = (photo.fixations[np.isin(photo.observers, half)] for half in drawn)
            first, second = (density_from_points(half, *shape)[None] for half in points)
            found.append(cc(first, second).item())
        agreements.append(max(np.nanmean(found), 0.0))
    if not agreements:
        raise ValueError(f"no {split} photo in {run_dir} has two known observers")
    r = np.array(agreements)
    return {"halves": r.mean(), "reachable": np.sqrt(2 * r / (1 + r)).mean()}
