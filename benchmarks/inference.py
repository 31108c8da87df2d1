"""Prediction speed: the network alone, and whole photos from the file to the density.

    python benchmarks/inference.py
    python benchmarks/inference.py --presets paper --batches 1 16 64   # on a GPU
    python benchmarks/inference.py --smoke                             # seconds

Weights are random: they do not change the speed. The network alone gets letterboxed photos that
are in memory, in fp32, which is what ``predict`` computes in, and in the precision that training
would choose (``auto``). A whole photo is what ``Predictor.predict_batch`` makes of a JPEG file of
800x600 pixels: decoding, letterbox, network, density at the photo's size.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image

from mlnet_utils.config import load_config
from mlnet_utils.model.network import MLNet
from mlnet_utils.predict.predictor import Predictor
from mlnet_utils.training.trainer import choose_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, HEIGHT = 800, 600  # of a photo


def make_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of smooth noise."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        noise = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.jpg")
        Image.fromarray(noise).resize((WIDTH, HEIGHT)).save(paths[-1], quality=90)
    return paths


def calls(preset: str, batch: int, photos: list[Path], smoke: bool) -> dict[str, Callable]:
    """What is timed: name -> one pass over a batch."""
    config = load_config(preset, backbone_weights="none", test_flip=False)
    if smoke:
        config = replace(config, height=80, width=80, prior_cells=(1, 1))
    model = MLNet(config).to(DEVICE).eval()
    auto = choose_precision(replace(config, precision="auto"))
    kind = {"fp16": torch.float16}.get(auto, torch.bfloat16)
    image = torch.randint(
        0, 256, (batch, 3, config.height, config.width), dtype=torch.uint8, device=DEVICE
    )
    predictor = Predictor(model, config, DEVICE)

    def network(half: bool) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), torch.autocast(DEVICE, kind, enabled=half):
                model(image)

        return call

    found = {"network, fp32": network(False)}
    if auto != "no":
        found[f"network, {auto}"] = network(True)
    found["whole photos, fp32"] = lambda: predictor.predict_batch(photos[:batch])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["paper", "osie", "sample"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/inference.json")
    options = parser.parse_args()
    if options.smoke:
        options.batches, options.rounds = [1, 2], 1
    # Random weights may give a dead map.
    warnings.filterwarnings("ignore", "the predicted map is zero")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(Path(folder), max(options.batches))
        for preset in options.presets:
            for batch in options.batches:
                timed = calls(preset, batch, photos, options.smoke)
                times = measure.seconds(timed, options.rounds)
                speeds = {name: batch / measure.median(values) for name, values in times.items()}
                rows += [
                    {
                        "preset": preset,
                        "batch": batch,
                        "prediction": name,
                        "images/s": speed,
                        "ratio": speed / speeds["network, fp32"],
                    }
                    for name, speed in speeds.items()
                ]
    measure.print_table(rows)
    if not options.smoke:
        content = {"photo": [HEIGHT, WIDTH], "device": DEVICE, "inference": rows}
        measure.save("inference", content, options.out)


if __name__ == "__main__":
    main()
