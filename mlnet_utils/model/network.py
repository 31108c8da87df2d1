"""ML-Net in three visible parts: multi-level features, encoding, learned prior (paper, 3)."""

import pickle
import textwrap
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlnet_utils.config import Config, backbone_file
from mlnet_utils.data.geometry import IMAGENET_MEAN, IMAGENET_STD

# Mean and deviation of RGB input in 0..1. "caffe" is the Keras/Caffe VGG-16: BGR, mean only.
NORMALISATIONS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
}


# ---- 3.1 multi-level features ------------------------------------------------------------------
class VGG16Levels(nn.Module):
    """VGG-16 whose fourth pool has stride 1, so that three levels share 1/8 resolution."""

    channels = (256, 512, 512)  # pool3, pool4, conv5_3

    def __init__(self, compat: str = "", checkpointing: bool = False):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        # Not vgg16(): its classifier, which ML-Net has no use for, is 1 GB and most of the time.
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
    """The three deepest levels of a timm backbone, dilated to 1/8 resolution."""

    def __init__(self, config: Config, pretrained: bool):
        super().__init__()
        import timm

        try:
            self.body = timm.create_model(
                config.backbone,
                features_only=True,
                output_stride=8,
                pretrained=pretrained,
                **config.backbone_args,
            )
        except Exception as error:  # timm raises many types
            advice = "see timm.list_models(), or use vgg16"
            if pretrained and timm.is_model(config.backbone):
                advice = "where a download fails, name a file in $BACKBONE_WEIGHTS"
            raise ValueError(
                f"backbone {config.backbone!r} cannot be built by timm with features at 1/8 "
                f"resolution ({error}); {advice}"
            ) from error
        modules = dict(self.body.named_modules())
        for name in config.backbone_drop:
            if name not in modules:
                raise ValueError(f"config: backbone_drop={name!r} is not in {config.backbone}")
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, nn.Identity())
        if config.checkpointing:
            self.body.set_grad_checkpointing(True)
        self.levels = min(3, len(self.body.feature_info.channels()))
        self.channels = tuple(self.body.feature_info.channels())[-self.levels :]
        self.dropped = config.backbone_drop

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = (x.shape[-2] // 8, x.shape[-1] // 8)
        levels = self.body(x)[-self.levels :]
        # A backbone that cannot be dilated everywhere leaves levels at other strides.
        return [
            level
            if level.shape[-2:] == grid
            else F.interpolate(level, size=grid, mode="bilinear", align_corners=False)
            for level in levels
        ]


def build_backbone(config: Config) -> tuple[nn.Module, tuple[tuple, tuple]]:
    """The backbone with its weights, and the mean and deviation of the RGB input it expects.

    With ``normalisation="auto"`` these are what timm states for weights of its own: downloaded,
    or a local file with the classifier, as timm publishes them. Weights that were converted from
    elsewhere follow torchvision's convention, ImageNet's mean and deviation.

    Raises:
        ValueError: unknown backbone, or a local file that does not match it.
        FileNotFoundError: the local file is missing.
    """
    local = backbone_file(config)
    download = config.backbone_weights == "imagenet" and not local
    if config.backbone == "vgg16":
        backbone = VGG16Levels(config.compat, config.checkpointing)
        if download:
            from torchvision.models import VGG16_Weights

            weights = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
            backbone.load_state_dict({k: v for k, v in weights.items() if "features" in k})
    else:
        backbone = TimmLevels(config, pretrained=download)
    own = local and load_backbone_file(backbone, local)
    if config.normalisation != "auto":
        return backbone, NORMALISATIONS[config.normalisation]
    if (download or own) and config.backbone != "vgg16":
        stated = backbone.body.pretrained_cfg
        return backbone, (tuple(stated["mean"]), tuple(stated["std"]))
    return backbone, NORMALISATIONS["imagenet"]


def load_backbone_file(backbone: nn.Module, path: str | Path) -> bool:
    """Load local ImageNet weights strictly, ignoring only what the extractor leaves out.

    Returns:
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
    ignored = (*dropped, *classifier, "conv_head.", "norm_head.", "pre_logits.")
    counters = {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked")}
    used = {k: v for k, v in state.items() if k in wanted or not k.startswith(ignored)}
    load_strictly(target, {**counters, **used}, f"weights {path}")
    return any(key.startswith(classifier) for key in state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth``/``.pt`` state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, or no state dict.
    """
    state = read_tensors(path, "weights file", "name another file")
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights file {path} must hold a state dict of tensors")
    return state


def read_tensors(path: str | Path, kind: str, advice: str) -> Any:
    """Read what torch or safetensors saved, without ever running code from the file.

    Args:
        path: ``.safetensors``, or any other name for torch's format.
        kind: of file, for messages.
        advice: for where it is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, truncated, or more than tensors and plain values.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {path} does not exist: {advice}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types for a broken file
        reason = str(error)
        if isinstance(error, pickle.UnpicklingError):  # torch advises to let the file run code
            reason = "it holds something other than tensors and plain values"
        raise ValueError(f"{kind} {path} cannot be read ({reason}); was it cut short?") from error


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict of which every entry must fit.

    Raises:
        ValueError: names or shapes that do not match, listed; ``source`` says where they are from.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise ValueError(f"{source} does not match the network: {problems}") from error


# ---- the network -------------------------------------------------------------------------------
class MLNet(nn.Module):
    """ML-Net: levels of a CNN -> encoding -> learned prior -> saliency.

    Input: (B, 3, H, W) RGB in 0..255 (uint8 or float), H and W multiples of 8; or, for a frozen
    backbone, the (B, C, H/8, W/8) ``features`` of its levels, concatenated (features.py).
    Output: (B, 1, H/8, W/8) float32; ``head="paper"``: non-negative, unnormalised;
    ``head="density"``: a probability density, each map sums to 1.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.head, self.compat = config.head, config.compat
        self.levels, self.dropout_at_test = config.levels, config.dropout_at_test
        self.freeze_norm = config.freeze_norm
        # 3.1 multi-level features
        self.backbone, (mean, std) = build_backbone(config)
        if config.levels > len(self.backbone.channels):
            raise ValueError(
                f"config: levels={config.levels}, but {config.backbone} has "
                f"{len(self.backbone.channels)} levels at 1/8 resolution"
            )
        # 3.2 encoding: dropout, 3x3 convolution to 64 channels, 1x1 convolution to one map
        width = sum(self.backbone.channels[-config.levels :])
        self.dropout = (nn.Dropout2d if config.dropout_channels else nn.Dropout)(config.dropout)
        self.encode = nn.Conv2d(width, config.channels, 3, padding=1)
        self.to_map = nn.Conv2d(config.channels, 1, 1)
        for layer in (self.encode, self.to_map):
            nn.init.xavier_normal_(layer.weight)  # code: glorot_normal
            nn.init.zeros_(layer.bias)
        # 3.3 learned prior: W starts at zero, which is neutral in both heads
        self.prior = (
            nn.Parameter(torch.zeros(1, 1, *config.prior_cells)) if config.prior_cells else None
        )
        self.swap_to_bgr = config.normalisation == "caffe"
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1) * 255)
        freeze(self, config.freeze)

    def forward(self, image: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        levels = self.extract(image)[-self.levels :] if features is None else [features]  # 3.1
        x = self.encode_levels(levels)  # 3.2
        return self.apply_prior(x)  # 3.3

    def extract(self, image: Tensor) -> list[Tensor]:
        """All levels of the backbone, shallow to deep, each (B, C, H/8, W/8)."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[-2] % 8 or image.shape[-1] % 8:
            raise ValueError(
                "MLNet expects (B, 3, H, W) with H and W multiples of 8, got "
                f"{tuple(image.shape)}; see transforms.letterbox"
            )
        x = (image.to(self.mean.dtype) - self.mean) / self.std
        return self.backbone(x.flip(1) if self.swap_to_bgr else x)

    @torch.inference_mode()
    def explain(self, image: Tensor) -> dict[str, Tensor]:
        """Take a prediction apart, in the units of the raw map (log-density with that head).

        Returns:
            ``"level 1"``...: (B, 1, h, w) change of the raw map made by what is specific to each
            place in that level (against the level's mean over the photo); ``"raw"``: the raw map
            before the prior; ``"prior"``: (1, 1, h, w); ``"saliency"``: the output.
        """
        levels = self.extract(image)[-self.levels :]
        raw = self.encode_levels(levels)
        parts = {}
        for i, level in enumerate(levels):
            flat = level.mean((2, 3), keepdim=True).expand_as(level)
            parts[f"level {i + 1}"] = raw - self.encode_levels(
                [*levels[:i], flat, *levels[i + 1 :]]
            )
        prior = torch.zeros_like(raw[:1])
        if self.prior is not None:
            prior = self.upsampled_prior(raw.shape[-2:])
        return {**parts, "raw": raw, "prior": prior, "saliency": self.apply_prior(raw)}

    def encode_levels(self, levels: list[Tensor]) -> Tensor:
        """3.2: levels -> the map before the prior, (B, 1, H/8, W/8) float32."""
        x = torch.cat(levels, dim=1)  # (B, 1280, H/8, W/8) with VGG-16
        x = self.encode(self.drop(x))  # (B, 64, H/8, W/8)
        if self.compat != "mlnet-pytorch":
            x = F.relu(x)
        return self.to_map(x).float()  # (B, 1, H/8, W/8)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout; at test time only where MLNet-Pytorch's defect is asked for."""
        if self.dropout_at_test and not self.training:
            channelwise = isinstance(self.dropout, nn.Dropout2d)
            drop = F.dropout2d if channelwise else F.dropout
            return drop(x, self.dropout.p, training=True)
        return self.dropout(x)

    def apply_prior(self, x: Tensor) -> Tensor:
        """3.3: combine the raw map with the learned prior, upsampled to the map's size."""
        if self.head == "density":
            if self.prior is not None:
                x = x + self.upsampled_prior(x.shape[-2:])
            return x.flatten(1).softmax(1).reshape(x.shape)
        if self.compat != "mlnet-pytorch":
            x = F.relu(x)
        if self.prior is not None:
            x = x * (1 + self.upsampled_prior(x.shape[-2:]))
        return F.relu(x)

    def upsampled_prior(self, size: tuple[int, int]) -> Tensor:
        """W, bilinearly upsampled to the map: (1, 1, h, w). Zero means: no preference."""
        prior = self.prior.float()
        if self.compat == "theano":
            rows = theano_upsampling(prior.shape[-2], size[0]).to(prior)
            columns = theano_upsampling(prior.shape[-1], size[1]).to(prior)
            return rows @ prior @ columns.T
        corners = self.compat == "mlnet-pytorch"
        return F.interpolate(prior, size=size, mode="bilinear", align_corners=corners)

    def train(self, mode: bool = True) -> "MLNet":
        """As usual, except that a backbone with ``freeze_norm`` keeps its batch-norm statistics."""
        super().train(mode)
        if self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def network_input(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What :meth:`MLNet.forward` takes of a batch: photos, or features where they are cached."""
    if "features" in batch:
        return {"features": batch["features"].float()}
    return {"image": batch["image"]}


def theano_upsampling(cells: int, size: int) -> Tensor:
    """(size, cells) weights of Theano's bilinear_upsampling for the ratio r = size / cells.

    Sample s is centred at r*s + (r - 1)//2 and the border is replicated.
    """
    if size % cells:
        raise ValueError(f"Theano's upsampling needs a whole ratio, got {cells} -> {size}")
    ratio = size // cells
    position = (torch.arange(size, dtype=torch.float64) - (ratio - 1) // 2) / ratio
    position = position.clamp(0, cells - 1)
    low = position.floor().long().clamp(max=max(cells - 2, 0))
    weight = position - low
    matrix = torch.zeros(size, cells, dtype=torch.float64)
    index = torch.arange(size)
    matrix[index, low] = 1 - weight
    matrix[index, (low + 1).clamp(max=cells - 1)] += weight
    return matrix


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Stop the gradient of parameters whose names match a pattern; return the frozen names.

    Raises:
        ValueError: a pattern that matches nothing (a typo would otherwise train silently).
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"config: freeze pattern {pattern!r} matches no parameter of {names}")
    frozen = []
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)
