"""Kill -9 at any moment, run again: the weights and the log are those of an uninterrupted run.

The trainings run in processes of their own, forked from a server that has imported torch once.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from conftest import prepare_run, tiny_config

from mlnet_utils.data.photos import Prepared
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.training import trainer, validation
from mlnet_utils.training.trainer import fit

pytestmark = pytest.mark.slow

# Everything that could go out of step: dropout, augmentation, batch-norm, averaging, momentum.
OPTIONS = {"epochs": 3, "dropout": 0.5, "flip": 0.5, "ema_decay": 0.8,
           "patience": 2, "checkpoint_every": 2}  # fmt: skip
KILLS = 10
PATIENCE = 600  # seconds, for a machine that does other things
WEIGHTS = ("best.pt", "last.pt")


# ---- in the other process ----------------------------------------------------------------------
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_event(number: int) -> None:
    """Kill this process at its ``number``-th call of any function, in Python or C."""
    left = [number]

    def count(frame, event, argument):
        left[0] -= 1
        if left[0] == 0:
            die()

    sys.setprofile(count)


def die_between_renames(_: int) -> None:
    """Kill between ``last -> previous`` and ``next -> last``, the second time it is reached."""
    original, calls = os.replace, []

    def replace(source, target):
        original(source, target)
        if Path(target).name == "previous.pt":
            calls.append(target)
            if len(calls) == 2:
                die()

    os.replace = replace


def die_in_a_write(number: int) -> None:
    """Kill when half of the ``number``-th checkpoint is on disk."""
    original, calls = torch.save, []

    def save(content, path):
        original(content, path)
        calls.append(path)
        if len(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save


def die_in_validation(number: int) -> None:
    """Kill in the ``number``-th validation."""
    original, calls = validation.nss_loss, []

    def nss_loss(*maps):
        calls.append(maps)
        if len(calls) == number:
            die()
        return original(*maps)

    validation.nss_loss = nss_loss


def die_before_the_log(number: int) -> None:
    """Kill when an epoch is over and nothing of it is on disk yet."""
    original, calls = trainer.write_text, []

    def write_text(path, text):
        calls.append(path)
        if len(calls) == number:
            die()
        original(path, text)

    trainer.write_text = write_text


def signal_in_step(number: int, which: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of an update."""
    original = trainer.Trainer.losses

    def losses(self, batch):
        if self.updates == number:
            os.kill(os.getpid(), which)
        return original(self, batch)

    trainer.Trainer.losses = losses


def sigterm_in_step(number: int) -> None:
    signal_in_step(number, signal.SIGTERM)


def interrupt_in_validation(number: int) -> None:
    original, calls = validation.Objective, []

    def objective(config):
        calls.append(config)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(config)

    validation.Objective = objective


def fill_the_disk(size: int) -> None:
    """No file can grow beyond ``size`` bytes from the second checkpoint on."""
    original, calls = torch.save, []

    def save(content, path):
        calls.append(path)
        if len(calls) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        original(content, path)

    torch.save = save


def train_here(folder: Path, options: dict, accident: str, number: int) -> None:
    """Train in this process; exit code 1 and ``error.txt`` if that raises."""
    # Loader processes from this one, not from another server that first imports torch.
    multiprocessing.set_start_method("fork", force=True)
    with open(folder / "output.txt", "a") as output, contextlib.redirect_stdout(output):
        try:
            if accident:
                globals()[accident](number)
            fit(tiny_config(**options), folder)
        except BaseException as error:
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
            (folder / "traceback.txt").write_text(traceback.format_exc())
            sys.exit(1)


# ---- in this process ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def server():
    """A process that has imported everything, from which each training is forked."""
    context = multiprocessing.get_context("forkserver")
    slow_imports = ["torchvision.transforms.v2", "timm"]  # which happen within functions
    context.set_forkserver_preload(["conftest", "mlnet_utils.training.trainer", *slow_imports])
    return context


@pytest.fixture
def train(server):
    def run(folder: Path, accident: str = "", number: int = 0, **options) -> int:
        process = server.Process(
            target=train_here, args=(folder, {**OPTIONS, **options}, accident, number)
        )
        process.start()
        process.join(PATIENCE)
        code = process.exitcode
        process.kill()
        assert code is not None, "the training hangs"
        return code

    return run


def outcome(folder: Path) -> dict:
    """The log and all weights of a finished run."""
    content = {name: load_checkpoint(folder / "checkpoints" / name) for name in WEIGHTS}
    assert content["last.pt"]["progress"]["finished"]
    weights = {
        f"{name} {key}": tensor
        for name in WEIGHTS
        for key, tensor in content[name]["model"].items()
    }
    average = {f"average {k}": v for k, v in content["last.pt"]["average"].items()}
    return {"log": (folder / "log.csv").read_bytes(), **weights, **average}


def assert_identical(folder: Path, expected: dict) -> None:
    found = outcome(folder)
    assert found.keys() == expected.keys()
    assert found["log"] == expected["log"]
    different = [k for k in found if k != "log" and not torch.equal(found[k], expected[k])]
    assert different == []


@pytest.fixture(scope="module")
def uninterrupted(server, tmp_path_factory, tiny_photos) -> tuple[dict, int]:
    """What the training gives, and how many events it has, with nothing in its way."""
    folder = prepare_run(tmp_path_factory.mktemp("uninterrupted"), *tiny_photos)
    events = server.Value("q", 0)
    process = server.Process(target=count_events, args=(folder, events))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, (folder / "error.txt").read_text()
    return outcome(folder), events.value


def count_events(folder: Path, total) -> None:
    left = [0]

    def count(frame, event, argument):
        left[0] += 1

    sys.setprofile(count)
    train_here(folder, OPTIONS, "", 0)
    sys.setprofile(None)
    total.value = left[0]


# ---- kill -9 -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_anywhere_a_training_ends_the_same(train, run_folder, uninterrupted, kill):
    expected, events = uninterrupted
    number = random.Random(kill).randrange(events)
    assert train(run_folder, "die_at_event", number) == -signal.SIGKILL
    assert train(run_folder) == 0
    assert_identical(run_folder, expected)


def test_killed_again_and_again_a_training_ends_the_same(train, run_folder, uninterrupted):
    expected, events = uninterrupted
    lottery, kills = random.Random(0), 0
    # Long enough to reach the next checkpoint, too short to reach the end.
    while train(run_folder, "die_at_event", lottery.randrange(events * 4 // 10, events * 7 // 10)):
        kills += 1
        assert kills < 20, "no progress"
    assert kills >= 2
    assert_identical(run_folder, expected)


@pytest.mark.parametrize(
    ("accident", "number"),
    [
        ("die_between_renames", 2),
        ("die_in_a_write", 1),  # the first ever
        ("die_in_a_write", 2),  # the first of the best epoch
        ("die_in_a_write", 5),
        ("die_in_validation", 1),
        ("die_in_validation", 2),
        ("die_before_the_log", 1),
        ("die_before_the_log", 3),
    ],
)
def test_killed_at_the_worst_moments(train, run_folder, uninterrupted, accident, number):
    assert train(run_folder, accident, number) == -signal.SIGKILL
    assert train(run_folder) == 0
    assert_identical(run_folder, uninterrupted[0])
    leftovers = {path.name for path in (run_folder / "checkpoints").iterdir()}
    assert leftovers == {"best.pt", "last.pt", "previous.pt"}


def test_between_the_renames_there_is_only_the_previous_checkpoint(train, run_folder):
    assert train(run_folder, "die_between_renames", 2) == -signal.SIGKILL
    assert not (run_folder / "checkpoints" / "last.pt").exists()
    assert train(run_folder) == 0
    assert "resuming at epoch" in (run_folder / "output.txt").read_text()


def test_how_often_checkpoints_are_written_does_not_matter(train, run_folder, uninterrupted):
    assert train(run_folder, "die_in_validation", 2, checkpoint_every=1) == -signal.SIGKILL
    assert train(run_folder, "die_in_validation", 2, checkpoint_every=1) == -signal.SIGKILL
    assert train(run_folder, checkpoint_every=100) == 0
    assert_identical(run_folder, uninterrupted[0])


def test_loader_processes_do_not_matter(train, run_folder, uninterrupted):
    assert train(run_folder, "signal_in_step", 4, workers=1) == 1
    assert train(run_folder, workers=1) == 0
    assert_identical(run_folder, uninterrupted[0])


# ---- signals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("accident", "number", "where"),
    [
        ("signal_in_step", 4, "epoch 2, update 5"),
        ("sigterm_in_step", 4, "epoch 2, update 5"),
        ("interrupt_in_validation", 1, "epoch 1, update 3"),
    ],
)
def test_signals_save_and_say_how_to_continue(
    train, run_folder, uninterrupted, accident, number, where
):
    assert train(run_folder, accident, number, checkpoint_every=100) == 1
    message = (run_folder / "error.txt").read_text()
    assert message.startswith(f"KeyboardInterrupt: stopped at {where}; saved in ")
    assert "run the same command again to continue" in message
    progress = load_checkpoint(run_folder / "checkpoints" / "last.pt")["progress"]
    assert f"update {progress['updates']}" in where
    assert train(run_folder) == 0
    assert_identical(run_folder, uninterrupted[0])


# ---- checkpoints that cannot be used or written ------------------------------------------------
@pytest.fixture
def stopped(train, run_folder):
    """A run that was killed in its second validation: both checkpoints exist."""
    assert train(run_folder, "die_in_validation", 2) == -signal.SIGKILL
    return run_folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")], ids=["cut", "empty"])
def test_an_unreadable_checkpoint_gives_way_to_the_one_before(stopped, uninterrupted, damage):
    damage(stopped / "checkpoints" / "last.pt")
    with pytest.warns(UserWarning, match=r"last.pt cannot be read.*continuing from previous.pt"):
        fit(tiny_config(**OPTIONS), stopped)
    assert_identical(stopped, uninterrupted[0])


def test_two_unreadable_checkpoints_are_an_error(stopped):
    for name in ("last.pt", "previous.pt"):
        cut(stopped / "checkpoints" / name)
    with pytest.raises(ValueError, match=r"last.pt.*previous.pt.*delete the folder .*checkpoints"):
        fit(tiny_config(**OPTIONS), stopped)


def test_another_configuration_is_an_error_but_engine_settings_may_change(stopped, uninterrupted):
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.004 there, 0.1 here\)"):
        fit(tiny_config(**OPTIONS, lr=0.1), stopped)
    fit(tiny_config(**{**OPTIONS, "checkpoint_every": 7}, cache=False, bootstrap=5), stopped)
    assert_identical(stopped, uninterrupted[0])


def test_a_best_epoch_without_step_checkpoints_is_not_overwritten(train, run_folder):
    assert train(run_folder) == 0
    best = run_folder / "checkpoints" / "best.pt"
    for name in ("last.pt", "previous.pt"):
        (run_folder / "checkpoints" / name).unlink()
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.004 there, 0.1 here\)"):
        fit(tiny_config(**OPTIONS, lr=0.1), run_folder)
    content = load_checkpoint(best)
    torch.save({**content, "scores": {**content["scores"], "epoch": 2}}, best)
    with pytest.raises(ValueError, match=r"best.pt is there, but not .*last.pt to continue from"):
        fit(tiny_config(**OPTIONS), run_folder)
    assert load_checkpoint(best)["scores"]["epoch"] == 2


def test_a_training_from_the_beginning_counts_its_own_seconds(train, run_folder):
    (run_folder / "times.csv").write_text("epoch,updates,train_seconds\n1,1,1000\n")
    assert train(run_folder) == 0
    assert "1000" not in (run_folder / "times.csv").read_text()


def test_other_data_are_an_error(stopped):
    prepared = Prepared.read(stopped / "data")
    prepared.photos[0].fixations[0] += 1
    prepared.write()
    with pytest.raises(ValueError, match="was trained on other prepared data"):
        fit(tiny_config(**OPTIONS), stopped)


def test_a_deleted_best_checkpoint_is_an_error(stopped):
    (stopped / "checkpoints" / "best.pt").unlink()
    with pytest.raises(ValueError, match=r"best.pt is missing, but its training is at epoch 2"):
        fit(tiny_config(**OPTIONS), stopped)


def test_a_full_disk_leaves_the_old_checkpoint(train, run_folder, uninterrupted):
    assert train(run_folder, "fill_the_disk", 500_000) == 1
    message = (run_folder / "error.txt").read_text()
    assert message.startswith("OSError: checkpoint")
    assert "could not be written" in message
    assert "is the disk full?" in message
    folder = run_folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.pt"}
    assert load_checkpoint(folder / "last.pt")["progress"]["updates"] == 2
    assert train(run_folder) == 0
    assert_identical(run_folder, uninterrupted[0])


def test_no_space_reported_by_the_system_is_explained(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, tiny_config(), {})
    before = path.read_bytes()

    def save(content, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"No space left on device.*The one before it is intact"):
        checkpoints.save_checkpoint(path, tiny_config(), {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_copied_run_folder_continues(stopped, uninterrupted, tmp_path):
    """As from one machine to another."""
    shutil.copytree(stopped, tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tiny_config(**OPTIONS), tmp_path / "moved")
    assert_identical(tmp_path / "moved", uninterrupted[0])
