"""Confidence intervals of means over photos."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


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
