"""Several processes, on the CPU with gloo: the same weights, one writer, clear ends, exact resumes.

Most trainings are forked from a server that has imported torch once, with the environment that
torchrun would give them; the last tests use torchrun itself.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import prepare_run, tiny_config

from mlnet_utils import runtime
from mlnet_utils.experiments import evaluation
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.model.network import MLNet
from mlnet_utils.training import trainer, validation
from mlnet_utils.training.optimization import make_accelerator
from mlnet_utils.training.trainer import fit

pytestmark = pytest.mark.slow

# The same mathematics whatever the share of each process: no dropout, no batch-norm statistics.
# Everything else that could depend on the division is on. 10 photos in batches of 4: the last
# batch has 2, fewer than 4 processes.
DIVISIBLE = {"dropout": 0.0, "freeze_norm": True, "optimizer": "sgd", "lr": 0.02, "flip": 0.5,
             "ema_decay": 0.5, "clip_norm": 5.0, "prior_penalty": 1.0, "batch_size": 4}  # fmt: skip
# What depends on it, for comparisons among runs of the same number of processes.
EVERYTHING = {"dropout": 0.5, "flip": 0.5, "ema_decay": 0.8, "checkpoint_every": 2}
PATIENCE = 600  # seconds, for a machine that does other things


# ---- in the other processes --------------------------------------------------------------------
def only_one_writes() -> None:
    """Any file that another process than the first replaces is an error."""

    def replace(source, target):
        raise AssertionError(f"process {os.environ['RANK']} writes {target}")

    if os.environ["RANK"] != "0":
        runtime.os.replace = checkpoints.os.replace = replace


def signal_in_step(which: int, rank: int, update: int) -> None:
    """Send a signal to one process, in the middle of an update."""
    original = trainer.Trainer.losses

    def losses(self, batch):
        if self.updates == update and self.rank == rank:
            os.kill(os.getpid(), which)
        return original(self, batch)

    trainer.Trainer.losses = losses


def kill_second(update: int) -> None:
    signal_in_step(signal.SIGKILL, 1, update)


def terminate_second(update: int) -> None:
    signal_in_step(signal.SIGTERM, 1, update)


def nan_in_second(update: int) -> None:
    """The loss of one photo, in one process, is not a number."""
    original = trainer.Trainer.losses

    def losses(self, batch):
        scale = float("nan") if self.updates == update and self.rank == 1 else 1.0
        return original(self, batch) * scale

    trainer.Trainer.losses = losses


def record_keys(_: int) -> None:
    """Write down what the updates' random numbers are drawn from."""
    original, path = trainer.keyed_seed, Path(f"keys{os.environ['RANK']}.txt").resolve()

    def keyed_seed(*key):
        with open(path, "a") as file:
            print(*key, file=file)
        return original(*key)

    trainer.keyed_seed = keyed_seed


def hide_checkpoints_from_second(_: int) -> None:
    """As if the second machine did not see the storage of the first."""
    if os.environ["RANK"] == "1":
        trainer.checkpoints.load_latest = lambda *_: None


def train_here(folder: Path, options: dict, environment: dict, accident: str, number: int) -> None:
    """Train as one of several processes; exit code 1 and ``error<rank>.txt`` if that raises."""
    os.environ.update(environment)
    os.chdir(folder)
    rank = environment["RANK"]
    validation.BATCH = 2  # three batches of validation, which the processes share
    only_one_writes()
    with open(folder / f"output{rank}.txt", "a") as output, contextlib.redirect_stdout(output):
        try:
            if accident:
                globals()[accident](number)
            fit(tiny_config(**options), folder)
        except BaseException as error:
            (folder / f"error{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            (folder / f"traceback{rank}.txt").write_text(traceback.format_exc())
            sys.exit(1)


# ---- in this process ---------------------------------------------------------------------------
def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def local_environment() -> dict[str, str]:
    """What processes on this machine need to find each other without a name service."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": loopback,
        "ACCELERATE_USE_CPU": "true",
    }


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "mlnet_utils.training.trainer", "timm"])
    return context


@pytest.fixture
def train(server, tmp_path, tiny_photos):
    """Train in a fresh or given folder, in ``world`` processes; returns it and the exit codes."""

    def run(world: int, folder: Path | None = None, accident: str = "", number: int = 0, **options):
        folder = folder or prepare_run(tmp_path / f"{world} {time.monotonic_ns()}", *tiny_photos)
        shared = {**local_environment(), "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
        shared["LOCAL_WORLD_SIZE"] = str(world)
        processes = [
            server.Process(
                target=train_here,
                args=(
                    folder,
                    options,
                    {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    accident,
                    number,
                ),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert None not in codes, "a process hangs"
        return folder, codes

    return run


def results(folder: Path) -> tuple[dict, list[dict]]:
    """All weights, and the history."""
    content = load_checkpoint(folder / "checkpoints" / "last.pt")
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    weights = {f"last {k}": v for k, v in content["model"].items()}
    weights |= {f"best {k}": v for k, v in best["model"].items()}
    return weights, content["progress"]["history"]


# ---- the same training -------------------------------------------------------------------------
@pytest.mark.parametrize(("micro_batch", "worlds"), [(0, (2, 4)), (1, (3,))])
def test_any_number_of_processes_trains_to_the_same_weights(train, micro_batch, worlds):
    """To 1e-5: the processes add up the gradients of a batch in another order.

    Of 3 processes, the first has 2 micro-batches of every batch and the others 1.
    """
    folder, codes = train(1, **DIVISIBLE)
    assert codes == [0]
    expected, expected_history = results(folder)
    for world in worlds:
        folder, codes = train(world, **DIVISIBLE, micro_batch=micro_batch)
        assert codes == [0] * world
        weights, history = results(folder)
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=key)
        for row, expected_row in zip(history, expected_history, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-4)


def test_validation_gives_exactly_the_same_numbers(train):
    """5 photos, in batches of 2, over 1, 2 and 4 processes: the weights do not change here."""
    frozen = {**DIVISIBLE, "lr": 0.0, "epochs": 1, "dropout_at_test": True, "dropout": 0.3}
    rows = []
    for world in (1, 2, 4):
        folder, codes = train(world, **frozen)
        assert codes == [0] * world
        rows.append({k: v for k, v in results(folder)[1][0].items() if k.startswith("val_")})
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_the_logged_scores_are_those_of_the_saved_weights(train, monkeypatch, ema_decay):
    """Batch-norm statistics are each process's own until the first one's are given to all."""
    folder, codes = train(2, **{**EVERYTHING, "ema_decay": ema_decay, "flip": 0.0})
    assert codes == [0, 0]
    monkeypatch.setattr(validation, "BATCH", 2)
    model, config, content = checkpoints.load_model(folder / "checkpoints" / "best.pt")
    run = trainer.Trainer(config, folder, make_accelerator(config))
    run.judged.load_state_dict(model.state_dict())
    run.epoch = content["scores"]["epoch"] - 1
    assert run.validate().items() <= content["scores"].items()


def test_processes_draw_different_dropout(train):
    """Else all shares of a batch would lose the same features."""
    keys = []
    for _ in range(2):
        folder, codes = train(2, accident="record_keys", **EVERYTHING)
        assert codes == [0, 0]
        keys.append([(folder / f"keys{rank}.txt").read_text().splitlines() for rank in (0, 1)])
    assert keys[0] == keys[1]
    first, second = (set(part) for part in keys[0])
    assert len(first) == len(second) == 6  # one per update
    assert first.isdisjoint(second)


def test_only_the_first_process_writes_and_prints(train):
    folder, codes = train(2, **EVERYTHING)  # the others cannot replace a file: only_one_writes()
    assert codes == [0, 0]
    assert len((folder / "output0.txt").read_text().splitlines()) == 2
    assert (folder / "output1.txt").read_text() == ""
    assert not list(folder.glob("error*.txt"))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "best.pt", "last.pt", "previous.pt",
    }  # fmt: skip


# ---- ends --------------------------------------------------------------------------------------
def assert_same_to_the_bit(folder: Path, reference: Path) -> None:
    weights, history = results(folder)
    expected, expected_history = results(reference)
    assert history == expected_history
    assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []


def test_a_killed_process_ends_the_others_and_the_job_resumes_exactly(train):
    reference, _ = train(2, **EVERYTHING)
    folder, codes = train(2, accident="kill_second", number=4, **EVERYTHING)
    assert codes == [1, -signal.SIGKILL]
    message = (folder / "error0.txt").read_text()
    assert message.startswith("RuntimeError: process 0 of 2 stopped at update 4: ")
    assert "The same command continues from the last checkpoint" in message
    _, codes = train(2, folder, **EVERYTHING)
    assert codes == [0, 0]
    assert_same_to_the_bit(folder, reference)
    assert "resuming at epoch 2, batch 2" in (folder / "output0.txt").read_text()


def test_a_signal_to_one_process_stops_all_at_the_same_update(train):
    reference, _ = train(2, **EVERYTHING)
    folder, codes = train(2, accident="terminate_second", number=3, **EVERYTHING)
    assert codes == [1, 1]
    for rank in (0, 1):
        message = (folder / f"error{rank}.txt").read_text()
        assert message.startswith("KeyboardInterrupt: stopped at epoch 2, update 4; saved in")
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["progress"]["updates"] == 4
    _, codes = train(2, folder, **EVERYTHING)
    assert codes == [0, 0]
    assert_same_to_the_bit(folder, reference)


def test_a_job_may_continue_in_another_number_of_processes(train):
    reference, _ = train(1, **DIVISIBLE, checkpoint_every=2)
    folder, _ = train(2, accident="terminate_second", number=3, **DIVISIBLE, checkpoint_every=2)
    _, codes = train(1, folder, **DIVISIBLE, checkpoint_every=2)
    assert codes == [0]
    for key, value in results(reference)[0].items():
        torch.testing.assert_close(results(folder)[0][key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_bad_loss_in_one_process_stops_all(train):
    folder, codes = train(2, accident="nan_in_second", number=1, **DIVISIBLE)
    assert codes == [1, 1]
    for rank in (0, 1):
        assert "TrainingDied: the loss became nan" in (folder / f"error{rank}.txt").read_text()


def test_processes_that_see_different_checkpoints_are_an_error(train):
    folder, _ = train(2, accident="terminate_second", number=3, **EVERYTHING)
    _, codes = train(2, folder, accident="hide_checkpoints_from_second", **EVERYTHING)
    assert codes == [1, 1]
    for rank in (0, 1):
        message = (folder / f"error{rank}.txt").read_text()
        assert "must be on storage that all machines share" in message


# ---- torchrun ----------------------------------------------------------------------------------
@pytest.fixture
def preset(tmp_path, run_folder):
    """A YAML preset on prepared photos, and the command line that trains it."""
    small = {"preset": "tiny", "height": 32, "width": 40, "prior_cells": [2, 2], "limit": 0}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**small, "epochs": 8, "checkpoint_every": 2}))
    return ["-m", "mlnet_utils", "train", "--preset", str(path), "--run-dir", str(run_folder)]


def launch(command: list[str], *options: str) -> subprocess.Popen:
    """torchrun on the CPU, with its output in one pipe."""
    root = Path(runtime.__file__).parent.parent
    environment = {**os.environ, **local_environment(), "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=root,
    )


def test_torchrun_reports_a_killed_worker_and_its_job_resumes(preset, run_folder):
    options = ("--nproc_per_node=2", f"--master_port={free_port()}")
    job = launch(preset, *options)
    lines = []
    for line in job.stdout:
        lines.append(line)
        if line.startswith("epoch "):
            break
    workers = psutil.Process(job.pid).children()
    assert len(workers) == 2, "".join(lines)
    workers[1].kill()
    rest, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert "SIGKILL" in rest or "Signal 9" in rest, rest
    job = launch(preset, *options)
    text, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, text
    assert "resuming at epoch" in text
    assert text.count("trained 8 epochs") == 1
    assert load_checkpoint(run_folder / "checkpoints" / "last.pt")["progress"]["finished"]


@pytest.mark.parametrize("world", [2, 3])
def test_shared_evaluation_gives_exactly_the_table_of_one_process(run_folder, world):
    """5 photos: an odd share for each."""
    config = tiny_config()
    checkpoint = run_folder / "checkpoints" / "best.pt"
    checkpoints.save_checkpoint(checkpoint, config, MLNet(config).state_dict())
    expected = evaluation.evaluate(run_folder, split="val")
    assert expected["photos"] == 5
    table = (run_folder / "per_image.csv").read_bytes()
    (run_folder / "per_image.csv").unlink()
    (run_folder / "metrics.json").unlink()
    command = ["-m", "mlnet_utils", "evaluate", "--run-dir", str(run_folder), "--split", "val"]
    job = launch(command, f"--nproc_per_node={world}", f"--master_port={free_port()}")
    text, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, text
    assert text.count("| inter-observer |") == 1
    assert (run_folder / "per_image.csv").read_bytes() == table
    found = json.loads((run_folder / "metrics.json").read_text())
    assert found["rows"] == expected["rows"]


def test_processes_hang_up_and_end_at_once(preset, run_folder, tmp_path):
    """Dismantling the interpreter can abort a process that has succeeded."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import atexit, os, runpy\n"
        "from torch import distributed\n"
        "atexit.register(print, 'dismantled')\n"
        "end = os._exit\n"
        "def watched(code):\n"
        "    print('connected', distributed.is_initialized(), flush=True)\n"
        "    end(code)\n"
        "os._exit = watched\n"
        "runpy.run_module('mlnet_utils', run_name='__main__')\n"
    )
    options = ("--nproc_per_node=2", f"--master_port={free_port()}", str(script))
    job = launch([*preset[2:], "--set", "epochs=1"], *options)
    text, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0, text
    assert text.count("connected False") == 2
    assert "dismantled" not in text


def test_two_nodes_find_each_other(preset, run_folder):
    """Two launchers, as on two machines; the run folder is what they share."""
    place = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    port = f"--master_port={free_port()}"
    nodes = [launch(preset, *place, port, f"--node_rank={rank}") for rank in (0, 1)]
    texts = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert [text.count("trained 8 epochs") for text in texts] == [1, 0]
    assert load_checkpoint(run_folder / "checkpoints" / "last.pt")["progress"]["finished"]


def test_a_notebook_launches_processes(run_folder, preset):
    """As in docs/training.md, in an interpreter that has started nothing else."""
    code = (
        "from accelerate import notebook_launcher\nfrom mlnet_utils import config\n"
        "from mlnet_utils.training import trainer\n"
        f"small = config.load_config({preset[4]!r}, epochs=2)\n"
        f"notebook_launcher(trainer.fit, (small, {str(run_folder)!r}), num_processes=2,\n"
        f"                  use_port={free_port()!r})\n",
    )
    root = Path(runtime.__file__).parent.parent
    environment = {**os.environ, **local_environment(), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch   2/2") == 1  # two trainings of one process would print it twice
    assert load_checkpoint(run_folder / "checkpoints" / "last.pt")["progress"]["finished"]
