"""Sweeps: many trainings that differ in a few keys, each in a run folder of its own, in one table.

A grid names the cells, each a set of changes to a preset, and the seeds. Every (cell, seed) is
prepared, trained and scored; what is done is not done again, and a training that was interrupted
continues. A cell that fails is reported and does not stop the others.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from mlnet_utils.config import Config, load_config
from mlnet_utils.data import datasets
from mlnet_utils.experiments import dispatch, evaluation
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.metrics.summary import format_table
from mlnet_utils.model import checkpoints
from mlnet_utils.runtime import display_path, read_json, read_yaml, write_text
from mlnet_utils.training import trainer
from mlnet_utils.training.trainer import TrainingDied

DATA_KEYS = ("dataset", "limit", "train_limit", "sigma", "fold")  # what decides prepared data
GRID_KEYS = ("preset", "seeds", "split", "common", "cells")
TABLE, PER_IMAGE = "sweep.csv", "per_image.csv"
DIED = "died.txt"  # in a run folder: which configuration died, and of what


@dataclass(frozen=True)
class Grid:
    """What to train. ``cells`` maps a cell's name to what it changes in ``preset`` + ``common``.

    ``start_from`` in a cell may be the name of another cell: it then starts from the weights that
    the same seed of that cell has found.
    """

    name: str
    preset: str
    cells: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)
    split: str = "test"
    common: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        slugs = [slug(cell) for cell in self.cells]
        if not self.cells or len(set(slugs)) != len(slugs):
            raise ValueError(
                f"grid {self.name}: needs cells whose names differ in their letters and digits; "
                f"got {list(self.cells)}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(
                f"grid {self.name}: seeds={list(self.seeds)} must be one or more numbers, each once"
            )
        if self.split not in ("val", "test"):
            raise ValueError(f"grid {self.name}: split={self.split!r} is not val or test")
        start = {cell: {**self.common, **self.cells[cell]}.get("start_from") for cell in self.cells}
        for cell, parent in start.items():
            if start.get(parent) in self.cells:
                raise ValueError(
                    f"grid {self.name}: {cell} starts from {parent}, which starts from another cell"
                    f", {start[parent]}; if that comes from `common`, set start_from: '' in it"
                )


@dataclass(frozen=True)
class Job:
    """One training of a sweep: everything a worker process needs to know."""

    cell: str
    seed: int
    split: str
    preset: str
    changes: dict[str, Any]
    folder: Path
    data_root: Path
    data: Path  # the prepared folder, shared with all jobs that see the same photos
    notebooks: bool
    waits: str  # title of the training that it starts from, or ""

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.cell}, seed {self.seed}"

    @property
    def preset_file(self) -> Path:
        """The cell as a YAML preset, for the notebook and for whoever looks into the folder."""
        return self.folder / f"{slug(self.cell)}.yaml"

    def config(self) -> Config:
        """The configuration of this training."""
        config = load_config(self.preset, **self.changes, seed=self.seed)
        config = checkpoints.with_start(config, self.folder / "checkpoints")
        return replace(config, preset=slug(self.cell))


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_grid(path: str | Path) -> Grid:
    """A grid from a YAML file with the keys of ``GRID_KEYS``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a grid, an unknown key, or one that is there twice.
    """
    path, values = Path(path), read_yaml(path)
    if not isinstance(values.get("cells"), dict):
        raise ValueError(f"{path} must hold a mapping with `cells`: name -> changed keys")
    unknown = sorted(set(values) - set(GRID_KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(GRID_KEYS)}")
    cells = {str(name): changes or {} for name, changes in values.pop("cells").items()}
    return Grid(path.stem, cells=cells, **{"preset": "sample", **values})


def jobs_of(grid: Grid, folder: Path, data_root: Path, notebooks: bool) -> list[Job]:
    """All trainings of a grid.

    Raises:
        ValueError: a cell is no valid configuration; nothing has run.
    """
    jobs = []
    for cell, changes in grid.cells.items():
        for seed in grid.seeds:
            values = {**grid.common, **changes}
            parent, waits = values.get("start_from"), ""
            if parent in grid.cells:
                waits = f"{parent}, seed {seed}"
                best = folder / slug(parent) / str(seed) / "checkpoints" / "best.pt"
                values["start_from"] = str(best)
            try:
                config = load_config(grid.preset, **values)
            except ValueError as error:
                raise ValueError(f"grid {grid.name}, cell {cell!r}: {error}") from None
            jobs.append(
                Job(
                    cell=cell,
                    seed=seed,
                    split=grid.split,
                    preset=grid.preset,
                    changes=values,
                    folder=folder / slug(cell) / str(seed),
                    data=folder / "data" / data_key(config, data_root),
                    data_root=data_root,
                    notebooks=notebooks,
                    waits=waits,
                )
            )
    return jobs


def data_key(config: Config, data_root: Path) -> str:
    """A folder name for the prepared data: equal names, equal data."""
    values = [str(data_root.resolve()), *(config.to_dict()[key] for key in DATA_KEYS)]
    return f"{config.dataset}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"


# ---- one training ------------------------------------------------------------------------------
def run_job(job: Job) -> None:
    """Train and score one (cell, seed) on its prepared data, as far as that is not done yet.

    What it prints goes into the run folder: the lines of several workers would only be mixed up.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(job.folder / "output.txt", "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
    ):
        _train_and_score(job)


def _train_and_score(job: Job) -> None:
    config, best = job.config(), job.folder / "checkpoints" / "best.pt"
    _link_data(job)
    try:
        if job.notebooks:
            from mlnet_utils.running import pipeline

            write_text(job.preset_file, yaml.safe_dump({**config.to_dict(), "preset": job.preset}))
            pipeline.reproduce(
                str(job.preset_file.resolve()),
                run_dir=job.folder,
                data_root=job.data_root,
                parameters={"SEED": job.seed},
                stages=[stage for stage in pipeline.STAGES if stage.name == "02_training"],
            )
        else:
            trainer.fit(config, job.folder)
    except Exception as error:
        in_notebook = getattr(error.__cause__, "ename", "")  # where only its name is left
        if isinstance(error, TrainingDied) or in_notebook == TrainingDied.__name__:
            write_text(job.folder / DIED, f"{_identity(job)}\n{error}\n")
        raise
    report = job.folder / "metrics.json"
    fresh = report.is_file() and report.stat().st_mtime >= best.stat().st_mtime
    if not fresh or read_json(report, "the sweep")["split"] != job.split:
        evaluation.evaluate(job.folder, split=job.split, models=(evaluation.MODEL,))


def _link_data(job: Job) -> None:
    """Point the run's ``data`` to the photos of its configuration, which may have changed.

    The link is relative: a sweep's folder may be moved and copied.
    """
    link = job.folder / "data"
    target = os.path.relpath(job.data.resolve(), job.folder.resolve())
    if link.is_symlink():
        if os.readlink(link) == target:
            return
        link.unlink()
    elif link.exists():
        raise ValueError(f"{link} is not a link to {job.data}: remove it, and the sweep makes one")
    link.symlink_to(target, target_is_directory=True)


def _identity(job: Job) -> str:
    """Equal for trainings that must end alike, on the same machine."""
    values = json.dumps([job.config().to_dict(), job.data.name], default=str)
    return f"configuration {hashlib.sha256(values.encode()).hexdigest()[:16]}"


def _check_alive(job: Job) -> None:
    """Raises TrainingDied where the same training died in an earlier call: it would again."""
    note = job.folder / DIED
    if not note.is_file():
        return
    identity, _, message = note.read_text(encoding="utf-8").partition("\n")
    if identity == _identity(job):
        again = f"so it was before; to try again, delete {display_path(note)}"
        raise TrainingDied(f"{message.strip()} ({again})")
    note.unlink()


# ---- all trainings -----------------------------------------------------------------------------
def run_sweep(
    grid: Grid,
    folder: str | Path,
    data_root: str | Path,
    workers: int = 1,
    notebooks: bool = True,
    cluster: str = "",
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Run what is missing of a grid and gather the table.

    Args:
        grid: what to train.
        folder: each training gets ``<folder>/<cell>/<seed>/``; the tables go beside them.
        data_root: folder of the raw datasets.
        workers: trainings at a time on this machine; they share its cores.
        notebooks: train by executing notebook 02 with papermill (an executed copy stays in every
            run folder); False calls the same function without it.
        cluster: ``""`` for this machine, or an executor of submitit: ``"slurm"``, ``"local"``.
        options: submitit's parameters, e.g. ``{"slurm_partition": "gpu", "timeout_min": 60}``.

    Returns:
        ``"cell, seed n"`` -> error, of the trainings that failed.

    Raises:
        ValueError: a cell is no valid configuration, or ``workers`` is below 1; nothing has run.
        ModuleNotFoundError: ``cluster`` without the extra ``cluster``.
        KeyboardInterrupt: nothing new has begun, and the tables hold what this call finished.
    """
    if workers < 1:
        raise ValueError(f"sweep: workers={workers} must be at least 1")
    folder, ended = Path(folder), {}
    jobs = jobs_of(grid, folder, Path(data_root), notebooks)
    for job in jobs:
        if not (job.data / "meta.json").is_file():
            config = load_config(grid.preset, **job.changes)
            datasets.prepare(config, job.data_root, job.data)
    start = functools.partial(dispatch.one_by_one, run_job)
    if cluster:
        values = {"folder": folder / "jobs", "cluster": cluster, "options": options or {}}
        start = functools.partial(dispatch.on_cluster, run_job, **values)
    elif workers > 1:
        start = functools.partial(dispatch.in_processes, run_job, workers=workers)
    try:
        for late in (False, True):
            wave = [(job, _hopeless(job, ended)) for job in jobs if bool(job.waits) is late]
            over = [(job, error) for job, error in wave if error]
            with contextlib.closing(start([job for job, error in wave if not error])) as results:
                for job, error in itertools.chain(over, results):
                    ended[job.title] = error
                    cause = error.partition(". ")[0]  # advice is in what is returned
                    print(f"{job.title}: {f'failed: {cause}' if error else 'done'}", flush=True)
    finally:
        if ended:  # other folders may hold scores of a configuration that was changed since
            gather([job for job in jobs if ended.get(job.title) == ""], folder)
    return {title: error for title, error in ended.items() if error}


def _hopeless(job: Job, ended: Mapping[str, str]) -> str:
    """Why a training need not begin, or ``""``."""
    if ended.get(job.waits):
        return f"it starts from {job.waits}, which failed"
    return dispatch.attempt(_check_alive, job)


# ---- results -----------------------------------------------------------------------------------
def gather(jobs: Sequence[Job], folder: Path) -> pd.DataFrame:
    """Write ``sweep.csv`` (a row per training) and ``per_image.csv`` (a row per photo too).

    Returns:
        The first table: cell, seed, dataset, split, epochs, seconds, the mean of every metric's
        finite scores, and, where there are any, the number of photos whose score is infinite.
    """
    rows, photos = [], []
    for job in jobs:
        report = read_json(job.folder / "metrics.json", "the sweep")
        row = {"cell": job.cell, "seed": job.seed}
        row |= {key: report[key] for key in ("dataset", "split")}
        row["epochs"] = len(pd.read_csv(job.folder / "log.csv"))
        times = job.folder / "times.csv"  # missing where training was killed before its last act
        seconds = pd.read_csv(times)["train_seconds"].sum() if times.is_file() else math.nan
        row["train_seconds"] = round(seconds, 1)
        scores = report["rows"][0]["metrics"]
        row |= {name: scores[name]["mean"] for name in METRICS}
        rows.append(row | {f"{name} infinite": scores[name]["infinite"] for name in METRICS})
        single = pd.read_csv(job.folder / "per_image.csv", dtype={"stem": str})
        photos.append(single.assign(cell=job.cell, seed=job.seed, dataset=report["dataset"]))
    infinite = [f"{name} infinite" for name in METRICS]
    infinite = [name for name in infinite if any(row[name] for row in rows)]
    columns = ["cell", "seed", "dataset", "split", "epochs", "train_seconds", *METRICS, *infinite]
    table = pd.DataFrame(rows, columns=columns)
    write_text(folder / TABLE, table.to_csv(index=False))
    columns = ["cell", "seed", "dataset", "stem", *METRICS]
    if photos:
        write_text(folder / PER_IMAGE, pd.concat(photos)[columns].to_csv(index=False))
    else:  # nor the photos of an earlier call
        (folder / PER_IMAGE).unlink(missing_ok=True)
    return table


def summary(folder: str | Path) -> str:
    """The table as text: per cell the seeds, the means, and how many photos are infinite."""
    table = pd.read_csv(Path(folder) / TABLE)
    if table.empty:
        return "no training has finished"
    means = table.groupby("cell", sort=False)[list(METRICS)].mean()
    means.insert(0, "seeds", table.groupby("cell", sort=False).size())
    photos = pd.read_csv(Path(folder) / PER_IMAGE, dtype={"stem": str})
    endless = np.isinf(photos[list(METRICS)]).groupby([photos["cell"], photos["stem"]]).any()
    counts = endless.groupby("cell").sum().add_suffix(" infinite")  # with any seed, as in `study`
    means = means.join(counts.loc[:, counts.any()])
    title = ", ".join(table[["dataset", "split"]].iloc[0])
    return f"{title}\n{format_table(means)}\n\n{display_path(Path(folder) / TABLE)}"
