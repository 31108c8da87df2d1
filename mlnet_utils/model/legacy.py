"""Weights of the two earlier implementations, converted to this project's files.

Three kinds are recognised by their content, never by their name:

* ``keras-mlnet``: the HDF5 files of the authors' ML-Net (Keras 1.1 on Theano), such as the released
  ``mlnet_salicon_weights.pkl``.
* ``keras-vgg16``: the authors' ImageNet weights, ``vgg16_weights.h5``.
* ``mlnet-pytorch``: the state dict of MLNet-Pytorch (immortal3, 2018).

The keys ``compat`` and ``normalisation`` of the configuration, which is returned and stored, make
the imported networks compute as the originals; docs/fidelity.md lists the differences.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.config import Config, load_config
from mlnet_utils.model import backbones, tensorfiles
from mlnet_utils.model.checkpoints import save_checkpoint
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import atomic_path, locked, reading, require, sha256_file

WEIGHTS = "weights of an earlier ML-Net or of VGG-16 from Keras"
KINDS = ("keras-mlnet", "keras-vgg16", "mlnet-pytorch")

_HDF5 = b"\x89HDF\r\n\x1a\n"
_TORCH = (b"PK\x03\x04", b"\x80")  # a zip since PyTorch 1.6, bare pickles before
# MLNet-Pytorch's names of modules, and the names here.
_RENAMED = {"features": "backbone.features", "int_conv": "encode", "pre_final_conv": "to_map"}
# Places of the 13 convolutions in torchvision's ``features``.
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_CELL = 80  # input pixels per cell of the prior: stride 8 of the network times 10 of the prior


def recognise(path: str | Path) -> str:
    """The kind of a weights file, of ``KINDS``.

    Raises:
        FileNotFoundError, ValueError: no such file; or truncated, unreadable, none of the kinds.
        ImportError: the file is HDF5 and h5py is not installed.
    """
    path = Path(path)
    with reading(path, WEIGHTS), open(path, "rb") as file:
        start = file.read(512)
    names = ()
    if start.startswith(_HDF5):
        with _open_hdf5(path) as file:
            if "layer_names" in file.attrs or "model_weights" in file:
                return "keras-mlnet"
            if "layer_1" in file and "nb_params" in file["layer_1"].attrs:
                return "keras-vgg16"
            names = sorted(file)
    elif start.startswith(_TORCH):
        names = sorted(tensorfiles.read_weights(path))
        if "int_conv.weight" in names or "pre_final_conv.weight" in names:
            return "mlnet-pytorch"
    found = f"a file with {', '.join(names[:5])} in it" if names else "neither HDF5 nor PyTorch"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        found = "a web page, as Google Drive sends instead of a large file: download it again"
    raise ValueError(f"{path} is none of the known kinds ({', '.join(KINDS)}); it is {found}")


def import_weights(path: str | Path, out: str | Path) -> Config:
    """Convert a weights file of one of ``KINDS``.

    Writes a checkpoint for prediction and evaluation; of ``keras-vgg16`` a ``.safetensors`` file
    for use as ``backbone_weights``. Returns the configuration with which the result computes as
    the original did; for a backbone, the paper's preset on top of it.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file is HDF5 and h5py is not installed.
        ValueError: truncated, of no known kind, a wrong ``out``, or other layers than the
            network's; names the layer and the expected form.
    """
    path, out = Path(path), Path(out)
    kind = recognise(path)
    if out.resolve() == path.resolve():
        raise ValueError(f"{out} is the file to import; write the result elsewhere")
    suffix = ".safetensors" if kind == "keras-vgg16" else ".pt"
    if (out.suffix == ".safetensors") != (kind == "keras-vgg16"):
        raise ValueError(f"{path} is {kind}: write it to a {suffix} file, not to {out.name}")
    source = {"kind": kind, "file": path.name, "sha256": sha256_file(path)}
    if kind == "keras-vgg16":
        weights = _keras_vgg16(path)
        tensorfiles.load_strictly(backbones.VGG16Levels(), weights, str(path))
        with locked(out), atomic_path(out) as temporary:
            tensorfiles.save_safetensors(temporary, weights, {**source, "normalisation": "caffe"})
        return load_config("paper", backbone_weights=str(out), normalisation="caffe")
    if kind == "keras-mlnet":
        weights = _keras_mlnet(path)
        preset, options = "paper", {"compat": "theano", "normalisation": "caffe"}
    else:
        weights = _mlnet_pytorch(path)
        preset, options = "mlnet-pytorch", {"normalisation": "imagenet"}
    rows, columns = weights["prior"].shape[-2:]
    size = {"prior_cells": (rows, columns), "height": _CELL * rows, "width": _CELL * columns}
    config = load_config(preset, backbone_weights="none", **size, **options)
    model = MLNet(config)
    tensorfiles.load_strictly(model, {**dict(model.named_buffers()), **weights}, str(path))
    with locked(out):
        save_checkpoint(out, config, model.state_dict(), source=source)
    return config


# ---- the three kinds: parameters of this project's network by name ------------------------------
def _keras_mlnet(path: Path) -> dict[str, Tensor]:
    """ML-Net as ``save_weights`` or ``ModelCheckpoint`` of Keras 1 wrote it.

    Layer names carry a counter of the Python process (convolution2d_1, ...), so layers are taken
    in the file's order, which is the network's. The prior is the only weight without a bias.
    """
    convolutions, priors = [], []
    with _open_hdf5(path) as file:
        # A whole model holds the same groups one level down.
        root = file if "layer_names" in file.attrs else file["model_weights"]
        for layer in root.attrs["layer_names"]:
            group = root[layer]
            found = [_correlating(group[name]) for name in group.attrs["weight_names"]]
            if len(found) > 2:
                raise ValueError(f"{path}: {group.name} holds {len(found)} weights, not 0 to 2")
            (convolutions if len(found) == 2 else priors).extend(found)
    if (counts := (len(convolutions) // 2, len(priors))) != (15, 1):
        found = "{} convolutions and {} layers with a single weight".format(*counts)
        raise ValueError(f"{path} holds {found}; ML-Net has 15 and 1, the prior")
    layers = [*(f"backbone.features.{place}" for place in _PLACES), "encode", "to_map"]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    prior = _checked_prior(path, priors[0][None, None])
    return {"prior": prior, **dict(zip(names, convolutions, strict=True))}


def _keras_vgg16(path: Path) -> dict[str, Tensor]:
    """VGG-16 trained in Caffe (BGR, mean only), stored for Theano."""
    weights = {}
    with _open_hdf5(path) as file:
        for place in _PLACES:
            # Layer 0 is the input there, so that all places are one higher.
            group = file[f"layer_{place + 1}"]
            weights[f"features.{place}.weight"] = _correlating(group["param_0"])
            weights[f"features.{place}.bias"] = _correlating(group["param_1"])
    return weights


def _mlnet_pytorch(path: Path) -> dict[str, Tensor]:
    """MLNet-Pytorch's state dict: other names of the layers, and a prior around 1, not 0."""
    weights = {}
    for label, value in tensorfiles.read_weights(path).items():
        module, dot, rest = label.partition(".")
        weights[f"{_RENAMED.get(module, module)}{dot}{rest}"] = _finite(path, label, value)
    if "prior" not in weights:
        raise ValueError(f"{path} lacks prior, the learned prior of MLNet-Pytorch")
    return {**weights, "prior": _checked_prior(path, weights["prior"]) - 1}


# ---- common ------------------------------------------------------------------------------------
@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator:
    """The open file; a ValueError names it where a part is missing or cannot be read."""
    with reading(path, WEIGHTS), require("h5py", "legacy").File(path, "r") as file:
        yield file


def _correlating(dataset) -> Tensor:
    """A weight of Theano, which convolves, for PyTorch, which correlates: kernels are rotated."""
    values = torch.from_numpy(np.asarray(dataset[()]))
    weight = _finite(dataset.file.filename, dataset.name[1:], values)
    return weight.flip(-2, -1).contiguous() if weight.ndim == 4 else weight


def _finite(path: str | Path, label: str, values: Tensor) -> Tensor:
    if not values.is_floating_point() or not values.isfinite().all():
        raise ValueError(f"{path}: {label} holds values that are not finite numbers")
    return values.float()


def _checked_prior(path: Path, prior: Tensor) -> Tensor:
    if prior.ndim != 4 or prior.shape[:2] != (1, 1) or not prior.numel():
        shape = tuple(prior.shape)
        raise ValueError(f"{path}: the prior has the shape {shape}, expected (1, 1, rows, columns)")
    return prior
