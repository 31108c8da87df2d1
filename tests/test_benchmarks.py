"""The engine's benchmarks run, print their tables, and save nothing in their smoke mode."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Their folder on the path, for processes that they start too; threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("training", ["MLNet-Pytorch's loop", "this engine", "VGG-16 trunk"]),
        ("memory", ["default", "checkpointing", "peak GB"]),
        ("finetuning", ["random weights", "sample model, as it is", "ImageNet backbone", "CC"]),
        ("inference", ["PyTorch --fast", "ONNX --fast", "cpu_s", "peak GB"]),
        ("adapting", ["as it is", "adapt ", "finetune", "brought back"]),
        ("random_splits", ["seed", "sAUC"]),
        ("techniques", ["reference", "micro-batches of 4", "seed 1", "of the seeds'"]),
        ("scaling", ["exchange's share", "gradient MB", "speed-up"]),
        ("in_a_browser", ["Chromium, one thread", "PyTorch, threads: 1"]),
    ],
)
def test_a_benchmark_runs(name, columns, tmp_path, monkeypatch, capsys):
    if name in ("in_a_browser", "inference"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if name == "in_a_browser" and not (shutil.which("npm") and shutil.which("chromium")):
        pytest.skip("needs npm and Chromium")
    results = ROOT / "results" / "benchmarks" / f"{name}.json"
    before = results.read_bytes() if results.exists() else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--smoke"])
    importlib.import_module(name).main()
    printed = capsys.readouterr().out
    for text in columns:
        assert text in printed
    assert (results.read_bytes() if results.exists() else None) == before


def test_a_record_says_what_was_run_but_not_where_it_was_written(tmp_path, monkeypatch):
    import measure

    words = ["--figure", "f.png", "--rounds", "3", "--out", "/somewhere", "--layers"]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    record = json.loads(measure.save("x", {"rows": []}, tmp_path / "x.json").read_text())
    assert record["command"] == "python benchmarks/x.py --rounds 3 --layers"
    assert {"hardware", "versions", "rows"} <= record.keys()
