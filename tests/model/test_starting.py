"""Starting from a checkpoint: its weights to the bit, its architecture, and what contradicts it."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_checkpoint, tiny_config

import mlnet_utils.__main__ as cli
from mlnet_utils import runtime
from mlnet_utils.config import describe, from_dict, load_config
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint, with_start
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import sha256_file
from mlnet_utils.training.trainer import Trainer, fit, make_accelerator

# An architecture that differs from both the paper's and the preset's in every key that it can.
OTHER = {"levels": 2, "channels": 5, "head": "density", "prior_cells": (3, 4), "seed": 7}


@pytest.fixture
def start(tmp_path):
    return tiny_checkpoint(tmp_path / "start.pt", **OTHER)


def asked(start, **overrides):
    """The preset as users ask for it, small, and on whatever is prepared."""
    small = {"sigma": 6.0, "batch_size": 4, "epochs": 2, "precision": "fp32"}
    return load_config("finetune", start_from=start, **{**small, **overrides})


def finetune(start, **overrides):
    """The same with the architecture of the start."""
    return with_start(asked(start, **overrides))


def rewrite(path, **changes):
    torch.save({**load_checkpoint(path), **changes}, path)


def begun(config, run_folder):
    """A training at its first update."""
    trainer = Trainer(config, run_folder, make_accelerator(config))
    trainer.resume()
    return trainer


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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("preset", "dataset", "fold", "known"),
    [
        *(("finetune", "osie", 0, True), ("adapt", "eyecrowd", 4, True)),
        *(("finetune", "osie", -1, False), ("finetune", "folder", 0, False)),
    ],
)
def test_a_network_that_may_know_a_fold_s_test_photos_is_warned_of(preset, dataset, fold, known):
    said = rf"fold -1 of 'osie\+eyecrowd', .* fold {fold}"
    with pytest.warns(UserWarning, match=said) if known else nullcontext():
        with_start(load_config(preset, dataset=dataset, fold=fold))


def test_a_relative_path_is_also_looked_for_in_the_checkout(start, monkeypatch):
    monkeypatch.setattr(runtime, "checkout_root", lambda: start.parent)
    assert finetune("start.pt").channels == OTHER["channels"]


def test_the_input_size_may_differ_and_other_keys_may_say_the_same(start):
    config = finetune(start, height=64, width=48, levels=2, prior_cells=(3, 4))
    assert (config.height, config.width, config.prior_cells) == (64, 48, OTHER["prior_cells"])


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


def test_another_file_than_the_one_that_was_pinned_is_an_error(start):
    pinned = finetune(start).start_from
    rewrite(start, scores={"CC": 0.5})
    with pytest.raises(ValueError, match=rf"start\.pt .*{pinned[-64:]}.* {sha256_file(start)}"):
        finetune(pinned)


# ---- the training ------------------------------------------------------------------------------
def test_a_training_starts_with_the_checkpoint_s_weights_to_the_bit(start, run_folder):
    expected = {key: value + 1 for key, value in load_checkpoint(start)["model"].items()}
    rewrite(start, model=expected)
    trainer = begun(finetune(start, ema_decay=0.5), run_folder)
    found = trainer.model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    # The average begins with the first update, not with weights that were never trained.
    trainer.step(next(iter(trainer.train_loader)))
    average = trainer.judged.state_dict()
    assert all(torch.equal(average[k], v) for k, v in trainer.model.state_dict().items())


def test_the_checksum_of_the_backbone_s_weights_stays_with_them(run_folder, tmp_path):
    weights, best = tmp_path / "backbone.pth", run_folder / "checkpoints" / "best.pt"
    torch.save(MLNet(tiny_config()).backbone.body.state_dict(), weights)
    digest, config = sha256_file(weights), tiny_config(epochs=1, backbone_weights=str(weights))
    fit(config, run_folder)
    assert load_checkpoint(best)["backbone_sha256"] == digest
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
    with pytest.raises(FileNotFoundError, match=r"start_from=gone/best\.pt"):
        fit(asked("gone/best.pt"), run_folder)
    assert not (run_folder / "checkpoints").exists()


@pytest.mark.parametrize("named", ["", "#sha256="], ids=["path", "path and checksum"])
def test_a_training_continues_without_the_file_it_started_from(start, run_folder, tmp_path, named):
    whole, config = shutil.copytree(run_folder, tmp_path / "whole"), finetune(start)
    fit(config, whole)
    trainer = begun(config, run_folder)
    trainer.train_epoch()
    trainer.end_epoch(trainer.validate())
    start_from = config.start_from if named else str(start)
    start.unlink()
    fit(asked(start_from), run_folder)
    assert (run_folder / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    a, b = (load_checkpoint(f / "checkpoints/last.pt")["model"] for f in (run_folder, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fit(asked(tmp_path / "other.pt"), run_folder)
    with pytest.raises(ValueError, match=r"last\.pt .*lr: 0\.0003 there, 0\.1 here"):
        fit(asked(start_from, lr=0.1), run_folder)


def test_continuing_from_another_file_and_from_none_are_errors(start, run_folder):
    fit(finetune(start, epochs=1), run_folder)
    rewrite(start, scores={"CC": 0.5})
    with pytest.raises(ValueError, match=r"last\.pt .*start_from: '.*start\.pt.*start\.pt"):
        fit(finetune(start, epochs=1), run_folder)
    start.unlink()
    (run_folder / "checkpoints" / "last.pt").write_bytes(b"")  # reported before the missing start
    with pytest.raises(ValueError, match=r"last\.pt' cannot be read"):
        fit(asked(start, epochs=1), run_folder)


def test_a_checkpoint_from_before_this_key_existed_continues(run_folder):
    config = tiny_config(epochs=1)
    fit(config, run_folder)
    stored = {key: value for key, value in config.to_dict().items() if key != "start_from"}
    rewrite(run_folder / "checkpoints" / "last.pt", config=stored)
    assert len(fit(config, run_folder).history) == 1


def test_a_checkpoint_without_all_its_weights_is_an_error(start, run_folder):
    model, lost = load_checkpoint(start)["model"], {"prior", "encode.weight"}
    rewrite(start, model={key: value for key, value in model.items() if key not in lost})
    with pytest.raises(ValueError, match=r"start_from=.*start.pt .*prior.*encode.weight"):
        fit(finetune(start), run_folder)


# ---- the recipe of docs/training.md ------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["adapt", "finetune"])
def test_own_photos_from_folder_to_maps(recipe, start, tiny_photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos, root = tiny_photos
    shutil.copytree(root, "data/folder/images")
    points = [f"{p.image},{x},{y}" for p in photos for x, y in p.fixations.tolist()]
    (tmp_path / "data/folder/fixations.csv").write_text("\n".join(["image,x,y", *points]))
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
