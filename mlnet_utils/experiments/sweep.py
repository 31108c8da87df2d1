"""Sweeps: many trainings that differ in a few keys, each in a run folder of its own, in one table.

A grid names the cells, each a set of changes to a preset, and the seeds. Every (cell, seed) is
prepared, trained and scored; nothing is done twice, and an interrupted training continues. A
cell that fails is reported and does not stop the others.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlnet_utils import runtime
from mlnet_utils.config import Config, load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.photos import Prepared
from mlnet_utils.experiments import evaluation
from mlnet_utils.metrics.protocols import METRICS
from mlnet_utils.metrics.summary import format_table
from mlnet_utils.model import checkpoints
from mlnet_utils.training import trainer
from mlnet_utils.training.trainer import TrainingDied

DATA_KEYS = ("dataset", "sigma", *preparation.DATA_KEYS)  # they decide the prepared data
GRID_KEYS = ("preset", "seeds", "split", "common", "cells")
COLUMNS = ("cell", "seed", "dataset", "split", "configuration", "epochs", "train_seconds")
INFINITE = tuple(f"{metric} infinite" for metric in METRICS)
TABLE, PER_IMAGE = "sweep.csv", "per_image.csv"
AS_WRITTEN = {  # to pandas "None" is no value, and 0.001 and 1e-3 are one cell
    "dtype": {"cell": str, "stem": str},
    **{"keep_default_na": False, "na_values": ["", "nan"]},
}
DIED = "died.txt"  # in a run folder: the configuration that died, and the cause
GRACE_SECONDS = 10  # for processes that stop by themselves, as they do after a terminal's Ctrl-C

Train = Callable[[Config, Path], Any]  # trains a configuration in its prepared run folder


@dataclass(frozen=True)
class Grid:
    """The trainings; ``cells`` maps a cell's name to its changes of ``preset`` + ``common``.

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
        named = all(name.strip(".") for name in slugs)  # "..", say, would be another folder
        problem, seeds = "", list(self.seeds)
        if not (self.cells and named and len(set(slugs)) == len(slugs)):
            problem = f"cells={list(self.cells)} must differ in their letters and digits"
        if not seeds or len(set(seeds)) != len(seeds):
            problem = f"{seeds=} must be numbers, each once"
        if self.split not in ("val", "test"):
            problem = f"split={self.split!r} is not val or test"
        start = {cell: {**self.common, **self.cells[cell]}.get("start_from") for cell in self.cells}
        for cell, parent in start.items():
            if start.get(parent) in self.cells:
                problem = f"{cell} starts from {parent}, which starts from another cell: set "
                problem += f"start_from: '' in {parent} if it comes from `common`"
        if problem:
            raise ValueError(f"grid {self.name}: {problem}")


@dataclass(frozen=True)
class Job:
    """One training of a sweep, with all that a worker process needs to know."""

    cell: str
    config: Config  # with the cell's seed; the checkpoint it starts from may not exist yet
    split: str
    folder: Path
    data: Path  # the prepared folder, shared with all jobs that see the same photos
    waits: str  # title of the training that it starts from, or ""
    train: Train

    @property
    def title(self) -> str:
        """The name of this training in messages."""
        return f"{self.cell}, seed {self.config.seed}"

    @property
    def configuration(self) -> str:
        """A digest of the configuration, on every machine the same."""
        values = self.config.to_dict()
        if self.waits:  # the path of a checkpoint
            values["start_from"] = self.waits
        return runtime.digest_of(values)[:16]

    def start(self) -> Config:
        """The configuration with the architecture of the checkpoint that it starts from."""
        return checkpoints.with_start(self.config, self.folder / "checkpoints")


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_grid(path: str | Path) -> Grid:
    """A grid from a YAML file with the keys of ``GRID_KEYS``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a grid, an unknown key, or a key that is there twice.
    """
    path, values = Path(path), runtime.read_yaml(path)
    with runtime.reading(path, f"{', '.join(GRID_KEYS)}; `cells`: name -> changed keys", "mend it"):
        if unknown := set(values) - set(GRID_KEYS):
            raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
        cells = {str(name): dict(changes or {}) for name, changes in values.pop("cells").items()}
        return Grid(path.stem, cells=cells, **{"preset": "sample", **values})


def jobs_of(grid: Grid, folder: Path, data_root: Path, train: Train = trainer.fit) -> list[Job]:
    """All trainings of a grid; a ValueError where a cell is no valid configuration."""
    jobs = []
    for cell, seed in itertools.product(grid.cells, grid.seeds):
        values, waits = {**grid.common, **grid.cells[cell]}, ""
        parent = values.get("start_from")
        if parent in grid.cells:
            waits = f"{parent}, seed {seed}"
            best = folder / slug(parent) / str(seed) / "checkpoints" / "best.pt"
            values["start_from"] = str(best)
        try:
            config = load_config(grid.preset, **values, seed=seed)
        except (ValueError, TypeError) as error:  # TypeError: `seed` among the keys
            raise ValueError(f"grid {grid.name}, cell {cell!r}: {error}") from None
        config = replace(config, preset=slug(cell))
        place, data = folder / slug(cell) / str(seed), folder / "data" / data_key(config, data_root)
        jobs.append(Job(cell, config, grid.split, place, data, waits, train))
    return jobs


def data_key(config: Config, data_root: Path) -> str:
    """A folder name for the prepared data: equal names, equal data."""
    values = [str(data_root.resolve()), *(config.to_dict()[key] for key in DATA_KEYS)]
    return f"{config.dataset}-{hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]}"


# ---- one training ------------------------------------------------------------------------------
def run_job(job: Job) -> None:
    """Train and score a (cell, seed) on its prepared data, as far as that is not done yet.

    Its printed lines go into the run folder: the lines of several workers would only be mixed up.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with (
        runtime.locked(job.folder),
        open(job.folder / "output.txt", "a", encoding="utf-8") as output,
        contextlib.redirect_stdout(output),
    ):
        _link_data(job)
        try:
            job.train(job.start(), job.folder)
        except Exception as error:
            in_notebook = getattr(error.__cause__, "ename", "")  # only its name is left there
            if isinstance(error, TrainingDied) or in_notebook == TrainingDied.__name__:
                runtime.remove_temporaries([job.folder / DIED])
                runtime.write_text(job.folder / DIED, f"{_identity(job)}\n{error}\n")
            raise
        if not _scored(job):
            models = (evaluation.MODEL,)
            evaluation.evaluate(job.folder, split=job.split, models=models, config=job.config)


def _scored(job: Job) -> bool:
    """True where the scores are whole, and of the present checkpoint, data, evaluation keys."""
    path, best = job.folder / "metrics.json", job.folder / "checkpoints" / "best.pt"
    photos = job.folder / "per_image.csv"
    if not (path.is_file() and photos.is_file()):
        return False
    report = runtime.read_json(path, "the sweep")
    wanted = evaluation.inputs_of(Prepared.read(job.data).digest, best, job.config)
    wanted["split"] = job.split
    if evaluation.PER_IMAGE in report:  # early versions did not note it
        text = photos.read_text(encoding="utf-8", errors="replace")
        wanted[evaluation.PER_IMAGE] = evaluation.sha256_text(text)
    return all(report.get(key) == value for key, value in wanted.items())


def _link_data(job: Job) -> None:
    """Point the run's ``data`` to its photos, which may have changed, by a relative link."""
    link = job.folder / "data"
    target = os.path.relpath(job.data.resolve(), job.folder.resolve())
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link} is not a link to {job.data}: remove it; the sweep makes the link")
    link.unlink(missing_ok=True)
    link.symlink_to(target, target_is_directory=True)


def _identity(job: Job) -> str:
    """A digest that is equal for trainings that must end alike, on the same machine."""
    data = Prepared.read(job.data).digest
    values = json.dumps([job.start().to_dict(), data], default=str)
    return f"configuration {hashlib.sha256(values.encode()).hexdigest()[:16]}"


# ---- all trainings -----------------------------------------------------------------------------
def run_sweep(
    grid: Grid,
    folder: str | Path,
    data_root: str | Path,
    workers: int = 1,
    train: Train = trainer.fit,
    cluster: str = "",
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Run the missing trainings of a grid and gather the table.

    Each training gets ``<folder>/<cell>/<seed>/``; the tables go beside them. ``data_root`` holds
    the raw datasets; ``workers`` trainings at a time share this machine's cores. ``train`` is
    called with a configuration and its prepared run folder; ``running.pipeline.train`` executes
    notebook 02 and leaves the executed copy there. ``cluster`` is ``""`` for this machine, or an
    executor of submitit (``"slurm"``, ``"local"``) with its ``options``, e.g.
    ``{"slurm_partition": "gpu", "timeout_min": 60}``.

    Returns ``"cell, seed n"`` -> error, of the trainings that failed.

    Raises:
        ValueError: a cell is no valid configuration, ``workers`` is below 1, ``folder`` is a run,
            or the split has no ground truth; nothing has been trained.
        ImportError: ``cluster`` without the extra ``cluster``.
        KeyboardInterrupt: nothing new begins; the tables hold the trainings that this call ended.
    """
    if workers < 1:
        raise ValueError(f"sweep: workers={workers} must be at least 1")
    folder, data_root, ended = Path(folder), Path(data_root), {}
    runtime.refuse_run(folder)
    jobs = jobs_of(grid, folder, data_root, train)
    for job in jobs:
        preparation.ensure(job.config, data_root, job.data).with_truth(job.split)
    place = {"folder": folder / "jobs", "cluster": cluster, "options": options or {}}
    several = functools.partial(in_processes, workers=workers) if workers > 1 else one_by_one
    dispatch = functools.partial(on_cluster, **place) if cluster else several
    try:
        for late in (False, True):
            wave = [(job, _hopeless(job, ended)) for job in jobs if bool(job.waits) is late]
            over = [(job, error) for job, error in wave if error]
            begun = dispatch(run_job, [job for job, error in wave if not error])
            with contextlib.closing(begun) as results:
                for job, error in itertools.chain(over, results):
                    ended[job.title] = error
                    cause = error.partition(". ")[0]  # the returned error has the advice too
                    print(f"{job.title}: {f'failed: {cause}' if error else 'done'}", flush=True)
    finally:
        if ended:  # other folders may hold scores of a configuration that was changed since
            gather([job for job in jobs if ended.get(job.title) == ""], folder)
    return {title: error for title, error in ended.items() if error}


def _hopeless(job: Job, ended: Mapping[str, str]) -> str:
    """The reason why a training need not begin, or ``""``."""
    if ended.get(job.waits):
        return f"it starts from {job.waits}, which failed"
    return attempt(_check_alive, job)


def _check_alive(job: Job) -> None:
    """Raise TrainingDied where the same training died in an earlier call: it would again."""
    note = job.folder / DIED
    if note.is_file():
        text = note.read_text(encoding="utf-8", errors="replace")
        identity, _, message = text.partition("\n")
        if identity == _identity(job):
            again = f"so it was before; to try again, delete {runtime.display_path(note)}"
            raise TrainingDied(f"{message.strip()} ({again})")
        note.unlink()


# ---- one after another, in processes, on a cluster ---------------------------------------------
# Each way yields every job with its error, "" for none, as the jobs end: an error ends no other
# job. Closed before its end, a way begins nothing new.
def attempt(call: Callable[..., Any], *arguments: Any) -> str:
    """Call a function; return its error, or ``""``."""
    try:
        call(*arguments)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def one_by_one(run: Callable[[Job], Any], jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    """Run jobs in this process."""
    for job in jobs:
        yield job, attempt(run, job)


def in_processes(
    run: Callable[[Job], Any], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, str]]:
    """Run ``workers`` jobs at a time, each in a new process: if killed, it takes no other along.

    Closed before its end, it lets the running jobs save and stop.
    """
    # Inherited by the processes, which start afresh, and by their notebooks' kernels.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, runtime.cpu_count() // workers)))
    context = multiprocessing.get_context("spawn")
    waiting, running = iter(jobs), {}
    try:
        while True:
            for job in itertools.islice(waiting, workers - len(running)):
                answer, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_report, args=(run, job, theirs))
                process.start()
                theirs.close()  # held by the process only: `answer` ends when the process does
                running[answer] = job, process
            if not running:
                return
            for answer in connection.wait(running):
                job, process = running.pop(answer)
                try:
                    error = answer.recv()
                except EOFError:
                    process.join()
                    error = f"its process was killed (exit code {process.exitcode})"
                    error += "; if memory ran out, use fewer workers. The same command continues"
                process.join()
                yield job, error
    finally:
        for _, process in running.values():
            process.join(GRACE_SECONDS)
            process.terminate()  # training notes it, saves and stops
            process.join()


def _report(run: Callable[[Job], Any], job: Job, answer: connection.Connection) -> None:
    """Run the job in a process of its own and answer with its error."""
    try:
        answer.send(attempt(run, job))
    except KeyboardInterrupt as stop:
        answer.send(str(stop) or "it was interrupted")


def on_cluster(
    run: Callable[[Job], Any], jobs: Sequence[Job], folder: Path, cluster: str, options: Mapping
) -> Iterator[tuple[Job, str]]:
    """Submit jobs through submitit, as one array; closed before its end, they stay in the queue."""
    executor = runtime.require("submitit", "cluster").AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(name="mlnet-sweep", **options)
    submitted = executor.map_array(run, jobs) if jobs else []
    for job, sent in zip(jobs, submitted, strict=True):
        yield job, attempt(sent.result)


# ---- results -----------------------------------------------------------------------------------
def gather(jobs: Sequence[Job], folder: Path) -> pd.DataFrame:
    """Write ``sweep.csv`` (a row per training) and ``per_image.csv`` (a row per photo too).

    Returns the first table: names, configuration, epochs, seconds, the mean of every metric's
    finite scores, and, where there are any, the number of photos with an infinite score.
    """
    rows, photos, others, package = [], [], [], runtime.package_digest()
    for job in jobs:
        if not _scored(job):
            print(f"{job.title}: `evaluate` wrote other scores meanwhile: sweep again", flush=True)
            continue
        report = runtime.read_json(job.folder / "metrics.json", "the sweep")
        name = {"cell": job.cell, "seed": job.config.seed, "dataset": report["dataset"]}
        seconds = pd.read_csv(job.folder / "times.csv")["train_seconds"].sum()
        epochs = len(pd.read_csv(job.folder / "log.csv"))
        row = {"split": report["split"], "configuration": job.configuration, "epochs": epochs}
        row["train_seconds"] = round(seconds, 1)
        (scores,) = (r["metrics"] for r in report["rows"] if r["model"] == evaluation.MODEL)
        row |= {metric: scores[metric]["mean"] for metric in METRICS}
        row |= {f"{metric} infinite": scores[metric]["infinite"] for metric in METRICS}
        rows.append(name | row)
        others += [job.title] * (report.get("package") != package)
        found = pd.read_csv(job.folder / "per_image.csv", **AS_WRITTEN)
        # The verb `evaluate`, called for a cell, scores the baselines too.
        photos.append(found[found["model"] == evaluation.MODEL].assign(**name))
    if others:
        kept = f"{len(others)} of {len(jobs)} trainings, e.g. {others[0]}, keep scores of other"
        remedy = "delete their metrics.json to score them again"
        print(f"{kept} code of the package: {remedy}", flush=True)
    table = pd.DataFrame(rows, columns=[*COLUMNS, *METRICS, *INFINITE])
    table = table.drop(columns=[name for name in INFINITE if not table[name].any()])
    _write_tables(folder, table, pd.concat(photos) if photos else None)
    return table


def _write_tables(folder: Path, table: pd.DataFrame, photos: pd.DataFrame | None) -> None:
    with runtime.locked(folder / TABLE):  # both files are of one call
        runtime.remove_temporaries([folder / PER_IMAGE])
        runtime.write_text(folder / TABLE, table.to_csv(index=False))
        if photos is None:  # nor those of an earlier call
            (folder / PER_IMAGE).unlink(missing_ok=True)
        else:
            text = photos[["cell", "seed", "dataset", "stem", *METRICS]].to_csv(index=False)
            runtime.write_text(folder / PER_IMAGE, text)


def take_scores(grid: Grid, source: str | Path, folder: str | Path) -> dict[str, str]:
    """Take the tables of a finished sweep of the same grid, instead of training.

    ``source`` is a folder or its address, with ``sweep.csv`` and ``per_image.csv``. Their rows of
    this grid are written into ``folder``. Returns, as :func:`run_sweep`, ``"cell, seed n"`` ->
    error, of the trainings that have no scores there.

    Raises ValueError: a table is missing or damaged, the tables are of different sweeps, or a cell
    of this name was trained in another configuration.
    """
    jobs = {(job.cell, job.config.seed): job for job in jobs_of(grid, Path(folder), Path())}
    key, scores = ["cell", "seed"], list(METRICS)
    try:
        places = (f"{str(source).rstrip('/')}/{name}" for name in (TABLE, PER_IMAGE))
        table, photos = (pd.read_csv(place, **AS_WRITTEN) for place in places)
        means = photos.replace([np.inf, -np.inf], np.nan).groupby(key)[scores].mean()
        stated = table.set_index(key).sort_index()
        one = means.index.equals(stated.index)
        if not (one and np.allclose(stated[scores], means, 1e-4, 1e-4, equal_nan=True)):
            raise ValueError(f"the means of {TABLE} are not those of {PER_IMAGE}")
        found = stated["configuration"].to_dict()
    except (OSError, KeyError, TypeError, ValueError) as error:
        advice = f"name a folder or an address with {TABLE} and {PER_IMAGE} of one sweep"
        raise ValueError(f"'{source}' holds no finished sweep ({error}): {advice}") from error
    for name, job in jobs.items():
        if found.get(name, job.configuration) != job.configuration:
            other = f"was trained in another configuration than {grid.name} has now"
            raise ValueError(f"'{source}': {job.title} {other}: take its rows out, or train")
    parts = [frame[frame.set_index(key).index.isin(list(jobs))] for frame in (table, photos)]
    _write_tables(Path(folder), *parts)
    absent = "it has no scores there: it died, or was not trained"
    return {job.title: absent for name, job in jobs.items() if name not in found}


def summary(folder: str | Path) -> str:
    """The table as text: per cell the seeds, the means, and the photos with infinite scores."""
    table = pd.read_csv(Path(folder) / TABLE, **AS_WRITTEN)
    if table.empty:
        return "no training has finished"
    means = table.groupby("cell", sort=False)[list(METRICS)].mean()
    means.insert(0, "seeds", table.groupby("cell", sort=False).size())
    photos = pd.read_csv(Path(folder) / PER_IMAGE, **AS_WRITTEN)
    endless = np.isinf(photos[list(METRICS)]).groupby([photos["cell"], photos["stem"]]).any()
    counts = endless.groupby("cell").sum().add_suffix(" infinite")  # with any seed, as in `study`
    means = means.join(counts.loc[:, counts.any()])
    title = ", ".join(table[["dataset", "split"]].iloc[0])
    return f"{title}\n{format_table(means)}\n\n{runtime.display_path(Path(folder) / TABLE)}"
