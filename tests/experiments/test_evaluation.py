"""Scores of a run: the tables, the baselines beside the model, and what was left out."""

import json
import math
import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import files, unseen

from mlnet_utils import runtime
from mlnet_utils.__main__ import main
from mlnet_utils.config import load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.geometry import density_from_points, fixation_counts
from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.experiments import evaluation
from mlnet_utils.metrics import baselines
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.model import checkpoints
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import sha256_file

ONLY = {"models": (evaluation.MODEL,)}  # the network without the baselines


def save_network(path, seed=0, **changes):
    """Save an untrained network; returns its path."""
    config = load_config("tiny", limit=4, **changes)
    torch.manual_seed(seed)
    checkpoints.save_checkpoint(path, config, MLNet(config).state_dict())
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A prepared sample of a few photos and an untrained network."""
    folder = tmp_path_factory.mktemp("run")
    preparation.prepare(load_config("tiny", limit=4), folder, folder / "data")
    save_network(folder / "checkpoints" / "best.pt")
    return folder


@pytest.fixture(scope="module")
def report(run):
    return evaluation.evaluate(run)


@pytest.fixture
def copy(run, tmp_path):
    """A private copy of the run."""
    return shutil.copytree(run, tmp_path / "copy")


def means_of(report):
    return {
        row["model"]: {name: value["mean"] for name, value in row["metrics"].items()}
        for row in report["rows"]
    }


def test_every_model_is_scored_on_every_photo(run, report):
    scores = pd.read_csv(run / "per_image.csv")
    assert list(dict.fromkeys(scores["model"])) == list(evaluation.MODELS)
    assert (scores.groupby("model").size() == 4).all()
    assert list(scores) == ["dataset", "model", "stem", *METRICS]
    assert set(scores["dataset"]) == {report["dataset"]}
    means = scores[np.isfinite(scores["IG"])].groupby("model")["IG"].mean().to_dict()
    gains = evaluation.long_table(report).query("metric == 'IG'").set_index("model")["mean"]
    assert gains.to_dict() == pytest.approx(means)
    assert (report["photos"], report["split"]) == (4, "test")
    assert re.match("fixations .* 3 photos", report["negatives"])


def test_floors_and_ceilings_are_where_they_belong(run, report):
    means = means_of(report)
    assert means["uniform"]["AUC"] == means["uniform"]["sAUC"] == 0.5
    assert means["uniform"]["NSS"] == means["uniform"]["CC"] == 0
    assert means["centre bias"]["IG"] == pytest.approx(0, abs=1e-12)
    for metric in ("AUC", "sAUC", "NSS", "IG", "CC"):
        assert means["gold standard"][metric] > means["ML-Net"][metric]
    # One observer's fixations are no density to compare with.
    assert all(means["inter-observer"][name] is None for name in ("CC", "KL", "SIM"))
    assert 0 < means["inter-observer"]["IG"] < means["gold standard"]["IG"]
    shares = evaluation.explained_information(report)
    assert shares["gold standard"] == 1
    assert shares["centre bias"] == pytest.approx(0, abs=1e-12)
    assert evaluation.explained_information({"rows": report["rows"][:1]}) == {}  # no gold standard
    data = evaluation.TestSet(run, "test")
    photo = data.photos[0]  # of the sample: the gold standard is the true density
    with np.load(data.prepared.root / photo.density) as arrays:
        truth = arrays["density"].astype(float)
    np.testing.assert_allclose(data.gold(photo).numpy(), truth / truth.sum())


def poorer(folder, change):
    """The report of an evaluation after a change of each photo of a run."""
    prepared = Prepared.read(folder / "data")
    prepared.meta["dataset"] = "folder"  # of the sample, the maps are the truth
    replace(prepared, photos=[change(photo) for photo in prepared.photos]).write()
    return evaluation.evaluate(folder)


@pytest.mark.slow
def test_density_maps_alone_are_scored_by_what_needs_no_points(copy):
    report = poorer(copy, unseen)
    means = means_of(report)
    assert list(means) == ["ML-Net", "uniform", "centre bias"]
    for row in means.values():
        assert [name for name in METRICS if row[name] is None] == ["AUC", "sAUC", "IG", "NSS"]
    assert means["centre bias"]["CC"] > means["uniform"]["CC"] == 0
    assert means["centre bias"]["KL"] < means["uniform"]["KL"]
    assert "density maps" in report["ig_baseline"]
    assert "need fixations" in evaluation.format_table(report)
    assert np.isnan(evaluation.compare_protocols(copy)["NSS"]).all()


def test_one_unknown_observer_leaves_the_rows_that_need_several_out(copy, report):
    found = poorer(copy, lambda p: replace(p, observers=np.full_like(p.observers, NOBODY)))
    means, complete = means_of(found), means_of(report)
    assert list(means) == ["ML-Net", "uniform", "centre bias"]
    for metric in ("AUC", "sAUC", "NSS", "IG"):  # which do not look at the density
        assert means["ML-Net"][metric] == complete["ML-Net"][metric]


@pytest.mark.slow
def test_protocols_change_the_numbers_but_not_the_correlation(run):
    table = evaluation.compare_protocols(run)
    assert list(table.index) == ["mit300", "salicon", "salicon2015"]
    assert table.loc["mit300", "CC"] == pytest.approx(table.loc["salicon", "CC"])
    assert table.loc["mit300", "AUC"] != table.loc["salicon", "AUC"]
    assert math.isnan(table.loc["salicon2015", "KL"])
    assert table.loc["salicon2015", "CC"] != pytest.approx(table.loc["mit300", "CC"], abs=1e-3)


def test_salicon2015_has_a_ground_truth_of_its_own(run):
    data = evaluation.TestSet(run, "test")
    photo, *others = data.photos
    photo.fixations[:3] = photo.fixations[0]  # a pixel that is fixated three times
    data.negatives = baselines.LeaveOneOut(data.photos)
    own = data.truth(photo, "salicon2015")
    size, points = (photo.height, photo.width), photo.fixations
    pixels = np.unique(np.floor(points + 0.5), axis=0)
    assert len(pixels) < len(points)
    expected = density_from_points(pixels, *size, 19.0)
    torch.testing.assert_close(own["density"][0], expected, atol=1e-15, rtol=0)
    assert torch.equal(own["fixations"][0], fixation_counts(points, *size))
    seen = [fixation_counts(other.fixations, *size) > 0 for other in others]
    assert torch.equal(own["negatives"][0], sum(seen, torch.zeros(size, dtype=torch.int32)))
    usual = data.truth(photo, "mit300")
    assert torch.equal(usual["fixations"], own["fixations"])
    assert torch.equal(usual["density"][0], density_from_points(points, *size, data.prepared.sigma))


@pytest.mark.slow
def test_reports_describe_the_ground_truth_of_their_protocol(copy, report):
    assert (report["protocol"], report["sigma_px"]) == ("mit300", 8.0)
    assert report["density"].startswith("fixations, blurred")
    save_network(copy / "checkpoints" / "best.pt", protocol="salicon2015")
    found = evaluation.evaluate(copy)  # the checkpoint's protocol, unless another is given
    assert (found["protocol"], found["sigma_px"]) == ("salicon2015", 19.0)
    assert found["density"].startswith("fixated pixels, each once")
    assert re.match("pixels .* 3 photos .*weighted", found["negatives"])
    means = means_of(found)["ML-Net"]
    assert [name for name in METRICS if means[name] is None] == ["KL", "IG", "SIM"]
    assert evaluation.evaluate(copy, protocol="mit300")["rows"] == report["rows"]
    assert main(["evaluate", "--run-dir", str(copy), "--protocol", "salicon"]) == 0
    assert json.loads((copy / "metrics.json").read_text())["protocol"] == "salicon"


def test_changes_count_for_a_network_of_any_preset_or_are_refused(copy, capsys):
    call = ["evaluate", "--run-dir", str(copy), "--preset", "sample"]
    assert main([*call, "--set", "epochs=3"]) == 1
    assert re.search("epochs: .* protocol, test_flip", capsys.readouterr().err)
    assert main([*call, "--set", "test_flip=true", "--set", "bootstrap=7"]) == 0
    found = json.loads((copy / "metrics.json").read_text())
    assert (found["test_flip"], found["bootstrap"]) == (True, 7)


def test_photos_with_an_infinite_gain_are_counted_in_comparisons(run, monkeypatch):
    cut = {"unchanged": lambda p, _: p, "cut": lambda p, _: np.where(p > p.mean(), p, 0)}
    monkeypatch.setattr(evaluation, "CHANGES", cut)
    table = evaluation.compare_changes(run)
    assert table.loc["cut", "IG"] == -math.inf
    assert table[evaluation.INFINITE].tolist() == [0, 4]


@pytest.mark.filterwarnings("error")
def test_changes_move_the_metrics_that_should_move(run):
    table = evaluation.compare_changes(run)
    assert not table[evaluation.INFINITE].any()
    same = table.loc["unchanged"]
    for power in ("peaky (squared)", "flat (square root)"):
        assert table.loc[power, "AUC"] == pytest.approx(same["AUC"], abs=1e-9)
        assert table.loc[power, "sAUC"] == pytest.approx(same["sAUC"], abs=1e-9)
        assert table.loc[power, "-KL"] != pytest.approx(same["-KL"], abs=1e-3)
    assert table.loc["half centre bias", "sAUC"] != same["sAUC"]


def test_the_present_preset_decides_the_evaluation(copy, capsys):
    before = evaluation.evaluate(copy, **ONLY)
    now = load_config("tiny", limit=4, test_flip=True)
    after = evaluation.evaluate(copy, config=now, **ONLY)
    assert (before["test_flip"], after["test_flip"]) == (False, True)
    assert means_of(before) != means_of(after)
    assert re.search("test_flip=True, .*tiny", capsys.readouterr().out)
    other = evaluation.evaluate(copy, config=load_config("sample", test_flip=True), **ONLY)
    assert other["rows"] == before["rows"]


def test_a_network_is_not_scored_on_other_data_than_its_own(copy, tmp_path):
    best = copy / "checkpoints" / "best.pt"
    model, config, _ = checkpoints.load_model(best)
    checkpoints.save_checkpoint(best, config, model.state_dict(), data="other")
    with pytest.raises(ValueError, match=rf"best\.pt .*{copy / 'data'} "):
        evaluation.evaluate(copy)
    elsewhere = shutil.move(best, tmp_path / "other.pt")
    assert evaluation.evaluate(copy, elsewhere, **ONLY)["photos"] == 4


def test_a_network_of_another_fold_is_warned_of(copy, tmp_path):
    other = save_network(tmp_path / "other.pt", fold=1)
    with pytest.warns(UserWarning, match="fold 1 .*'synthetic'.* fold -1"):
        evaluation.evaluate(copy, other, **ONLY)


def test_scores_that_still_hold_are_kept(copy, tmp_path):
    other = save_network(tmp_path / "other.pt", seed=1)
    evaluation.evaluate(copy, **ONLY)
    own = {name: (copy / name).read_bytes() for name in ("metrics.json", "per_image.csv")}
    evaluation.evaluate(copy, other, **ONLY)
    for name, content in own.items():
        assert (copy / name).read_bytes() != content
        assert (copy / f"{name}.before").read_bytes() == content
    evaluation.evaluate(copy, **ONLY)  # those of the other network are not the run's
    evaluation.evaluate(copy, protocol="salicon", **ONLY)
    for name, content in own.items():  # scored twice, the same bytes
        assert (copy / f"{name}.before1").read_bytes() == content
    shutil.copy(other, copy / "checkpoints" / "best.pt")
    evaluation.evaluate(copy, **ONLY)  # those before hold no longer
    assert sorted(path.name for path in copy.glob("*.before*")) == [
        *("metrics.json.before", "metrics.json.before1"),
        *("per_image.csv.before", "per_image.csv.before1"),
    ]


def test_scores_name_the_network_that_was_scored(copy, monkeypatch):
    best = copy / "checkpoints" / "best.pt"
    digest, score_models = sha256_file(best), evaluation.TestSet.score_models

    def train_on_meanwhile(*arguments):
        best.write_bytes(b"of a later epoch")
        return score_models(*arguments)

    monkeypatch.setattr(evaluation.TestSet, "score_models", train_on_meanwhile)
    assert evaluation.evaluate(copy, **ONLY)["checkpoint_sha256"] == digest


def test_a_network_that_is_written_while_it_is_read_is_not_scored(copy, monkeypatch):
    read = evaluation.load

    def train_on_meanwhile(checkpoint, device):
        predictor = read(checkpoint, device)
        checkpoint.write_bytes(b"of a later epoch")
        return predictor

    monkeypatch.setattr(evaluation, "load", train_on_meanwhile)
    with pytest.raises(ValueError, match=r"best\.pt was written while"):
        evaluation.evaluate(copy, **ONLY)


def test_both_files_are_of_one_call(tmp_path, monkeypatch):
    """Another call comes between the two files of the first."""
    write, others = runtime.write_json, []

    def save(stem):
        row = {"model": "ML-Net", "stem": stem, **dict.fromkeys(METRICS, 0.5)}
        evaluation.save_scores(tmp_path, {"dataset": "tiny", "stem": stem}, [row], 10)

    def slowly(*arguments, **options):
        if not others:
            others.append(threading.Thread(target=save, args=("second",)))
            others[0].start()
            others[0].join(0.3)
        write(*arguments, **options)

    monkeypatch.setattr(runtime, "write_json", slowly)
    save("first")
    others[0].join()
    report = runtime.read_json(tmp_path / "metrics.json", "evaluate")
    text = (tmp_path / "per_image.csv").read_text()
    assert evaluation.sha256_text(text) == report[evaluation.PER_IMAGE]
    assert report["stem"] in text
    assert files(tmp_path) == {"metrics.json", "per_image.csv"}


def test_missing_inputs_name_what_makes_them(tmp_path, run):
    for checkpoint in ("", run / "checkpoints" / "best.pt"):
        with pytest.raises(FileNotFoundError, match="01_data_preparation"):
            evaluation.evaluate(tmp_path, checkpoint)
    shutil.copytree(run / "data", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="02_training"):
        evaluation.evaluate(tmp_path)
