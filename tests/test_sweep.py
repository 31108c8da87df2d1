"""Sweeps: every cell and seed once, failures reported, interruptions continued, one table."""

import sys

import pandas as pd
import pytest
import yaml

from mlnet_utils import __main__ as cli
from mlnet_utils import checkpoints, sweep
from mlnet_utils.metrics import METRICS
from mlnet_utils.sweep import Grid, read_grid, run_sweep

FAST = {"epochs": 1, "limit": 6, "height": 32, "width": 40, "prior_cells": [2, 2]}
CELLS = {"Three levels": {}, "One level": {"levels": 1}}


def grid(**changes):
    values = {"preset": "tiny", "cells": CELLS, "seeds": (0, 1), "common": FAST, **changes}
    return Grid("trial", **values)


def checkpoints_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("best.pt")}


def test_every_cell_and_seed_gets_a_run_and_a_row(tmp_path):
    assert run_sweep(grid(), tmp_path, tmp_path, notebooks=False) == {}
    table = pd.read_csv(tmp_path / sweep.TABLE)
    assert list(zip(table["cell"], table["seed"], strict=True)) == [
        ("Three levels", 0), ("Three levels", 1), ("One level", 0), ("One level", 1),
    ]  # fmt: skip
    assert table[list(METRICS)].notna().all(axis=None)
    assert table["NSS"].nunique() == 4
    photos = pd.read_csv(tmp_path / sweep.PER_IMAGE)
    assert len(photos) == 4 * 6
    mean = photos.groupby(["cell", "seed"], sort=False)["CC"].mean()
    assert mean.to_list() == pytest.approx(table["CC"].to_list())
    assert "Three levels      2" in sweep.summary(tmp_path)


def test_what_is_done_is_not_done_again_and_the_rest_is(tmp_path):
    run_sweep(grid(cells={"Three levels": {}}), tmp_path, tmp_path, notebooks=False)
    before = checkpoints_of(tmp_path)
    run_sweep(grid(), tmp_path, tmp_path, notebooks=False)
    after = checkpoints_of(tmp_path)
    assert len(before) == 2
    assert len(after) == 4
    assert before.items() <= after.items()


def test_another_split_is_scored_again_without_training(tmp_path):
    run_sweep(grid(seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    before = checkpoints_of(tmp_path)
    run_sweep(grid(seeds=(0,), split="val"), tmp_path, tmp_path, notebooks=False)
    assert checkpoints_of(tmp_path) == before
    assert set(pd.read_csv(tmp_path / sweep.TABLE)["split"]) == {"val"}


def test_a_failing_cell_is_reported_and_the_others_go_on(tmp_path, capsys):
    cells = {"wild": {"lr": 1e30, "optimizer": "sgd"}, "tame": {}}
    failed = run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    assert list(failed) == ["wild, seed 0"]
    assert "Try a smaller lr" in failed["wild, seed 0"]
    assert list(pd.read_csv(tmp_path / sweep.TABLE)["cell"]) == ["tame"]
    assert "wild, seed 0: failed" in capsys.readouterr().out


def test_a_mistake_in_a_cell_stops_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"cell 'typo': unknown configuration key levles"):
        run_sweep(grid(cells={"fine": {}, "typo": {"levles": 1}}), tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cells": {}}, "needs seeds, and cells"),
        ({"seeds": ()}, "needs seeds, and cells"),
        ({"cells": {"a b": {}, "A-B": {}}}, "names differ in their letters and digits"),
        ({"split": "train"}, "split='train' is not val or test"),
    ],
)
def test_impossible_grids(values, words):
    with pytest.raises(ValueError, match=words):
        grid(**values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cells: [1, 2]", "must hold a mapping with `cells`"),
        ("cells: {a: {}}\nsedes: [1]", "unknown key sedes; known: preset, seeds"),
        ("cells: {a: {", "is not valid YAML"),
    ],
)
def test_files_that_are_no_grids(text, words, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_grid(tmp_path / "grid.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        read_grid(tmp_path / "none.yaml")


def test_the_verb_ends_with_1_where_a_training_failed(tmp_path, capsys):
    cells = {"wild": {"lr": 1e30, "optimizer": "sgd"}, "tame": {}}
    content = {"preset": "tiny", "seeds": [0], "common": FAST, "cells": cells}
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(content))
    assert cli.main(["sweep", str(path), "--plain", "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "failed: wild, seed 0" in captured.err
    assert "tame" in captured.out


@pytest.mark.slow
def test_two_workers_and_papermill_find_what_one_process_finds(tmp_path, monkeypatch):
    pytest.importorskip("papermill", reason="needs the extra `notebooks`")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    one, two = tmp_path / "one", tmp_path / "two"
    small = grid(cells={"Three levels": {}}, seeds=(3, 4))
    assert run_sweep(small, one, tmp_path, notebooks=False) == {}
    assert run_sweep(small, two, tmp_path, workers=2) == {}
    assert (two / "three-levels" / "3" / "notebooks" / "02_training.ipynb").is_file()
    columns = ["cell", "seed", *METRICS]
    tables = [pd.read_csv(folder / sweep.TABLE)[columns] for folder in (one, two)]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.slow
def test_submitit_runs_the_jobs(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `cluster`")
    cells = {"wild": {"lr": 1e30, "optimizer": "sgd"}, "tame": {}}
    trial = grid(cells=cells, seeds=(0,))
    options = {"timeout_min": 5}
    failed = run_sweep(trial, tmp_path, tmp_path, notebooks=False, cluster="local", options=options)
    assert list(failed) == ["wild, seed 0"]
    assert list(pd.read_csv(tmp_path / sweep.TABLE)["cell"]) == ["tame"]


def test_a_cluster_needs_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlnet-utils\[cluster\]'"):
        run_sweep(grid(), tmp_path, tmp_path, notebooks=False, cluster="slurm")


def test_a_cell_starts_from_what_the_same_seed_of_another_found(tmp_path):
    cells = {
        "prior alone": {
            "start_from": "no prior",
            "freeze": ["backbone.*", "encode.*", "to_map.*"],
            "freeze_norm": True,
        },
        "no prior": {"freeze": ["prior"]},
    }
    assert run_sweep(grid(cells=cells), tmp_path, tmp_path, notebooks=False) == {}
    for seed in (0, 1):
        first, second = (
            checkpoints.load_checkpoint(tmp_path / cell / str(seed) / "checkpoints" / "best.pt")
            for cell in ("no-prior", "prior-alone")
        )
        assert (second["model"]["encode.weight"] == first["model"]["encode.weight"]).all()
        assert (first["model"]["prior"] == 0).all()
        assert (second["model"]["prior"] != 0).any()


def test_only_one_step_from_cell_to_cell():
    cells = {"a": {}, "b": {"start_from": "a"}, "c": {"start_from": "b"}}
    with pytest.raises(ValueError, match="c starts from b, which starts from another cell"):
        grid(cells=cells)
