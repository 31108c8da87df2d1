"""Five folds: every photo once, by a network that never saw it; protocol "A" on known fixations."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_photo

from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.data.readers.osie import read_osie
from mlnet_utils.experiments.evaluation import CENTRE
from mlnet_utils.metrics.baselines import CentreBias
from mlnet_utils.predict.predictor import MODEL


@pytest.fixture
def folds(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import folds

    return folds


@pytest.fixture
def photos(tmp_path):
    return [make_photo(tmp_path, f"p{number}", "", number) for number in range(6)]


def test_the_first_fixation_of_each_scanpath_is_left_out(folds, photos):
    photo = photos[0]  # three observers, four fixations each
    order = [4, 0, 5, 8, 1, 2, 9, 6, 10, 3, 7, 11]  # mixed, in order within each
    later = folds.without_first(photo.only(order))
    assert len(later.fixations) == 9
    assert not (later.fixations[:, None] == photo.fixations[[0, 4, 8]]).all(2).any()
    assert len(later.observers) == len(later.durations) == 9
    nobody = replace(photo, observers=np.full(12, NOBODY, np.int16))  # have no first
    with pytest.raises(ValueError, match="photo p0: fixations without observers"):
        folds.without_first(nobody)


def test_the_baseline_of_a_photo_knows_all_the_others_only(photos):
    bias = CentreBias.fit(photos)
    strangers = CentreBias.fit(photos[1:]).counts
    assert bias.without(photos[0]).counts.equal(strangers)
    assert bias.without(photos[0]).bandwidth == bias.bandwidth


def test_protocol_a_scores_the_models_that_have_a_map_against_the_baseline(folds, photos):
    predict = {
        "uniform": lambda photo: np.ones((photo.height, photo.width)),
        "one photo": lambda photo: np.eye(60, 80) + 1 if photo.stem == "p1" else None,
    }
    scores = folds.score_a(photos, predict)
    assert scores.groupby("model").size().to_dict() == {CENTRE: 6, "uniform": 6, "one photo": 1}
    assert set(scores["fixations"]) == {9}
    assert (scores.loc[scores["model"] == CENTRE, "IG"] == 0).all()
    assert (scores.loc[scores["model"] == "uniform", "AUC"] == 0.5).all()


def test_one_command_scores_all_photos_by_networks_that_never_saw_them(
    folds, photos, tmp_path, monkeypatch, capsys
):
    folder, tables = tmp_path / "raw" / "folder", []
    (folder / "images").mkdir(parents=True)
    for photo in photos:
        (tmp_path / photo.image).rename(folder / "images" / photo.image)
        table = pd.DataFrame(photo.fixations, columns=["x", "y"])
        tables.append(table.assign(image=photo.image, observer=photo.observers))
    pd.concat(tables).to_csv(folder / "fixations.csv", index=False)
    preset, runs, out = (tmp_path / name for name in ("small.yaml", "runs", "out/folds.json"))
    small = "epochs: 1\nheight: 32\nwidth: 40\nprior_cells: [2, 2]\n"
    # Photos that no fold trains on are scored too.
    preset.write_text(f"preset: tiny\ndataset: folder\nsigma: 6\ntrain_limit: 2\n{small}")
    words = ["--preset", preset, "--data-root", tmp_path / "raw", "--keep", runs, "--out", out]
    monkeypatch.setattr(sys, "argv", ["folds.py", *map(str, words)])
    folds.main()
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


@pytest.mark.slow
@pytest.mark.realdata
def test_the_centre_bias_of_osie_has_the_published_scores(folds, real_data):
    """DeepGaze's table: AUC .723 and NSS 0.78 on 87,821 fixations."""
    scores = folds.score_a(read_osie(real_data / "osie"), {})
    assert scores["fixations"].sum() == 87_821
    assert scores["AUC"].mean() == pytest.approx(0.723, abs=0.002)
    assert scores["NSS"].mean() == pytest.approx(0.78, abs=0.005)
