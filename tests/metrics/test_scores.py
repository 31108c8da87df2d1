"""Scores of a split: collected over batches and processes, with intervals."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mlnet_utils import metrics
from mlnet_utils.metrics.bootstrap import bootstrap_interval
from mlnet_utils.metrics.scores import SaliencyMetrics

COUNT, H, W = 10, 12, 16
ROOT = Path(__file__).parents[2]


def split():
    """Maps of ten images; nobody looked at number 3, and number 5 has a zero at a fixation."""
    generator = torch.Generator().manual_seed(0)
    shape = (COUNT, H, W)
    prediction = torch.rand(shape, generator=generator, dtype=torch.float64)
    fixations = (torch.rand(shape, generator=generator) < 0.05).long()
    fixations[3] = 0
    prediction[5][fixations[5] > 0] = 0
    return {
        "prediction": prediction,
        "fixations": fixations,
        "density": torch.rand(shape, generator=generator)
        * (fixations.sum((1, 2)) > 0)[:, None, None],
        "negatives": fixations.sum(0) - fixations,
        "baseline": torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1,
    }


def collect(batches, **options):
    scores = SaliencyMetrics(resamples=200, **options)
    maps = split()
    for batch in batches:
        index = torch.tensor(batch)
        scores.update(index, **{kind: values[index] for kind, values in maps.items()})
    return scores


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=0, abs=0, nan_ok=True), name


def test_means_leave_out_and_count_what_is_undefined():
    found = collect([[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]).compute()
    expected = metrics.score_all(**split())
    assert set(found) == set(metrics.METRICS)
    for name, summary in found.items():
        values = expected[name]
        finite = values[values.isfinite()]
        assert summary["mean"] == pytest.approx(finite.mean().item(), abs=1e-12)
        assert summary["low"] < summary["mean"] < summary["high"]
        assert summary["skipped"] == 1
        assert summary["infinite"] == (1 if name == "IG" else 0)
        assert summary["n"] == len(finite) == COUNT - 1 - summary["infinite"]


def test_batches_order_and_repeats_do_not_matter():
    whole = collect([list(range(COUNT))])
    parts = collect([[9, 2, 4], [0, 1], [3, 5, 6, 7, 8], [9, 0]])  # samplers repeat images
    same(whole.compute(), parts.compute())
    for one, other in zip(whole.per_image(), parts.per_image(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


def test_protocol_and_metrics_are_chosen():
    found = collect([[0, 1, 2]], protocol="salicon2015").compute()
    assert found["KL"]["n"] == 0
    assert math.isnan(found["KL"]["mean"])
    assert found["sAUC"]["n"] == 3
    assert list(collect([[0, 1]], metrics=["AUC-Judd", "NSS"]).compute()) == ["AUC-Judd", "NSS"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_reset_forgets():
    scores = collect([[0, 1, 2]])
    scores.reset()
    index, table = scores.per_image()
    assert (index.shape, index.dtype) == ((0,), torch.int64)
    assert (table.shape, table.dtype) == ((0, len(metrics.METRICS)), torch.float64)
    assert scores.compute()["NSS"]["n"] == 0


def test_one_index_per_image():
    maps = split()
    with pytest.raises(ValueError, match="one position per image"):
        SaliencyMetrics().update(torch.tensor([0]), maps["prediction"], maps["fixations"])


PROCESS = """
import json
import os
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, "tests")
from test_scores import collect

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
scores = collect(json.loads(sys.argv[4]))
torch.save(scores.compute(), sys.argv[3])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads outlive the group, see runtime.end_process
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches",
    [
        # What a distributed sampler hands out: interleaved, the last batch filled up.
        [[[0, 2, 4], [6, 8]], [[1, 3, 5], [7, 9, 0]]],
        [[list(range(COUNT))], []],
    ],
    ids=["shared", "one without"],
)
def test_two_processes_give_the_result_of_one(tmp_path, batches):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    call = [sys.executable, "-c", PROCESS]
    running = [
        subprocess.Popen(
            [*call, str(rank), port, tmp_path / f"{rank}.pt", json.dumps(share)], cwd=ROOT
        )
        for rank, share in enumerate(batches)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    alone = collect([batch for share in batches for batch in share]).compute()
    for rank in range(2):
        same(torch.load(tmp_path / f"{rank}.pt"), alone)


# ---- intervals ---------------------------------------------------------------------------------
def test_interval_of_normal_values_is_that_of_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_interval_is_seeded_and_covers_the_level():
    values = torch.arange(50.0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_interval_leaves_out_what_is_not_finite():
    values = [1.0, 2.0, 3.0]
    assert bootstrap_interval([*values, math.nan, -math.inf]) == bootstrap_interval(values)
    assert all(map(math.isnan, bootstrap_interval([math.nan])))
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"resamples": 0}])
def test_interval_refuses_nonsense(options):
    with pytest.raises(ValueError, match="0 < level < 1 and resamples > 0"):
        bootstrap_interval([1.0, 2.0], **options)
