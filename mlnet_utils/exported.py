"""Networks in their exported form: loading them for prediction, and measuring what they cost."""

import importlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mlnet_utils.config import from_dict
from mlnet_utils.evaluation import TestSet
from mlnet_utils.metrics import METRICS
from mlnet_utils.prediction import Predictor, load
from mlnet_utils.runtime import progress


def require(name: str):
    """Import a package of the extra ``export``."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX needs {error.name}: pip install 'mlnet-utils[export]'"
        ) from error


def load_exported(path: str | Path, threads: int = 0) -> Predictor:
    """An exported file as a predictor on the CPU: the same pre- and postprocessing as ever.

    Args:
        path: what ``export.export`` wrote.
        threads: of onnxruntime; 0 = its own choice.

    Raises:
        ModuleNotFoundError: the extra ``export`` is not installed.
        FileNotFoundError: there is no such file.
        ValueError: not a file that ``export.export`` wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"exported network {path} does not exist")
    try:
        if path.suffix == ".onnx":
            network = OnnxNetwork(path, threads)
            config = json.loads(network.metadata["config"])
        else:
            extra = {"metadata.json": ""}
            network = torch.export.load(path, extra_files=extra).module()
            config = json.loads(json.loads(extra["metadata.json"])["config"])
    except ModuleNotFoundError:
        raise
    except Exception as error:  # both readers raise many types for a foreign file
        raise ValueError(f"{path} is not an exported network of this project ({error})") from error
    return Predictor(network, from_dict(config))


class OnnxNetwork(nn.Module):
    """An ONNX file in the place of :class:`~mlnet_utils.model.MLNet`, run by onnxruntime."""

    def __init__(self, path: Path, threads: int = 0):
        super().__init__()
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 1, H/8, W/8) float32."""
        return torch.from_numpy(self.session.run(None, {"image": image.numpy()})[0])


def measure(
    files: Mapping[str, Path],
    run_dir: str | Path,
    split: str = "test",
    limit: int = 0,
    threads: int = 1,
    repeats: int = 20,
) -> list[dict]:
    """Size, speed and scores of a network in several files.

    Args:
        files: name -> checkpoint (``.pt``) or exported file.
        run_dir: the run whose prepared photos are scored.
        split: of those photos.
        limit: at most so many photos, 0 = all.
        threads: that PyTorch and onnxruntime may use.
        repeats: timed passes of one photo through the network, of which the median counts.

    Returns:
        Per file: ``variant``, ``megabytes``, ``milliseconds`` per photo (network only, CPU), and
        the mean over photos of every metric.
    """
    data = TestSet(Path(run_dir), split)
    photos = data.photos[:limit] if limit else data.photos
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = []
        for name, path in files.items():
            whole = Path(path).suffix == ".pt"
            predictor = load(path, "cpu") if whole else load_exported(path, threads)
            scores = [
                data.score(photo, predictor.predict(data.image(photo)), predictor.config.protocol)
                for photo in progress(photos, f"scoring {name}", unit="photo")
            ]
            means = {m: float(np.nanmean([score[m] for score in scores])) for m in METRICS}
            image, _ = predictor.prepare(data.image(photos[0]))
            rows.append(
                {
                    "variant": name,
                    "megabytes": Path(path).stat().st_size / 1e6,
                    "milliseconds": 1e3 * _median_seconds(predictor.model, image[None], repeats),
                    **means,
                }
            )
    finally:
        torch.set_num_threads(before)
    return rows


@torch.inference_mode()
def _median_seconds(network: nn.Module, images: Tensor, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 2):  # the first two warm up
        start = time.perf_counter()
        network(images)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))
