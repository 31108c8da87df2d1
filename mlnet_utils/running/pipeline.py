"""Run the numbered notebooks in order with papermill; publish successful runs only.

A stage is one notebook and the files it promises: the pipeline knows stages and paths, and nothing
about saliency. Needs the extra ``notebooks`` (``pip install "mlnet-utils[notebooks]"``).
"""

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlnet_utils import __version__, runtime
from mlnet_utils.config import Config, backbone_file, load_config
from mlnet_utils.running import notebooks
from mlnet_utils.runtime import display_path, sha256_file, write_json

STATE_FILE = "pipeline.json"
WEIGHTS = "backbone weights"  # an input: the checksum of their file, None where there is none
OWN_PARAMETERS = ("PRESET", "RUN_DIR", "DATA_ROOT")  # set through the arguments of `reproduce`


class PublishError(RuntimeError):
    """A run that must not be published; the message says why."""


@dataclass(frozen=True)
class Stage:
    """One notebook and the files it promises: glob patterns, relative to the run folder.

    Its last act is to write its record, ``<name>.json``. ``resumes`` is the folder with which an
    interrupted stage goes on.
    """

    name: str
    outputs: tuple[str, ...] = ()
    resumes: str = ""

    @property
    def record(self) -> str:  # its path in the run folder
        return f"{self.name}.json"


STAGES = (
    Stage("01_data_preparation", ("data/meta.json",)),
    Stage("02_training", ("checkpoints/best.pt", "log.csv"), resumes="checkpoints"),
    Stage("03_evaluation", ("metrics.json", "per_image.csv")),
    Stage("04_visualization", ("figures/*.png",)),
)
# Trains every cell of the study: minutes on the sample, hours on real data. Run on request.
STUDY = Stage("05_ablation", ("study/sweep.csv", "study/per_image.csv"), resumes="study")


def reproduce(
    preset: str | Path = "sample",
    run_dir: str | Path = "",
    data_root: str | Path = "",
    parameters: Mapping[str, Any] | None = None,
    force: bool = False,
    stages: Sequence[Stage] = STAGES,
    stale: Callable[[Path], str] = lambda folder: "",
) -> Path:
    """Run every stage with changed inputs, in order, and return the folder of the results.

    A stage is skipped when its notebook, its parameters, the preset's content, the package and
    the records of the stages before it are the same as at its last success, and its files, and
    the dataset's that it read, are still as it left them. A finished training goes on where it
    ended: it is not repeated because a notebook or the package changed, only with ``force`` or
    other backbone weights. A second call for the same folder waits for the first.

    Args:
        preset, run_dir, data_root: as the notebooks' ``PRESET``, ``RUN_DIR`` and ``DATA_ROOT``.
        parameters: further notebook parameters; text is converted to the type of the notebook's
            own value, so that values from a command line need no quoting.
        force: run unchanged stages too, from their beginning: the folder they would go on with
            is kept beside itself, as ``checkpoints.before``, ``checkpoints.before1`` and so on.
        stages: the stages to run, in order.
        stale: says what has changed of the files outside the run folder that its first stage has
            read, ``""`` = nothing; the pipeline itself does not know them.

    Raises:
        ValueError: unknown preset or parameter, or a value of the wrong type (nothing has run).
        FileNotFoundError: a notebook, the YAML file or the checkpoint to start from is missing
            (nothing has run).
        NotebookError: a stage failed, or did not write a promised file.
    """
    config = load_config(preset)
    folder, raw = runtime.run_dir(run_dir, preset), runtime.data_root(data_root).resolve()
    if config.start_from:  # its SHA-256 is an input too
        from mlnet_utils.model.checkpoints import with_start

        config = with_start(config, folder / "checkpoints")
    # Folders that a notebook finds by itself are not injected: they would only put this machine's
    # paths into the executed copies.
    own = {"PRESET": str(preset)}
    if folder.resolve() != runtime.default_run_dir(preset).resolve():
        own["RUN_DIR"] = str(folder.resolve())
    if raw != runtime.data_root().resolve():
        own["DATA_ROOT"] = str(raw)
    sources = _sources(stages)
    injections = _injections(sources, own, parameters or {})

    weights = Path(backbone_file(config)).expanduser()
    shared = {
        "preset": _digest(config.to_dict()),
        "package": f"{__version__} {_package_digest()}",
        "data folder": str(raw),
        WEIGHTS: sha256_file(weights) if weights.is_file() else None,
    }
    started = time.monotonic()
    with runtime.locked(folder / STATE_FILE):
        _run_stages(folder, stages, sources, injections, shared, force, stale)
    print(f"Finished in {time.monotonic() - started:.1f} s; results: {display_path(folder)}")
    return folder


def _run_stages(
    folder: Path,
    stages: Sequence[Stage],
    sources: Mapping[str, Path],
    injections: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    force: bool,
    stale: Callable[[Path], str],
) -> None:
    """Run the stages that need it; ``shared`` are the inputs that all of them have."""
    state = _read_state(folder)
    for number, stage in enumerate(stages):
        label = f"[{number + 1}/{len(stages)}] {stage.name}"
        inputs = {
            **shared,
            "notebook": notebooks.source_digest(sources[stage.name]),
            "parameters": injections[stage.name],
            "earlier records": _records(folder, stages[:number]),
        }
        inputs = json.loads(json.dumps(inputs))  # as the state file will hold them
        done = state.get(stage.name)
        reason = "forced" if force else _reason_to_run(folder, stage, done, inputs)
        if not reason and number == 0:
            reason = stale(folder)
        if not reason:
            print(f"{label}: unchanged, skipped", flush=True)
            continue
        print(f"{label}: running ({reason})", flush=True)
        # A training notices other settings itself. (Early versions did not note the weights.)
        known = done["inputs"].get(WEIGHTS, inputs[WEIGHTS]) if done else inputs[WEIGHTS]
        if stage.resumes and (force or known != inputs[WEIGHTS]):
            _set_aside(folder / stage.resumes)
        # Forgotten before it starts: a stage that is interrupted or fails counts as not done.
        state.pop(stage.name, None)
        write_json(folder / STATE_FILE, state)
        (folder / stage.record).unlink(missing_ok=True)
        stage_started = time.monotonic()
        notebooks.run_notebook(
            sources[stage.name],
            _executed(folder, stage),
            injections[stage.name],
            check=functools.partial(_broken_promise, folder, stage),
        )
        seconds = round(time.monotonic() - stage_started, 1)
        outputs = _output_digests(folder, stage)
        state[stage.name] = {"inputs": inputs, "outputs": outputs, "seconds": seconds}
        write_json(folder / STATE_FILE, state)
        print(f"{label}: done in {seconds:.1f} s", flush=True)


def train(config: Config, run_dir: Path) -> None:
    """Train as ``training.trainer.fit`` does, by executing notebook 02 in a prepared run folder."""
    preset = run_dir.resolve() / f"{config.preset}.yaml"
    values = {key: value for key, value in config.to_dict().items() if key != "preset"}
    runtime.write_text(preset, yaml.safe_dump(values))
    stages = [stage for stage in STAGES if stage.name == "02_training"]
    reproduce(preset, run_dir=run_dir, parameters={"SEED": config.seed}, stages=stages)


def publish(run_dir: str | Path, stages: Sequence[Stage] = STAGES) -> list[Path]:
    """Copy a run's executed notebooks into ``notebooks/``, its figures into ``figures/``.

    Returns the files written, in the checkout that this package is imported from; ``run_dir`` is
    a folder that :func:`reproduce` has filled with these stages.

    Raises:
        PublishError: a stage has not succeeded or is out of date, a notebook was changed after
            the run or ran with other parameters than its own, or holds this machine's paths.
            Nothing has been copied.
    """
    run_dir, repository = Path(run_dir), runtime.checkout_root()
    if repository is None:
        raise PublishError("not published: this package is not imported from a checkout")
    state = _read_state(run_dir)
    copies = {}
    for index, stage in enumerate(stages):
        target = repository / "notebooks" / f"{stage.name}.ipynb"
        problem = _publish_problem(run_dir, stage, stages[:index], state.get(stage.name), target)
        if problem:
            raise PublishError(f"not published: {stage.name} {problem}")
        copies[target] = _executed(run_dir, stage)
    for figure in sorted((run_dir / "figures").glob("*.png")):
        copies[repository / "figures" / figure.name] = figure
    for target, source in copies.items():
        with runtime.atomic_path(target) as temporary:
            temporary.write_bytes(source.read_bytes())
    return list(copies)


# ---- before anything runs ----------------------------------------------------------------------
def _sources(stages: Sequence[Stage]) -> dict[str, Path]:
    """Path of every stage's notebook."""
    root = (runtime.checkout_root() or Path.cwd()) / "notebooks"
    sources = {stage.name: root / f"{stage.name}.ipynb" for stage in stages}
    for path in sources.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run from a checkout of the repository")
    return sources


def _injections(
    sources: Mapping[str, Path], own: Mapping[str, str], extra: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per notebook, the parameters that differ from the notebook's own values.

    papermill itself only warns about unknown parameters and goes on with the defaults.
    """
    defaults = {name: notebooks.parameters_of(path) for name, path in sources.items()}
    for name, known in defaults.items():
        if missing := set(OWN_PARAMETERS) - set(known):
            raise ValueError(f"notebook {name} has no parameter {', '.join(sorted(missing))}")
    free = {key for known in defaults.values() for key in known} - set(OWN_PARAMETERS)
    if unknown := set(extra) - free:
        raise ValueError(
            f"parameters {', '.join(sorted(unknown))}: the notebooks have "
            f"{', '.join(sorted(free)) or 'none'}, and {', '.join(OWN_PARAMETERS)} by other means"
        )
    result = {}
    for name, known in defaults.items():
        wanted = {key: value for key, value in {**own, **extra}.items() if key in known}
        values = {key: notebooks.converted(key, value, known[key]) for key, value in wanted.items()}
        result[name] = {key: value for key, value in values.items() if value != known[key]}
    return result


# ---- changes since the last run ----------------------------------------------------------------
def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _package_digest() -> str:
    """Digest of the code that a notebook may use: all rooms but this one and the command line."""
    here = Path(__file__).resolve().parent
    files = sorted(here.parent.rglob("*.py"))
    used = [f for f in files if f.parent != here and f.name != "__main__.py"]
    return _digest({f.relative_to(here.parent).as_posix(): sha256_file(f) for f in used})


def _records(folder: Path, stages: Sequence[Stage]) -> dict[str, str]:
    return {stage.name: sha256_file(folder / stage.record) for stage in stages}


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        return {}
    state = runtime.read_json(path, "`reproduce`")
    with runtime.reading(path, "inputs and outputs of stages", "delete it: the stages run again"):
        if not all({"inputs", "outputs"} <= set(done) for done in state.values()):
            raise ValueError("they are missing")
    return state


def _executed(folder: Path, stage: Stage) -> Path:
    return folder / "notebooks" / f"{stage.name}.ipynb"


def _output_digests(folder: Path, stage: Stage) -> dict[str, str]:
    """Digest of every file the stage has written, with its executed notebook and record."""
    found = [path for pattern in stage.outputs for path in sorted(folder.glob(pattern))]
    found += [path for path in (folder / stage.record, _executed(folder, stage)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}


def _touched(folder: Path, stage: Stage, done: Mapping[str, Any]) -> list[str]:
    """The files of a stage that are not as it left them."""
    now = _output_digests(folder, stage)
    return sorted(path for path, then in done["outputs"].items() if now.get(path) != then)


def _reason_to_run(
    folder: Path, stage: Stage, done: Mapping[str, Any] | None, inputs: Mapping[str, Any]
) -> str:
    """The reason why a stage must run, or ``""`` where it need not."""
    if done is None:
        return "not done yet"
    if changed := [key for key in inputs if inputs[key] != done["inputs"].get(key)]:
        return f"changed: {', '.join(changed)}"
    touched = _touched(folder, stage, done)
    return f"changed or missing since: {', '.join(touched)}" if touched else ""


def _set_aside(folder: Path) -> None:
    """Rename a folder, so that nothing is found there and nothing is lost."""
    if folder.is_dir():
        names = (f"{folder.name}.before{number or ''}" for number in itertools.count())
        before = next(path for path in map(folder.with_name, names) if not path.exists())
        folder.rename(before)
        print(f"{display_path(folder)} was renamed to {before.name}", flush=True)


# ---- after a stage -----------------------------------------------------------------------------
def _broken_promise(folder: Path, stage: Stage) -> str:
    """The files that a stage did not write, as a sentence, or ``""``."""
    missing = [
        pattern
        for pattern in (*stage.outputs, stage.record)
        if not any(path.is_file() and path.stat().st_size for path in folder.glob(pattern))
    ]
    return f"wrote no {', '.join(missing)} into {display_path(folder)}" if missing else ""


def _publish_problem(
    folder: Path, stage: Stage, earlier: Sequence[Stage], done: Mapping | None, target: Path
) -> str:
    """The reason why a stage's notebook must not be published, or ``""``."""
    if done is None:
        return f"has not succeeded in {display_path(folder)}"
    records, then = _records(folder, earlier), done["inputs"]["earlier records"]
    stale = _touched(folder, stage, done)
    stale += [f"{name}.json" for name in records if records[name] != then.get(name)]
    if stale:
        return f"is out of date: {', '.join(stale)} changed since it ran"
    if not target.is_file() or notebooks.source_digest(target) != done["inputs"]["notebook"]:
        return f"was executed from another version than {display_path(target)}: run it again"
    if done["inputs"]["parameters"]:
        return f"ran with {done['inputs']['parameters']} instead of the notebook's own values"
    found = notebooks.machine_paths(_executed(folder, stage))
    return f"shows this machine's path {found[0]}" if found else ""
