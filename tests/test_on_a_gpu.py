"""The benchmark for a GPU: small on a CPU, without what a GPU's machine may lack, cut off."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniatures import save_osie, save_photo
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LACKING = ("gdown", "nbclient", "nbformat", "papermill", "jupyter_client", "IPython", "pydantic",
           "skimage", "hypothesis", "h5py", "av", "onnx", "onnxruntime")  # fmt: skip


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import on_a_gpu

    monkeypatch.setattr(on_a_gpu, "tidy", lambda: None)  # a second, of a busy machine's
    return on_a_gpu


def run(on_a_gpu, rows, out, seconds=60.0, allowed=60.0):
    """Run the rows in a section of their own each; the record that stands in the file."""
    sections = {name: (allowed, {"row": row}) for name, row in rows.items()}
    record = {"complete": False, "seconds": {}, "sections": {}}
    on_a_gpu.run_sections(sections, record, out, seconds)
    return json.loads(out.read_text())


def without_what_may_lack(code, cwd, **environment):
    """Run code in an interpreter of which those packages cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({LACKING})); {code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_every_section_runs_without_what_the_machine_may_lack(tmp_path):
    out, folder = tmp_path / "record.json", ROOT / "benchmarks"
    without_what_may_lack(
        f"sys.argv[1:] = ['--smoke', '--out', {str(out)!r}]; sys.path.insert(0, {str(folder)!r}); "
        f"import runpy; runpy.run_path({str(folder / 'on_a_gpu.py')!r}, run_name='__main__')",
        tmp_path,
    )
    record = json.loads(out.read_text())
    assert record["complete"]
    assert list(record["sections"]) == [
        *("matrix", "memory", "training", "resume", "batch-size finder", "prediction", "parts"),
        *("MLNet-Pytorch", "compile", "osie"),
    ]
    rows = [row for section in record["sections"].values() for row in section.values()]
    assert not [row["error"] for row in rows if "error" in row]
    assert record["sections"]["resume"]["bf16, deterministic"]["same log"]
    assert record["sections"]["osie"]["training"]["scores"]["CC"]["mean"] is not None


@pytest.mark.slow
def test_the_tests_for_a_gpu_are_collected_without_what_the_machine_may_lack():
    words = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    code = f"import pytest; sys.exit(pytest.main({words}))"
    printed = without_what_may_lack(
        code, ROOT, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )  # nbval: nbformat
    assert "test_a_gpu_predicts_the_same" in printed
    assert "needs the package nbformat" in printed


def test_a_run_that_is_cut_off_keeps_what_it_had(on_a_gpu, tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(on_a_gpu, {"first": lambda: {"is": 1}, "second": killed}, tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["sections"]["first"], record["complete"]) == ({"row": {"is": 1}}, False)


def test_a_row_that_fails_or_takes_too_long_is_recorded_and_the_next_one_runs(on_a_gpu, tmp_path):
    rows = {"fails": lambda: 1 // 0, "takes": lambda: time.sleep(9), "runs": lambda: {"is": 1}}
    started = time.monotonic()
    record = run(on_a_gpu, rows, tmp_path / "r.json", allowed=0.3)
    assert time.monotonic() - started < 8
    assert "ZeroDivisionError: " in record["sections"]["fails"]["row"]["error"]
    assert "skipped" in record["sections"]["takes"]["row"]
    assert record["sections"]["runs"] == {"row": {"is": 1}}
    assert record["complete"]
    record = run(on_a_gpu, rows, tmp_path / "r.json", seconds=0.3)
    assert "no time" in record["sections"]["runs"]["row"]["skipped"]


def test_photos_that_were_made_smaller_are_brought_back(on_a_gpu, tmp_path):
    save_osie(tmp_path / "osie", {"1001.jpg": [], "1002.jpg": []})
    save_photo(tmp_path / "osie/data/stimuli/1002.jpg", 640, 480)
    (tmp_path / "work").mkdir()
    options = argparse.Namespace(data=tmp_path, weights=None, smoke=False, minutes=1)
    root = on_a_gpu.Measurements(options, tmp_path / "work")._osie_root() / "osie/data"
    photos = sorted((root / "stimuli").iterdir())
    assert [Image.open(photo).size for photo in photos] == 2 * [(800, 600)]
    assert photos[0].is_symlink()
    assert (root / "eye/fixations.mat").is_file()


def test_without_osie_the_training_is_skipped_with_a_reason(on_a_gpu, tmp_path):
    options = argparse.Namespace(data=tmp_path, weights=None, smoke=False, minutes=1)
    assert str(tmp_path) in on_a_gpu.Measurements(options, tmp_path).train()["skipped"]
