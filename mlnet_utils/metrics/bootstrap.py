"""Means over photos, with confidence intervals and with what they leave out."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from mlnet_utils.metrics.protocols import METRICS


def bootstrap_interval(
    values: Sequence[float] | np.ndarray | Tensor,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, chapter 13).

    Photos are the units that are drawn with replacement. Values that are not finite are left out,
    as they are left out of the mean.

    Args:
        values: (N,) one score per photo.
        seed: of the draws; the same seed gives the same interval.
        resamples: how many means are drawn.
        level: share of them inside the interval.

    Returns:
        (low, high); NaN without finite values, equal with one.

    Raises:
        ValueError: ``level`` is not between 0 and 1, or there are no resamples.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"need 0 < level < 1 and resamples > 0, got {level} and {resamples}")
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for index in range(resamples):  # one draw at a time: memory stays that of one sample
        means[index] = values[generator.integers(len(values), size=len(values))].mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(
    values: Sequence[float] | np.ndarray | Tensor, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """Mean over photos, 95 % bootstrap interval, and what they leave out.

    Args:
        values: (N,) one score per photo.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Returns:
        ``mean``, ``low`` and ``high`` of the ``n`` finite values (NaN if there is none), and how
        many others are NaN, i.e. undefined (``skipped``), or ``infinite``.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    low, high = bootstrap_interval(finite, seed, resamples)
    return {
        "mean": float(finite.mean()) if len(finite) else math.nan,
        "low": low,
        "high": high,
        "n": len(finite),
        "skipped": int(np.isnan(values).sum()),
        "infinite": int(np.isinf(values).sum()),
    }


def summarise(rows: Sequence[dict], resamples: int) -> list[dict]:
    """The :func:`summary` of every model and metric, for JSON: undefined numbers are None.

    Args:
        rows: one per model and photo, with ``model`` and a value per metric.
        resamples: of the bootstrap.

    Returns:
        Rows of ``metrics.json``: ``model``, and ``metrics`` with a summary per metric.
    """
    return [
        {
            "model": model,
            "metrics": {
                metric: {
                    key: None if math.isnan(value) else value
                    for key, value in summary(part[metric], resamples=resamples).items()
                }
                for metric in METRICS
            },
        }
        for model, part in pd.DataFrame(rows).groupby("model", sort=False)
    ]
