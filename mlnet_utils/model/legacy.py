"""Weights of the two earlier implementations, converted to this project's files.

Three kinds are recognised by their content, never by their name:

* ``keras-mlnet``: what the authors' ML-Net (Keras 1.1 on Theano) saves; the released
  ``mlnet_salicon_weights.pkl`` is such an HDF5 file.
* ``keras-vgg16``: the authors' ImageNet weights, ``vgg16_weights.h5``.
* ``mlnet-pytorch``: the state dict of MLNet-Pytorch (immortal3, 2018).

What the imported networks compute differently from this project's own is chosen by ``compat``
and ``normalisation`` in the configuration that is returned and stored; docs/fidelity.md lists it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.config import Config, load_config
from mlnet_utils.model.checkpoints import save_checkpoint
from mlnet_utils.model.network import MLNet, VGG16Levels, read_weights
from mlnet_utils.runtime import atomic_path, sha256_file

KINDS = ("keras-mlnet", "keras-vgg16", "mlnet-pytorch")

# For each parameter of this project's network: its name in the file, and its values.
Arrays = dict[str, tuple[str, np.ndarray]]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_TORCH = (b"PK\x03\x04", b"\x80")  # a zip since PyTorch 1.6, bare pickles before
# MLNet-Pytorch's names of what is called otherwise here.
_RENAMED = {"features": "backbone.features", "int_conv": "encode", "pre_final_conv": "to_map"}
# Where the 13 convolutions stand in torchvision's ``features``.
_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_CELL = 80  # input pixels per cell of the prior: stride 8 of the network times 10 of the prior


def recognise(path: str | Path) -> str:
    """Tell which of ``KINDS`` a weights file is.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the file is HDF5 and h5py is not installed.
        ValueError: truncated, unreadable, or none of the kinds.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    with open(path, "rb") as file:
        start = file.read(512)
    if start.startswith(_HDF5):
        with _open_hdf5(path) as file:
            if "layer_names" in file.attrs or "model_weights" in file:
                return "keras-mlnet"
            if "layer_1" in file and "nb_params" in file["layer_1"].attrs:
                return "keras-vgg16"
            found = f"an HDF5 file with {', '.join(sorted(file)[:5]) or 'nothing'} in it"
    elif start.startswith(_TORCH):
        names = read_weights(path)
        if "int_conv.weight" in names or "pre_final_conv.weight" in names:
            return "mlnet-pytorch"
        found = f"a PyTorch file with {', '.join(sorted(names)[:5]) or 'nothing'} in it"
    elif start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        found = "a web page, as Google Drive sends instead of a large file: download it again"
    else:
        found = "neither an HDF5 nor a PyTorch file"
    raise ValueError(
        f"{path} is not a weights file of an earlier implementation ({', '.join(KINDS)}); "
        f"it is {found}"
    )


def import_weights(path: str | Path, out: str | Path) -> Config:
    """Convert a weights file of an earlier implementation.

    Args:
        path: a file of one of ``KINDS``.
        out: for ``keras-mlnet`` and ``mlnet-pytorch`` a checkpoint to write, for prediction and
            evaluation; for ``keras-vgg16`` a ``.safetensors`` file to write, for use as
            ``backbone_weights``.

    Returns:
        The configuration with which the result computes what the original computed. For a
        backbone: the paper's preset on top of it.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the file is HDF5 and h5py is not installed.
        ValueError: truncated, of no known kind, or its layers are not those of the network;
            names the layer, and what was expected.
    """
    path, out = Path(path), Path(out)
    kind = recognise(path)
    if out.resolve() == path.resolve():
        raise ValueError(f"{out} is the file to import; write the result elsewhere")
    if (out.suffix == ".safetensors") != (kind == "keras-vgg16"):
        suffix = ".safetensors" if kind == "keras-vgg16" else ".pt"
        raise ValueError(f"{path} is {kind}: write it to a {suffix} file, not to {out.name}")
    source = {"kind": kind, "file": path.name, "sha256": sha256_file(path)}
    if kind == "keras-vgg16":
        return _import_backbone(path, out, source)
    read = _read_mlnet_pytorch if kind == "mlnet-pytorch" else _read_keras_mlnet
    config, arrays = read(path)
    model = MLNet(config)
    weights = _match(path, arrays, dict(model.named_parameters()), rotate=kind == "keras-mlnet")
    model.load_state_dict({**model.state_dict(), **weights})
    save_checkpoint(out, config, model.state_dict(), source=source)
    return config


# ---- the authors' Keras files ------------------------------------------------------------------
def _read_keras_mlnet(path: Path) -> tuple[Config, Arrays]:
    """ML-Net as ``save_weights`` or ``ModelCheckpoint`` of Keras 1 wrote it.

    Layer names carry a counter of the Python process (convolution2d_1, ...), so layers are taken
    in the file's order, which is the network's. The prior is the only weight without a bias.
    """
    convolutions, priors = [], []
    with _open_hdf5(path) as file:
        # A whole model holds the same groups one level down.
        root = file if "layer_names" in file.attrs else file["model_weights"]
        for layer in _strings(root, "layer_names"):
            group = _member(path, root, layer)
            found = [_array(path, group, name) for name in _strings(group, "weight_names")]
            if len(found) > 2:
                raise ValueError(
                    f"{path}: layer {layer} holds {len(found)} weights; ML-Net's layers hold a "
                    "kernel and a bias, or the prior, or nothing"
                )
            (convolutions if len(found) == 2 else priors).extend(found)
    if len(convolutions) != 2 * 15 or len(priors) != 1:
        raise ValueError(
            f"{path} holds {len(convolutions) // 2} convolutions and {len(priors)} layers with a "
            "single weight; ML-Net has 15 (13 of VGG-16, 2 of the encoding network) and 1 (the "
            "prior)"
        )
    label, prior = priors[0]
    config = load_config(
        "paper",
        compat="theano",
        normalisation="caffe",
        backbone_weights="none",
        **_size(path, label, prior, "(rows, columns)"),
    )
    layers = [*(f"backbone.features.{place}" for place in _PLACES), "encode", "to_map"]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    arrays = dict(zip(names, convolutions, strict=True))
    return config, {"prior": (label, prior[None, None]), **arrays}


def _import_backbone(path: Path, out: Path, source: dict[str, str]) -> Config:
    """VGG-16 trained in Caffe (BGR, mean only), stored for Theano."""
    from safetensors.torch import save_file

    arrays = {}
    with _open_hdf5(path) as file:
        for place in _PLACES:
            # Layer 0 is the input there, so that all places are one higher.
            group = _member(path, file, f"layer_{place + 1}")
            arrays[f"features.{place}.weight"] = _array(path, group, "param_0")
            arrays[f"features.{place}.bias"] = _array(path, group, "param_1")
    weights = _match(path, arrays, VGG16Levels().state_dict(), rotate=True)
    with atomic_path(out) as temporary:
        save_file(weights, temporary, metadata={**source, "normalisation": "caffe"})
    return load_config("paper", backbone_weights=str(out), normalisation="caffe")


# ---- MLNet-Pytorch -----------------------------------------------------------------------------
def _read_mlnet_pytorch(path: Path) -> tuple[Config, Arrays]:
    """Its state dict: the same layers under other names, and a prior around 1 instead of 0."""
    arrays: Arrays = {}
    for label, value in read_weights(path).items():
        module, dot, rest = label.partition(".")
        arrays[f"{_RENAMED.get(module, module)}{dot}{rest}"] = (label, value.float().numpy())
    if "prior" not in arrays:
        raise ValueError(f"{path} lacks prior, the learned prior of MLNet-Pytorch")
    label, prior = arrays["prior"]
    arrays["prior"] = (label, prior - 1)
    config = load_config(
        "mlnet-pytorch",
        normalisation="imagenet",
        backbone_weights="none",
        **_size(path, label, prior, "(1, 1, rows, columns)"),
    )
    return config, arrays


# ---- common ------------------------------------------------------------------------------------
def _size(path: Path, label: str, prior: np.ndarray, layout: str) -> dict[str, Any]:
    """The input size that a prior was trained for, and the prior's own."""
    leading = (1,) * layout.count("1")
    if prior.shape[:-2] != leading or prior.ndim != len(leading) + 2 or not prior.size:
        raise ValueError(f"{path}: the prior {label} has shape {prior.shape}, expected {layout}")
    rows, columns = prior.shape[-2:]
    return {"prior_cells": (rows, columns), "height": _CELL * rows, "width": _CELL * columns}


def _match(
    path: Path, arrays: Arrays, wanted: dict[str, Tensor], rotate: bool
) -> dict[str, Tensor]:
    """The arrays as float32 tensors, each weight of the network once and with its shape.

    Args:
        path: the file, for messages.
        arrays: for each parameter of the network its name in the file and its values.
        wanted: the network's parameters.
        rotate: turn kernels by 180 degrees: Theano convolves, PyTorch correlates.

    Raises:
        ValueError: weights that are missing, unknown, of another shape, or not finite numbers.
    """
    problems = [f"lacks {name}" for name in wanted if name not in arrays]
    weights = {}
    for name, (label, values) in arrays.items():
        if name not in wanted:
            problems.append(f"has an unknown {label}")
        elif values.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            problems.append(f"has {label} of shape {values.shape}, expected {expected}")
        elif values.dtype.kind != "f" or not np.isfinite(values).all():
            problems.append(f"has {label} with values that are not finite numbers")
        else:
            weight = torch.from_numpy(values.astype(np.float32))
            kernel = rotate and name.endswith(".weight")
            weights[name] = weight.flip(-2, -1).contiguous() if kernel else weight
    if problems:
        more = f", and {len(problems) - 6} more such problems" if len(problems) > 6 else ""
        raise ValueError(f"{path} {', '.join(problems[:6])}{more}")
    return weights


def _open_hdf5(path: Path):
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} is an HDF5 file, which needs h5py: pip install 'mlnet-utils[legacy]'"
        ) from None
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); was it cut short?") from error


def _strings(group, attribute: str) -> list[str]:
    """A list of names in an attribute, which HDF5 gives as bytes or as text."""
    return [
        name.decode() if isinstance(name, bytes) else str(name)
        for name in group.attrs.get(attribute, ())
    ]


def _member(path: Path, group, name: str):
    if name not in group:
        raise ValueError(f"{path} lacks {name}; it holds {', '.join(sorted(group)[:5])} ...")
    return group[name]


def _array(path: Path, group, name: str) -> tuple[str, np.ndarray]:
    """A dataset's full name in the file, and its values."""
    dataset = _member(path, group, name)
    try:
        return dataset.name[1:], dataset[()]
    except OSError as error:
        raise ValueError(f"{path}: {name} cannot be read ({error}); was it cut short?") from error
