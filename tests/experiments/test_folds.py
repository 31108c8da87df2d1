"""Five folds: every photo once, by a network that never saw it; protocol "A" on known fixations."""

import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import make_photo

from mlnet_utils.data import preparation
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.data.readers import DATASETS
from mlnet_utils.data.readers.osie import read_osie
from mlnet_utils.experiments import folds, sweep
from mlnet_utils.experiments.evaluation import CENTRE
from mlnet_utils.metrics import METRICS
from mlnet_utils.metrics.baselines import CentreBias
from mlnet_utils.predict.predictor import MODEL


@pytest.fixture
def photos(tmp_path):
    return [make_photo(tmp_path, f"p{number}", "", number) for number in range(6)]


def test_the_first_fixation_of_each_scanpath_is_left_out(photos):
    photo = photos[0]  # three observers, four fixations each
    order = np.array([4, 0, 5, 8, 1, 2, 9, 6, 10, 3, 7, 11])  # mixed, in order within each
    arrays = ("fixations", "observers", "durations")
    mixed = replace(photo, **{name: getattr(photo, name)[order] for name in arrays})
    later = folds.without_first(mixed)
    assert len(later.fixations) == 9
    assert not (later.fixations[:, None] == photo.fixations[[0, 4, 8]]).all(2).any()
    assert len(later.observers) == len(later.durations) == 9


def test_fixations_without_observers_have_no_first(photos):
    nobody = replace(photos[0], observers=np.full(12, NOBODY, np.int16))
    with pytest.raises(ValueError, match="photo p0: fixations without observers"):
        folds.without_first(nobody)


def test_the_baseline_of_a_photo_knows_all_the_others_only(photos):
    bias = CentreBias.fit(photos)
    strangers = CentreBias.fit(photos[1:]).counts
    assert bias.without(photos[0]).counts.equal(strangers)
    assert bias.without(photos[0]).bandwidth == bias.bandwidth


def test_protocol_a_scores_the_models_that_have_a_map_against_the_baseline(photos):
    scores = folds.score_a(
        photos,
        {
            "uniform": lambda photo: np.ones((photo.height, photo.width)),
            "one photo": lambda photo: (
                np.eye(photo.height, photo.width) + 1 if photo.stem == "p1" else None
            ),
        },
    )
    assert scores.groupby("model").size().to_dict() == {CENTRE: 6, "uniform": 6, "one photo": 1}
    assert set(scores["fixations"]) == {9}
    centre = scores[scores["model"] == CENTRE]
    assert (centre["IG"] == 0).all()
    assert (scores.loc[scores["model"] == "uniform", "AUC"] == 0.5).all()


def test_one_command_scores_all_photos_by_networks_that_never_saw_them(
    photos, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "raw" / "folder"
    (folder / "images").mkdir(parents=True)
    with open(folder / "fixations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "observer", "x", "y"))
        for photo in photos:
            (tmp_path / photo.image).rename(folder / "images" / photo.image)
            rows = zip(photo.observers, *photo.fixations.T, strict=True)
            writer.writerows((photo.image, *row) for row in rows)
    preset, runs, out = (tmp_path / name for name in ("small.yaml", "runs", "out/folds.json"))
    small = "epochs: 1\nheight: 32\nwidth: 40\nprior_cells: [2, 2]\n"
    preset.write_text(f"preset: tiny\ndataset: folder\nsigma: 6\n{small}")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    words = ["--preset", preset, "--data-root", tmp_path / "raw", "--keep", runs, "--out", out]
    monkeypatch.setattr(sys, "argv", ["folds.py", *map(str, words)])
    importlib.import_module("folds").main()
    assert "lowest CC" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["photos"], found["fixations"]) == (6, 6 * 9)
    assert found["ours"]["CC"]["n"] == found["a"][MODEL]["IG"]["n"] == 6
    for table in ("folds_per_image.csv", "folds_per_image_a.csv"):
        assert set(pd.read_csv(out.with_name(table))["stem"]) == {photo.stem for photo in photos}
    for job in runs.glob("fold-*/0"):
        prepared = Prepared.read(job / "data")
        scored = set(pd.read_csv(job / "per_image.csv")["stem"])
        assert scored == {photo.stem for photo in prepared.split("test")}
        assert not scored & {photo.stem for photo in prepared.split("train")}


def test_fewer_training_photos_leave_no_photo_unscored(photos, tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    spec = SimpleNamespace(**vars(DATASETS["folder"]) | {"read": lambda root, **_: photos})
    (raw / "folder").mkdir(parents=True)
    for photo in photos:
        (tmp_path / photo.image).rename(raw / "folder" / photo.image)
    spec.read_from = ()
    monkeypatch.setitem(DATASETS, "folder", spec)

    def run_sweep(grid, folder, data_root, workers):
        for job in sweep.jobs_of(grid, folder, data_root):
            preparation.ensure(job.config, data_root, job.data)
        scores = {name: [0.0] * 6 for name in METRICS} | {"stem": [p.stem for p in photos]}
        pd.DataFrame(scores).to_csv(folder / sweep.PER_IMAGE, index=False)

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    network = SimpleNamespace(predict=lambda path: np.ones(read_image(path).shape[1:]))
    monkeypatch.setattr(folds, "load", lambda path: network)
    few = {"dataset": "folder", "sigma": 6, "train_limit": 1}
    found = folds.cross_validate("tiny", out, raw, **few)
    assert found["photos"] == found["a"][MODEL]["AUC"]["n"] == 6


@pytest.mark.slow
@pytest.mark.realdata
def test_the_centre_bias_of_osie_has_the_published_scores(real_data):
    """DeepGaze's table: AUC .723 and NSS 0.78 on 87,821 fixations."""
    scores = folds.score_a(read_osie(real_data / "osie"), {})
    assert scores["fixations"].sum() == 87_821
    assert scores["AUC"].mean() == pytest.approx(0.723, abs=0.002)
    assert scores["NSS"].mean() == pytest.approx(0.78, abs=0.005)
