"""What the engine's techniques change in a training: loss curves with and without each, and speed.

    python benchmarks/techniques.py             # minutes; also draws figures/techniques.png
    python benchmarks/techniques.py --smoke     # seconds, to see that it works

The embedded sample is trained once per technique, all else equal, and with other seeds: what two
seeds differ by is the noise of a training. Batch-norm is held fixed, or accumulating gradients
would change what it normalises by. The speed is that of single updates, in turns.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import measure
import seaborn as sns
import torch

from mlnet_utils import plots
from mlnet_utils.config import Config, load_config
from mlnet_utils.data import preparation
from mlnet_utils.runtime import set_determinism
from mlnet_utils.training.trainer import fit

FIGURE = measure.RESULTS.parent.parent / "figures" / "techniques.png"
REFERENCE = "reference"
SEEDS = {f"seed {seed}": {"seed": seed} for seed in (1, 2, 3)}
TECHNIQUES = {
    "bf16": {"precision": "bf16"},
    "checkpointing": {"checkpointing": True},
    "micro-batches of 4": {"micro_batch": 4},
    "channels_last off": {"channels_last": False},
    "deterministic": {"deterministic": True},
    "compile": {"compile": True},
}


def make_config(smoke: bool, **changes) -> Config:
    """The sample, shortened; fp32 and channels_last, as the preset has them."""
    small = {"limit": 96, "epochs": 8, "freeze_norm": True, "micro_batch": 0}
    if smoke:
        small |= {"limit": 8, "epochs": 1, "batch_size": 4, "height": 64, "width": 80}
    return load_config("sample", **{**small, **changes})


def train(config: Config, folder: Path, data: Path) -> list[dict]:
    """The log of one training on data that all trainings share."""
    folder.mkdir()
    (folder / "data").symlink_to(data.resolve(), target_is_directory=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return fit(config, folder).history


def curves(names: dict[str, dict], smoke: bool, folder: Path) -> dict[str, dict[str, list]]:
    """Training and validation loss by epoch of every variant."""
    preparation.prepare(make_config(smoke), folder, folder / "data")
    found = {}
    for number, (name, changes) in enumerate(names.items()):
        history = train(make_config(smoke, **changes), folder / str(number), folder / "data")
        found[name] = {key: [row[key] for row in history] for key in ("train_loss", "val_loss")}
        print(f"{name:20s}" + " ".join(f"{loss:.4f}" for loss in found[name]["val_loss"]))
    set_determinism(False)
    return found


def differences(found: dict, name: str) -> list[float]:
    """By epoch, how far a validation loss is from the reference's."""
    pairs = zip(found[name]["val_loss"], found[REFERENCE]["val_loss"], strict=True)
    return [abs(a - b) for a, b in pairs]


def compare(found: dict, speeds: dict[str, float]) -> list[dict]:
    """A row per variant: its largest difference, as a share of what seeds differ by, its speed."""
    noise = max(max(differences(found, name)) for name in SEEDS if name in found)
    return [
        {
            "training": name,
            "last val_loss": found[name]["val_loss"][-1],
            "largest difference": max(differences(found, name)),
            "of the seeds'": max(differences(found, name)) / noise,
            "speed": speeds.get(name),
        }
        for name in found
    ]


def speed(names: dict[str, dict], smoke: bool, rounds: int, folder: Path) -> dict[str, float]:
    """Updates per second, relative to the reference."""

    def prepared(update: Callable[[], None], config: Config) -> Callable[[], None]:
        def call() -> None:
            set_determinism(config.deterministic)
            update()

        return call

    updates = {}
    for number, (name, changes) in enumerate(names.items()):
        config = make_config(smoke, **changes, cache=False)
        trainer = measure.make_trainer(config, folder / f"speed{number}")
        updates[name] = prepared(measure.one_update(trainer), config)
    times = measure.seconds(updates, rounds)
    set_determinism(False)
    return {n: measure.median(times[REFERENCE]) / measure.median(t) for n, t in times.items()}


def draw(found: dict, path: Path) -> None:
    """Loss curves, and their distance from the reference beside that of other seeds."""
    plots.use_style()
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(plots.WIDTH, 7), layout="constrained")
    epochs = range(1, 1 + len(found[REFERENCE]["val_loss"]))
    others = (name for name in found if name not in SEEDS)
    colours = dict(zip(others, sns.color_palette(plots.PALETTE), strict=False))
    for name, values in found.items():
        same = name != REFERENCE and not any(differences(found, name))
        if name in SEEDS:
            label = "other seeds" if name == next(iter(SEEDS)) else None
            style = {"color": "0.7", "zorder": 1, "lw": 1.5}
        else:
            label = f"{name} (identical)" if same else name
            style = {"color": colours[name], "marker": "o", "ms": 4}
            style["ls"] = "--" if same else "-"
        upper.plot(epochs, values["val_loss"], label=label, **style)
        if name != REFERENCE and not same:
            lower.plot(epochs, differences(found, name), **style)
    upper.set(title="validation loss", ylabel="KL, nats")
    lower.set(title="distance to the reference", xlabel="epoch", ylabel="KL, nats", ylim=(0, None))
    for axis in (upper, lower):
        plots.few_ticks(axis.xaxis, integer=True)
        plots.few_ticks(axis.yaxis)
    figure.legend(loc="outside lower center", ncols=2)
    plots.save(figure, path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="TECHNIQUE")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of speed")
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/techniques.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    seeds, techniques, rounds = SEEDS, TECHNIQUES, options.rounds
    if not shutil.which("g++") and not torch.cuda.is_available():
        options.without.append("compile")  # needs a compiler
    if options.smoke:
        seeds, rounds = dict(list(SEEDS.items())[:1]), 1
        options.without = [name for name in TECHNIQUES if name != "micro-batches of 4"]
    kept = {name: value for name, value in techniques.items() if name not in options.without}
    kept = {REFERENCE: {}, **kept}
    with tempfile.TemporaryDirectory() as folder:
        found = curves({**kept, **seeds}, options.smoke, Path(folder))
        speeds = speed(kept, options.smoke, rounds, Path(folder))
    rows = compare(found, speeds)
    print()
    measure.print_table(rows)
    if not options.smoke:
        draw(found, options.figure)
        content = {"config": make_config(False).to_dict(), "techniques": rows, "curves": found}
        measure.save("techniques", content, options.out)


if __name__ == "__main__":
    main()
