"""Starting from a checkpoint: its weights to the bit, its architecture, and what contradicts it."""

import csv
import shutil

import pytest
import torch
from conftest import tiny_checkpoint, tiny_config

import mlnet_utils.__main__ as cli
from mlnet_utils import runtime
from mlnet_utils.config import describe, from_dict, load_config
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import with_start
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import sha256_file
from mlnet_utils.training.trainer import Trainer, fit, make_accelerator

# An architecture that differs from both the paper's and the preset's in every key that it can.
OTHER = {"levels": 2, "channels": 5, "head": "density", "prior_cells": (3, 4), "seed": 7}


@pytest.fixture
def start(tmp_path):
    """A checkpoint as a training leaves it, of weights that no other seed gives."""
    config = tiny_config(**OTHER)
    torch.manual_seed(7)
    model = MLNet(config)
    with torch.no_grad():
        model.prior.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    path = tmp_path / "start.pt"
    checkpoints.save_checkpoint(path, config, model.state_dict())
    return path


def asked(start, **overrides):
    """The preset as users ask for it, small, and on whatever is prepared."""
    small = {"sigma": 6.0, "batch_size": 4, "epochs": 2, "precision": "fp32"}
    return load_config("finetune", start_from=start, **{**small, **overrides})


def finetune(start, **overrides):
    """The same with the architecture of the start."""
    return with_start(asked(start, **overrides))


def rewrite(path, **changes):
    torch.save({**checkpoints.load_checkpoint(path), **changes}, path)


# ---- the configuration -------------------------------------------------------------------------
def test_the_architecture_and_the_size_come_from_the_checkpoint(start):
    config, source = finetune(start), tiny_config(**OTHER)
    for key in (*checkpoints.ARCHITECTURE, *checkpoints.USUAL):
        assert getattr(config, key) == getattr(source, key), key
    assert (config.preset, config.lr, config.dataset) == ("finetune", 3e-4, "folder")
    assert config.backbone_weights == "none"
    assert from_dict(config.to_dict()) == config


def test_the_file_is_recorded_with_its_checksum_and_without_the_machine(start, monkeypatch):
    monkeypatch.chdir(start.parent)
    config = finetune(start)
    assert config.start_from == f"start.pt#sha256={sha256_file(start)}"
    assert str(start.parent) not in describe(config)
    assert finetune(config.start_from) == config


def test_a_network_that_may_know_the_test_photos_of_a_fold_is_warned_of():
    for preset, dataset, fold in (("finetune", "osie", 0), ("adapt", "eyecrowd", 4)):
        with pytest.warns(UserWarning, match=rf"fold -1 of 'osie\+eyecrowd', .* fold {fold}"):
            with_start(load_config(preset, dataset=dataset, fold=fold))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("dataset", "fold"), [("osie", -1), ("folder", 0)])
def test_a_network_that_cannot_know_them_is_not(dataset, fold):
    with_start(load_config("finetune", dataset=dataset, fold=fold))


def test_a_relative_path_is_also_looked_for_in_the_checkout(start, monkeypatch):
    monkeypatch.setattr(runtime, "checkout_root", lambda: start.parent)
    assert finetune("start.pt").channels == OTHER["channels"]


def test_the_input_size_may_differ(start):
    config = finetune(start, height=64, width=48)
    assert (config.height, config.width, config.prior_cells) == (64, 48, OTHER["prior_cells"])


def test_a_key_that_agrees_with_the_checkpoint_may_be_set(start, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        f"preset: finetune\nstart_from: {start}\nsigma: 6\nprior_cells: [3, 4]\nlevels: 2\n"
    )
    assert with_start(load_config(preset)).levels == 2


@pytest.mark.parametrize(
    ("key", "value", "both"),
    [
        ("backbone_args", {"x": 1}, r"\{'x': 1\}.*\{\}"),
        ("levels", 3, "3.*2"),
        ("head", "paper", "'paper'.*'density'"),
        ("prior_cells", (6, 8), r"\[6, 8\].*\[3, 4\]"),
    ],
)
def test_a_key_that_contradicts_the_checkpoint_is_an_error(start, key, value, both):
    with pytest.raises(ValueError, match=rf"^config: {key}={both}.*start\.pt"):
        finetune(start, **{key: value})


@pytest.mark.parametrize("content", [b"text", b"\xff\xd8\xff\xe0" + bytes(range(256))])
def test_other_files_are_errors(start, content):
    start.write_bytes(content)
    with pytest.raises(ValueError, match=r"start\.pt") as error:
        finetune(start)
    assert "weights_only" not in str(error.value)  # no advice to let files run code


def test_another_file_than_the_one_that_was_pinned_is_an_error(start):
    pinned = finetune(start).start_from
    rewrite(start, scores={})
    with pytest.raises(ValueError, match=r"asks for .*start.pt with SHA-256 \w{64}, but the file"):
        finetune(pinned)


# ---- the training ------------------------------------------------------------------------------
def test_a_training_starts_with_the_checkpoint_s_weights_to_the_bit(start, run_folder):
    expected = checkpoints.load_checkpoint(start)["model"]
    trainer = Trainer(finetune(start, ema_decay=0.5), run_folder, make_accelerator(finetune(start)))
    trainer.resume()
    found = trainer.model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    # The average begins with the first update, not with weights that were never trained.
    batch = next(iter(trainer.train_loader))
    trainer.step(batch)
    average = trainer.judged.state_dict()
    assert all(torch.equal(average[k], v) for k, v in trainer.model.state_dict().items())


def test_the_checksum_of_the_backbone_s_weights_stays_with_them(run_folder, tmp_path):
    weights = tmp_path / "backbone.pth"
    torch.save(MLNet(tiny_config()).backbone.body.state_dict(), weights)
    config = tiny_config(epochs=1, backbone_weights=str(weights))
    digest, best = sha256_file(weights), run_folder / "checkpoints" / "best.pt"
    fit(config, run_folder)
    assert checkpoints.load_checkpoint(best)["backbone_sha256"] == digest
    weights.write_bytes(weights.read_bytes() + b"0")  # other weights, which a resume does not use
    trainer = Trainer(config, run_folder, make_accelerator(config))
    assert trainer.model.backbone.sha256 != digest
    trainer.resume()
    assert trainer.model.backbone.sha256 == digest
    started = MLNet(tiny_config())
    checkpoints.load_start(started, with_start(load_config("finetune", start_from=best)))
    assert started.backbone.sha256 == digest


def test_the_paper_s_head_can_be_fine_tuned_too(run_folder, tmp_path):
    """As imported weights of the earlier implementations are."""
    kind = {"compat": "theano", "normalisation": "caffe", "prior_cells": (2, 5)}
    tuned = finetune(tiny_checkpoint(tmp_path / "x.pt", head="paper", **kind), epochs=1)
    assert (tuned.head, tuned.compat, tuned.normalisation) == ("paper", "theano", "caffe")
    assert len(fit(tuned, run_folder).history) == 1


def test_a_missing_checkpoint_is_an_error_when_the_training_starts(run_folder):
    config = asked("gone/best.pt")
    assert config.backbone_weights == "none"  # nothing is downloaded on the way to the error
    with pytest.raises(FileNotFoundError, match=r"start_from=gone/best.pt does not exist: name"):
        fit(config, run_folder)
    assert not (run_folder / "checkpoints").exists()


@pytest.mark.parametrize("named", ["", "#sha256="], ids=["path", "path and checksum"])
def test_a_training_continues_without_the_file_it_started_from(start, run_folder, tmp_path, named):
    whole = shutil.copytree(run_folder, tmp_path / "whole")
    config = finetune(start)
    fit(config, whole)
    trainer = Trainer(config, run_folder, make_accelerator(config))
    trainer.resume()
    trainer.train_epoch()
    trainer.end_epoch(trainer.validate())
    start_from = config.start_from if named else str(start)
    start.unlink()
    fit(asked(start_from), run_folder)
    assert (run_folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    a, b = (
        checkpoints.load_checkpoint(folder / "checkpoints" / "last.pt")["model"]
        for folder in (run_folder, whole)
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fit(asked(tmp_path / "other.pt"), run_folder)
    with pytest.raises(ValueError, match=r"another configuration \(lr: 0.0003 there, 0.1 here\)"):
        fit(asked(start_from, lr=0.1), run_folder)


def test_unreadable_checkpoints_are_reported_before_a_missing_start(start, run_folder):
    fit(finetune(start, epochs=1), run_folder)
    for name in ("last.pt", "previous.pt"):
        (run_folder / "checkpoints" / name).write_bytes(b"")
    start.unlink()
    with pytest.raises(ValueError, match=r"last.pt' cannot be read.*delete the folder"):
        fit(asked(start, epochs=1), run_folder)


def test_continuing_from_another_file_is_an_error(start, run_folder):
    fit(finetune(start, epochs=1), run_folder)
    rewrite(start, scores={})
    with pytest.raises(ValueError, match=r"another configuration \(start_from: '.*' there, '.*' h"):
        fit(finetune(start, epochs=1), run_folder)


def test_a_checkpoint_from_before_this_key_existed_continues(run_folder):
    config = tiny_config(epochs=1)
    fit(config, run_folder)
    path = run_folder / "checkpoints" / "last.pt"
    stored = config.to_dict()
    del stored["start_from"]
    rewrite(path, config=stored)
    assert len(fit(config, run_folder).history) == 1


@pytest.mark.parametrize("key", ["encode.weight", "prior"])
def test_a_checkpoint_without_all_its_weights_is_an_error(start, run_folder, key):
    model = checkpoints.load_checkpoint(start)["model"]
    del model[key]
    rewrite(start, model=model)
    with pytest.raises(ValueError, match=rf"start_from=.*start.pt .*{key}"):
        fit(finetune(start), run_folder)


# ---- the recipe of docs/training.md ------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["adapt", "finetune"])
def test_own_photos_from_folder_to_maps(recipe, start, tiny_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos, root = tiny_photos
    shutil.copytree(root, tmp_path / "data" / "folder" / "images")
    with open(tmp_path / "data" / "folder" / "fixations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "x", "y"))
        writer.writerows((p.image, *point) for p in photos for point in p.fixations.tolist())
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"preset: {recipe}\nstart_from: start.pt\nepochs: 1\n")
    train = ["train", "--preset", "mine.yaml", "--run-dir", "run", "--data-root", "data"]
    assert cli.main(train) == 1
    assert "`sigma`" in capsys.readouterr().err
    preset.write_text(preset.read_text() + "sigma: 6\n")
    assert cli.main(train) == 0
    best = "run/checkpoints/best.pt"
    assert cli.main(["predict", "--checkpoint", best, "--out", "maps", "data/folder/images"]) == 0
    assert len(list((tmp_path / "maps").glob("*.png"))) == len(photos)
