"""The study: its grids are valid, its comparisons paired, its verdicts what the intervals say."""

import itertools
import re
import tempfile
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import files
from scipy.ndimage import gaussian_filter

from mlnet_utils.config import ENGINE_FIELDS, load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.experiments import study
from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.experiments.sweep import jobs_of
from mlnet_utils.metrics import METRICS, cc


def scores(shifts, photos=40, seeds=(0, 1, 2)):
    """Scores whose cells differ by a constant, under large differences between photos."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 5, photos)
    rows = [
        {"cell": cell, "seed": seed, "stem": f"{photo:03}"}
        | {metric: level[photo] + shift + rng.normal(0, 0.01) for metric in METRICS}
        for cell, shift in shifts.items()
        for seed in seeds
        for photo in range(photos)
    ]
    return pd.DataFrame(rows)


def differences(table, cell):
    return study.compare(table, [cell]).set_index("metric")


def pairs_of(found):
    return found[["reference", "model"]].drop_duplicates().to_numpy().tolist()


@pytest.mark.parametrize("preset", sorted(study.QUESTIONS))
def test_every_grid_is_a_set_of_valid_configurations(preset, tmp_path):
    grid = study.grid(preset, seeds=(0,))
    jobs = jobs_of(grid, tmp_path, tmp_path)
    assert len(jobs) == len(grid.cells)
    assert next(iter(grid.cells)) == study.REFERENCE


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="not of 'paper'"):
        study.grid("paper")
    with pytest.raises(ValueError, match="'reference'"):
        study.compare(scores({"up": 0.1}), ["up"])
    table = study.compare(scores({"reference": 0}), ["absent"])
    assert tuple(table.columns) == study.COMPARISON
    assert study.sentence(table).startswith("*No scores")


def test_differences_are_paired_by_photo():
    table = scores({"reference": 0, "up": 0.1, "same": 0})
    assert set(study.compare(table, ["up", "same", "absent"])["model"]) == {"up", "same"}
    up = differences(table, "up").loc["CC"]
    # Unpaired, the interval would be +-1.5 wide: photos differ by 5.
    assert up["mean"] == pytest.approx(0.1, abs=0.01)
    assert 0.08 < up["low"] < up["high"] < 0.12
    assert up["seeds"] == 3
    assert 0.09 < up["seed_low"] < up["mean"] < up["seed_high"] < 0.11
    assert (up["reference"], up["side"]) == ("reference", 1)


def test_a_difference_is_clear_only_where_the_seeds_agree():
    table = scores({"reference": 0, "torn": 0})
    torn = table["cell"] == "torn"
    table.loc[torn, "CC"] += table["seed"].map({0: 0.5, 1: -0.1, 2: 0.5})
    found = differences(table, "torn").loc["CC"]
    assert found["low"] > 0.25  # over photos alone it looks clear
    assert found["seed_low"] == pytest.approx(-0.1, abs=0.02)
    assert found["side"] == 0


def test_only_the_seeds_that_both_have_are_compared():
    table = scores({"reference": 0, "up": 0.1})
    table.loc[(table["cell"] == "reference") & (table["seed"] == 2), list(METRICS)] += 7
    table = table[(table["cell"] == "reference") | (table["seed"] < 2)]  # seed 2 died
    found = differences(table, "up").loc["CC"]
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(0.1, abs=0.01)
    alone = differences(table[(table["cell"] == "up") | (table["seed"] == 2)], "up")
    assert (alone["seeds"] == 0).all()
    assert alone["seed_low"].isna().all()
    assert (alone["side"] == 0).all()


def test_missing_scores_are_left_out_and_infinite_ones_said():
    table = scores({"reference": 0, "up": 0.1})
    few = (table["cell"] == "up") & table["stem"].isin(["003", "007"]) & (table["seed"] == 1)
    table.loc[few, "IG"] = -np.inf
    table.loc[0, "CC"] = np.nan
    found = differences(table, "up")
    assert np.isnan(found.loc["IG", "mean"])  # the mean of the other photos would flatter
    assert found["infinite"].to_dict() == {**dict.fromkeys(METRICS, 0), "IG": 2}
    told = study.sentence(found.reset_index())
    assert "better in CC and NSS, worse in IG" in told
    assert "IG infinite for 2 photos" in told
    assert found.loc["CC", "mean"] == pytest.approx(0.1, abs=0.01)
    table.loc[(table["cell"] == "reference") & table["stem"].eq("009"), "IG"] = -np.inf
    both = differences(table, "up").loc["IG"]
    assert (both["infinite"], both["side"]) == (3, 0)  # neither is finite


def test_a_map_that_recovers_did_not_die():
    curves = ([0.5, 0, 0.2, 0.3], [0.5, 0.1, 0, 0.0002])
    tables = [pd.DataFrame({"update": range(4), "above zero": above}) for above in curves]
    alive, dead = map(study.fate, tables)
    assert re.match(r"alive\D* 30%", alive)
    assert re.match(r"dead\D* 0\.02%", dead)


VERDICTS = {
    (1, 1, 1): "is better than the reference",
    (-1, -1, -1): "is worse than the reference",
    (0, 0, 0): "is neither clearly better nor worse than",
    (1, 0, 0): "is better in CC than",
    (-1, 0, -1): "is worse in CC and IG than",
    (1, -1, 0): "is better in CC, worse in NSS than",
}


@pytest.mark.parametrize("sides", VERDICTS)
def test_verdicts_follow_the_sides(sides):
    table = pd.DataFrame({"metric": study.JUDGED, "side": sides}).assign(
        **{"model": "a cell", "reference": study.REFERENCE, "infinite": 0, "seeds": 3},
        **{"mean": 0.15, "low": 0.1, "high": 0.2, "seed_low": 0.12, "seed_high": 0.17},
    )
    text, words = study.sentence(table), VERDICTS[sides]
    assert words in text
    assert re.search(r"CC \+0\.150 \[\+0\.100, \+0\.200\][^+]*\+0\.120[^+]*\+0\.170", text)
    assert "than *no prior*: CC" in study.sentence(table.assign(reference="no prior"))
    single = study.sentence(table.assign(seeds=1))
    assert words.split(" than")[0] not in single
    assert single.startswith("- **a cell** against the reference: CC +0.150")
    assert single.endswith("no verdict from one seed")


def test_the_low_level_model_is_scored(run_folder):
    pytest.importorskip("cv2.saliency", reason="needs the extra `study`")
    row = study.low_level(run_folder)
    assert row["model"] == "spectral residual"
    # The test photos are a bright disc on noise, where the observers looked.
    assert row["metrics"]["AUC"]["mean"] > 0.6
    assert row["metrics"]["IG"]["infinite"] == 0


@pytest.mark.slow
def test_the_reachable_cc_is_what_the_truth_reaches(tmp_path):
    """The sample's true density is known: blurred as the ground truth is, it is the best model."""
    preparation.prepare(load_config("tiny"), tmp_path, tmp_path / "data")
    data = TestSet(tmp_path, "test")
    perfect = []
    for photo in data.photos:
        blurred = gaussian_filter(data.gold(photo).numpy(), data.prepared.sigma)
        perfect.append(cc(torch.from_numpy(blurred)[None], data.truth(photo)["density"]).item())
    found = study.reachable_cc(tmp_path)
    assert found["reachable"] == pytest.approx(np.mean(perfect), abs=0.02)
    assert 0 < found["halves"] < found["reachable"] < 1
    assert found == study.reachable_cc(tmp_path)


def test_without_observers_nothing_is_known_of_the_reachable_cc(run_folder):
    prepared = Prepared.read(run_folder / "data")
    nobody = [replace(p, observers=np.full_like(p.observers, NOBODY)) for p in prepared.photos]
    replace(prepared, photos=nobody).write()
    with pytest.raises(ValueError, match=f"test .*{run_folder} .*two .*observers"):
        study.reachable_cc(run_folder)


def test_the_ladder_ends_at_the_preset(tmp_path):
    jobs = jobs_of(study.grid("osie", seeds=(0,)), tmp_path, tmp_path)
    rungs = {job.cell: job.config.to_dict() for job in jobs if job.cell in study.LADDER}
    assert list(rungs) == list(study.LADDER)
    published, last = load_config("osie").to_dict(), list(rungs.values())[-1]
    assert {k for k in published if published[k] != last[k]} <= {"preset", *ENGINE_FIELDS}
    assert all(below != rung for below, rung in itertools.pairwise(rungs.values()))


def test_steps_pass_over_the_dead():
    table = scores({"first": 0, "second": 0.1, "fourth": 0.3})
    found = study.steps(table, ["first", "second", "third", "fourth"])
    assert pairs_of(found) == [["first", "second"], ["second", "fourth"]]
    means = found[found["metric"] == "CC"]["mean"]
    assert means.to_numpy() == pytest.approx([0.1, 0.2], abs=0.02)
    assert study.steps(table, ["absent"]).empty
    told = study.ladder_sentence(found.assign(side=[1] * 7 + [0] * 7))
    assert told.startswith("Clear in CC: second (+0.1")
    assert told.endswith("Not clear: fourth.")
    assert study.ladder_sentence(found.iloc[:0]).startswith("*")


def test_a_claim_is_judged_under_both_heads():
    own = study.OWN_HEAD
    table = scores({"reference": 0, "no prior": -0.1, own: 0, f"{own}, no prior": 0.2})
    found = study.judge(table, "prior")
    assert pairs_of(found) == [["reference", "no prior"], [own, f"{own}, no prior"]]
    verdicts = study.verdicts(found).set_index("change")
    assert verdicts["verdict"].to_list() == ["worse", "better"]
    assert verdicts.loc["no prior", "CC"].startswith("-0.10")
    dead = study.judge(table[table["cell"] != own], "prior")
    assert set(dead["model"]) == {"no prior"}
    assert study.verdicts(study.judge(table.iloc[:0], "prior")).empty


@pytest.mark.parametrize("claim", sorted(study.CLAIMS))
def test_claims_name_cells_of_the_study(claim):
    cells = study.grid("osie").cells
    assert {*study.CLAIMS[claim], *itertools.chain(*study.CLAIMS[claim].values())} <= set(cells)


def test_the_dead_are_counted():
    grid = study.grid("osie")
    assert len(study.WAYS) * len(study.OPTIMISERS) == 21
    cells = {"rectified and centred, AdamW": 50, "levels rectified, AdamW": -50}
    alive = scores(cells, seeds=(0, 1))
    found = study.survival(alive, grid).set_index(["way", "optimiser"])
    assert len(found) == 21
    assert tuple(found.loc[("rectified and centred", "AdamW"), ["alive", "of"]]) == (2, 3)
    assert found["alive"].sum() == 2
    line = "- **rectified and centred**: alive 2 of 9"
    assert line in study.survival_sentence(found.reset_index())
    nothing = study.survival(alive, study.grid("tiny"))
    assert nothing.empty
    assert study.survival_sentence(nothing).startswith("*")


def test_the_life_of_a_head_is_watched(run_folder, monkeypatch):
    pytest.importorskip("torch.distributed.fsdp")  # torch 2.6 makes a folder as it is imported
    monkeypatch.setattr(tempfile, "mkdtemp", None)  # of a killed call, it would stay
    still = {"lr": 0, "freeze_norm": True}
    config = load_config("tiny", head="paper", loss="mlnet", prior_penalty=-1, **still)
    before = files(run_folder)
    found = study.life(config, run_folder / "data", updates=2)
    assert files(run_folder) == before
    assert list(found["update"]) == [0, 1, 2]
    assert found["above zero"].between(0, 1).all()
    assert found["above zero"].nunique() == 1  # a rate of 0 changes nothing
    assert found["loss"].between(0, 1).all()


def test_amounts_of_photos_and_what_they_are_worth():
    table = study.photos_of(study.grid("osie"))
    assert sorted(table["training photos"]) == [50, 100, 200, 350, 500]
    assert study.photos_of(study.grid("sample")).empty
    means = table.assign(CC=0.5, NSS=1.0, IG=table["training photos"] / 100)
    assert re.search(r"50 .*500 .*CC 0\.500 → 0\.500", study.amount_sentence(means))
    assert "IG 0.500 → 5.000" in study.amount_sentence(means)
    assert study.amount_sentence(means.iloc[:0]).startswith("*")
