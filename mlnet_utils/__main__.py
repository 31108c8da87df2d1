"""Command line: thin wrappers over the functions that the notebooks call.

``python -m mlnet_utils <verb> --help`` shows examples of each verb.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mlnet_utils import __version__
from mlnet_utils.config import choices, load_config, preset_names
from mlnet_utils.runtime import (
    data_root,
    display_path,
    end_process,
    leave_processes,
    note_command,
    read_json,
    run_dir,
)

Verb = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 a reported failure, 2 wrong usage)."""
    options = parser().parse_args(arguments)
    note_command(sys.argv[1:] if arguments is None else arguments)
    try:
        code = options.function(options)
        leave_processes()
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

    verb = _verb(verbs, reproduce)
    _run_options(verb)
    verb.add_argument("--force", action="store_true", help="rerun stages that are up to date")
    verb.add_argument("--study", action="store_true", help="run notebook 05, the ablation, too")
    verb.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="parameters",
        help="set a parameter of the notebooks (repeatable)",
    )  # fmt: skip

    verb = _verb(verbs, publish)
    _run_options(verb)
    verb.add_argument("--study", action="store_true", help="notebook 05 too")

    verb = _verb(verbs, download)
    verb.add_argument("name", help="a dataset; an unknown name lists them all")
    verb.add_argument("--root", default="", help="raw datasets (default: $MLNET_DATA, data/)")
    verb.add_argument(
        "--from", nargs="+", default=[], type=Path, metavar="ARCHIVE", dest="archives",
        help="archives that you have already",
    )  # fmt: skip

    verb = _verb(verbs, prepare)
    _run_options(verb)
    verb.add_argument("--check", action="store_true", help="re-verify prepared data instead")

    verb = _verb(verbs, train)
    _run_options(verb)
    verb.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="change one key of the preset (repeatable)",
    )  # fmt: skip

    verb = _verb(verbs, evaluate)
    _run_options(verb)
    verb.add_argument("--checkpoint", type=Path, help="default: the run's checkpoints/best.pt")
    verb.add_argument("--split", choices=("val", "test"), default="test")
    verb.add_argument("--protocol", choices=choices("protocol"), help="default: as trained")

    verb = _verb(verbs, sweep)
    verb.add_argument("grid", type=Path, help="YAML: preset, seeds, split, common, cells")
    verb.add_argument("--out", type=Path, help="default: runs/<grid>")
    verb.add_argument("--data-root", default="", help="raw datasets (default: $MLNET_DATA, data/)")
    verb.add_argument("--workers", type=int, default=1, help="trainings at a time on this machine")
    verb.add_argument("--plain", action="store_true", help="train without executing notebooks")
    verb.add_argument("--cluster", default="", help="executor of submitit: slurm, local")
    verb.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", dest="options",
        help="parameter of submitit, e.g. timeout_min=60 (repeatable)",
    )  # fmt: skip

    verb = _verb(verbs, predict)
    _checkpoint_option(verb, ", or an exported file")
    verb.add_argument("--out", type=Path, required=True, help="folder for the maps")
    verb.add_argument("--overlay", action="store_true", help="also write <stem>_overlay.png")
    verb.add_argument("--npy", action="store_true", help="also write <stem>.npy, sums to 1")
    verb.add_argument("--video", action="store_true", help="paths are videos; writes <stem>.mp4")
    verb.add_argument("--force", action="store_true", help="redo maps that exist")
    verb.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="photos and folders")

    verb = _verb(verbs, export)
    _checkpoint_option(verb)
    verb.add_argument("--out", type=Path, required=True, help=".onnx or .pt2 file to write")
    verb.add_argument("--format", choices=("onnx", "torch-export"), default="onnx")
    verb.add_argument("--int8", action="store_true", help="8 bits, calibrated on the photos (ONNX)")
    verb.add_argument(
        "photos", nargs="*", type=Path, metavar="PHOTO",
        help="photos and folders to verify with; default: the run's training photos",
    )  # fmt: skip

    verb = _verb(verbs, submit)
    _checkpoint_option(verb, ", or an exported file")
    verb.add_argument("--out", type=Path, required=True, help=".zip, .json or .hdf5 file to write")
    _benchmark_options(verb)

    verb = _verb(verbs, check_submission)
    verb.add_argument("file", type=Path, help=".zip, .json or .hdf5 file")
    _benchmark_options(verb)

    verb = _verb(verbs, import_weights)
    verb.add_argument("file", type=Path, help="Keras HDF5 file, or MLNet-Pytorch's state dict")
    verb.add_argument("--out", type=Path, required=True, help="checkpoint or .safetensors file")
    return top


def _verb(verbs, function: Verb) -> argparse.ArgumentParser:
    """Add a verb; its help is the docstring of its function."""
    text = inspect.cleandoc(function.__doc__)
    verb = verbs.add_parser(
        function.__name__.replace("_", "-"),
        help=text.splitlines()[0].rstrip("."),
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(function=function)
    return verb


def _run_options(verb) -> None:
    names = ", ".join(preset_names())
    verb.add_argument("--preset", default="sample", help=f"{names}, or a YAML file")
    verb.add_argument("--run-dir", default="", help="default: runs/<preset>")
    verb.add_argument("--data-root", default="", help="raw datasets (default: $MLNET_DATA, data/)")


def _checkpoint_option(verb, more: str = "") -> None:
    text = f"a trained or imported network{more}"
    verb.add_argument("--checkpoint", type=Path, required=True, help=text)


def _benchmark_options(verb) -> None:
    verb.add_argument("--dataset", required=True, help="a benchmark; an unknown name lists them")
    verb.add_argument("--split", default="test", help="test (default), or val where it is taken")
    verb.add_argument("--photos", default="", help="folder of its photos, if not in the raw data")
    verb.add_argument("--data-root", default="", help="raw datasets (default: $MLNET_DATA, data/)")


def overrides(pairs: list[str]) -> dict:
    """``["lr=0.01", "levels=2"]`` as a dictionary; values are read as JSON where they are JSON.

    Raises:
        ValueError: an item without ``=``.
    """
    result = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        try:
            result[key] = json.loads(text)
        except ValueError:
            result[key] = text
    return result


def _first_process() -> bool:
    """True in the one process of a launch that reports."""
    return os.environ.get("RANK", "0") == "0"


# ---- verbs -------------------------------------------------------------------------------------
def reproduce(options: argparse.Namespace) -> int:
    """Run all notebooks, data to figures.

    Examples:
        %(prog)s
        %(prog)s --preset osie --data-root ~/data
        %(prog)s --preset my.yaml --force
    """
    from mlnet_utils.running import pipeline

    study = (pipeline.STUDY,) if options.study else ()
    folder = pipeline.reproduce(
        options.preset,
        run_dir=run_dir(options.run_dir, options.preset),
        data_root=data_root(options.data_root),
        parameters=dict(options.parameters),
        force=options.force,
        stages=pipeline.STAGES + study,
    )
    from mlnet_utils.metrics.summary import score_table  # after the run: it imports torch

    print(score_table(read_json(folder / "metrics.json", "notebook 03_evaluation")))
    return 0


def publish(options: argparse.Namespace) -> int:
    """Copy a finished run's notebooks and figures here.

    Examples:
        %(prog)s --preset sample
        %(prog)s --preset sample --study
    """
    from mlnet_utils.running import pipeline

    folder = run_dir(options.run_dir, options.preset)
    study = (pipeline.STUDY,) if options.study else ()
    for path in pipeline.publish(folder, stages=pipeline.STAGES + study):
        print(display_path(path))
    return 0


def download(options: argparse.Namespace) -> int:
    """Fetch, verify and unpack a dataset.

    Examples:
        %(prog)s osie
        %(prog)s salicon-2017 --root ~/data --from images.zip maps.zip
    """
    from mlnet_utils.data.download import acquire

    folder = acquire(options.name, data_root(options.root), options.archives)
    print(f"{options.name} is complete in {display_path(folder)}")
    return 0


def prepare(options: argparse.Namespace) -> int:
    """Index a dataset (notebook 01 without the pictures).

    Examples:
        %(prog)s --preset osie
        %(prog)s --preset osie --check
    """
    from mlnet_utils.data import photos, preparation

    folder = run_dir(options.run_dir, options.preset) / "data"
    if options.check:
        prepared = photos.Prepared.read(folder)
        problems = prepared.check()
        print("\n".join(problems) or f"{len(prepared.photos)} photos are as prepared")
        return 1 if problems else 0
    config = load_config(options.preset)
    meta = preparation.prepare(config, data_root(options.data_root), folder).meta
    print(f"{meta['title']}: {meta['photos']}, {meta['fixations']} fixations, in {folder}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Train, or continue a training, on prepared data.

    Examples:
        %(prog)s --preset sample
        %(prog)s --preset osie --set epochs=4 --set lr=0.002
    """
    from mlnet_utils.data import preparation
    from mlnet_utils.training import trainer

    config = load_config(options.preset, **overrides(options.overrides))
    folder = run_dir(options.run_dir, options.preset)
    accelerator = trainer.make_accelerator(config)  # of this process's launch
    with accelerator.main_process_first():
        if not (folder / "data" / "meta.json").is_file():
            preparation.prepare(config, data_root(options.data_root), folder / "data")
    preparation.check_same_data(config, read_json(folder / "data" / "meta.json", "`prepare`"))
    result = trainer.fit(config, folder, accelerator)
    if accelerator.is_main_process:
        print(f"trained {len(result.history)} epochs; best checkpoint: {display_path(result.best)}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Score a trained network and the baselines.

    Examples:
        %(prog)s --preset sample
        %(prog)s --preset osie --split val
    """
    from mlnet_utils.experiments import evaluation
    from mlnet_utils.metrics.summary import score_table

    folder = run_dir(options.run_dir, options.preset)
    report = evaluation.evaluate(folder, options.checkpoint, options.split, options.protocol)
    if _first_process():
        print(score_table(report))
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Train a grid of configurations and seeds, in one table.

    Examples:
        %(prog)s grid.yaml
        %(prog)s grid.yaml --workers 2 --plain
        %(prog)s grid.yaml --cluster slurm --option slurm_partition=gpu
    """
    from mlnet_utils.experiments import sweep as sweeps
    from mlnet_utils.training import trainer

    train = trainer.fit
    if not options.plain:
        from mlnet_utils.running import pipeline

        train = pipeline.train
    grid = sweeps.read_grid(options.grid)
    folder = options.out or run_dir("", grid.name)
    failed = sweeps.run_sweep(
        grid,
        folder,
        data_root(options.data_root),
        workers=options.workers,
        train=train,
        cluster=options.cluster,
        options=overrides(options.options),
    )
    print(sweeps.summary(folder))
    for job, error in failed.items():
        print(f"failed: {job}: {error}", file=sys.stderr)
    return 1 if failed else 0


def predict(options: argparse.Namespace) -> int:
    """Saliency maps for photos and folders of photos.

    Examples:
        %(prog)s --checkpoint best.pt --out maps photo.jpg holiday/
        %(prog)s --checkpoint network.onnx --out maps --overlay photo.jpg
        %(prog)s --checkpoint best.pt --out maps --overlay --video clip.mp4
    """
    call = (options.checkpoint, options.paths, options.out)
    if options.video:
        from mlnet_utils.predict.video import predict_videos

        if options.npy:
            raise ValueError("--npy is for photos; a video's maps are written as a video only")
        result = predict_videos(*call, overlay=options.overlay, force=options.force)
    else:
        from mlnet_utils.predict.folders import predict_folder

        result = predict_folder(
            *call, overlay=options.overlay, npy=options.npy, force=options.force
        )
    if _first_process():
        print(result.summary())
    return 1 if result.failed else 0


def export(options: argparse.Namespace) -> int:
    """Write a trained network for other runtimes.

    Examples:
        %(prog)s --checkpoint best.pt --out network.onnx
        %(prog)s --checkpoint best.pt --out small.onnx --int8 holiday/
        %(prog)s --checkpoint best.pt --out network.pt2 --format torch-export photo.jpg
    """
    from mlnet_utils.predict.export import export as write

    report = write(options.checkpoint, options.out, options.format, options.int8, options.photos)
    print(report.summary())
    return 0


def submit(options: argparse.Namespace) -> int:
    """Write the file that a public benchmark takes.

    Examples:
        %(prog)s --checkpoint best.pt --dataset salicon-2017 --split test --out maps.zip
        %(prog)s --checkpoint best.pt --dataset mit300 --photos ~/mit300 --out maps.hdf5
    """
    from mlnet_utils.predict import submission

    place = (options.split, options.photos, data_root(options.data_root))
    path = submission.write_submission(options.checkpoint, options.dataset, options.out, *place)
    if _first_process():
        print(f"{display_path(path)}: complete and valid for {options.dataset}, {options.split}")
    return 0


def check_submission(options: argparse.Namespace) -> int:
    """Check anybody's benchmark file.

    Examples:
        %(prog)s maps.zip --dataset salicon-2017 --split test
        %(prog)s maps.hdf5 --dataset mit300 --photos ~/mit300
    """
    from mlnet_utils.predict import submission

    root = data_root(options.data_root)
    _, sizes = submission.benchmark_photos(options.dataset, options.split, options.photos, root)
    problems = submission.validate_submission(options.file, sizes)
    print("\n".join(problems) or f"valid: a map for each of the {len(sizes)} photos")
    return 1 if problems else 0


def import_weights(options: argparse.Namespace) -> int:
    """Convert weights of earlier ML-Nets.

    Examples:
        %(prog)s mlnet_salicon_weights.pkl --out authors.pt
        %(prog)s vgg16_weights.h5 --out vgg16.safetensors
    """
    from mlnet_utils.model import legacy

    config = legacy.import_weights(options.file, options.out)
    where = f"{display_path(options.out)}, normalisation {config.normalisation}"
    if options.out.suffix == ".safetensors":
        print(f"backbone vgg16 for backbone_weights: {where}")
    else:
        print(f"checkpoint: {where}, {config.width}x{config.height}, compat {config.compat}")
    return 0


if __name__ == "__main__":
    end_process(main())
