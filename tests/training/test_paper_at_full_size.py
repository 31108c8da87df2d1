"""Preset ``paper`` as it stands, from SALICON's files to a map: 480x640, batches of 10, VGG-16.

    MLNET_PAPER_PHOTOS=11 python -m pytest -s tests/training/test_paper_at_full_size.py

makes an update of a full batch and one more, and prints the seconds and the peak of memory.
"""

import os
import resource
import sys
import time

import numpy as np
import pandas as pd
import pytest
from miniatures import save_photo, save_salicon_mat

import mlnet_utils
from mlnet_utils.__main__ import main
from mlnet_utils.model.checkpoints import load_checkpoint

PHOTOS = int(os.environ.get("MLNET_PAPER_PHOTOS", "1"))


def make_salicon(root):
    """Photos in SALICON's layout of 2015; three workers look at a place of each photo's own."""
    for number in range(PHOTOS + 1):
        split = "train" if number < PHOTOS else "val"
        stem = f"COCO_{split}2014_{number:012d}"
        save_photo(root / f"images/{split}/{stem}.jpg", 640, 480, seed=number)
        rng = np.random.default_rng(number)
        centre = rng.uniform((100, 100), (540, 380))
        workers = [rng.normal(centre, 40, (20, 2)).clip(1, (640, 480)) for _ in range(3)]
        save_salicon_mat(root / f"fixations-2015/{split}/{stem}.mat", workers, "2015")


@pytest.mark.slow
def test_the_papers_recipe_trains_at_full_size(tmp_path):
    make_salicon(tmp_path / "raw" / "salicon")
    run = tmp_path / "run"
    words = ["--preset", "paper", "--run-dir", str(run), "--data-root", str(tmp_path / "raw")]
    started = time.monotonic()
    # Weights are random and one epoch is enough; all else is the preset's.
    code = main(["train", *words, "--set", "backbone_weights=none", "--set", "epochs=1"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = (peak if sys.platform == "darwin" else 1024 * peak) / 1e9
    print(f"{time.monotonic() - started:.0f} s, {peak:.2f} GB at most in the training's process")
    assert code == 0

    log = pd.read_csv(run / "log.csv")
    assert log["updates"].tolist() == [-(-PHOTOS // 10)]
    assert np.isfinite(log).all(axis=None)
    checkpoint = run / "checkpoints" / "best.pt"
    config = load_checkpoint(checkpoint)["config"]
    assert (config["height"], config["width"], config["batch_size"]) == (480, 640, 10)
    photo = np.random.default_rng(0).integers(0, 256, (480, 640, 3)).astype(np.uint8)
    density = mlnet_utils.load(checkpoint, device="cpu").predict(photo)
    assert density.shape == (480, 640)
    assert density.sum() == pytest.approx(1, abs=1e-4)
