"""Training on tiny photos: what it writes, when it stops, what must not change what is learned."""

import dataclasses
import functools
import shutil
from unittest import mock

import numpy as np
import pandas as pd
import processes
import pytest
import torch
from accelerate import Accelerator
from conftest import prepare_run, tiny_config, unseen

from mlnet_utils.data.loading import make_loader
from mlnet_utils.data.photos import Prepared
from mlnet_utils.model import checkpoints
from mlnet_utils.model.network import MLNet
from mlnet_utils.training import trainer as trainers
from mlnet_utils.training.trainer import Trainer, fit

# Nothing that depends on how the batch is divided (batch-norm's statistics, dropout), and an
# optimiser that does not blow up rounding errors where gradients are almost zero, as Adam does.
INDIVISIBLE = {"freeze_norm": True, "dropout": 0.0, "optimizer": "sgd", "lr": 0.02,
               "prior_penalty": 5.0}  # fmt: skip


@pytest.fixture
def make(run_folder):
    """A trainer that has not begun; its configuration's changes are the arguments."""
    return lambda **changes: Trainer(tiny_config(**changes), run_folder, Accelerator())


def stored(run_folder, name="last"):
    return checkpoints.load_checkpoint(run_folder / "checkpoints" / f"{name}.pt")


def weights_after(run_folder, **overrides):
    fit(tiny_config(**overrides), run_folder)
    return stored(run_folder)["model"]


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}")


# ---- what a training leaves behind -------------------------------------------------------------
@pytest.mark.filterwarnings("error")
def test_a_training_writes_log_times_and_checkpoints(run_folder, capsys):
    config = tiny_config(epochs=3, ema_decay=0.9, flip=0.5, schedule="keras1", lr_decay=0.5)
    result = fit(config, run_folder)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", f"{n}/3"] for n in (1, 2, 3)]
    log = pd.read_csv(run_folder / "log.csv", dtype=str).astype(float)
    assert tuple(log) == trainers.LOG_FIELDS
    assert log.to_dict("records") == result.history
    assert list(zip(log["epoch"], log["updates"], strict=True)) == [(1, 3), (2, 6), (3, 9)]
    assert log["lr"].tolist() == [config.lr / (1 + 0.5 * update) for update in (2, 5, 8)]
    assert log["train_loss"][2] < log["train_loss"][0]
    times = pd.read_csv(run_folder / "times.csv")
    assert tuple(times) == trainers.TIME_FIELDS
    assert list(zip(times["epoch"], times["updates"], strict=True)) == [(1, 3), (2, 3), (3, 3)]
    assert times["images_per_second"][0] > 0
    folder = run_folder / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.pt", "last.pt", "previous.pt"}
    assert result.best == folder / "best.pt"
    model, found, content = checkpoints.load_model(result.best)
    assert content["config"] == config.to_dict()
    assert content["versions"]["torch"]
    assert content["scores"] == min(result.history, key=lambda row: row["val_loss"])
    # Validated again, the weights get the logged scores.
    assert not model.training
    trainer = Trainer(found, run_folder, Accelerator())
    trainer.judged.load_state_dict(model.state_dict())
    trainer.epoch = content["scores"]["epoch"] - 1
    assert trainer.validate().items() <= content["scores"].items()
    trainer.note_time(2.0, 1.0, updates=3)
    assert trainer.times[-1]["images_per_second"] == 5  # 10 photos in three batches of 4


@pytest.mark.parametrize(("drive", "written"), [(True, 2), (False, 7)])
def test_checkpoints_on_google_drive_are_few(tmp_path, tiny_photos, monkeypatch, drive, written):
    """Only the first, those minutes later, and the last."""
    folder = tmp_path / ("drive/MyDrive/run" if drive else "run")
    rotate = mock.Mock(side_effect=checkpoints.rotate_and_save)
    monkeypatch.setattr(checkpoints, "rotate_and_save", rotate)
    config = tiny_config(epochs=3, checkpoint_every=2)  # of three updates an epoch
    fit(config, prepare_run(folder, *tiny_photos))
    assert rotate.call_count == written
    assert stored(folder)["progress"]["finished"]


def test_a_finished_training_returns_at_once(run_folder, capsys):
    def contents():
        return {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}

    first, before = fit(tiny_config(), run_folder), contents()
    (run_folder / "log.csv").unlink()  # is written from the checkpoint
    capsys.readouterr()
    assert fit(tiny_config(), run_folder).history == first.history
    assert "epoch" not in capsys.readouterr().out
    assert contents() == before


def test_the_same_seed_gives_the_same_log_and_another_seed_another(run_folder):
    logs = []
    for seed in (0, 0, 1):
        fit(tiny_config(seed=seed, flip=0.5), run_folder)
        logs.append((run_folder / "log.csv").read_text())
        shutil.rmtree(run_folder / "checkpoints")
    assert logs[0] == logs[1] != logs[2]


def test_what_training_needs_must_be_there(tmp_path, run_folder):
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        fit(tiny_config(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="freeze="):
        fit(tiny_config(freeze=("*",)), run_folder)
    prepared = Prepared.read(run_folder / "data")
    dataclasses.replace(prepared, photos=prepared.split("train")).write()
    with pytest.raises(ValueError, match="val"):
        fit(tiny_config(), run_folder)


# ---- when to stop ------------------------------------------------------------------------------
def test_early_stopping_counts_epochs_without_a_better_validation_loss(run_folder):
    result = fit(tiny_config(lr=0.0, epochs=20, patience=3, freeze_norm=True), run_folder)
    assert len(result.history) == 4  # the first is the best, then three that are not better


def test_a_dead_output_is_noticed(run_folder, make):
    trainer = make(head="paper", loss="mlnet", **INDIVISIBLE)
    torch.nn.init.constant_(trainer.model.to_map.bias, -1e6)
    with pytest.raises(trainers.TrainingDied, match=r"epoch 1 .*head='density'"):
        trainer.run()
    assert not (run_folder / "checkpoints" / "best.pt").exists()


def test_a_loss_that_is_not_finite_is_noticed(make):
    with pytest.raises(trainers.TrainingDied, match=r"nan by update \d+"):
        make(optimizer="sgd", lr=1e30, momentum=0.0, schedule="constant", epochs=3).run()
    trainer = make()
    trainer.objective.per_image = lambda maps, *_: torch.full((len(maps),), torch.nan)
    with pytest.raises(trainers.TrainingDied, match="validation loss is nan"):
        trainer.validate()


def test_photos_without_fixations_are_left_out_of_the_validation_nss(make):
    trainer = make()
    expected, data = trainer.validate(), trainer.data["val"]
    data.photos.append(unseen(data.photos[0]))
    trainer.val_loader = make_loader(data, [[(0, index) for index in range(len(data))]], 0)
    assert trainer.validate()["val_nss"] == pytest.approx(expected["val_nss"])


# ---- schedules, optimisers, precision ----------------------------------------------------------
def test_one_cycle_warms_up_and_falls_to_zero():
    config = tiny_config(schedule="onecycle", lr=1.0, warmup=0.25)
    rates = [trainers.learning_rate(config, t, 100) for t in range(100)]
    assert rates[25] == max(rates) == 1.0
    assert np.allclose(np.diff(rates[:25]), 1 / 26)
    assert (np.diff(rates[25:]) < 0).all()
    assert rates[99] < 1e-3
    assert trainers.learning_rate(tiny_config(schedule="constant", lr=0.3), 5, 9) == 0.3


def test_the_backbone_has_its_own_rate(make):
    trainer = make(optimizer="sgd", momentum=0.0, backbone_lr_scale=0.0, epochs=1)
    before = parameters(trainer)
    trainer.run()
    for name, after in parameters(trainer).items():
        assert torch.equal(before[name], after) == name.startswith("backbone.")


def test_precision_is_chosen_from_the_hardware(monkeypatch):
    places = (
        *("cuda.is_available", "cuda.is_bf16_supported", "backends.mps.is_available"),
        *("cpu._is_avx512_bf16_supported", "cpu._is_amx_tile_supported"),
    )
    table = {"11000": "bf16", "10000": "fp16", "00111": "no", "00000": "no", "00010": "bf16",
             "00001": "bf16"}  # fmt: skip
    for answers, expected in table.items():
        for place, answer in zip(places, answers, strict=True):
            monkeypatch.setattr(f"torch.{place}", lambda answer=answer, **_: answer == "1")
        assert trainers.choose_precision(tiny_config(precision="auto")) == expected


def test_two_precisions_in_one_process():
    """accelerate's state is one per process; a notebook may train twice."""
    for precision, name in (("fp32", "no"), ("bf16", "bf16")):
        accelerator = trainers.make_accelerator(tiny_config(precision=precision))
        assert accelerator.mixed_precision == name


# ---- techniques that must not change what is learned ---------------------------------------------
@pytest.fixture
def reference(run_folder):
    return weights_after(run_folder, **INDIVISIBLE)


@pytest.fixture
def fresh(tmp_path, tiny_photos):
    return prepare_run(tmp_path / "second", *tiny_photos)


@pytest.mark.parametrize(("technique", "exact"), [
    *(({"micro_batch": photos}, False) for photos in (2, 3)), ({"checkpointing": True}, False),
    ({"channels_last": False}, False), ({"cache": True, "checkpoint_every": 1}, True),
    ({"workers": 1}, True),
], ids=str)  # fmt: skip
def test_a_technique_changes_nothing_beyond_rounding(reference, fresh, technique, exact):
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 2e-5}
    assert_close(weights_after(fresh, **INDIVISIBLE, **technique), reference, **tolerance)


def test_bf16_trains_as_fp32_within_its_precision(fresh, run_folder):
    full = fit(tiny_config(**INDIVISIBLE, epochs=3), run_folder).history
    half = fit(tiny_config(**INDIVISIBLE, epochs=3, precision="bf16"), fresh).history
    for a, b in zip(full, half, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.05)
        assert b["train_loss"] != a["train_loss"]


@pytest.mark.slow
def test_compile_changes_nothing_beyond_rounding(reference, fresh, monkeypatch):
    """Tracing is what can break our code; generating the kernels takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = weights_after(fresh, **INDIVISIBLE, compile=True)
    assert_close(compiled, reference, rtol=1e-3, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_compile_on_a_gpu(run_folder, fresh):
    plain = fit(tiny_config(**INDIVISIBLE), run_folder).history
    compiled = fit(tiny_config(**INDIVISIBLE, compile=True), fresh).history
    assert compiled[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=1e-3)


def test_clipping_limits_the_step(make):
    one_update = {**INDIVISIBLE, "lr": 1.0, "momentum": 0.0, "epochs": 1, "batch_size": 10}
    trainer = make(**one_update, schedule="constant", clip_norm=1e-3)
    start = parameters(trainer)
    trainer.run()
    moved = sum((p - start[name]).square().sum() for name, p in parameters(trainer).items())
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=0.01)


# ---- photos that fit into a GPU ----------------------------------------------------------------
@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the device has memory for so many photos; returns the sizes that are tried."""
    forward = MLNet.forward

    def pretend(photos: int) -> list[int]:
        monkeypatch.setattr(MLNet, "forward", forward)
        monkeypatch.setattr(trainers, "has_own_memory", None)
        return processes.small_gpu(photos)

    return pretend


@pytest.mark.slow
def test_a_small_gpu_learns_what_a_large_one_does(reference, fresh, gpu, monkeypatch, capsys):
    monkeypatch.setattr(trainers, "VALIDATION_BATCH", 1)
    tried = gpu(1)
    weights = weights_after(fresh, **INDIVISIBLE)
    assert tried[:4] == [4, 2, 1, 1]  # three that are tried, and the first of the training
    assert "1 of 4 photos" in capsys.readouterr().out
    assert_close(weights, reference, rtol=1e-3, atol=2e-5)
    assert not torch.equal(weights["encode.weight"], reference["encode.weight"])


@pytest.mark.slow
def test_a_resumed_training_keeps_the_size_that_was_found(make, gpu):
    # A GPU for 2 photos, then a larger and a smaller one.
    for photos, first_tried, expected in ((2, 4, 2), (100, 2, 2), (1, 2, 1)):
        tried, run = gpu(photos), make(**INDIVISIBLE)
        run.resume()
        run.fit_into_memory()
        assert (tried[0], run.micro_batch) == (first_tried, expected)
        if photos == 2:
            run.train_epoch()
            run.save()


@pytest.mark.parametrize(("changes", "expected"), [
    ({"freeze_norm": False}, 0), ({"micro_batch": 3}, 3), ({"micro_batch": 0}, 0)
], ids=str)  # fmt: skip
def test_batch_norm_that_learns_and_a_chosen_number_decide(make, gpu, changes, expected):
    tried, run = gpu(1), make(**{**INDIVISIBLE, **changes})
    run.fit_into_memory()
    assert (tried, run.micro_batch) == ([], expected)


@pytest.mark.slow
def test_a_hopeless_gpu_is_an_error_and_so_is_anything_else(run_folder, gpu, monkeypatch):
    gpu(0)
    with pytest.raises(RuntimeError, match="checkpointing=true"):
        fit(tiny_config(**INDIVISIBLE), run_folder)
    monkeypatch.setattr(MLNet, "forward", lambda self, image: image.float() @ image.float())
    with pytest.raises(RuntimeError, match="size"):
        fit(tiny_config(**INDIVISIBLE), run_folder)


# ---- checkpoints -------------------------------------------------------------------------------
def test_the_average_is_what_is_kept(run_folder, make):
    trainer = make(ema_decay=0.5, epochs=1, batch_size=5, freeze_norm=True)
    step, seen, name = trainer.step, [], "encode.weight"

    def watched(batch):
        step(batch)
        seen.append(trainer.model.state_dict()[name].clone())

    trainer.step = watched
    trainer.run()
    best, last = (stored(run_folder, name)["model"] for name in ("best", "last"))
    torch.testing.assert_close(best[name], (seen[0] + seen[1]) / 2)
    assert torch.equal(last[name], seen[1])


def test_a_model_is_loaded_without_its_backbone_s_file(tmp_path):
    config = dataclasses.replace(tiny_config(), backbone_weights="/long/gone.safetensors")
    weights = MLNet(tiny_config()).state_dict()
    checkpoints.save_checkpoint(tmp_path / "x.pt", config, weights)
    loaded, loaded_config, _ = checkpoints.load_model(tmp_path / "x.pt")
    assert loaded_config == config
    assert_close(loaded.state_dict(), weights, rtol=0, atol=0)


def test_continuing_in_another_precision_warns(run_folder, make, capsys):
    trainer = make(precision="auto", epochs=2)
    trainer.train_epoch()
    trainer.end_epoch(trainer.validate())
    other = {**stored(run_folder), "precision": "fp16"}
    torch.save(other, run_folder / "checkpoints" / "last.pt")
    with pytest.warns(UserWarning, match="'fp16'"):
        fit(trainer.config, run_folder)
    assert "resuming at epoch 2, batch 1" in capsys.readouterr().out


def test_a_loss_on_fixations_is_refused_where_only_maps_are_known(tmp_path, tiny_photos):
    """Also where the data were prepared for another loss, or by another program."""
    photos, root = tiny_photos
    (root / "map.png").touch()
    run = prepare_run(tmp_path / "maps", [unseen(p, density="map.png") for p in photos], root)
    with pytest.raises(ValueError, match=r"15 photos .* train0, .*loss='kl \+ nss'"):
        fit(tiny_config(loss="kl + nss"), run)
