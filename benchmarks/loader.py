"""Loading speed against what the network consumes, and memory over an epoch of 10,000 photos.

    python benchmarks/loader.py            # minutes
    python benchmarks/loader.py --smoke    # seconds, to see that it works

Photos of SALICON's size and number of fixations are generated as JPEGs of about 100 kB. An item is
what training gets: decoded, letterboxed and augmented photo, density made from the fixations, and
fixation counts. The network is the preset's, on the same machine, in its own precision.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image

from mlnet_utils.config import Config, load_config
from mlnet_utils.data.loading import EpochSampler, SaliencyDataset, make_loader
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.runtime import cpu_count

HEIGHT, WIDTH, FIXATIONS, SIGMA = 480, 640, 460, 19.0
FILES = 64  # different photos; more records than files share them


def make_photos(folder: Path, count: int) -> list[Photo]:
    """Records of generated photos: noise at several scales, which JPEG packs as it packs photos."""
    rng, photos = np.random.default_rng(0), []
    for number in range(FILES):
        pixels = np.zeros((HEIGHT, WIDTH, 3))
        for scale in (2, 8, 32):
            size = (WIDTH // scale, HEIGHT // scale)
            noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT))) / 3
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg", quality=85)
    for number in range(count):
        points = rng.uniform(0, (WIDTH - 1, HEIGHT - 1), (FIXATIONS, 2)).astype(np.float32)
        observers = np.repeat(np.arange(FIXATIONS // 10), 10).astype(np.int16)
        name = f"{number % FILES}.jpg"
        photos.append(Photo(str(number), name, WIDTH, HEIGHT, "train", points, observers))
    return photos


def resident() -> int:
    """Bytes that this process holds now; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def prepared(photos: list[Photo], folder: Path) -> Prepared:
    """The photos of a folder, as data that are ready for training."""
    return Prepared(folder, photos, {"root": ".", "sigma_px": SIGMA})


def load(photos: list[Photo], folder: Path, config: Config, workers: int) -> float:
    """Photos per second over one pass, without the first batches.

    Those are not timed that the workers load ahead while the first is waited for.
    """
    dataset = SaliencyDataset(prepared(photos, folder), "train", config, augment=True)
    batches = EpochSampler(len(photos), config.batch_size, seed=0)
    loader = iter(make_loader(dataset, batches, workers))
    for _ in range(1 + 2 * workers):
        next(loader)
    start, count = time.perf_counter(), 0
    for batch in loader:
        count += len(batch["image"])
    return count / (time.perf_counter() - start)


def memory_over_an_epoch(photos: list[Photo], folder: Path, config: Config) -> list[dict]:
    """Resident memory of the loading process, ten times in a pass over all photos."""
    dataset = SaliencyDataset(prepared(photos, folder), "train", config, augment=True)
    batches = EpochSampler(len(photos), config.batch_size, seed=0)
    rows, seen, step = [], 0, len(photos) // 10
    for batch in make_loader(dataset, batches, workers=0):
        before, seen = seen, seen + len(batch["image"])
        if seen // step > before // step:
            rows.append({"photos": seen, "resident MB": resident() / 1e6})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="salicon")
    parser.add_argument("--photos", type=int, default=400, help="per measurement of speed")
    parser.add_argument("--epoch", type=int, default=10_000, help="photos for the memory")
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/loader.json")
    options = parser.parse_args()
    if options.smoke:
        options.photos, options.epoch = 100, 100
    config = load_config(options.preset, backbone_weights="none", cache=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = make_photos(folder, max(options.photos, options.epoch))
        size = np.mean([path.stat().st_size for path in folder.glob("*.jpg")])
        small = replace(config, height=96, width=128) if options.smoke else config
        trainer = measure.make_trainer(replace(small, workers=0), folder / "model")
        times = measure.seconds({"update": measure.one_update(trainer)}, 1 if options.smoke else 3)
        consumed = config.batch_size / measure.median(times["update"])
        del trainer
        rows = []
        for workers in sorted({0, 1, min(2, cpu_count()), cpu_count() - 1, cpu_count()}):
            loaded = load(photos[: options.photos], folder, config, workers)
            rows.append(
                {
                    "workers": workers,
                    "loaded photos/s": loaded,
                    "trained photos/s": consumed,
                    "ratio": loaded / consumed,
                }
            )
        print(
            f"{config.height}x{config.width}, batch {config.batch_size}, {size / 1e3:.0f} kB JPEG"
        )
        measure.print_table(rows)
        memory = memory_over_an_epoch(photos[: options.epoch], folder, config)
        measure.print_table(memory)
    if not options.smoke:
        content = {
            "preset": options.preset,
            "size": [config.height, config.width],
            "batch": config.batch_size,
            "jpeg_bytes": float(size),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "speed": rows,
            "memory": memory,
        }
        measure.save("loader", content, options.out)


if __name__ == "__main__":
    main()
