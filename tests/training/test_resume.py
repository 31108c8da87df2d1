"""Kill -9 at any moment, run again: the weights and the log are those of an uninterrupted run."""

import random
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from conftest import prepare_run, tiny_config
from miniatures import truncate
from processes import assert_identical, outcome, signal_at, train

from mlnet_utils.data.photos import Prepared
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.training.trainer import fit

pytestmark = pytest.mark.slow

# Everything that could go out of step: dropout, augmentation, batch-norm, averaging, momentum.
OPTIONS = {"epochs": 3, "dropout": 0.5, "flip": 0.5, "ema_decay": 0.8,
           "patience": 2, "checkpoint_every": 2}  # fmt: skip
KILLS = 10
KILLED = [-signal.SIGKILL]
die_in_validation = partial(signal_at, "nss_loss")


def run(folder: Path, accident=None, **changes) -> list[int]:
    return train(folder, accident, **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_photos) -> tuple[dict, int]:
    """The outcome of the training, and how many events it has, with nothing in its way."""
    folder = prepare_run(tmp_path_factory.mktemp("uninterrupted"), *tiny_photos)
    assert run(folder, processes.count_events) == [0], (folder / "error0.txt").read_text()
    return outcome(folder), int((folder / "events.txt").read_text())


# ---- kill -9 -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_anywhere_a_training_ends_the_same(run_folder, uninterrupted, kill):
    expected, events = uninterrupted
    number = random.Random(kill).randrange(events)
    assert run(run_folder, partial(processes.die_at_event, number)) == KILLED
    assert run(run_folder) == [0]
    assert_identical(run_folder, expected)


def test_killed_again_and_again_a_training_ends_the_same(run_folder, uninterrupted):
    """However often checkpoints are written."""
    expected, events = uninterrupted
    lottery = random.Random(0)
    for kills in range(20):
        # Long enough to reach the next checkpoint, too short to reach the end.
        number = lottery.randrange(events * 4 // 10, events * 7 // 10)
        accident = partial(processes.die_at_event, number)
        if run(run_folder, accident, checkpoint_every=1 + kills % 2) == [0]:
            break
    assert 2 <= kills < 19
    assert_identical(run_folder, expected)


def test_two_trainings_at_once_end_as_one(run_folder, uninterrupted):
    """The second waits for the first, and then finds it finished."""
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [run_folder] * 2)) == [[0], [0]]
    assert_identical(run_folder, uninterrupted[0])


@pytest.mark.parametrize("accident", [
    processes.die_between_renames,
    # The first write ever, the first of the best epoch, and another.
    *(partial(processes.die_in_a_write, number) for number in (1, 2, 5)),
    *(partial(die_in_validation, number) for number in (1, 2)),
    *(partial(signal_at, "write_text", number) for number in (1, 3)),  # before the log
])  # fmt: skip
def test_killed_at_the_worst_moments(run_folder, uninterrupted, accident):
    assert run(run_folder, accident) == KILLED
    if accident is processes.die_between_renames:
        assert not (run_folder / "checkpoints" / "last.pt").exists()
    assert run(run_folder) == [0]
    assert_identical(run_folder, uninterrupted[0])
    leftovers = {path.name for path in (run_folder / "checkpoints").iterdir()}
    assert leftovers == {"best.pt", "last.pt", "previous.pt"}


# ---- signals -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("signalled", "words", "workers"), [
    (("Trainer.losses", 5, signal.SIGINT), "epoch 2, update 5", 1),
    (("Trainer.losses", 5, signal.SIGTERM), "epoch 2, update 5", 0),
    (("Trainer.validate", 1, signal.SIGINT), "epoch 1, update 3", 0),
])  # fmt: skip
def test_signals_save_and_say_where(run_folder, uninterrupted, signalled, words, workers):
    accident = partial(signal_at, *signalled)
    assert run(run_folder, accident, checkpoint_every=100, workers=workers) == [1]
    message = (run_folder / "error0.txt").read_text()
    assert re.match(f"KeyboardInterrupt: .*{words};", message)
    progress = load_checkpoint(run_folder / "checkpoints" / "last.pt")["progress"]
    assert words.endswith(f"update {progress['updates']}")
    assert run(run_folder, workers=workers) == [0]
    assert_identical(run_folder, uninterrupted[0])


# ---- checkpoints that cannot be used or written ------------------------------------------------
@pytest.fixture
def stopped(run_folder):
    """A run that was killed in its second validation: both checkpoints exist."""
    assert run(run_folder, partial(die_in_validation, 2)) == KILLED
    return run_folder


@pytest.mark.parametrize("share", [0, 0.5])
def test_an_unreadable_checkpoint_gives_way_to_the_one_before(stopped, uninterrupted, share):
    truncate(stopped / "checkpoints" / "last.pt", share)
    with pytest.warns(UserWarning, match=r"last\.pt.*previous\.pt"):
        fit(tiny_config(**OPTIONS), stopped)
    assert_identical(stopped, uninterrupted[0])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_data(meta: Path) -> None:
    prepared = Prepared.read(meta.parent)
    prepared.photos[0].fixations[0] += 1
    prepared.write()


@pytest.mark.parametrize(("damage", "names", "changes", "message"), [
    (truncate, ("last.pt", "previous.pt"), {}, r"last\.pt.*previous\.pt.*checkpoints"),
    (Path.unlink, ("best.pt",), {}, r"best\.pt .* epoch 2"),
    (truncate, ("best.pt",), {}, r"best\.pt' .* again"),
    (flip_a_bit, ("best.pt",), {}, r"best\.pt' .* again"),
    (change_data, ("../data/meta.json",), {}, r"last\.pt .*run/data"),
    (None, (), {"lr": 0.1}, r"last\.pt .*lr: 0.004 there, 0.1 here"),
])  # fmt: skip
def test_what_cannot_be_continued_is_an_error(stopped, damage, names, changes, message):
    for name in names:
        damage(stopped / "checkpoints" / name)
    with pytest.raises(ValueError, match=message):
        fit(tiny_config(**{**OPTIONS, **changes}), stopped)


@pytest.mark.filterwarnings("error")
def test_a_copied_run_folder_continues_with_other_engine_settings(stopped, uninterrupted, tmp_path):
    """As from one machine to another."""
    moved = shutil.copytree(stopped, tmp_path / "moved")
    changes = {"checkpoint_every": 7, "cache": False, "bootstrap": 5}
    fit(tiny_config(**{**OPTIONS, **changes}), moved)
    assert_identical(moved, uninterrupted[0])


def test_a_best_epoch_without_step_checkpoints_is_not_overwritten(run_folder):
    (run_folder / "times.csv").write_text("epoch,updates,train_seconds\n1,1,1000\n")
    assert run(run_folder) == [0]
    assert "1000" not in (run_folder / "times.csv").read_text()  # those of another training
    best, *others = (run_folder / "checkpoints" / f"{n}.pt" for n in ("best", "last", "previous"))
    for path in others:
        path.unlink()
    with pytest.raises(ValueError, match=r"lr: 0.004 there, 0.1 here"):
        fit(tiny_config(**OPTIONS, lr=0.1), run_folder)
    content = load_checkpoint(best)
    torch.save({**content, "scores": {**content["scores"], "epoch": 2}}, best)
    with pytest.raises(ValueError, match=r"best\.pt .*last\.pt"):
        fit(tiny_config(**OPTIONS), run_folder)
    assert load_checkpoint(best)["scores"]["epoch"] == 2


def test_a_full_disk_leaves_the_old_checkpoint(run_folder, uninterrupted):
    assert run(run_folder, partial(processes.fill_the_disk, 500_000)) == [1]
    assert (run_folder / "error0.txt").read_text().startswith("OSError: '")
    folder = run_folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.pt"}
    assert load_checkpoint(folder / "last.pt")["progress"]["updates"] == 2
    assert run(run_folder) == [0]
    assert_identical(run_folder, uninterrupted[0])
