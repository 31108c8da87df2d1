"""Several processes, on the CPU with gloo: the same weights, one writer, clear ends, exact resumes.

Most trainings are forked from a server; the last tests use torchrun itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import yaml
from conftest import prepare_run, tiny_checkpoint
from processes import PATIENCE, assert_identical, outcome, signal_at, train

from mlnet_utils import runtime
from mlnet_utils.experiments import evaluation
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.training import trainer

pytestmark = pytest.mark.slow

# The same mathematics whatever the share of each process: no dropout, no batch-norm statistics.
# Everything else that could depend on the division is on. 10 photos in batches of 4: the last
# batch has 2, fewer than 4 processes.
DIVISIBLE = {"dropout": 0.0, "freeze_norm": True, "optimizer": "sgd", "lr": 0.02, "flip": 0.5,
             "ema_decay": 0.5, "clip_norm": 5.0, "prior_penalty": 1.0, "batch_size": 4}  # fmt: skip
# What depends on it, for comparisons among runs of the same number of processes.
EVERYTHING = {"dropout": 0.5, "flip": 0.5, "ema_decay": 0.8, "checkpoint_every": 2}
die_in_step = partial(signal_at, "Trainer.losses")
stop_in_step = partial(signal_at, "Trainer.losses", which=signal.SIGTERM)


@pytest.fixture(scope="module")
def divisible(tmp_path_factory, tiny_photos) -> Path:
    """The run folder of a training in one process with nothing in its way."""
    folder = prepare_run(tmp_path_factory.mktemp("divisible"), *tiny_photos)
    assert train(folder, world=1, **DIVISIBLE) == [0]
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory, tiny_photos) -> Path:
    """The run folder of a training in two processes with nothing in its way."""
    folder = prepare_run(tmp_path_factory.mktemp("everything"), *tiny_photos)
    assert train(folder, processes.record_keys, world=2, **EVERYTHING) == [0, 0]
    return folder


def progress(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoints" / "last.pt")["progress"]


def errors(folder: Path) -> list[str]:
    return [(folder / f"error{rank}.txt").read_text() for rank in (0, 1)]


def assert_close(folder: Path, reference: Path) -> None:
    """To 1e-5: the processes add up the gradients of a batch in another order."""
    found, expected = outcome(folder), outcome(reference)
    for key in expected.keys() - {"log"}:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=key)
    for rows in zip(*(progress(run)["history"] for run in (folder, reference)), strict=True):
        assert rows[0] == pytest.approx(rows[1], rel=1e-4)


# ---- the same training -------------------------------------------------------------------------
@pytest.mark.parametrize(("world", "micro_batch"), [(4, 0), (3, 1)])
def test_any_number_of_processes_trains_to_the_same_weights(
    run_folder, divisible, world, micro_batch
):
    """Of 3 processes, the first has 2 micro-batches of every batch and the others 1."""
    assert train(run_folder, world=world, **DIVISIBLE, micro_batch=micro_batch) == [0] * world
    assert_close(run_folder, divisible)


def test_validation_gives_exactly_the_same_numbers(tmp_path, tiny_photos):
    """5 photos, in batches of 2, over 1 and 4 processes: the weights do not change here."""
    frozen = {**DIVISIBLE, "lr": 0.0, "epochs": 1, "dropout_at_test": True, "dropout": 0.3}
    rows = []
    for world in (1, 4):
        folder = prepare_run(tmp_path / str(world), *tiny_photos)
        assert train(folder, world=world, **frozen) == [0] * world
        (row,) = progress(folder)["history"]
        rows.append({name: value for name, value in row.items() if name.startswith("val_")})
    assert rows[0] == rows[1]


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_the_logged_scores_are_those_of_the_saved_weights(run_folder, monkeypatch, ema_decay):
    """Batch-norm statistics are each process's own until the first one's are given to all."""
    options = {**EVERYTHING, "ema_decay": ema_decay, "flip": 0.0}
    assert train(run_folder, world=2, **options) == [0, 0]
    monkeypatch.setattr(trainer, "VALIDATION_BATCH", 2)
    model, config, content = checkpoints.load_model(run_folder / "checkpoints" / "best.pt")
    run = trainer.Trainer(config, run_folder, trainer.make_accelerator(config))
    run.judged.load_state_dict(model.state_dict())
    run.epoch = content["scores"]["epoch"] - 1
    assert run.validate().items() <= content["scores"].items()


def test_processes_draw_different_dropout_and_the_first_writes_and_prints(everything):
    """Else all shares of a batch would lose the same features."""
    first, second = (set((everything / f"keys{n}.txt").read_text().splitlines()) for n in (0, 1))
    assert len(first) == len(second) == 6  # one per update
    assert first.isdisjoint(second)
    # The others cannot replace a file: only_one_writes().
    assert len((everything / "output0.txt").read_text().splitlines()) == 2
    assert (everything / "output1.txt").read_text() == ""
    names = {path.name for path in (everything / "checkpoints").iterdir()}
    assert names == {"best.pt", "last.pt", "previous.pt"}


def test_processes_agree_on_the_photos_that_fit_every_gpu(run_folder, divisible):
    """The second GPU is the smaller; a resume on larger ones keeps the size."""
    options = {**DIVISIBLE, "checkpoint_every": 2, "world": 2}
    assert train(run_folder, partial(accident_on_small_gpus, 3), **options) == [1, 1]
    assert progress(run_folder)["micro_batch"] == 1
    assert "1 of 2 photos" in (run_folder / "output0.txt").read_text()
    assert train(run_folder, partial(processes.small_gpu, 100), **options) == [0, 0]
    assert progress(run_folder)["micro_batch"] == 1
    assert_close(run_folder, divisible)


def accident_on_small_gpus(number: int) -> None:
    processes.small_gpu(1 if os.environ["RANK"] == "1" else 2)
    stop_in_step(number)


# ---- ends --------------------------------------------------------------------------------------
def test_a_killed_process_ends_the_others_and_the_job_resumes_exactly(run_folder, everything):
    codes = train(run_folder, partial(die_in_step, 5), rank=1, world=2, **EVERYTHING)
    assert codes == [1, -signal.SIGKILL]
    assert train(run_folder, world=2, **EVERYTHING) == [0, 0]
    assert_identical(run_folder, outcome(everything))
    assert "resuming at epoch 2, batch 2" in (run_folder / "output0.txt").read_text()


def test_a_signal_to_one_process_stops_all_at_the_same_update(run_folder, everything):
    job = {"rank": 1, "world": 2, **EVERYTHING}
    assert train(run_folder, partial(stop_in_step, 4), **job) == [1, 1]
    for message in errors(run_folder):
        assert re.match("KeyboardInterrupt: .*epoch 2, update 4;", message)
    assert progress(run_folder)["updates"] == 4
    # The other process does not see the storage of the first.
    assert train(run_folder, processes.hide_checkpoints, **job) == [1, 1]
    assert all("different checkpoints" in message for message in errors(run_folder))
    assert train(run_folder, world=2, **EVERYTHING) == [0, 0]
    assert_identical(run_folder, outcome(everything))


def test_a_job_may_continue_in_another_number_of_processes(run_folder, divisible):
    options = {**DIVISIBLE, "checkpoint_every": 2}
    assert train(run_folder, partial(stop_in_step, 4), rank=1, world=2, **options) == [1, 1]
    assert train(run_folder, world=1, **options) == [0]
    assert_close(run_folder, divisible)


def test_a_bad_loss_in_one_process_stops_all(run_folder):
    accident = partial(processes.not_a_number, 1)
    assert train(run_folder, accident, rank=1, world=2, **DIVISIBLE) == [1, 1]
    assert all(re.search("TrainingDied: .*nan", message) for message in errors(run_folder))


# ---- torchrun ----------------------------------------------------------------------------------
@pytest.fixture
def preset(tmp_path, run_folder):
    """A YAML preset on prepared photos, and the command line that trains it."""
    small = {"preset": "tiny", "height": 32, "width": 40, "prior_cells": [2, 2], "limit": 0}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**small, "epochs": 8, "checkpoint_every": 2}))
    return ["-m", "mlnet_utils", "train", "--preset", str(path), "--run-dir", str(run_folder)]


def output_of(*command: str) -> str:
    """What Python prints, on the CPU, which must succeed."""
    root = Path(runtime.__file__).parent.parent
    environment = {**os.environ, **processes.local_environment(), "PYTHONPATH": str(root)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options |= {"env": environment, "cwd": root, "timeout": PATIENCE}
    job = subprocess.run([sys.executable, *command], **options)
    assert job.returncode == 0, job.stdout
    return job.stdout


def torchrun(*command: str) -> str:
    options = ("--nproc_per_node=2", f"--master_port={processes.free_port()}")
    return output_of("-m", "torch.distributed.run", *options, *command)


def test_shared_evaluation_gives_exactly_the_table_of_one_process(run_folder):
    """5 photos: an odd share for each."""
    tiny_checkpoint(run_folder / "checkpoints" / "best.pt")
    expected = evaluation.evaluate(run_folder, split="val")
    assert expected["photos"] == 5
    table = (run_folder / "per_image.csv").read_bytes()
    (run_folder / "per_image.csv").unlink()
    (run_folder / "metrics.json").unlink()
    command = ["-m", "mlnet_utils", "evaluate", "--run-dir", str(run_folder), "--split", "val"]
    text = torchrun(*command)
    assert text.count("| inter-observer |") == 1
    assert (run_folder / "per_image.csv").read_bytes() == table
    assert json.loads((run_folder / "metrics.json").read_text())["rows"] == expected["rows"]


def test_processes_hang_up_and_end_at_once(preset, run_folder, tmp_path):
    """Dismantling the interpreter can abort a process that has succeeded."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import atexit, os, runpy\n"
        "from torch import distributed\n"
        "atexit.register(print, 'dismantled')\n"
        "end = os._exit\n"
        "def watched(code):\n"
        "    print(f'connected {distributed.is_initialized()}\\n', end='', flush=True)\n"
        "    end(code)\n"
        "os._exit = watched\n"
        "runpy.run_module('mlnet_utils', run_name='__main__')\n"
    )
    text = torchrun(str(script), *preset[2:], "--set", "epochs=1")
    assert text.count("connected False") == 2
    assert "dismantled" not in text


def test_a_notebook_launches_processes(run_folder, preset):
    """As in docs/training.md, in an interpreter that has started nothing else."""
    code = (
        "from accelerate import notebook_launcher\nfrom mlnet_utils import config\n"
        "from mlnet_utils.training import trainer\n"
        f"small = config.load_config({preset[4]!r}, epochs=2)\n"
        f"notebook_launcher(trainer.fit, (small, {str(run_folder)!r}), num_processes=2,\n"
        f"                  use_port={processes.free_port()!r})\n"
    )
    # Two trainings of one process would print it twice.
    assert output_of("-c", code).count("epoch   2/2") == 1
    assert progress(run_folder)["finished"]
