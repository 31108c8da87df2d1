"""Networks in their exported form, loaded for prediction."""

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from mlnet_utils.config import from_dict
from mlnet_utils.predict.predictor import Predictor, load

SUFFIXES = (".onnx", ".pt2")


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


def load_network(
    path: str | Path, device: str | None = None, default: str | None = None
) -> Predictor:
    """A checkpoint, or by its suffix an exported file, as a predictor.

    Args:
        path: of either.
        device: where it runs; exported files run on the CPU only.
        default: device of a checkpoint without ``device``; None: a GPU if there is one.

    Raises:
        FileNotFoundError, ModuleNotFoundError: see :func:`load_exported`.
        ValueError: it cannot be read, or an exported file is wanted on another device.
    """
    if Path(path).suffix not in SUFFIXES:
        return load(path, device or default)
    if device not in (None, "cpu"):
        raise ValueError(f"{path} is an exported network, which runs on the CPU, not on {device}")
    return load_exported(path)


class OnnxNetwork(nn.Module):
    """An ONNX file in the place of :class:`MLNet`, run by onnxruntime."""

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
