"""Sweeps: many trainings that differ in a few keys, each in a run folder of its own, in one table.

A grid names the cells, each a set of changes to a preset, and the seeds. Every (cell, seed) is
prepared, trained and scored; what is done is not done again, and a training that was interrupted
continues. A cell that fails is reported and does not stop the others.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from mlnet_utils import datasets, evaluation, training
from mlnet_utils.config import Config, load_config
from mlnet_utils.metrics import METRICS
from mlnet_utils.runtime import cpu_count, display_path, read_json, write_text

DATA_KEYS = ("dataset", "limit", "train_limit", "sigma", "fold")  # what decides prepared data
GRID_KEYS = ("preset", "seeds", "split", "common", "cells")
TABLE, PER_IMAGE = "sweep.csv", "per_image.csv"


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
        if not self.cells or not self.seeds or len(set(slugs)) != len(slugs):
            raise ValueError(
                f"grid {self.name}: needs seeds, and cells whose names differ in their letters and "
                f"digits; got seeds {list(self.seeds)} and cells {list(self.cells)}"
            )
        if self.split not in ("val", "test"):
            raise ValueError(f"grid {self.name}: split={self.split!r} is not val or test")
        for cell, changes in self.cells.items():
            parent = changes.get("start_from")
            if parent in self.cells and self.cells[parent].get("start_from") in self.cells:
                raise ValueError(
                    f"grid {self.name}: {cell} starts from {parent}, which starts from another cell"
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
    waits: bool  # for the training that it starts from

    @property
    def preset_file(self) -> Path:
        """The cell as a YAML preset, for the notebook and for whoever looks into the folder."""
        return self.folder / f"{slug(self.cell)}.yaml"

    def config(self) -> Config:
        """The configuration of this training."""
        config = load_config(self.preset, **self.changes, seed=self.seed)
        return replace(config, preset=slug(self.cell))


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_grid(path: str | Path) -> Grid:
    """A grid from a YAML file with the keys of ``GRID_KEYS``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a grid, or an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"grid {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("cells"), dict):
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
            waits = values.get("start_from") in grid.cells
            if waits:
                parent = folder / slug(values["start_from"]) / str(seed)
                values["start_from"] = str(parent / "checkpoints" / "best.pt")
            try:
                config = load_config(grid.preset, **_without_start(values))
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


def _without_start(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's changes without the checkpoint that it starts from, which may not exist yet."""
    return {key: value for key, value in changes.items() if key != "start_from"}


def data_key(config: Config, data_root: Path) -> str:
    """A folder name for the prepared data: equal names, equal data."""
    values = [str(data_root.resolve()), *(config.to_dict()[key] for key in DATA_KEYS)]
    return f"{config.dataset}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"


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
    if not (job.folder / "data").exists():
        (job.folder / "data").symlink_to(job.data.resolve(), target_is_directory=True)
    if job.notebooks:
        from mlnet_utils import pipeline

        write_text(job.preset_file, yaml.safe_dump({**config.to_dict(), "preset": job.preset}))
        pipeline.reproduce(
            str(job.preset_file.resolve()),
            run_dir=job.folder,
            data_root=job.data_root,
            parameters={"SEED": job.seed},
            stages=[stage for stage in pipeline.STAGES if stage.name == "02_training"],
        )
    else:
        training.fit(config, job.folder)
    report = job.folder / "metrics.json"
    fresh = report.is_file() and report.stat().st_mtime >= best.stat().st_mtime
    if not fresh or read_json(report, "the sweep")["split"] != job.split:
        evaluation.evaluate(job.folder, split=job.split, models=(evaluation.MODEL,))


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
        ValueError: a cell is no valid configuration; nothing has run.
        ModuleNotFoundError: ``cluster`` without the extra ``cluster``.
    """
    folder, failed = Path(folder), {}
    jobs = jobs_of(grid, folder, Path(data_root), notebooks)
    for job in jobs:
        if not (job.data / "meta.json").is_file():
            config = load_config(grid.preset, **_without_start(job.changes))
            datasets.prepare(config, job.data_root, job.data)
    for late in (False, True):
        wave = [job for job in jobs if job.waits is late]
        if not wave:
            continue
        start = _on_cluster(folder, cluster, options or {}) if cluster else _here(workers)
        for job, result in zip(wave, start(wave), strict=True):
            try:
                result()
                print(f"{job.cell}, seed {job.seed}: done", flush=True)
            except Exception as error:  # whatever ended one training, the others go on
                failed[f"{job.cell}, seed {job.seed}"] = str(error)
                print(f"{job.cell}, seed {job.seed}: failed: {error}", flush=True)
    gather(jobs, folder)
    return failed


Results = list[Callable[[], None]]


def _here(workers: int) -> Callable[[list[Job]], Results]:
    """Start jobs on this machine; each result waits for its job."""
    if workers == 1:
        return lambda jobs: [lambda job=job: run_job(job) for job in jobs]
    # Inherited by the workers, which start afresh, and by their notebooks' kernels.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // workers)))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))

    def start(jobs: list[Job]) -> Results:
        futures: list[Future] = [pool.submit(run_job, job) for job in jobs]
        pool.shutdown(wait=False)
        return [future.result for future in futures]

    return start


def _on_cluster(
    folder: Path, cluster: str, options: Mapping[str, Any]
) -> Callable[[list[Job]], Results]:
    """Submit jobs through submitit, as one array."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sweeps on a cluster need submitit: pip install 'mlnet-utils[cluster]'"
        ) from error
    executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
    executor.update_parameters(name="mlnet-sweep", **options)
    return lambda jobs: [job.result for job in executor.map_array(run_job, jobs)]


# ---- results -----------------------------------------------------------------------------------
def gather(jobs: Sequence[Job], folder: Path) -> pd.DataFrame:
    """Write ``sweep.csv`` (a row per training) and ``per_image.csv`` (a row per photo too).

    Returns:
        The first table: cell, seed, best epoch, parameters of the score, mean of every metric.
    """
    rows, photos = [], []
    for job in jobs:
        if not (job.folder / "metrics.json").is_file():
            continue
        report = read_json(job.folder / "metrics.json", "the sweep")
        means = {name: value["mean"] for name, value in report["rows"][0]["metrics"].items()}
        log = pd.read_csv(job.folder / "log.csv")
        seconds = pd.read_csv(job.folder / "times.csv")["train_seconds"].sum()
        row = {"cell": job.cell, "seed": job.seed, "split": report["split"]}
        rows.append({**row, "epochs": len(log), "train_seconds": round(seconds, 1), **means})
        single = pd.read_csv(job.folder / "per_image.csv", dtype={"stem": str})
        photos.append(single.assign(cell=job.cell, seed=job.seed))
    table = pd.DataFrame(
        rows, columns=["cell", "seed", "split", "epochs", "train_seconds", *METRICS]
    )
    write_text(folder / TABLE, table.to_csv(index=False))
    if photos:
        every = pd.concat(photos)[["cell", "seed", "stem", *METRICS]]
        write_text(folder / PER_IMAGE, every.to_csv(index=False))
    return table


def summary(folder: str | Path) -> str:
    """The table as text: per cell the number of seeds and the mean of every metric."""
    table = pd.read_csv(Path(folder) / TABLE)
    if table.empty:
        return "no training has finished"
    means = table.groupby("cell", sort=False)[list(METRICS)].mean().round(3)
    means.insert(0, "seeds", table.groupby("cell", sort=False).size())
    return f"{means.to_string()}\n\n{display_path(Path(folder) / TABLE)}"
