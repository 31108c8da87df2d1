"""Peak memory of training the paper's recipe: 480x640, batch 10, VGG-16, nothing frozen.

    python benchmarks/memory.py
    python benchmarks/memory.py --smoke   # seconds, to see that it works

On a CPU: the most resident memory of the process, less what it held before the network was built.
Every variant runs in a process of its own. ``on_a_gpu.py`` measures a GPU's.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from pathlib import Path

import measure

from mlnet_utils.config import load_config

VARIANTS = {
    "default": {"micro_batch": 0},
    "fp32": {"micro_batch": 0, "precision": "fp32"},
    "checkpointing": {"micro_batch": 0, "checkpointing": True},
    "micro-batches of 5": {"micro_batch": 5},
    "micro-batches of 1": {"micro_batch": 1},
    "checkpointing, micro-batches of 5": {"checkpointing": True, "micro_batch": 5},
}


def resident_peak() -> int:
    """Most resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak(changes: dict, size: tuple[int, int], batch: int, updates: int, results) -> None:
    """Make some updates and report the peak."""
    cells = (size[0] // 80, size[1] // 80)
    options = {"precision": "auto", "backbone_weights": "none", "workers": 0, "prior_cells": cells}
    config = load_config(
        "paper", height=size[0], width=size[1], batch_size=batch, **{**options, **changes}
    )
    before = resident_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = measure.make_trainer(config, Path(folder))
        update = measure.one_update(trainer)
        for _ in range(updates):
            update()
    results.put((resident_peak() - before, trainer.accelerator.mixed_precision))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640))
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/memory.json")
    options = parser.parse_args()
    variants = VARIANTS
    if options.smoke:
        options.size, options.updates = (80, 80), 1
        variants = {name: VARIANTS[name] for name in ("default", "checkpointing")}
    context = multiprocessing.get_context("spawn")
    rows = []
    for name, changes in variants.items():
        results = context.Queue()
        arguments = (changes, tuple(options.size), options.batch, options.updates, results)
        process = context.Process(target=peak, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name}: the measuring process ended with code {process.exitcode}")
        resident, precision = results.get()
        rows.append(
            {
                "training": name,
                "precision": {"no": "fp32"}.get(precision, precision),
                "peak GB": resident / 1e9,
            }
        )
    measure.print_table(rows)
    if not options.smoke:
        content = {"size": options.size, "batch": options.batch, "memory": rows}
        measure.save("memory", content, options.out)


if __name__ == "__main__":
    main()
