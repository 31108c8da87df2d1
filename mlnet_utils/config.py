"""One flat, frozen configuration; named presets; strict overrides.

The defaults are the authors' recipe, each with the place it comes from: *paper* is Cornia et al.,
"A Deep Multi-Level Network for Saliency Prediction", ICPR 2016 (arXiv:1609.01064); *code* is the
Keras implementation they released. A preset lists only what it changes.
"""

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers. Unknown keys and wrong types are errors."""

    preset: str = "paper"

    # ---- data
    dataset: str = "salicon-2015"  # paper 4.1: SALICON, 10,000 train and 5,000 validation photos
    limit: int = 0  # photos per split, 0 = all
    train_limit: int = 0  # training photos, 0 = all; the other splits stay whole
    height: int = 480  # paper 3.4: input 480 x 640
    width: int = 640
    sigma: float = 0.0  # blur of the fixations in photo pixels; 0 = the dataset's own
    fold: int = -1  # cross-validation fold 0..4; -1 = the dataset's fixed split

    # ---- model
    backbone: str = "vgg16"  # paper 3.1: VGG-16; any other name is timm's
    backbone_weights: str = "imagenet"  # "imagenet", "none" or a .safetensors/.pth file
    backbone_args: dict = field(default_factory=dict)  # passed on to timm.create_model
    backbone_drop: tuple = ()  # modules of the timm backbone that the extractor leaves out
    normalisation: str = "auto"  # or "imagenet", "caffe", "half"; model.build_backbone has "auto"
    levels: int = 3  # paper 3.1: pool3, pool4 and conv5_3 (the deepest n levels are used)
    channels: int = 64  # paper 3.2: 3x3 convolution to 64 channels
    dropout: float = 0.5  # paper 3.2: dropout on the concatenated levels
    dropout_channels: bool = False  # drop whole channels instead of single elements
    head: str = "paper"  # "paper" (ReLU, multiplied prior) or "density" (softmax, added log prior)
    prior_cells: tuple = (6, 8)  # paper 3.3: (H/8/10, W/8/10); () = no prior
    compat: str = ""  # "theano" or "mlnet-pytorch": compute as the earlier implementation does
    dropout_at_test: bool = False  # a defect of MLNet-Pytorch, reproduced on request
    freeze: tuple = ()  # name patterns of parameters that stay as they are (paper: none)
    freeze_norm: bool = False  # keep batch-norm statistics of the backbone fixed
    start_from: str = ""  # checkpoint that a new training starts from, with its architecture

    # ---- loss
    loss: str = "mlnet"  # e.g. "mlnet", "kl", "kl + 0.5*cc + 0.1*nss" (terms in losses.py)
    alpha: float = 1.1  # paper 3.4, equation 2
    prior_penalty: float = -1.0  # weight of ||W||^2; -1 = 1 / number of prior cells (paper 3.4)

    # ---- optimisation
    optimizer: str = "sgd"  # paper 3.4: SGD with Nesterov momentum
    lr: float = 1e-3  # code
    backbone_lr_scale: float = 1.0  # learning rate of the backbone relative to the rest
    schedule: str = "keras1"  # code: Keras 1 decay, lr / (1 + decay * updates)
    lr_decay: float = 5e-4  # code
    warmup: float = 0.0  # share of the updates over which one-cycle warms up
    momentum: float = 0.9  # code
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # gradient norm limit, 0 = none
    batch_size: int = 10  # code
    epochs: int = 20  # code
    patience: int = 5  # code: epochs without a better validation loss; 0 = never stop early
    ema_decay: float = 0.0  # exponential moving average of the weights, 0 = none
    flip: float = 0.0  # probability of mirroring photo and fixations together

    # ---- engine (changes speed and memory, not what is learned)
    precision: str = "fp32"  # code: Theano in float32; "auto", "fp32", "bf16" or "fp16"
    micro_batch: int = -1  # photos per forward pass; 0 = batch_size, -1 = what fits into the GPU
    checkpointing: bool = False  # recompute backbone activations to save memory
    channels_last: bool = True  # memory format; VGG-16 is 5 to 15 % faster, on a CPU too
    compile: bool = False
    workers: int = -1  # loader processes; -1 = chosen from the machine
    cache: bool = False  # keep letterboxed photos in memory after the first epoch
    cache_features: bool = False  # keep a frozen backbone's features on disk, see features.py
    checkpoint_every: int = 200  # updates between step checkpoints
    deterministic: bool = False  # bit-reproducible GPU kernels, slower (the CPU always is)
    seed: int = 0

    # ---- evaluation
    protocol: str = "mit300"  # metric definitions, see docs/metrics.md
    test_flip: bool = False  # average the prediction with that of the mirrored photo
    test_scales: tuple = (1.0,)  # average predictions at these multiples of the input size
    bootstrap: int = 2000  # resamples of the confidence intervals

    # Keys that were set, by a preset or its user: those that a checkpoint to start from may not
    # contradict (model.checkpoints.with_start). No setting itself: neither compared nor stored.
    given: frozenset = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self):
        for name, expected in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _coerce(name, getattr(self, name), expected))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config: {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        for name in ("height", "width"):  # the network works at 1/8 resolution
            if getattr(self, name) < 32 or getattr(self, name) % 8:
                raise ValueError(
                    f"config: {name}={getattr(self, name)} must be a multiple of 8, at least 32"
                )
        for name in ("batch_size", "epochs", "levels", "channels", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"config: {name}={getattr(self, name)} must be at least 1")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"config: {name}={getattr(self, name)} must be finite, 0 or more")
        for name in ("dropout", "flip", "ema_decay", "warmup"):
            if not 0 <= getattr(self, name) < 1 and not (name == "flip" and self.flip == 1):
                raise ValueError(f"config: {name}={getattr(self, name)} must be in [0, 1)")
        for name in ("micro_batch", "workers", "fold"):
            if getattr(self, name) < -1:
                raise ValueError(f"config: {name}={getattr(self, name)} must be at least -1")
        if self.prior_penalty != -1 and not 0 <= self.prior_penalty < math.inf:
            raise ValueError(f"config: prior_penalty={self.prior_penalty} must be -1, 0 or more")
        for name in ("freeze", "backbone_drop"):
            if not all(isinstance(pattern, str) for pattern in getattr(self, name)):
                raise ValueError(f"config: {name}={getattr(self, name)} must hold names only")
        if not self.alpha > 1:  # or the loss divides by 0
            raise ValueError(f"config: alpha={self.alpha} must be above 1")
        scales = self.test_scales
        if not scales or not all(isinstance(n, int | float) and 0.1 <= n <= 4 for n in scales):
            raise ValueError(f"config: test_scales={scales} must be numbers from 0.1 to 4")
        cells = self.prior_cells
        if len(cells) not in (0, 2) or not all(isinstance(n, int) and n > 0 for n in cells):
            raise ValueError(f"config: prior_cells={cells} must be (rows, columns) or ()")

    @property
    def antialias(self) -> bool:
        """Whether photos are resized with an antialiasing filter.

        The earlier implementations use OpenCV's bilinear filter, which does not antialias.
        """
        return self.compat == ""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the network's output: 1/8 of the input."""
        return self.height // 8, self.width // 8

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary (lists instead of tuples) for JSON and checkpoints."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if key != "given"
        }


_NOT_NEGATIVE = (
    *("limit", "train_limit", "patience", "seed", "bootstrap"),
    *("sigma", "lr", "backbone_lr_scale", "lr_decay", "momentum", "weight_decay"),
    "clip_norm",
)

CHOICES = {
    "head": ("paper", "density"),
    "compat": ("", "theano", "mlnet-pytorch"),
    "normalisation": ("auto", "imagenet", "caffe", "half"),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("keras1", "constant", "onecycle"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "protocol": ("mit300", "salicon", "salicon2015"),
}

FIELDS = {f.name for f in dataclasses.fields(Config)} - {"given"}

# Fields that may differ between a checkpoint and the run that resumes it.
ENGINE_FIELDS = (
    *("workers", "cache", "checkpoint_every", "bootstrap"),
    *("test_flip", "test_scales", "protocol"),
)

# Keys that earlier checkpoints hold, with the values that change nothing. Both changed the photos
# of a training, so that predictions do not depend on them.
RETIRED = {"jitter": 0.0, "crop": 0.0}

_DENSITY = {
    "head": "density",
    "loss": "kl",
    "prior_penalty": 0.0,
    "optimizer": "adamw",
    "schedule": "onecycle",
    "warmup": 0.1,
    "flip": 0.5,
}

# MLNet-Pytorch (immortal3, 2018) stops the gradient of the first 23 entries of
# ``model.parameters()``. Entry 0 is its prior; the other 22 are weight and bias of the first
# eleven convolutions, conv1_1 to conv5_1, here by their place in torchvision's ``features``.
_MLNET_PYTORCH_FROZEN = tuple(
    f"backbone.features.{place}.*" for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24)
)

PRESETS: dict[str, dict[str, Any]] = {
    # The authors' recipe to the letter: the defaults.
    "paper": {},
    # MLNet-Pytorch as it was meant: its prior is trained, its penalty has the paper's weight,
    # and dropout is off at test time.
    "mlnet-pytorch": {
        "compat": "mlnet-pytorch",
        "dataset": "salicon-2017",
        "height": 240,
        "width": 320,
        "prior_cells": (3, 4),
        "dropout_channels": True,
        "freeze": _MLNET_PYTORCH_FROZEN,
        "optimizer": "adam",
        "schedule": "constant",
        "weight_decay": 1e-4,
        "batch_size": 16,
        "epochs": 10,
        "patience": 0,
    },
    # Minutes on two CPU cores, from random weights, on stimuli whose true density is known.
    "sample": {
        **_DENSITY,
        "dataset": "synthetic",
        "height": 120,
        "width": 160,
        "backbone": "test_resnet",
        "backbone_weights": "none",
        "dropout": 0.2,
        "lr": 4e-3,
        "batch_size": 16,
        "epochs": 12,
        "patience": 0,
        "precision": "fp32",
        "workers": 0,
        "cache": True,
    },
    # Real eye tracking: 700 photos, 15 observers.
    "osie": {
        **_DENSITY,
        "dataset": "osie",
        # On the validation photos, one run each, CC 0.826 and KL 0.389; 0.820 and 0.401 with
        # "kl + 0.5*cc + 0.1*nss" and a backbone_lr_scale of 0.3, which had NSS 3.20 for 3.00.
        "loss": "kl + cc",
        "height": 360,
        "width": 480,
        "backbone": "mobilenetv1_100",
        # The TensorFlow weights were trained with SAME padding.
        "backbone_args": {"pad_type": "same"},
        # The last pointwise layer is left out: the third level is its 1024-channel input.
        "backbone_drop": ("blocks.4.1.conv_pw", "blocks.4.1.bn2"),
        "freeze_norm": True,
        "dropout_channels": True,  # element-wise masks take a tenth of a step on a CPU
        "precision": "auto",
        "channels_last": False,  # depthwise convolutions are slower in it on a CPU
        "lr": 1e-3,
        "backbone_lr_scale": 0.1,
        "weight_decay": 1e-2,
        "epochs": 8,
        "patience": 0,
        "ema_decay": 0.98,
        "test_flip": True,
        "workers": 0,
        "cache": True,
    },
    # Our best recipe on SALICON 2017: nothing frozen, mixed precision, density head.
    "salicon": {
        **_DENSITY,
        "dataset": "salicon-2017",
        "lr": 3e-4,
        "backbone_lr_scale": 0.3,
        "weight_decay": 1e-4,
        "epochs": 10,
        "patience": 3,
        "ema_decay": 0.999,
        "precision": "auto",
    },
    # Your own photos and fixations, 50 to a few hundred. Set `sigma`, and `start_from` if another
    # network than the one trained on OSIE is the start; its architecture comes with it.
    "finetune": {
        **{key: value for key, value in _DENSITY.items() if key != "head"},
        "start_from": "runs/osie/checkpoints/best.pt",
        "dataset": "folder",
        "freeze_norm": True,  # a few photos are no sample of the statistics
        "lr": 3e-4,
        "backbone_lr_scale": 0.3,
        "weight_decay": 1e-2,
        "batch_size": 8,
        "epochs": 10,
        "patience": 0,
        "precision": "auto",
        "workers": 0,
        "cache": True,
    },
}
# MLNet-Pytorch as it is. Three defects, each a switch: the prior never trains, dropout stays on
# at test time, and the penalty is divided by 1 instead of by the number of cells.
PRESETS["mlnet-pytorch-asis"] = {
    **PRESETS["mlnet-pytorch"],
    "freeze": ("prior", *_MLNET_PYTORCH_FROZEN),
    "dropout_at_test": True,
    "prior_penalty": 1.0,
}
# Seconds: for the tests of the pipeline and for trying things out.
PRESETS["tiny"] = {
    **PRESETS["sample"],
    "limit": 12,
    "height": 64,
    "width": 80,
    "channels": 8,
    "epochs": 2,
    "batch_size": 4,
    "bootstrap": 100,
}


def load_config(preset: str | Path = "sample", **overrides: Any) -> Config:
    """Resolve a preset name or a YAML file, with strict overrides.

    A YAML file holds a mapping of the fields of :class:`Config`; its optional key ``preset``
    names the preset that it starts from (default ``paper``, the plain defaults). An override
    that is None keeps the preset's value. The checkpoint that ``start_from`` names is not opened:
    ``model.checkpoints.with_start`` takes over its architecture when the run begins.

    Raises:
        ValueError: unknown preset, unknown key, wrong type or value out of range, or weights of a
            backbone beside ``start_from``.
        FileNotFoundError: the path of a YAML file that does not exist.
    """
    name = str(preset)
    if name in PRESETS:
        values = {**PRESETS[name], "preset": name}
    elif name.endswith((".yaml", ".yml")):
        values = _read_yaml(Path(name))
    else:
        raise ValueError(
            f"unknown preset {name!r}: use one of {', '.join(PRESETS)} or the path of a .yaml file"
        )
    values |= {k: v for k, v in overrides.items() if v is not None or k not in FIELDS}
    if values.get("start_from") and values.setdefault("backbone_weights", "none") != "none":
        raise ValueError(
            f"config: backbone_weights={values['backbone_weights']!r} and start_from exclude each "
            "other: a checkpoint holds all weights, the backbone's too; set one of them"
        )
    return _strict(values)


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a configuration that :meth:`Config.to_dict` wrote, in this version or before.

    Raises:
        ValueError: unknown key, wrong type or value out of range.
    """
    return _strict({key: value for key, value in values.items() if key not in RETIRED})


def _strict(values: dict[str, Any]) -> Config:
    unknown = sorted(set(values) - FIELDS)
    if unknown:
        raise ValueError(f"unknown configuration key {', '.join(unknown)}; known: {sorted(FIELDS)}")
    return Config(**values, given=frozenset(values))


def describe(config: Config) -> list[tuple[str, str, str]]:
    """(key, value, how it differs from the paper) for every field, for the notebooks' table."""
    paper = Config()
    rows = []
    for key, value in config.to_dict().items():
        default = paper.to_dict()[key]
        rows.append((key, str(value), "" if value == default else f"paper: {default}"))
    return rows


def backbone_file(config: Config) -> str:
    """Local weights of the backbone: the preset's path, else ``$BACKBONE_WEIGHTS``, else ``""``.

    The variable only replaces a download (``backbone_weights="imagenet"``), never ``"none"``.
    """
    if config.backbone_weights == "imagenet":
        return os.environ.get("BACKBONE_WEIGHTS", "")
    return "" if config.backbone_weights == "none" else config.backbone_weights


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"preset file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of configuration keys")
    base = values.get("preset", "paper")
    if base not in PRESETS:
        raise ValueError(f"{path}: preset {base!r} is not one of {', '.join(PRESETS)}")
    return {**PRESETS[base], **values, "preset": path.stem}


def _coerce(name: str, value: Any, expected: type) -> Any:
    """Check a value's type; accept what says the same (1 or "1e-3" for a float, list for tuple)."""
    expected = get_origin(expected) or expected
    if expected is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if expected is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as text
            return float(value)
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    raise ValueError(
        f"config: {name}={value!r} should be {expected.__name__}, not {type(value).__name__}"
    )
