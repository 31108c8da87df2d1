"""Sweeps: every cell and seed once, failures reported, interruptions continued, one table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import yaml

from mlnet_utils import __main__ as cli
from mlnet_utils.data.photos import Prepared
from mlnet_utils.experiments import study, sweep
from mlnet_utils.experiments.sweep import Grid, read_grid, run_sweep
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.model import checkpoints

WILD = {"lr": 1e30, "optimizer": "sgd"}  # dies in its first epoch
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
    assert "| Three levels | 2 " in sweep.summary(tmp_path)


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
    cells = {"wild": WILD, "tame": {}}
    failed = run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    assert list(failed) == ["wild, seed 0"]
    assert "Try a smaller lr" in failed["wild, seed 0"]
    assert list(pd.read_csv(tmp_path / sweep.TABLE)["cell"]) == ["tame"]
    assert "wild, seed 0: failed" in capsys.readouterr().out


def test_a_death_is_remembered_until_the_cell_or_the_file_is_gone(tmp_path):
    wild = grid(cells={"wild": WILD}, seeds=(0,))
    first = run_sweep(wild, tmp_path, tmp_path, notebooks=False)["wild, seed 0"]
    note, output = tmp_path / "wild" / "0" / sweep.DIED, tmp_path / "wild" / "0" / "output.txt"
    output.unlink()
    second = run_sweep(wild, tmp_path, tmp_path, notebooks=False)["wild, seed 0"]
    assert second == f"{first} (so it was before; to try again, delete {note})"
    assert not output.exists()  # it has not begun
    note.unlink()
    assert run_sweep(wild, tmp_path, tmp_path, notebooks=False) == {"wild, seed 0": first}
    assert output.exists()
    assert note.exists()
    mended = grid(cells={"wild": {}}, seeds=(0,))
    assert run_sweep(mended, tmp_path, tmp_path, notebooks=False) == {}
    assert not note.exists()


@pytest.mark.slow
def test_a_death_in_a_notebook_is_remembered_too(tmp_path, monkeypatch):
    pytest.importorskip("papermill", reason="needs the extra `notebooks`")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    wild = grid(cells={"wild": WILD}, seeds=(0,))
    first = run_sweep(wild, tmp_path, tmp_path)["wild, seed 0"]
    assert "TrainingDied: the loss became nan" in first
    assert run_sweep(wild, tmp_path, tmp_path)["wild, seed 0"].startswith(f"{first} (so it was")


def test_a_cell_that_changes_before_its_first_checkpoint_reads_its_new_photos(tmp_path):
    cells, data = {"a": WILD}, tmp_path / "a" / "0" / "data"
    run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    assert len(Prepared.read(data).split("train")) == 6
    more = grid(cells={"a": {"limit": 8}}, seeds=(0,))
    assert run_sweep(more, tmp_path, tmp_path, notebooks=False) == {}
    assert len(Prepared.read(data).split("train")) == 8


def test_a_folder_that_was_copied_is_as_good(tmp_path):
    raw, first, second = tmp_path / "raw", tmp_path / "first", tmp_path / "other" / "second"
    trial = grid(cells={"a": {}}, seeds=(0,))
    run_sweep(trial, first, raw, notebooks=False)
    shutil.copytree(first, second, symlinks=True)
    shutil.rmtree(first)
    before = checkpoints_of(second)
    assert run_sweep(trial, second, raw, notebooks=False) == {}
    assert checkpoints_of(second) == before
    link = second / "a" / "0" / "data"
    link.unlink()
    link.symlink_to(first / "data")  # absolute, and nothing is there any more
    assert run_sweep(trial, second, raw, notebooks=False) == {}
    assert not os.path.isabs(os.readlink(link))
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, link)  # as where a copy followed the links
    assert "is not a link to" in run_sweep(trial, second, raw, notebooks=False)["a, seed 0"]


def test_the_tables_leave_out_another_configuration_s_scores(tmp_path):
    run_sweep(grid(cells={"a": {}}, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    edited = grid(cells={"a": {"levels": 1}}, seeds=(0,))
    failed = run_sweep(edited, tmp_path, tmp_path, notebooks=False)
    assert "another configuration" in failed["a, seed 0"]
    assert pd.read_csv(tmp_path / sweep.TABLE).empty
    assert not (tmp_path / sweep.PER_IMAGE).exists()
    assert sweep.summary(tmp_path) == "no training has finished"


def test_seconds_that_were_not_written_are_empty(tmp_path):
    trial = grid(cells={"a": {}}, seeds=(0, 1))
    run_sweep(trial, tmp_path, tmp_path, notebooks=False)
    (tmp_path / "a" / "0" / "times.csv").unlink()  # killed between the checkpoint and this file
    assert run_sweep(trial, tmp_path, tmp_path, notebooks=False) == {}
    table = pd.read_csv(tmp_path / sweep.TABLE)
    assert table["train_seconds"].isna().to_list() == [True, False]


def test_photos_whose_score_is_infinite_are_counted(tmp_path):
    trial = grid(cells={"reference": {}, "b": {}}, seeds=(0, 1))
    run_sweep(trial, tmp_path, tmp_path, notebooks=False)
    assert "IG infinite" not in pd.read_csv(tmp_path / sweep.TABLE)
    for seed, photos in ((0, [2]), (1, [2, 3])):  # as where a map is zero at a fixation
        folder = tmp_path / "b" / str(seed)
        scores = pd.read_csv(folder / "per_image.csv", dtype={"stem": str})
        scores.loc[photos, "IG"] = -np.inf
        scores.to_csv(folder / "per_image.csv", index=False)
        report = json.loads((folder / "metrics.json").read_text())
        report["rows"][0]["metrics"]["IG"]["infinite"] = len(photos)
        (folder / "metrics.json").write_text(json.dumps(report))
    run_sweep(trial, tmp_path, tmp_path, notebooks=False)
    table = pd.read_csv(tmp_path / sweep.TABLE)
    assert table["IG infinite"].to_list() == [0, 0, 1, 2]
    assert not {f"{metric} infinite" for metric in METRICS if metric != "IG"} & set(table)
    lines = sweep.summary(tmp_path).splitlines()
    assert lines[0] == "synthetic, test"
    assert lines[1].endswith("| IG infinite |")
    assert lines[4].split()[1] == "b"
    assert lines[4].split()[-2] == "2"  # photos, as `study` counts them
    every = pd.read_csv(tmp_path / sweep.PER_IMAGE, dtype={"stem": str})
    judged = study.compare(every, ["b"], resamples=10).set_index("metric")
    assert judged.loc["IG", "infinite"] == 2


def test_ctrl_c_ends_the_call_with_a_table_of_what_has_finished(tmp_path):
    cells = {"short": {}, "long": {"epochs": 10_000}, "never": {}}
    saved = tmp_path / "long" / "0" / "checkpoints" / "last.pt"
    watch = threading.Thread(target=interrupt_when, args=([saved], os.getpid(), os.kill))
    watch.start()
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    watch.join()
    assert list(pd.read_csv(tmp_path / sweep.TABLE)["cell"]) == ["short"]
    assert not (tmp_path / "never").exists()


def interrupt_when(files, process, kill):
    """Press Ctrl-C once these files are there."""
    deadline = time.monotonic() + 120
    while not all(file.is_file() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(process, signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_stops_two_workers(tmp_path):
    cells = {"short": {}, "long": {"epochs": 10_000}, "never": {}}
    content = {"preset": "tiny", "seeds": [0, 1], "common": FAST, "cells": cells}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    options = ("--plain", "--workers", "2", "--out", tmp_path / "out", "--data-root", tmp_path)
    command = [sys.executable, "-m", "mlnet_utils", "sweep", tmp_path / "trial.yaml", *options]
    with subprocess.Popen(command, start_new_session=True) as call:
        saved = [tmp_path / "out" / "long" / seed / "checkpoints" / "last.pt" for seed in "01"]
        interrupt_when(saved, call.pid, os.killpg)  # as a terminal: to the workers too
        assert call.wait(60) == 130
    assert list(pd.read_csv(tmp_path / "out" / sweep.TABLE)["cell"]) == ["short", "short"]
    assert not (tmp_path / "out" / "never").exists()
    for file in saved:
        assert checkpoints.load_checkpoint(file)["progress"]["finished"] is False


def test_a_mistake_in_a_cell_stops_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"cell 'typo': unknown configuration key levles"):
        run_sweep(grid(cells={"fine": {}, "typo": {"levles": 1}}), tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cells": {}}, "needs cells whose names differ"),
        ({"seeds": ()}, r"seeds=\[\] must be one or more numbers"),
        ({"seeds": (0, 0)}, r"seeds=\[0, 0\] must be one or more numbers, each once"),
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
        ("cells: {a: {}, b: {}, a: {levels: 1}}", "'a' is there twice"),
        ("cells: {a: {levels: 1, levels: 2}}", "'levels' is there twice"),
        ("cells: {a: {}}\nseeds: [0]\nseeds: [1]", r"'seeds' is there twice\s.* line 3"),
    ],
)
def test_files_that_are_no_grids(text, words, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_grid(tmp_path / "grid.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        read_grid(tmp_path / "none.yaml")


def test_the_verb_ends_with_1_where_a_training_failed(tmp_path, capsys):
    cells = {"wild": WILD, "tame": {}}
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
    cells = {"wild": WILD, "tame": {}}
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


def test_a_cell_does_not_start_from_what_failed(tmp_path):
    cells = {"a": {}, "b": {"start_from": "a"}}
    run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    cells["a"] = {"levels": 1}  # whose folder still holds the weights of three levels
    failed = run_sweep(grid(cells=cells, seeds=(0,)), tmp_path, tmp_path, notebooks=False)
    assert failed["b, seed 0"] == "it starts from a, seed 0, which failed"


def test_only_one_step_from_cell_to_cell():
    cells = {"a": {}, "b": {"start_from": "a"}, "c": {"start_from": "b"}}
    with pytest.raises(ValueError, match="c starts from b, which starts from another cell"):
        grid(cells=cells)
    cells = {"a": {}, "b": {}}
    with pytest.raises(ValueError, match="if that comes from `common`, set start_from: ''"):
        grid(cells=cells, common={**FAST, "start_from": "a"})
    cells["a"] = {"start_from": ""}
    grid(cells=cells, common={**FAST, "start_from": "a"})


def test_there_must_be_a_worker(tmp_path):
    with pytest.raises(ValueError, match="workers=0 must be at least 1"):
        run_sweep(grid(), tmp_path, tmp_path, workers=0)
