"""The engine's benchmarks run, print their tables, and save nothing in their smoke mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("training", ["MLNet-Pytorch's loop", "this engine", "VGG-16 trunk", "features.28"]),
        ("memory", ["default", "checkpointing", "peak GB"]),
        ("export", ["torch.export", "ONNX, 8 bits", "lowest CC"]),
    ],
)
def test_a_benchmark_runs(name, columns, tmp_path):
    if name == "export":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    results = ROOT / "results" / "benchmarks" / f"{name}.json"
    before = results.read_bytes() if results.exists() else None
    options = ["--smoke", *(["--layers"] if name == "training" else [])]
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{name}.py", *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    for text in columns:
        assert text in run.stdout
    assert (results.read_bytes() if results.exists() else None) == before
