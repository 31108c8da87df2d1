"""Photos per second of the verb ``predict``: from a folder of JPEGs to a folder of maps.

    OMP_NUM_THREADS=2 python benchmarks/inference.py --run-dir runs/osie
    python benchmarks/inference.py --smoke   # a minute, nothing saved

Photos are crops of scikit-image's pictures, 1024x768. The network that comes with the package
predicts them in PyTorch and exported to ONNX, in 32 and in 8 bits, as published and with
``--fast``, each in a process of its own: start, decoding and writing are included. On a machine
that does other things, ``cpu_s``, seconds of processor time a photo, says what a quiet one would
do: photos/s are the cores divided by it. The start, most of ``cpu_s of one photo``, weighs less
the more photos there are. Scores are those of the run's validation photos.
Goal: 8 photos/s on two cores, below 1.5 GB.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
from PIL import Image

from mlnet_utils.experiments.evaluation import TestSet
from mlnet_utils.metrics import METRICS
from mlnet_utils.predict.predictor import Predictor, load
from mlnet_utils.runtime import SHIPPED, progress, require

WIDTH, HEIGHT = 1024, 768  # of a photo
CALIBRATING = 72  # photos that an export in 8 bits takes


def make_photos(folder: Path, count: int) -> Path:
    """Random crops of three pictures as JPEGs."""
    pictures = Path(require("skimage.data", "notebooks").__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png")
    originals = [Image.open(pictures / name).convert("RGB") for name in names]
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        original = originals[number % len(originals)]
        width = rng.integers(200, original.height)  # of 4 by 3; all are wider than high
        height = width * HEIGHT // WIDTH
        left, top = rng.integers(0, (original.width - width, original.height - height))
        crop = original.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT))
        crop.save(folder / f"{number}.jpg", quality=90)
    return folder


def run(*words: str | Path) -> tuple[float, float, float]:
    """Run a verb in a process of its own: its seconds, of its processors too, its peak of GB.

    This process must not grow before: a child's peak is at least that of its parent at the start.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "mlnet_utils", *map(str, words)])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with exit code {process.returncode}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    return time.monotonic() - start, used.ru_utime + used.ru_stime, peak


def score(predictor: Predictor, data: TestSet, name: str) -> dict[str, float]:
    """Every metric's mean over the photos."""
    scores = [
        data.score(photo, predictor.predict(data.image(photo)), predictor.config.protocol)
        for photo in progress(data.photos, f"scoring {name}", unit="photo")
    ]
    return {metric: float(np.mean([row[metric] for row in scores])) for metric in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--run-dir", type=Path, help="prepared data, to score and calibrate with")
    parser.add_argument("--smoke", action="store_true", help="few photos, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/inference.json")
    options = parser.parse_args()
    options.photos = 3 if options.smoke else options.photos
    data = TestSet(options.run_dir, "val") if options.run_dir else None
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = make_photos(folder / "photos", options.photos)
        calibrating = [photos]
        if data:
            train = data.prepared.split("train")[:CALIBRATING]
            calibrating = [data.prepared.root / photo.image for photo in train]
        forms = {"PyTorch": SHIPPED, "ONNX": folder / "a.onnx", "ONNX, 8 bits": folder / "b.onnx"}
        run("export", "--out", forms["ONNX"], *calibrating)
        if options.smoke:  # calibrating takes longest
            del forms["ONNX, 8 bits"]
        else:
            run("export", "--out", forms["ONNX, 8 bits"], "--int8", *calibrating)
        _, start, _ = run("predict", "--out", folder / "one", photos / "0.jpg")
        ways = list(itertools.product(forms, ([], ["--fast"])[options.smoke :]))
        for number, (form, fast) in enumerate(ways):
            where = ("--checkpoint", forms[form], "--out", folder / f"maps{number}")
            wall, cpu, peak = run("predict", *fast, *where, photos)
            speed = {"photos/s": options.photos / wall, "cpu_s": cpu / options.photos}
            size = forms[form].stat().st_size / 1e6
            rows.append({"form": " ".join([form, *fast]), "MB": size, **speed, "peak GB": peak})
        for row, (form, fast) in zip(rows, ways, strict=True) if data else ():
            row |= score(load(forms[form], "cpu", bool(fast)), data, row["form"])
    measure.print_table(rows)
    if not options.smoke:
        about = {"photos": options.photos, "size": [HEIGHT, WIDTH], "cpu_s of one photo": start}
        content = {**about, "forms": rows}
        measure.save("inference", content, options.out)


if __name__ == "__main__":
    main()
