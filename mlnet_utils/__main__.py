"""Command line: thin wrappers over the functions that the notebooks call.

``python -m mlnet_utils <verb> --help`` shows examples of each verb.
"""

import argparse
import inspect
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlnet_utils import __version__, runtime
from mlnet_utils.config import choices, load_config, preset_names

Outcome = tuple[str, int]  # the report, which one process of a launch prints, and the exit code


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 a reported failure, 2 wrong usage)."""
    options = parser().parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # names on the disk may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["MLNET_COMMAND"] = shlex.join(["python", "-m", "mlnet_utils", *words])  # for records
    try:
        if "data_root" in options:
            options.data_root = runtime.data_root(options.data_root)
        if "run_dir" in options:
            options.run_dir = runtime.run_dir(options.run_dir, options.preset)
        report, code = options.function(options)
        if runtime.first_of_launch():
            print(report)
        runtime.leave_processes()
        return code
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # These carry a sentence for the user; a traceback would bury it. --debug shows it.
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped'}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="python -m mlnet_utils", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    # Options that several verbs share.
    groups = [argparse.ArgumentParser(add_help=False) for _ in range(6)]
    raw, run, stages, network, benchmark, changes = groups
    text = "raw datasets (default: $MLNET_DATA, data/)"
    raw.add_argument("--data-root", "--root", default="", help=text)
    presets = f"{', '.join(preset_names())}, or a YAML file"
    run.add_argument("--preset", default="sample", help=presets)
    run.add_argument("--run-dir", default="", help="default: runs/<preset>")
    stages.add_argument("--study", action="store_true", help="notebook 05, the ablation, too")
    text = "a trained, imported or exported network (default: the one in the package)"
    network.add_argument("--checkpoint", type=Path, default=runtime.SHIPPED, help=text)
    benchmark.add_argument("--dataset", required=True, help="an unknown name lists the benchmarks")
    benchmark.add_argument("--split", default="test", help="test (default), or val where taken")
    benchmark.add_argument("--photos", default="", help="its photos, if not in the raw data")
    several = {"action": "append", "default": []}
    pairs = {**several, "type": override, "metavar": "KEY=VALUE"}
    text = "change one key of the preset (repeatable)"
    changes.add_argument("--set", dest="overrides", help=text, **pairs)

    option = _verb(verbs, reproduce, run, raw, stages)
    option("--force", action="store_true", help="rerun stages that are up to date")
    text = "set a parameter of the notebooks (repeatable)"
    option("-p", dest="parameters", help=text, nargs=2, metavar=("NAME", "VALUE"), **several)

    _verb(verbs, publish, run, raw, stages)

    option = _verb(verbs, download, raw)
    option("name", help="a dataset; an unknown name lists them all")
    option("--from", nargs="+", default=[], type=Path, dest="archives", help="archives you have")

    option = _verb(verbs, prepare, run, raw)
    option("--check", action="store_true", help="re-verify prepared data instead")

    _verb(verbs, train, run, raw, changes)

    option = _verb(verbs, evaluate, run, raw, changes)
    option("--checkpoint", type=Path, help="default: the run's checkpoints/best.pt")
    option("--split", choices=("val", "test"), default="", help="default: test, or val if secret")
    option("--protocol", choices=choices("protocol"), help="default: the preset's")

    option = _verb(verbs, score)
    option("maps", type=Path, help="folder of maps, or pysaliency's HDF5 file")
    option("--data", type=Path, required=True, help="a run with prepared data, or its data/")
    option("--split", choices=("train", "val", "test"), default="", help="as of `evaluate`")
    option("--protocol", choices=choices("protocol"), default="mit300", help="default: mit300")
    option("--compare", type=Path, metavar="MAPS", help="other maps, subtracted photo by photo")
    option("--out", type=Path, default=Path("scores"), help="folder (default: scores/)")

    option = _verb(verbs, sweep, raw)
    option("grid", type=Path, help="YAML: preset, seeds, split, common, cells")
    option("--out", type=Path, help="default: runs/<grid>")
    option("--workers", type=int, default=1, help="trainings at a time on this machine")
    option("--plain", action="store_true", help="train without executing notebooks")
    option("--cluster", default="", help="executor of submitit: slurm, local")
    option("--option", dest="options", help="of submitit, e.g. timeout_min=60", **pairs)

    option = _verb(verbs, predict, network)
    option("--out", type=Path, default=Path("saliency"), help="folder (default: saliency/)")
    option("--overlay", action="store_true", help="also write <stem>_overlay.png")
    option("--npy", action="store_true", help="also write <stem>.npy, sums to 1")
    option("--video", action="store_true", help="paths are videos; writes <stem>.mp4")
    option("--force", action="store_true", help="redo maps that exist")
    option("--fast", action="store_true", help="half precision, no mirrored photo: less exact")
    option("--megapixels", type=float, help="largest photo (default: 178), 20 MB of memory each")
    option("paths", nargs="+", type=Path, metavar="PATH", help="photos and folders")

    option = _verb(verbs, export, network)
    option("--out", type=Path, required=True, help=".onnx or .pt2 file to write")
    option("--format", choices=("onnx", "torch-export"), default="onnx")
    option("--int8", action="store_true", help="8 bits, calibrated on the photos (ONNX)")
    option("photos", nargs="*", type=Path, help="to verify with (default: the training photos)")

    option = _verb(verbs, submit, network, benchmark, raw)
    option("--out", type=Path, required=True, help=".zip, .json or .hdf5 file to write")

    option = _verb(verbs, check_submission, benchmark, raw)
    option("file", type=Path, help=".zip, .json or .hdf5 file")

    option = _verb(verbs, import_weights)
    option("file", type=Path, help="Keras HDF5 file, or MLNet-Pytorch's state dict")
    option("--out", type=Path, required=True, help="checkpoint or .safetensors file")
    return top


def _verb(verbs, function: Callable, *shared: argparse.ArgumentParser) -> Callable:
    """Add a verb, described by its docstring; returns the method that adds its options."""
    name = function.__name__.replace("_", "-")
    summary, _, examples = inspect.cleandoc(function.__doc__).partition("\n\n")
    examples = "".join(f"\n  %(prog)s {line}" for line in examples.splitlines())
    verb = verbs.add_parser(
        name,
        parents=shared,
        help=summary.rstrip("."),
        description=f"{summary}\n\nExamples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(function=function)
    return verb.add_argument


def override(pair: str) -> tuple[str, Any]:
    """Key and value (JSON, else text) of ``"lr=0.01"``; an ArgumentTypeError without ``=``."""
    key, equals, text = pair.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {pair!r}")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


# ---- verbs: the summary, then examples of a verb's arguments ------------------------------------
def reproduce(options: argparse.Namespace) -> Outcome:
    """Run all notebooks, data to figures.

    --preset osie --data-root ~/data
    --preset my.yaml --force
    """
    from mlnet_utils.running import pipeline

    pipeline.reproduce(
        options.preset,
        run_dir=options.run_dir,
        data_root=options.data_root,
        parameters=dict(options.parameters),
        force=options.force,
        stages=_stages(options),
    )
    return _scores(runtime.read_json(options.run_dir / "metrics.json", "notebook 03_evaluation"))


def publish(options: argparse.Namespace) -> Outcome:
    """Copy a finished run's notebooks and figures here; those of other presets to results/.

    --preset sample --study
    """
    from mlnet_utils.running import pipeline

    files = pipeline.publish(options.run_dir, stages=_stages(options))
    return "\n".join(map(runtime.display_path, files)), 0


def _stages(options: argparse.Namespace) -> tuple[str, ...]:
    from mlnet_utils.running import pipeline

    return (*pipeline.STAGES, pipeline.STUDY) if options.study else pipeline.STAGES


def _scores(report: dict) -> Outcome:
    from mlnet_utils.metrics.summary import score_table  # it imports torch

    return score_table(report), 0


def download(options: argparse.Namespace) -> Outcome:
    """Fetch, verify and unpack a dataset.

    osie
    salicon-2017 --root ~/data --from images.zip maps.zip
    """
    from mlnet_utils.data.download import SOURCES, acquire

    folder = acquire(options.name, options.data_root, options.archives)
    complete = f"{options.name} is complete in {runtime.display_path(folder)}"
    return f"{complete}; cite: {SOURCES[options.name].citation}", 0


def prepare(options: argparse.Namespace) -> Outcome:
    """Index a dataset (notebook 01 without the pictures).

    --preset osie
    --preset osie --check
    """
    from mlnet_utils.data import photos, preparation

    folder = options.run_dir / "data"
    if options.check:
        prepared = photos.Prepared.read(folder, check=False)
        problems = prepared.check()
        report = "\n".join(problems) or f"{len(prepared.photos)} photos are as prepared"
        return report, 1 if problems else 0
    prepared = preparation.prepare(load_config(options.preset), options.data_root, folder)
    return f"{prepared.describe()}, in {folder}", 0


def train(options: argparse.Namespace) -> Outcome:
    """Train, or continue a training, on prepared data.

    --preset osie --set epochs=4 --set lr=0.002
    """
    from mlnet_utils.data import preparation
    from mlnet_utils.training import trainer

    config = load_config(options.preset, **dict(options.overrides))
    accelerator = trainer.make_accelerator(config)  # of this process's launch
    with accelerator.main_process_first():
        data = preparation.ensure(config, options.data_root, options.run_dir / "data")
    result = trainer.fit(config, options.run_dir, accelerator)
    epochs = result.history[-1]["epoch"]
    word = "epoch" if epochs == 1 else "epochs"
    best = runtime.display_path(result.best)
    return f"{data.describe()}\ntrained {epochs} {word}; best checkpoint: {best}", 0


def evaluate(options: argparse.Namespace) -> Outcome:
    """Score a trained network and the baselines; --set refuses keys of training.

    --preset osie --split val
    """
    from mlnet_utils.experiments import evaluation

    changes = dict(options.overrides)
    if other := sorted(changes.keys() - set(evaluation.EVALUATION_KEYS)):
        known = ", ".join(evaluation.EVALUATION_KEYS)
        raise ValueError(f"--set {', '.join(other)}: `evaluate` takes {known}; `train` the others")
    what = (options.run_dir, options.checkpoint, options.split, options.protocol)
    config = load_config(options.preset, **changes)
    return _scores(evaluation.evaluate(*what, config=config, changes=changes))


def score(options: argparse.Namespace) -> Outcome:
    """Score saliency maps of any origin and the baselines.

    maps/ --data runs/osie
    maps.hdf5 --data runs/osie --compare other_maps/ --protocol salicon
    """
    from mlnet_utils.experiments import scoring

    how = (options.split, options.protocol, options.compare)
    return scoring.describe(scoring.score(options.maps, options.data, options.out, *how)), 0


def sweep(options: argparse.Namespace) -> Outcome:
    """Train a grid of configurations and seeds, in one table.

    grid.yaml --workers 2 --plain
    grid.yaml --cluster slurm --option slurm_partition=gpu
    """
    from mlnet_utils.experiments import sweep as sweeps

    if options.plain:
        from mlnet_utils.training.trainer import fit as train
    else:
        from mlnet_utils.running.pipeline import train
    grid = sweeps.read_grid(options.grid)
    folder = options.out or runtime.run_dir("", grid.name)
    how = {"workers": options.workers, "cluster": options.cluster, "train": train}
    failed = sweeps.run_sweep(grid, folder, options.data_root, options=dict(options.options), **how)
    for job, error in failed.items():
        print(f"failed: {job}: {error}", file=sys.stderr)
    return sweeps.summary(folder), 1 if failed else 0


def predict(options: argparse.Namespace) -> Outcome:
    """Saliency maps for photos and folders of photos; --video refuses --npy and --megapixels.

    photo.jpg
    --out maps --overlay holiday/
    --checkpoint best.pt --out maps --overlay --video clip.mp4
    """
    how = {"overlay": options.overlay, "force": options.force, "fast": options.fast}
    if options.video:
        from mlnet_utils.predict.video import predict_videos as predict

        if options.npy or options.megapixels:
            raise ValueError("--npy and --megapixels are for photos; a video's maps are a video")
    else:
        from mlnet_utils.predict.folders import predict_folder as predict

        how["npy"] = options.npy
        if options.megapixels is not None:
            how["megapixels"] = options.megapixels
    result = predict(options.checkpoint, options.paths, options.out, **how)
    return result.summary(), 1 if result.failed else 0


def export(options: argparse.Namespace) -> Outcome:
    """Write a trained network for other runtimes.

    --checkpoint best.pt --out small.onnx --int8 holiday/
    --checkpoint best.pt --out network.pt2 --format torch-export photo.jpg
    """
    from mlnet_utils.predict.export import export as write

    report = write(options.checkpoint, options.out, options.format, options.int8, options.photos)
    return report.summary(), 0


def submit(options: argparse.Namespace) -> Outcome:
    """Write the file that a public benchmark takes.

    --checkpoint best.pt --dataset salicon-2017 --split test --out maps.zip
    --checkpoint best.pt --dataset mit300 --photos ~/mit300 --out maps.hdf5
    """
    from mlnet_utils.predict.submission import write_submission

    place = (options.split, options.photos, options.data_root)
    path = write_submission(options.checkpoint, options.dataset, options.out, *place)
    where = runtime.display_path(path)
    return f"{where}: complete and valid for {options.dataset}, {options.split}", 0


def check_submission(options: argparse.Namespace) -> Outcome:
    """Check anybody's benchmark file.

    maps.zip --dataset salicon-2017 --split test
    """
    from mlnet_utils.predict import submission

    place = (options.split, options.photos, options.data_root)
    _, sizes = submission.benchmark_photos(options.dataset, *place)
    problems = submission.validate_submission(options.file, sizes)
    report = "\n".join(problems) or f"valid: a map for each of the {len(sizes)} photos"
    return report, 1 if problems else 0


def import_weights(options: argparse.Namespace) -> Outcome:
    """Convert weights of earlier ML-Nets.

    mlnet_salicon_weights.pkl --out authors.pt
    vgg16_weights.h5 --out vgg16.safetensors
    """
    from mlnet_utils.model import legacy

    config = legacy.import_weights(options.file, options.out)
    where = f"{runtime.display_path(options.out)}, normalisation {config.normalisation}"
    if options.out.suffix == ".safetensors":
        return f"backbone vgg16 for backbone_weights: {where}", 0
    size = f"{config.width}x{config.height}"
    return f"checkpoint: {where}, {size}, compat {config.compat}", 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: workers stop too
    runtime.end_process(main())
