"""Cached features of a frozen backbone: the same training, and never features of something else."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from miniatures import truncate

from mlnet_utils.model.network import MLNet
from mlnet_utils.training import features
from mlnet_utils.training import trainer as trainers
from mlnet_utils.training.features import backbone_key
from mlnet_utils.training.trainer import Trainer, fit

FROZEN = {"freeze": ("backbone.*",), "freeze_norm": True}
CACHED = {**FROZEN, "cache_features": True}


@pytest.fixture(autouse=True)
def cache_root(tmp_path, monkeypatch):
    """Caches go into a folder of the test's own."""
    monkeypatch.setenv("MLNET_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "features"


def cached(run_folder, **changes) -> Trainer:
    """A trainer as it is when its first epoch begins."""
    trainer = Trainer(tiny_config(**CACHED, **changes), run_folder, Accelerator())
    trainer.resume()
    about = (trainer.model, trainer.config, trainer.accelerator)
    features.cache_features(*about, trainer.data.values())
    return trainer


def files(root):
    return sorted(root.rglob("*.npz"))


@pytest.mark.slow
def test_training_on_cached_features_learns_the_same(run_folder, tmp_path, cache_root):
    """On those of the weights that it starts from, not of the random ones it is built with."""
    plain, quick = (shutil.copytree(run_folder, tmp_path / name) for name in ("plain", "quick"))
    fit(tiny_config(seed=7), run_folder)
    start = {"start_from": str(run_folder / "checkpoints" / "best.pt"), "backbone_weights": "none"}
    expected = fit(tiny_config(**FROZEN, **start), plain)
    found = fit(tiny_config(**CACHED, **start, workers=1), quick)
    # 10 training photos in both orientations and 5 validation photos in one
    assert len(files(cache_root)) == 25
    for a, b in zip(expected.history, found.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)


def test_the_size_that_fits_is_found_with_cached_features(run_folder, monkeypatch):
    tried, losses = [], Trainer.losses

    def watched(self, batch, network=None):
        if network is not None:  # in the search for a size
            tried.append("features" in batch and "image" not in batch)
        return losses(self, batch, network)

    monkeypatch.setattr(trainers, "has_own_memory", lambda device: True)
    monkeypatch.setattr(Trainer, "losses", watched)
    fit(tiny_config(**CACHED, micro_batch=-1, epochs=1), run_folder)
    assert tried == [True]


def test_a_second_run_reads_what_the_first_one_wrote(run_folder, tmp_path, cache_root):
    other, third = (shutil.copytree(run_folder, tmp_path / name) for name in ("other", "third"))
    fit(tiny_config(**CACHED), run_folder)
    before = {path: path.stat().st_mtime_ns for path in files(cache_root)}
    # Fewer levels and another seed of the encoding are another run on the same features; the seed
    # of a random backbone is not.
    trainer = cached(other, levels=1, lr=1e-3)
    assert {path: path.stat().st_mtime_ns for path in files(cache_root)} == before
    batch = next(iter(trainer.train_loader))
    assert batch["features"].shape[1] == trainer.model.backbone.channels[-1]
    fit(tiny_config(**CACHED, seed=1), third)
    assert len(files(cache_root)) == 50


def test_features_are_those_of_the_photo_and_of_its_mirror_image(run_folder):
    trainer = cached(run_folder)
    data, model = trainer.data["train"], trainer.model.eval()
    for mirrored in (False, True):
        image = data.image(3).flip(-1) if mirrored else data.image(3)
        with torch.inference_mode():
            expected = torch.cat(model.extract(image[None]), dim=1)[0]
        found = data.features(data.photos[3], mirrored)
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_the_key_changes_with_all_that_changes_features():
    def key(precision="no", **changes):
        torch.manual_seed(changes.pop("weights", 0))
        config = tiny_config(**{**FROZEN, **changes})
        return backbone_key(MLNet(config), config, precision)

    assert key() == key() == key(levels=1, head="paper", lr=1e-4, dropout=0.0)
    different = (key(weights=1), key("bf16"), key(height=40), key(width=48))
    assert len({key(), *different, key(normalisation="half")}) == 6


def test_what_changes_from_epoch_to_epoch_is_not_cached(run_folder):
    for changes, words in (
        ({"freeze": ()}, r"freeze to \['backbone"), ({"freeze_norm": False}, "freeze_norm")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            fit(tiny_config(**{**CACHED, **changes}), run_folder)


def test_damaged_files_and_photos_without_a_hash_are_named(run_folder):
    data = cached(run_folder).data["val"]
    photo = data.photos[0]
    path = truncate(data.features.path(photo, False), 0.1)
    with pytest.raises(ValueError, match=path.name):
        data.features(photo, False)
    np.savez(path, features=np.zeros((3, 4, 5), np.float16))
    with pytest.raises(ValueError, match=rf"{path.name}.*\(3, 4, 5\)"):
        data.features(photo, False)
    for sha256 in ("", "../../outside"):
        with pytest.raises(ValueError, match=photo.stem):
            data.features.path(dataclasses.replace(photo, sha256=sha256), False)


def test_a_disk_without_room_is_an_error_before_the_work(run_folder, monkeypatch):
    usage = shutil.disk_usage(run_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"20 photos .*cache_features"):
        fit(tiny_config(**CACHED), run_folder)


def test_values_beyond_half_precision_stay_single(run_folder):
    data = cached(run_folder).data["val"]
    large = torch.full(data.features.shape, 1e5)
    data.features.write(data.features.path(data.photos[0], False), large)
    torch.testing.assert_close(data.features(data.photos[0], False), large)
