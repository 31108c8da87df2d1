"""Sweeps: every cell and seed once, failures reported, interruptions continued, one table."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import processes
import pytest
import torch
import yaml
from conftest import files, unseen
from test_runtime import abandon

from mlnet_utils import __main__ as cli
from mlnet_utils.data.photos import Prepared
from mlnet_utils.experiments import evaluation, study, sweep
from mlnet_utils.experiments.sweep import PER_IMAGE, TABLE, Grid, read_grid
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.model import checkpoints
from mlnet_utils.runtime import StopSignals, read_json

# A GPU sums in no fixed order, with kernels that it chooses by their speed of the moment.
ROUNDING = 1e-2 if torch.cuda.is_available() else 0
WILD = {"lr": 1e30, "optimizer": "sgd"}  # dies in its first epoch
FAST = {"epochs": 1, "limit": 6, "height": 32, "width": 40, "prior_cells": [2, 2]}
ONE = {"Three levels": {}}
CELLS = {**ONE, "One level": {"levels": 1}}
RAW = Path("raw")  # the photos are made, not read


def grid(**changes):
    values = {"preset": "tiny", "cells": CELLS, "seeds": (0, 1), "common": FAST, **changes}
    return Grid("trial", **values)


def run_sweep(folder, **changes):
    """Run a grid with some changes; returns the errors."""
    return sweep.run_sweep(grid(**changes), folder, RAW)


def run_cells(folder, cells):
    """Run some cells with seed 0; returns the errors."""
    return run_sweep(folder, cells=cells, seeds=(0,))


def table_of(folder, name=TABLE):
    return pd.read_csv(folder / name, dtype={"stem": str})


@pytest.fixture(scope="module")
def done_once(tmp_path_factory):
    """The folder of a sweep that has succeeded: two cells, two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    assert run_sweep(folder) == {}
    return folder


@pytest.fixture
def done(done_once, tmp_path):
    """A copy of it, which is as good: no training is repeated."""
    return Path(shutil.copytree(done_once, tmp_path / "a copy", symlinks=True))


# ---- what is done, and what is not -------------------------------------------------------------
def test_every_cell_and_seed_gets_a_run_and_a_row(done):
    table, photos = table_of(done), table_of(done, PER_IMAGE)
    expected = [[cell, seed] for cell in CELLS for seed in (0, 1)]
    assert table[["cell", "seed"]].to_numpy().tolist() == expected
    assert table[list(METRICS)].notna().all(axis=None)
    assert table["NSS"].nunique() == 4
    assert len(photos) == 4 * 6
    mean = photos.groupby(["cell", "seed"], sort=False)["CC"].mean()
    assert mean.to_list() == pytest.approx(table["CC"].to_list())
    assert "| Three levels | 2 " in sweep.summary(done)


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_the_rest_is(done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("best.pt")}
    run_sweep(done, split="val")  # is scored again, without a training
    assert set(table_of(done)["split"]) == {"val"}
    assert run_sweep(done, cells={**CELLS, "Two levels": {"levels": 2}}, seeds=(0,)) == {}
    after = {path: path.stat().st_mtime_ns for path in done.rglob("best.pt")}
    assert len(after) == len(before) + 1
    assert before.items() <= after.items()


def test_scores_are_of_the_present_checkpoint_whatever_the_clock_says(done):
    other, best = (done / "three-levels" / seed / "checkpoints" / "best.pt" for seed in "10")
    expected = table_of(done)["NSS"][1]
    shutil.copy(other, best)
    os.utime(best, (1, 1))  # the clock was set back
    assert run_cells(done, ONE) == {}
    assert table_of(done)["NSS"].to_list() == [pytest.approx(expected, rel=ROUNDING, abs=0)]
    scores = done / "three-levels" / "0" / "metrics.json"
    scored = scores.read_text()
    assert run_cells(done, {"Three levels": {"test_flip": True}}) == {}
    assert scores.read_text() != scored


def damage_scores(run):
    text = (run / "per_image.csv").read_text()
    (run / "per_image.csv").write_text(text.replace("0.", "1.", 1))
    assert (run / "per_image.csv").read_text() != text


# The verb `evaluate` scores the baselines too.
@pytest.mark.parametrize("change", [damage_scores, evaluation.evaluate])
def test_damaged_scores_are_made_again_and_baselines_left_out(done, change):
    run_cells(done, ONE)
    expected = table_of(done, PER_IMAGE)
    change(done / "three-levels" / "0")
    assert run_cells(done, ONE) == {}
    pd.testing.assert_frame_equal(table_of(done, PER_IMAGE), expected, rtol=ROUNDING, atol=ROUNDING)


def test_both_tables_are_of_one_call(done, monkeypatch):
    """Another call comes between the two tables of the first."""
    write, others = sweep.runtime.write_text, []

    def slowly(path, text):
        write(path, text)
        if path.name == TABLE and not others:
            others.append(threading.Thread(target=run_sweep, args=(done,)))
            others[0].start()
            others[0].join(1)

    monkeypatch.setattr(sweep.runtime, "write_text", slowly)
    run_cells(done, ONE)
    others[0].join()
    for key in ("cell", "seed"):
        assert set(table_of(done, PER_IMAGE)[key]) == set(table_of(done)[key])


def test_scores_of_other_code_are_named(done, capsys):
    run_sweep(done)
    assert "other code" not in capsys.readouterr().out
    path = done / "one-level" / "1" / "metrics.json"
    path.write_text(json.dumps({**read_json(path, "the sweep"), "package": "0.9.0"}))
    run_sweep(done)
    assert re.search("1 of 4 .*One level, seed 1, .*other code", capsys.readouterr().out)


def test_scores_that_evaluate_wrote_meanwhile_are_not_the_sweep_s(done, capsys):
    first = done / "three-levels" / "0"

    def train(config, folder):
        if folder != first:
            evaluation.evaluate(first, split="val", models=(evaluation.MODEL,))

    assert sweep.run_sweep(grid(seeds=(0,)), done, RAW, train=train) == {}
    assert "Three levels, seed 0: `evaluate` wrote" in capsys.readouterr().out
    assert table_of(done)[["cell", "split"]].to_numpy().tolist() == [["One level", "test"]]


def test_a_run_and_a_split_without_truth_are_refused_before_training(done):
    with pytest.raises(ValueError, match="is a run"):
        run_sweep(done / "one-level" / "1")
    (data,) = (done / "data").iterdir()
    prepared = Prepared.read(data)
    secret = [unseen(photo, density="", density_sha256="") for photo in prepared.split("test")]
    replace(prepared, photos=prepared.split("train") + prepared.split("val") + secret).write()
    with pytest.raises(ValueError, match=r"6 of the 6 test photos .* 'val'"):
        run_cells(done, {"New": {"levels": 2}})
    assert not (done / "new").exists()


def test_links_to_the_photos_are_relative_and_mended(done, tmp_path):
    link = done / "three-levels" / "0" / "data"
    link.unlink()
    link.symlink_to(tmp_path / "gone")  # absolute, and nothing is there
    assert run_cells(done, ONE) == {}
    assert not os.path.isabs(os.readlink(link))
    target = link.resolve()
    link.unlink()
    shutil.copytree(target, link)  # as where a copy followed the links
    assert str(link) in run_cells(done, ONE)["Three levels, seed 0"]


def test_the_tables_leave_out_another_configuration_s_scores(done):
    failed = run_cells(done, {"Three levels": {"levels": 1}})
    assert "another configuration" in failed["Three levels, seed 0"]
    assert table_of(done).empty
    assert not (done / PER_IMAGE).exists()
    assert sweep.summary(done) == "no training has finished"


def test_half_tables_and_damaged_times_of_a_killed_sweep_do_not_stay(done):
    made, expected = files(done), table_of(done)["train_seconds"].to_list()
    for name in (TABLE, PER_IMAGE):
        abandon(done / name)
    times = [done / "three-levels" / seed / "times.csv" for seed in "01"]
    times[0].write_text(times[0].read_text().replace(".", "9."))
    times[1].unlink()
    assert run_sweep(done) == {}
    assert files(done) == made
    assert table_of(done)["train_seconds"].to_list() == expected


def test_photos_whose_score_is_infinite_are_counted(done):
    assert "IG infinite" not in table_of(done)
    for seed, photos in ((0, [2]), (1, [2, 3])):  # as where a map is zero at a fixation
        folder = done / "one-level" / str(seed)
        scores = table_of(folder, "per_image.csv")
        scores.loc[photos, "IG"] = -np.inf
        scores.to_csv(folder / "per_image.csv", index=False)
        report = read_json(folder / "metrics.json", "the sweep")
        report["rows"][0]["metrics"]["IG"]["infinite"] = len(photos)
        del report[evaluation.PER_IMAGE]
        (folder / "metrics.json").write_text(json.dumps(report))
    run_sweep(done)
    table = table_of(done)
    assert table["IG infinite"].to_list() == [0, 0, 1, 2]
    assert not {f"{metric} infinite" for metric in METRICS if metric != "IG"} & set(table)
    title, head, _, _, row, *_ = sweep.summary(done).splitlines()
    assert (title, head[-15:], row[:12]) == ("synthetic, test", "| IG infinite |", "| One level ")
    assert row.split()[-2] == "2"  # photos, as `study` counts them
    judged = study.compare(table_of(done, PER_IMAGE), ["One level"], "Three levels", resamples=10)
    assert judged.set_index("metric").loc["IG", "infinite"] == 2


def test_every_cell_keeps_its_name(tmp_path):
    """pandas takes "None" for no value, and two spellings of a number for one cell."""
    cells = ("None", "0.001", "1e-3")
    rows = [dict.fromkeys(METRICS, 0.5) | {"cell": cell, "stem": "null"} for cell in cells]
    table = pd.DataFrame(rows).assign(dataset="osie", split="test")
    for name in (TABLE, PER_IMAGE):
        table.to_csv(tmp_path / name, index=False)
    found = [line.split()[1:4] for line in sweep.summary(tmp_path).splitlines()[3:6]]
    assert found == [[cell, "|", "1"] for cell in cells]


# ---- failures ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_others_go_on(tmp_path, capsys):
    content = {"preset": "tiny", "common": FAST, "cells": {"wild": WILD, "tame": {}}}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    call = ["sweep", str(tmp_path / "trial.yaml"), "--plain", "--out", str(tmp_path)]
    assert cli.main(call) == 1
    captured = capsys.readouterr()
    assert "failed: wild, seed 0" in captured.err
    assert "wild, seed 0: failed" in captured.out
    assert list(table_of(tmp_path)["cell"]) == ["tame"]


@pytest.mark.slow
def test_a_death_is_remembered_until_the_cell_or_the_file_is_gone(tmp_path):
    first = run_cells(tmp_path, {"wild": WILD})["wild, seed 0"]
    note, output, data = (tmp_path / "wild/0" / name for name in (sweep.DIED, "output.txt", "data"))
    assert len(Prepared.read(data).split("train")) == 6
    output.unlink()
    second = run_cells(tmp_path, {"wild": WILD})["wild, seed 0"]
    assert second.startswith(first)
    assert str(note) in second
    assert not output.exists()  # it has not begun
    note.write_bytes(b"\xff\xfe\n")
    assert run_cells(tmp_path, {"wild": WILD}) == {"wild, seed 0": first}
    output.unlink()
    prepared = Prepared.read(data)
    replace(prepared, photos=prepared.photos[1:]).write()  # mended sources
    assert run_cells(tmp_path, {"wild": WILD}) == {"wild, seed 0": first}
    assert output.exists()
    assert note.exists()
    assert run_cells(tmp_path, {"wild": {"limit": 8}}) == {}
    assert not note.exists()
    assert len(Prepared.read(data).split("train")) == 8


def wait_for(files):
    deadline = time.monotonic() + 400  # on a machine that does other things
    while not all(file.is_file() for file in files) and time.monotonic() < deadline:
        time.sleep(0.01)


def interrupt_when(files, process, kill, number=signal.SIGINT):
    """Press Ctrl-C, or send another signal, once these files are there."""
    wait_for(files)
    kill(process, number)


@pytest.mark.slow
def test_ctrl_c_ends_the_call_with_a_table_of_what_has_finished(tmp_path):
    cells = {"short": {}, "long": {"epochs": 10_000}, "never": {}}
    saved = tmp_path / "long" / "0" / "checkpoints" / "last.pt"
    watch = threading.Thread(target=interrupt_when, args=([saved], os.getpid(), os.kill))
    watch.start()
    with pytest.raises(KeyboardInterrupt):
        run_cells(tmp_path, cells)
    watch.join()
    assert list(table_of(tmp_path)["cell"]) == ["short"]
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_ctrl_c_and_sigterm_stop_two_workers(tmp_path, kill, number):
    trial, endless = tmp_path / "trial.yaml", {"epochs": 10_000}
    cells = {"long": endless, "also long": endless, "never": {}}
    content = {"preset": "tiny", "common": FAST, "cells": cells}
    trial.write_text(yaml.safe_dump(content, sort_keys=False))
    options = ("--plain", "--workers", "2", "--out", tmp_path / "out", "--data-root", tmp_path)
    command = [sys.executable, "-m", "mlnet_utils", "sweep", trial, *options]
    with subprocess.Popen(command, start_new_session=True) as call:
        names = ("long", "also-long")
        saved = [tmp_path / "out" / name / "0/checkpoints/last.pt" for name in names]
        interrupt_when(saved, call.pid, kill, number)  # a terminal's goes to the workers too
        assert call.wait(300) == 130
    assert not (tmp_path / "out" / "never").exists()
    for file in saved:
        assert checkpoints.load_checkpoint(file)["progress"]["finished"] is False


@pytest.mark.slow
def test_two_workers_and_papermill_find_what_one_process_finds(done, tmp_path, monkeypatch):
    pytest.importorskip("papermill", reason="needs the extra `notebooks`")
    from mlnet_utils.running import pipeline

    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    two, cells = tmp_path / "two", {**ONE, "wild": WILD}
    call = {"folder": two, "data_root": RAW, "train": pipeline.train}
    (first,) = sweep.run_sweep(grid(cells=cells, seeds=(0,)), workers=2, **call).values()
    assert "TrainingDied" in first
    assert (two / "three-levels" / "0" / "notebooks" / "02_training.ipynb").is_file()
    columns = ["cell", "seed", *METRICS]
    pd.testing.assert_frame_equal(table_of(done)[columns][:1], table_of(two)[columns])
    # A death in a notebook is remembered too.
    note = str(two / "wild" / "0" / sweep.DIED)
    assert note in sweep.run_sweep(grid(cells={"wild": WILD}, seeds=(0,)), **call)["wild, seed 0"]


@pytest.mark.slow
def test_submitit_runs_the_jobs(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `cluster`")
    trial = grid(cells={"wild": WILD, "tame": {}}, seeds=(0,))
    failed = sweep.run_sweep(trial, tmp_path, RAW, cluster="local", options={"timeout_min": 5})
    assert list(failed) == ["wild, seed 0"]
    assert list(table_of(tmp_path)["cell"]) == ["tame"]


# ---- a cell that starts from another -----------------------------------------------------------
@pytest.mark.slow
def test_a_cell_starts_from_what_the_same_seed_of_another_found(tmp_path):
    rest = {"freeze": ["backbone.*", "encode.*", "to_map.*"], "freeze_norm": True}
    cells = {"prior alone": {"start_from": "no prior", **rest}, "no prior": {"freeze": ["prior"]}}
    assert run_sweep(tmp_path, cells=cells) == {}
    for seed in (0, 1):
        first, second = (
            checkpoints.load_checkpoint(tmp_path / cell / str(seed) / "checkpoints" / "best.pt")
            for cell in ("no-prior", "prior-alone")
        )
        assert (second["model"]["encode.weight"] == first["model"]["encode.weight"]).all()
        assert (first["model"]["prior"] == 0).all()
        assert (second["model"]["prior"] != 0).any()


def test_a_cell_does_not_start_from_what_failed(done):
    cells = {"Three levels": {"levels": 1}, "b": {"start_from": "Three levels"}}
    failed = run_cells(done, cells)  # the folder still holds the weights of three levels
    assert "Three levels, seed 0" in failed["b, seed 0"]


# ---- impossible grids --------------------------------------------------------------------------
def test_a_mistake_stops_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"'typo'.* levles"):
        run_sweep(tmp_path, cells={"fine": {}, "typo": {"levles": 1}})
    with pytest.raises(ValueError, match="workers=0"):
        sweep.run_sweep(grid(), tmp_path, RAW, workers=0)
    assert not list(tmp_path.iterdir())


IMPOSSIBLE = [
    ({"cells": {}}, r"\[\]"),
    ({"seeds": ()}, r"seeds=\[\]"),
    ({"seeds": (0, 0)}, r"seeds=\[0, 0\]"),
    ({"cells": {"a b": {}, "A-B": {}}}, r"\['a b', 'A-B'\]"),
    ({"split": "train"}, "split='train'"),
    # Only one step from cell to cell.
    ({"cells": {"a": {}, "b": {"start_from": "a"}, "c": {"start_from": "b"}}}, "c starts from"),
    ({"cells": {"a": {}, "b": {}}, "common": {"start_from": "a"}}, "common"),
]


@pytest.mark.parametrize(("values", "words"), IMPOSSIBLE)
def test_impossible_grids(values, words):
    with pytest.raises(ValueError, match=words):
        grid(**values)
    grid(cells={"a": {"start_from": ""}, "b": {}}, common={"start_from": "a"})


NO_GRIDS = {
    "cells: [1, 2]": "`cells`",
    "cells: {a: {}}\nsedes: [1]": "sedes",
    "cells: {a: {": "grid.yaml",
    "cells: {a: {}, b: {}, a: {levels: 1}}": "'a' is there twice",
}


@pytest.mark.parametrize("text", NO_GRIDS)
def test_files_that_are_no_grids(text, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=NO_GRIDS[text]):
        read_grid(tmp_path / "grid.yaml")


# ---- one after another, in processes -----------------------------------------------------------
def act(word: str) -> None:
    """A job that ends as it is told to."""
    if word == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "is interrupted":
        raise KeyboardInterrupt("saved; continue with the same command")
    if word == "fails":
        raise ValueError("a reason")
    if word == "fails without a word":
        raise MemoryError


def work_until_stopped(folder: Path) -> None:
    """A job like training: it works on until a signal comes, and saves then."""
    with StopSignals() as signals:
        (folder / "begun").touch()
        while folder.name != "short" and not signals.received:
            time.sleep(0.01)
    (folder / "saved").touch()


@pytest.fixture
def forked(monkeypatch):
    """Jobs' processes come from a server that has imported everything already."""
    server = processes.server()
    monkeypatch.setattr(sweep.multiprocessing, "get_context", lambda method: server)


@pytest.mark.slow
def test_one_job_s_end_is_its_own(forked):
    ended = dict(sweep.in_processes(act, ["is killed", "is interrupted", "fails"], workers=2))
    assert "exit code -9" in ended.pop("is killed")
    assert ended == {"is interrupted": "saved; continue with the same command", "fails": "a reason"}
    here = dict(sweep.one_by_one(act, ["fails", "fails without a word", "succeeds"]))
    assert here == {"fails": "a reason", "fails without a word": "MemoryError", "succeeds": ""}
    with pytest.raises(KeyboardInterrupt, match="saved"):  # of this process: no job's failure
        list(sweep.one_by_one(act, ["is interrupted", "succeeds"]))


@pytest.mark.slow
def test_closed_nothing_new_begins_and_what_runs_saves(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(sweep, "GRACE_SECONDS", 0)
    folders = [tmp_path / name for name in ("short", "long", "longer", "never", "nor this")]
    for folder in folders:
        folder.mkdir()
    with contextlib.closing(sweep.in_processes(work_until_stopped, folders, 2)) as results:
        assert next(results) == (folders[0], "")
        assert [(f / "begun").exists() for f in folders[2:]] == [False, False, False]
        wait_for([folders[1] / "begun"])
    assert [(folder / "saved").exists() for folder in folders] == [True, True, False, False, False]
    assert not any((folder / "begun").exists() for folder in folders[2:])


# ---- finished scores ---------------------------------------------------------------------------
def test_the_published_study_is_of_the_present_grid(tmp_path):
    published = Path(__file__).parents[2] / "results" / "osie" / "study"
    absent = sweep.take_scores(study.grid("osie"), published, tmp_path)
    assert 0 < len(absent) < 15  # those that died
    for name in (TABLE, PER_IMAGE):
        assert len(table_of(tmp_path, name)) == len(table_of(published, name))


def test_finished_scores_are_taken_as_far_as_they_are_of_the_grid(done_once, tmp_path):
    cells = {**ONE, "Another": {"levels": 2}}
    absent = sweep.take_scores(grid(cells=cells, seeds=(1,)), done_once, tmp_path)
    assert list(absent) == ["Another, seed 1"]
    for table in (table_of(tmp_path), table_of(tmp_path, PER_IMAGE)):
        assert table[["cell", "seed"]].drop_duplicates().values.tolist() == [["Three levels", 1]]
    assert len(table_of(tmp_path)) == 1


def test_scores_of_another_configuration_are_refused(done_once, tmp_path):
    with pytest.raises(ValueError, match=r"Three levels, seed 0 .*configuration"):
        sweep.take_scores(grid(cells={"Three levels": {"lr": 0.5}}), done_once, tmp_path)
    assert not files(tmp_path)


FAULTS = {
    "absent": lambda table, photos: photos.unlink(),
    "mixed": lambda table, photos: pd.read_csv(table).eval("CC = CC + 0.01").to_csv(table),
    "early": lambda table, photos: pd.read_csv(table).drop(columns="configuration").to_csv(table),
    "no table": lambda table, photos: table.write_bytes(b"\0\xff"),
    "of others": lambda table, photos: pd.read_csv(photos).query("seed == 0").to_csv(photos),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tables_that_are_no_finished_sweep_are_refused(done, tmp_path, fault):
    FAULTS[fault](done / TABLE, done / PER_IMAGE)
    with pytest.raises(ValueError, match=f"{done}.*{TABLE} and {PER_IMAGE}"):
        sweep.take_scores(grid(), done, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_cell_that_starts_from_another_is_known_on_every_machine(tmp_path):
    cells = {"First": {}, "Second": {"start_from": "First", "backbone_weights": "none"}}
    jobs = [sweep.jobs_of(grid(cells=cells), tmp_path / name, RAW) for name in ("a", "b")]
    here, there = ([job.configuration for job in these] for these in jobs)
    assert here == there
    assert len(set(here)) == 4
