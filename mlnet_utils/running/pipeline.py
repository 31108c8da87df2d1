"""Run the numbered notebooks in order with papermill; publish successful runs only.

A stage is one notebook and the files it promises: the pipeline knows stages and paths. It needs the
extra ``notebooks`` (``pip install "mlnet-utils[notebooks]"``).
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlnet_utils import runtime
from mlnet_utils.config import Config, backbone_file, load_config
from mlnet_utils.running import notebooks
from mlnet_utils.runtime import digest_of, display_path, sha256_file, write_json

STATE_FILE = "pipeline.json"
WEIGHTS = "backbone weights"  # an input: the checksum of their file, None where there is none
PHOTOS = "SHOW_PHOTOS"  # the parameter that keeps a dataset's photos out of the outputs
PUBLISHED = {"PRESET", PHOTOS, "STUDY"}  # parameters that a published copy may have been given
OWN_PARAMETERS = ("PRESET", "RUN_DIR", "DATA_ROOT")  # set through the arguments of `reproduce`


class PublishError(RuntimeError):
    """A run that must not be published; the message gives the reason."""


@dataclass(frozen=True)
class Stage:
    """One notebook and the files it promises: glob patterns, relative to the run folder.

    Its last act is to write its record, ``<name>.json``. ``resumes`` is the folder with which an
    interrupted stage goes on. ``stale`` returns a change, ``""`` = none, of the files that it has
    read outside the run folder.
    """

    name: str
    outputs: tuple[str, ...] = ()
    resumes: str = ""
    stale: Callable[[Path], str] = lambda folder: ""

    @property
    def record(self) -> str:  # its path in the run folder
        return f"{self.name}.json"

    @property
    def executed(self) -> str:  # the path of its executed copy there
        return f"notebooks/{self.name}.ipynb"


def _prepared(folder: Path, check: bool):
    from mlnet_utils.data.photos import Prepared  # imports torch

    return Prepared.read(folder / "data", check)


def _changed_sources(folder: Path) -> str:
    return next(iter(_prepared(folder, check=False).check(everything=False)), "")


STAGES = (
    Stage("01_data_preparation", ("data/meta.json",), stale=_changed_sources),
    Stage("02_training", ("checkpoints/best.pt", "log.csv", "times.csv"), resumes="checkpoints"),
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
) -> Path:
    """Run every stage with changed inputs, in order, and return the folder of the results.

    A stage is skipped when its inputs are those of its last success: its notebook and parameters,
    the preset's content, the package, and the records of the stages before it. Its files, and the
    dataset's that it read, must be as it left them too. A finished training goes on where it ended:
    it is not repeated because a notebook or the package changed, only with ``force`` or other
    backbone weights. A second call for the same folder waits for the first.

    ``preset``, ``run_dir`` and ``data_root`` are the notebooks' parameters of these names;
    ``parameters`` are others, text in the type of the notebook's own value, so that a command line
    needs no quoting. ``force`` runs unchanged stages too, from their beginning: the folder that
    they would go on with is kept beside itself, as ``checkpoints.before``, ``.before1`` and so on.

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
    if folder.resolve() != (runtime.runs_root() / Path(preset).stem).resolve():
        own["RUN_DIR"] = str(folder.resolve())
    if raw != runtime.data_root().resolve():
        own["DATA_ROOT"] = str(raw)
    root = (runtime.checkout_root() or Path.cwd()) / "notebooks"
    sources = {stage.name: root / f"{stage.name}.ipynb" for stage in stages}
    if missing := [path for path in sources.values() if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is missing: run from a checkout of the repository")
    injections = _injections(sources, own, parameters or {})

    asked = injections.get("03_evaluation", {})
    replace(config, protocol=asked.get("PROTOCOL") or config.protocol)  # refuses an unknown one
    split = asked.get("SPLIT", "")
    weights = Path(backbone_file(config)).expanduser()
    shared = {
        "preset": digest_of(config.to_dict()),
        "package": runtime.package_digest(),
        "data folder": str(raw),
        WEIGHTS: sha256_file(weights) if weights.is_file() else None,
    }
    started = time.monotonic()
    with runtime.locked(folder / STATE_FILE):
        state = _read_state(folder)
        for number, stage in enumerate(stages):
            inputs = {
                **shared,
                "notebook": notebooks.source_digest(sources[stage.name]),
                "parameters": injections[stage.name],
                "earlier records": _records(folder, stages[:number]),
            }
            inputs = json.loads(json.dumps(inputs))  # as the state file will hold them
            if split and stage.name == "02_training":  # refused before hours of training
                _prepared(folder, check=True).with_truth(split)
            label = f"[{number + 1}/{len(stages)}] {stage.name}"
            reason = "forced" if force else _reason_to_run(folder, stage, state, inputs)
            if reason:
                print(f"{label}: running ({reason})", flush=True)
                _run_stage(folder, stage, sources[stage.name], inputs, state, force)
                print(f"{label}: done in {state[stage.name]['seconds']:.1f} s", flush=True)
            else:
                print(f"{label}: unchanged, skipped", flush=True)
    print(f"Finished in {time.monotonic() - started:.1f} s; results: {display_path(folder)}")
    return folder


def _run_stage(
    folder: Path, stage: Stage, source: Path, inputs: dict, state: dict, force: bool
) -> None:
    """Execute a stage, and note in the state that it is done."""
    # A training notices other settings itself. (Early versions did not note the weights.)
    before = state.pop(stage.name, {"inputs": inputs})["inputs"]
    if stage.resumes and (force or before.get(WEIGHTS, inputs[WEIGHTS]) != inputs[WEIGHTS]):
        runtime.set_aside(folder / stage.resumes)
    # Forgotten before it starts: a stage that is interrupted or fails counts as not done.
    write_json(folder / STATE_FILE, state)
    (folder / stage.record).unlink(missing_ok=True)
    started = time.monotonic()
    check = functools.partial(_broken_promise, folder, stage)
    notebooks.run_notebook(source, folder / stage.executed, inputs["parameters"], check)
    seconds = round(time.monotonic() - started, 1)
    figures = folder.glob("figures/*.png")
    runtime.remove_temporaries([folder / stage.record, folder / stage.executed, *figures])
    outputs = _output_digests(folder, stage)
    state[stage.name] = {"inputs": inputs, "outputs": outputs, "seconds": seconds}
    write_json(folder / STATE_FILE, state)


def train(config: Config, run_dir: Path) -> None:
    """Train as ``training.trainer.fit`` does, by executing notebook 02 in a prepared run folder."""
    preset = run_dir.resolve() / f"{config.preset}.yaml"
    values = {key: value for key, value in config.to_dict().items() if key != "preset"}
    with runtime.locked(preset):
        runtime.write_text(preset, yaml.safe_dump(values))
    stages = [stage for stage in STAGES if stage.name == "02_training"]
    reproduce(preset, run_dir=run_dir, parameters={"SEED": config.seed}, stages=stages)


def publish(run_dir: str | Path, stages: Sequence[Stage] = STAGES) -> list[Path]:
    """Copy a run's executed notebooks into ``notebooks/``, its figures into ``figures/``.

    Those of another preset than the notebooks' own go into ``results/<preset>/notebooks/``: their
    titles say on which dataset they were executed, their links open the copies, and they must not
    show the dataset's photos. Returns the files written, in the checkout that this package is
    imported from. Raises PublishError: a stage is not done or is out of date, a notebook was
    changed after the run, ran with other parameters than its own, or holds this machine's paths.
    Nothing has been copied.
    """
    run_dir, repository = Path(run_dir), runtime.checkout_root()
    if repository is None:
        raise PublishError("not published: this package is not imported from a checkout")
    state = _read_state(run_dir)
    presets = {done["inputs"]["parameters"].get("PRESET", "") for done in state.values()}
    if len(presets) > 1:
        raise PublishError(f"not published: its stages ran with the presets {sorted(presets)}")
    preset, copies = "".join(presets), {}
    folder = f"results/{Path(preset).stem}/notebooks" if preset else "notebooks"
    for index, stage in enumerate(stages):
        own = repository / "notebooks" / f"{stage.name}.ipynb"
        problem = _publish_problem(run_dir, stage, stages[:index], state.get(stage.name), own)
        if problem:
            raise PublishError(f"not published: {stage.name} {problem}")
        content = (run_dir / stage.executed).read_bytes()
        if preset:
            names, data = [s.name for s in stages], load_config(preset).dataset.upper()
            content = notebooks.moved(run_dir / stage.executed, folder, data, names).encode()
        copies[repository / folder / own.name] = content
    if not preset:
        for figure in sorted((run_dir / "figures").glob("*.png")):
            copies[repository / "figures" / figure.name] = figure.read_bytes()
    for target, content in copies.items():
        with runtime.atomic_path(target) as temporary:
            temporary.write_bytes(content)
    return list(copies)


# ---- before anything runs ----------------------------------------------------------------------
def _injections(
    sources: Mapping[str, Path], own: Mapping[str, str], extra: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per notebook, the parameters that differ from its own; papermill would ignore new names."""
    defaults = {name: notebooks.parameters_of(path) for name, path in sources.items()}
    for name, known in defaults.items():
        if missing := set(OWN_PARAMETERS) - set(known):
            raise ValueError(f"notebook {name} has no parameter {', '.join(sorted(missing))}")
    free = {key for known in defaults.values() for key in known} - set(OWN_PARAMETERS)
    if unknown := set(extra) - free:
        there = f"{', '.join(sorted(free)) or 'none'}, and {', '.join(OWN_PARAMETERS)} otherwise"
        raise ValueError(f"parameters {', '.join(sorted(unknown))}: the notebooks have {there}")
    result = {}
    for name, known in defaults.items():
        wanted = {key: value for key, value in {**own, **extra}.items() if key in known}
        values = {key: notebooks.converted(key, value, known[key]) for key, value in wanted.items()}
        result[name] = {key: value for key, value in values.items() if value != known[key]}
    return result


# ---- changes since the last run ----------------------------------------------------------------
def _records(folder: Path, stages: Sequence[Stage]) -> dict[str, str]:
    return {stage.name: sha256_file(folder / stage.record) for stage in stages}


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        return {}
    with runtime.reading(path, "inputs and outputs of stages", "delete it: the stages run again"):
        state = json.loads(path.read_text(encoding="utf-8"))
        if not all({"inputs", "outputs"} <= set(done) for done in state.values()):
            raise ValueError("they are missing")
    return state


def _output_digests(folder: Path, stage: Stage) -> dict[str, str]:
    """Digest of every file the stage has written, with its executed notebook and record."""
    patterns = (*stage.outputs, stage.record, stage.executed)
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}


def _touched(folder: Path, stage: Stage, done: Mapping[str, Any]) -> list[str]:
    """The files of a stage that are not as it left them."""
    now = _output_digests(folder, stage)
    return sorted(path for path, then in done["outputs"].items() if now.get(path) != then)


def _reason_to_run(
    folder: Path, stage: Stage, state: Mapping[str, Any], inputs: Mapping[str, Any]
) -> str:
    """The reason why a stage must run, or ``""`` where it need not."""
    if not (done := state.get(stage.name)):
        return "not done yet"
    if changed := [key for key in inputs if inputs[key] != done["inputs"].get(key)]:
        return f"changed: {', '.join(changed)}"
    if touched := _touched(folder, stage, done):
        return f"changed or missing since: {', '.join(touched)}"
    return stage.stale(folder)


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
        return f"has no finished run in {display_path(folder)}: run `reproduce`"
    records, then = _records(folder, earlier), done["inputs"]["earlier records"]
    stale = _touched(folder, stage, done)
    stale += [f"{name}.json" for name in records if records[name] != then.get(name)]
    if stale:
        return f"is out of date: {', '.join(stale)} changed since it ran; run `reproduce`"
    if not target.is_file() or notebooks.source_digest(target) != done["inputs"]["notebook"]:
        return f"was executed from another version than {display_path(target)}: run it again"
    if done["inputs"].get("package") != runtime.package_digest():
        return "was executed with other code of the package: run `reproduce` again"
    own, given = notebooks.parameters_of(target), done["inputs"]["parameters"]
    if set(given) - PUBLISHED:
        return f"ran with {given} instead of the notebook's own values: run it without"
    if given and PHOTOS in own and given.get(PHOTOS, own[PHOTOS]):
        return f"shows the photos of its dataset: run it with `-p {PHOTOS} False`"
    found = notebooks.machine_paths(folder / stage.executed)
    return f"shows this machine's path {found[0]}" if found else ""
