"""Means over photos: intervals, photos that are left out, and tables."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from mlnet_utils.metrics import METRICS
from mlnet_utils.metrics.summary import bootstrap_interval, format_table, score_table, summarise


# ---- intervals ---------------------------------------------------------------------------------
def test_interval_of_normal_values_is_that_of_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std() / math.sqrt(400)
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_interval(values, resamples=4000) == pytest.approx(expected, abs=0.02)


def test_interval_is_seeded_and_leaves_out_what_is_not_finite():
    values = torch.arange(50.0).tolist()
    assert bootstrap_interval(torch.tensor(values)) == bootstrap_interval(values)
    assert bootstrap_interval([*values, math.nan, -math.inf]) == bootstrap_interval(values)
    assert all(map(math.isnan, bootstrap_interval([math.nan])))
    assert bootstrap_interval([2.5]) == bootstrap_interval([2.5, 2.5]) == (2.5, 2.5)


# ---- summaries and tables ----------------------------------------------------------------------
def summaries_of(**models):
    """Of rows per photo in which every metric has the same value."""
    rows = [
        {"model": model, "stem": str(photo), **dict.fromkeys(METRICS, value)}
        for model, values in models.items()
        for photo, value in enumerate(values)
    ]
    return summarise(rows, resamples=50)


def table_of(rows, fixations=1):
    return score_table({"dataset": "toy", "split": "val", "fixations": fixations, "rows": rows})


@pytest.fixture
def summaries():
    return summaries_of(a=[1.0, 3.0, math.nan, -math.inf], b=[math.nan])


def test_means_leave_out_and_count_what_is_undefined(summaries):
    values = summaries[0]["metrics"]["IG"]
    assert (values["mean"], values["n"], values["skipped"], values["infinite"]) == (2.0, 2, 1, 1)
    assert values["low"] < 2 < values["high"]
    nothing = summaries[1]["metrics"]["CC"]
    assert (nothing["mean"], nothing["low"], nothing["n"]) == (None, None, 0)
    assert json.loads(json.dumps(summaries)) == summaries


def test_score_table_has_dataset_models_intervals_and_notes(summaries):
    lines = table_of(summaries).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    head, _, first, second = ([c.strip() for c in line.split("|")[1:-1]] for line in lines[:4])
    assert head == ["toy, val", *METRICS]
    low, high = (summaries[0]["metrics"]["AUC"][bound] for bound in ("low", "high"))
    assert first[:2] == ["a", f"2.000 [{low:.3f}, {high:.3f}]"]
    assert second == ["b", *["–"] * len(METRICS)]
    assert all(f"a, IG: 1 photos {kind}" in lines[-1] for kind in ("skipped", "infinite"))
    assert "b, " not in lines[-1]


def test_score_table_says_why_columns_are_empty(summaries):
    assert "a, IG: 2 photos infinite" in table_of(summaries_of(a=[-math.inf, -math.inf]))
    assert "need fixations" in table_of(summaries, fixations=0)
    assert table_of([]).startswith("| toy, val | AUC |")


def test_format_table_rounds_fractions_and_keeps_the_rest():
    table = pd.DataFrame(
        {"n": [2, 10], "share": [0.12345, math.nan], "note": ["x", None]}, index=["long name", "b"]
    )
    assert format_table(table.rename_axis("cell")).splitlines() == [
        "| cell      | n  | share | note |",
        "| --------- | -- | ----- | ---- |",
        "| long name | 2  | 0.123 | x    |",
        "| b         | 10 | –     | –    |",
    ]
