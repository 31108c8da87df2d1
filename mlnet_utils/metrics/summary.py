"""Means over photos with their intervals and with the photos that they leave out, and tables."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

from mlnet_utils.metrics.protocols import METRICS

Scores = Sequence[float] | np.ndarray | Tensor


def bootstrap_interval(values: Scores, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron & Tibshirani 1993, chapter 13).

    Takes (N,) scores, one per photo; photos are drawn with replacement, always the same. The
    interval leaves out values that are not finite, as the mean does: (low, high) are NaN without
    finite values, equal with one.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return tuple(values.tolist()) * 2 or (math.nan, math.nan)
    rng = np.random.default_rng(0)
    options = {"n_resamples": resamples, "method": "percentile", "rng": rng}
    # 50 resamples in memory at a time: 6 MB for 5,000 photos.
    found = stats.bootstrap((values,), np.mean, batch=50, **options).confidence_interval
    return float(found.low), float(found.high)


def summary(values: Scores, resamples: int = 2000) -> dict[str, float]:
    """Mean over photos, 95 % bootstrap interval, and the number of photos left out.

    Takes (N,) scores, one per photo. Returns ``mean``, ``low`` and ``high`` of the ``n`` finite
    values (NaN if there are none), and the number of the others: NaN, i.e. undefined
    (``skipped``), or ``infinite``.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    finite = values[np.isfinite(values)]
    low, high = bootstrap_interval(finite, resamples)
    counts = {"skipped": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    mean = float(finite.mean()) if len(finite) else math.nan
    return {"mean": mean, "low": low, "high": high, "n": len(finite), **counts}


def summarise(rows: Sequence[dict], resamples: int) -> list[dict]:
    """The :func:`summary` of every model and metric, for JSON: undefined numbers are None.

    Takes a row per model and photo, with ``model`` and a value per metric. Returns rows of
    ``metrics.json``: ``model``, and ``metrics`` with a summary per metric.
    """

    def plain(values: pd.Series) -> dict:
        found = summary(values, resamples).items()
        return {key: None if math.isnan(value) else value for key, value in found}

    models = pd.DataFrame(rows).groupby("model", sort=False)
    return [
        {"model": model, "metrics": {metric: plain(part[metric]) for metric in METRICS}}
        for model, part in models
    ]


# ---- tables ------------------------------------------------------------------------------------
def format_table(table: pd.DataFrame) -> str:
    """A table as Markdown, aligned so that a terminal shows it well too.

    The index, under its name, is the first column. Fractions get three decimals, missing values a
    dash.
    """
    rows = [[str(table.index.name or ""), *map(str, table.columns)]]
    rows += [[str(name), *map(_cell, values)] for name, *values in table.itertuples(name=None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cell(value: object) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def score_table(report: dict) -> str:
    """The scores of a ``metrics.json``, one model per line, and the photos they leave out.

    Takes its content, undefined numbers None. Returns Markdown: means with 95 % intervals, and a
    note per metric with photos left out.
    """
    rows, notes = {}, []
    if not report["fixations"]:
        notes.append("AUC, sAUC, NSS and IG need fixations; these photos have density maps only")
    if report.get("dropped"):
        notes.append(f"{report['dropped']} fixations dropped: outside the photo, or lost gaze")
    for row in report["rows"]:
        cells = rows[row["model"]] = dict.fromkeys(METRICS)
        for metric, found in row["metrics"].items():
            cells[metric] = found["mean"]
            if found["mean"] is not None:
                cells[metric] = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found)
            notes += [
                f"{row['model']}, {metric}: {found[kind]} photos {kind}"
                for kind in ("skipped", "infinite")
                if found[kind] and (kind == "infinite" or found["mean"] is not None)
            ]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(METRICS))
    text = format_table(table.rename_axis(f"{report['dataset']}, {report['split']}"))
    return "\n\n".join([text, *filter(None, ["; ".join(notes)])])
