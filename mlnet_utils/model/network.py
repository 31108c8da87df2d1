"""ML-Net in three visible parts: multi-level features, encoding, learned prior (paper, 3)."""

from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlnet_utils.config import Config
from mlnet_utils.model.backbones import build_backbone

LEAST = 1e-12  # of a probability, before its logarithm is taken


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
            found = f"{config.backbone} has {len(self.backbone.channels)} levels"
            raise ValueError(f"config: levels={config.levels}, but {found} at 1/8 resolution")
        # 3.2 encoding: dropout, 3x3 convolution to 64 channels, 1x1 convolution to one map
        width = sum(self.backbone.channels[-config.levels :])
        # All levels at once: each of these treats every channel by itself.
        self.rectify = nn.ReLU() if config.rectify else nn.Identity()
        self.standard = nn.Identity()
        if config.standardise:
            self.standard = nn.BatchNorm2d(width, affine=False)
        elif config.centre:
            self.standard = Centring(width)
        self.dropout = (nn.Dropout2d if config.dropout_channels else nn.Dropout)(config.dropout)
        self.encode = nn.Conv2d(width, config.channels, 3, padding=1)
        self.to_map = nn.Conv2d(config.channels, 1, 1)
        self.relu = nn.ReLU()
        if config.compat == "mlnet-pytorch":
            self.relu = nn.Identity()  # its only ReLU is the last; its layers start as PyTorch's
        else:
            for layer in (self.encode, self.to_map):
                nn.init.xavier_normal_(layer.weight)  # code: glorot_normal
                nn.init.zeros_(layer.bias)
        if config.standardise and config.head == "density":
            nn.init.zeros_(self.to_map.weight)  # the first map is uniform, not noise
        # 3.3 learned prior: W starts at zero, which is neutral in both heads
        cells = config.prior_cells
        self.prior = nn.Parameter(torch.zeros(1, 1, *cells)) if cells else None
        if config.adapt and config.head != "density":
            raise ValueError(f"config: adapt needs head='density', not head={config.head!r}")
        self.adaptation = Adaptation() if config.adapt else nn.Identity()
        self.swap_to_bgr = config.normalisation == "caffe"
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1) * 255)
        freeze(self, config.freeze)

    def forward(self, image: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        raw = self.raw_map(image, features)
        return self.adaptation(self.apply_prior(raw))  # 3.3; the adaptation is none in the paper

    def raw_map(self, image: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """(B, 1, H/8, W/8) float32: the map before the prior, of photos or of their features."""
        levels = self.extract(image)[-self.levels :] if features is None else [features]  # 3.1
        return self.encode_levels(levels)  # 3.2

    def extract(self, image: Tensor) -> list[Tensor]:
        """The backbone's levels, shallow to deep, (B, C, H/8, W/8); ValueError: another shape."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[-2] % 8 or image.shape[-1] % 8:
            found = f"got {tuple(image.shape)}; see data.geometry.letterbox"
            raise ValueError(f"MLNet expects (B, 3, H, W) with H and W multiples of 8, {found}")
        x = (image.to(self.mean.dtype) - self.mean) / self.std
        return self.backbone(x.flip(1) if self.swap_to_bgr else x)

    @torch.inference_mode()
    def explain(self, image: Tensor) -> dict[str, Tensor]:
        """Take a prediction apart, in the units of the raw map (log-density with that head).

        Returns ``"level 1"`` and so on, (B, 1, h, w): the difference to the raw map in which the
        level has its mean over the photo everywhere. ``"raw"`` is the map before the prior,
        ``"prior"`` is (1, 1, h, w), ``"saliency"`` the output.
        """
        levels = self.extract(image)[-self.levels :]
        raw = self.encode_levels(levels)
        prior = self.upsampled_prior(raw.shape[-2:])
        parts = {"raw": raw, "prior": prior, "saliency": self.adaptation(self.apply_prior(raw))}
        shares = {}
        for i, level in enumerate(levels):
            flat = level.mean((2, 3), keepdim=True).expand_as(level)
            without = self.encode_levels([*levels[:i], flat, *levels[i + 1 :]])
            shares[f"level {i + 1}"] = raw - without
        return shares | parts

    def encode_levels(self, levels: list[Tensor]) -> Tensor:
        """3.2: levels -> the map before the prior, (B, 1, H/8, W/8) float32."""
        x = torch.cat(levels, dim=1)  # (B, 1280, H/8, W/8) with VGG-16
        x = self.standard(self.rectify(x))  # nothing, in the paper
        x = self.relu(self.encode(self.dropout(x)))  # (B, 64, H/8, W/8)
        return self.to_map(x).float()  # (B, 1, H/8, W/8)

    def apply_prior(self, x: Tensor) -> Tensor:
        """3.3: combine the raw map with the learned prior, upsampled to the map's size."""
        prior = self.upsampled_prior(x.shape[-2:])  # (1, 1, H/8, W/8), zero: no preference
        if self.head == "density":
            return _softmax(x + prior)
        return F.relu(self.relu(x) * (1 + prior))

    def upsampled_prior(self, size: tuple[int, int]) -> Tensor:
        """W, bilinearly upsampled to the map: (1, 1, h, w); zeros for a network without prior."""
        if self.prior is None:
            return torch.zeros(1, 1, *size, device=self.mean.device)
        prior = self.prior.float()
        if self.compat == "theano":
            rows = theano_upsampling(prior.shape[-2], size[0]).to(prior)
            columns = theano_upsampling(prior.shape[-1], size[1]).to(prior)
            return rows @ prior @ columns.T
        corners = self.compat == "mlnet-pytorch"
        return F.interpolate(prior, size=size, mode="bilinear", align_corners=corners)

    def train(self, mode: bool = True) -> "MLNet":
        """Set the mode; ``freeze_norm`` keeps the backbone's batch-norm statistics as they are, and
        ``dropout_at_test``, MLNet-Pytorch's defect, keeps the dropout on."""
        super().train(mode)
        self.dropout.train(mode or self.dropout_at_test)
        if self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class Centring(nn.Module):
    """(B, C, h, w) less the mean of every channel: of the batch in training, else a running mean.

    Batch norm without its division.
    """

    def __init__(self, channels: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean
        mean = x.mean((0, 2, 3), keepdim=True)
        self.mean.lerp_(mean.detach().to(self.mean.dtype), self.momentum)
        return x - mean


class Adaptation(nn.Module):
    """Differences between datasets beside the photos, in 14 numbers, neutral at first.

    A (B, 1, h, w) density is taken to the power 1 / temperature, blurred, and multiplied by a
    coarse bias, upsampled as the prior is. So do Kuemmerer et al. (2025, arXiv:2505.10169); their
    fewer than 20 numbers of a dataset hold sizes of the photo too.
    """

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))  # its logarithm
        # Logarithm of the Gaussian's deviation in cells: at 0.1 a neighbour weighs nothing.
        self.blur = nn.Parameter(torch.tensor(0.1).log())
        self.bias = nn.Parameter(torch.zeros(1, 1, 3, 4))  # of the log-density

    def forward(self, density: Tensor) -> Tensor:
        # In float32, whatever precision the rest of the network has.
        temperature, bias = self.temperature.float().exp(), self.bias.float()
        x = _softmax(density.clamp_min(LEAST).log() / temperature)
        rows, columns = map(self._blur_matrix, x.shape[-2:])
        x = (rows @ x @ columns.T).clamp_min(LEAST).log()
        return _softmax(x + F.interpolate(bias, size=x.shape[-2:], mode="bilinear"))

    def _blur_matrix(self, cells: int) -> Tensor:
        """(cells, cells) Gaussian blur along one axis; columns sum to 1, so that mass is kept."""
        at = torch.arange(cells, device=self.blur.device)
        weights = (-0.5 * ((at[:, None] - at) / self.blur.float().exp()) ** 2).exp()
        return weights / weights.sum(0)


def _softmax(x: Tensor) -> Tensor:
    """(B, 1, h, w) log-densities, of any sum, as densities."""
    return x.flatten(1).softmax(1).reshape(x.shape)


def network_input(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The input of :meth:`MLNet.forward` in a batch: photos, or features where they are cached."""
    cached = "features" in batch
    return {"features": batch["features"].float()} if cached else {"image": batch["image"]}


def theano_upsampling(cells: int, size: int) -> Tensor:
    """(size, cells) weights of Theano's bilinear_upsampling for the ratio r = size / cells.

    Sample s is centred at r*s + (r - 1)//2; the border is replicated. ValueError: r is not whole.
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
    """Stop the gradient of parameters with names that match a pattern; return these names.

    Raises ValueError: a pattern that matches nothing (a typo would otherwise train silently).
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"config: freeze pattern {pattern!r} matches no parameter of {names}")
    frozen = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)
