"""Training speed over several processes on this machine, and the time spent on gradients.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --smoke   # seconds, to see that it works

Every process computes with one thread and all share the batch, as in a real training, over gloo.
In turns with ordinary updates run updates in which the processes keep their gradients to
themselves; what those save is the exchange. Weights and photos are random.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import warnings
from pathlib import Path

import measure
import torch

from mlnet_utils.config import load_config


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def train(environment: dict, preset: str, rounds: int, folder: str, results) -> None:
    """Time updates as one of several processes; the first one reports."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Grad strides")  # of the prior: 48 numbers
    config = load_config(preset, backbone_weights="none", workers=0, cache=False, micro_batch=0)
    trainer = measure.make_trainer(config, Path(folder) / environment["RANK"])
    update = measure.one_update(trainer)

    def alone() -> None:
        with trainer.accelerator.no_sync(trainer.wrapped):
            update()

    times = measure.seconds({"update": update, "alone": alone}, rounds)
    if environment["RANK"] == "0":
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        size = sum(p.numel() * p.element_size() for p in trained)
        results.put((times, size, config.batch_size, trainer.accelerator.mixed_precision))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def measure_world(world: int, preset: str, rounds: int) -> dict:
    """A row of the table."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (environment, preset, rounds, folder, results)
            processes.append(context.Process(target=train, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise SystemExit(f"{world} processes: one ended with code {failed[0]}")
    times, size, batch, precision = results.get()
    together, alone = (measure.median(times[kind]) for kind in ("update", "alone"))
    return {
        "processes": world,
        "images/s": batch / together,
        "seconds per update": together,
        "without exchange": alone,
        "exchange's share": max(1 - alone / together, 0.0) if world > 1 else 0.0,
        "gradient MB": size / 1e6,
        "precision": {"no": "fp32"}.get(precision, precision),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["osie", "mlnet-pytorch"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/scaling.json")
    options = parser.parse_args()
    if options.smoke:
        options.presets, options.rounds = ["tiny"], 1
    rows = []
    for preset in options.presets:
        measured = [measure_world(world, preset, options.rounds) for world in options.processes]
        for row in measured:
            speedup = row["images/s"] / measured[0]["images/s"]
            rows.append({"preset": preset, **row, "speed-up": speedup})
    measure.print_table(rows)
    if not options.smoke:
        measure.save("scaling", {"scaling": rows}, options.out)


if __name__ == "__main__":
    main()
