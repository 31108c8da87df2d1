"""Saliency maps for photos, from Python: one photo or a batch of any sizes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mlnet_utils.config import Config
from mlnet_utils.data.geometry import Letterbox, letterbox, unletterbox
from mlnet_utils.data.images import SMALLEST_SIDE, decode, read_image, to_bytes
from mlnet_utils.model.checkpoints import load_model
from mlnet_utils.model.network import LEAST
from mlnet_utils.runtime import native_precision, pick_device

MODEL = "ML-Net"  # the network's name in tables of scores
EXPORTED = (".onnx", ".pt2")  # suffixes of networks in another form, see ``export``
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMOOTHLY = {"mode": "bilinear", "antialias": True, "align_corners": False}

Photo = str | Path | Image.Image | np.ndarray | Tensor


def load(checkpoint: str | Path = "", device: str | None = None, fast: bool = False) -> "Predictor":
    """A trained network, ready to predict.

    ``checkpoint`` is ``checkpoints/best.pt`` of a run, an imported or an exported network; by
    default the network that comes with the package, trained on OSIE and EyeCrowd. ``device`` is by
    default the GPU, if any; exported networks use the CPU only. ``fast`` leaves out the mirrored
    photo and other sizes, and computes in half precision where the device does:
    docs/prediction.md has speeds and scores.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read, or an exported network is wanted on another device.
        ImportError: a network in ONNX, and the extra ``export`` is not installed.

    Example:
        >>> import mlnet_utils
        >>> density = mlnet_utils.load().predict("photo.jpg")  # doctest: +SKIP
    """
    if Path(checkpoint).suffix in EXPORTED:
        from mlnet_utils.predict.export import load_exported

        if device not in (None, "cpu"):
            raise ValueError(f"{checkpoint} is exported: it runs on the CPU, not on {device}")
        predictor = load_exported(checkpoint)
    else:
        model, config, content = load_model(checkpoint)
        device = device or pick_device()
        predictor = Predictor(model.to(device), config, device, content.get("data", ""))
        if fast:  # channels last: a CPU's bf16 is no faster without it (results/benchmarks)
            kind = PRECISIONS[native_precision(device)]
            model.to(dtype=kind, memory_format=torch.channels_last)
    if fast:
        predictor.config = replace(predictor.config, test_flip=False, test_scales=(1.0,))
    return predictor


@dataclass
class Predictor:
    """A network in eval mode, the configuration of its training, and its device."""

    model: nn.Module
    config: Config
    device: str = "cpu"
    data: str = ""  # digest of the prepared data that it was trained on, where it is known

    def predict(self, image: Photo) -> np.ndarray:
        """The probability of a fixation at every pixel: (H, W) float32 at the photo's size, sum 1.

        The photo is a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or
        (H, W); arrays and tensors are uint8, or float in 0..1 or 0..255. Alpha goes over white.

        Raises:
            FileNotFoundError: a path that does not exist.
            ValueError: the photo is unreadable, too small, or of another shape or range.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Photo]) -> list[np.ndarray]:
        """:meth:`predict` for several photos of any sizes, in one pass through the network."""
        prepared = [self.prepare(to_tensor(image)) for image in images]
        if not prepared:
            return []
        inputs, boxes = zip(*prepared, strict=True)
        maps = predict_maps(self.model, self.config, torch.stack(inputs).to(self.device))
        pairs = zip(maps, boxes, strict=True)
        return [to_density(single, self.config, box).float().numpy() for single, box in pairs]

    def prepare(self, photo: Tensor) -> tuple[Tensor, Letterbox]:
        """(3, H, W) uint8 photo -> the network's uint8 input and its geometry.

        Raises ValueError: a side is shorter than 32 pixels.
        """
        (rows, columns), height, width = photo.shape[1:], self.config.height, self.config.width
        if min(rows, columns) < SMALLEST_SIDE:
            raise ValueError(f"the photo is {columns}x{rows}: at least {SMALLEST_SIDE} a side")
        boxed = letterbox(photo, height, width, self.config.antialias)
        return boxed, Letterbox(rows, columns, height, width)

    def explain(self, image: Photo) -> dict[str, np.ndarray]:
        """:meth:`MLNet.explain` at the photo's size: name -> (H, W) float32."""
        boxed, box = self.prepare(to_tensor(image))
        parts = self.model.explain(boxed[None].to(self.device)).items()
        maps = {name: unletterbox(part[:, 0].cpu().double(), box)[0] for name, part in parts}
        return {name: single.float().numpy() for name, single in maps.items()}

    @torch.inference_mode()
    def feature_maps(self, image: Photo, per_level: int = 4) -> dict[str, np.ndarray]:
        """The channels of every level that vary most over a photo: title -> (H, W) float32.

        Their standard deviation over the cells inside the photo, without padding, decides.
        """
        boxed, box = self.prepare(to_tensor(image))
        levels = self.model.extract(boxed[None].to(self.device))[-self.model.levels :]
        chosen = {}
        for number, level in enumerate(levels, start=1):
            channels = level[0].double().cpu()
            cells = {"photo_height": box.content_height // 8, "photo_width": box.content_width // 8}
            inside = unletterbox(channels, replace(box, **cells))
            order = inside.flatten(1).std(1).argsort(descending=True)
            for channel in order[:per_level].tolist():
                shown = unletterbox(channels[channel : channel + 1], box)[0]
                chosen[f"level {number}, channel {channel}"] = shown.float().numpy()
        return chosen


@torch.inference_mode()
def predict_maps(model: nn.Module, config: Config, images: Tensor) -> Tensor:
    """The network's output, averaged over mirroring and sizes of the photo as ``config`` asks.

    Probabilities are averaged as logarithms, other maps as they are (``test_flip`` and
    ``test_scales``). The model is in eval mode. Takes (B, 3, height, width) letterboxed images,
    0..255, on its device; returns (B, h, w) float64 on the CPU, on the network's grid.
    """
    geometric, found = config.head == "density", []
    for scale in config.test_scales:
        # Another size of whole cells of the network's grid.
        size = [8 * max(1, round(scale * side / 8)) for side in images.shape[-2:]]
        sized = images if scale == 1 else F.interpolate(images.float(), size=size, **SMOOTHLY)
        maps = model(sized)
        if config.test_flip:
            mirrored = model(sized.flip(-1)).flip(-1)
            maps = (maps * mirrored).sqrt() if geometric else (maps + mirrored) / 2
        found.append(maps.cpu().double())  # Apple's GPUs have no float64
    if config.test_scales == (1,):
        return found[0][:, 0]
    if geometric:
        found = [maps.clamp_min(LEAST).log() for maps in found]
    resized = [F.interpolate(maps, size=config.grid, **SMOOTHLY) for maps in found]
    mean = torch.stack(resized).mean(0)[:, 0]
    return mean.exp() if geometric else mean


def to_density(single: Tensor, config: Config, box: Letterbox) -> Tensor:
    """A (h, w) float64 map on the network's grid as a probability density at the photo's size.

    A density head is interpolated as a log-density, which keeps peaks sharp: on OSIE's validation
    photos it scored higher than interpolating the density itself in every metric. Imported
    networks of the authors are postprocessed as theirs (``authors_postprocess``).

    Returns (H, W) float64, sum 1; uniform, with a warning, for a dead network's map.
    """
    maps = single[None]
    if config.head == "density":
        density = unletterbox(maps.clamp_min(LEAST).log(), box)[0].exp_()
    elif config.compat == "theano":
        density = authors_postprocess(maps, box.photo_height, box.photo_width)[0]
    else:
        density = unletterbox(maps, box)[0]
    total = density.sum()
    if not 0 < total < torch.inf:
        said = "the network's map is zero everywhere or not a number; a uniform map replaces it"
        warnings.warn(f"{said}: train the network again, see docs/training.md", stacklevel=2)
        density, total = torch.ones_like(density), density.numel()
    return density.div_(total)  # in place: photos may be large


def authors_postprocess(maps: Tensor, height: int, width: int) -> Tensor:
    """(B, h, w) maps on the grid back at the photo's size, as the authors' code brings them.

    Their ``postprocess_predictions`` resizes a map until the letterboxed area covers the photo,
    crops the centre, and divides by the maximum (they multiply by 255 for their files). Without
    padding this equals :func:`unletterbox`; with it, this rounds the resized side down to whole
    pixels and reads into cells of the padding. A map of zeros stays so; the authors' becomes NaN.
    """
    rows, columns = maps.shape[-2:]
    if height * columns > width * rows:
        size = (height, columns * height // rows)
    else:
        size = (rows * width // columns, width)
    covering = F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    photo = covering[:, top : top + height, left : left + width]
    peak = photo.amax((1, 2), keepdim=True)
    return photo / peak.where(peak > 0, 1)


def to_tensor(image: Photo) -> Tensor:
    """Any accepted form of a photo as (3, H, W) uint8; errors as of :meth:`Predictor.predict`."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return decode(image)
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()
        pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
    else:
        pixels = np.asarray(image)
    channels = pixels.shape[-1] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        wanted = "a photo is a path, a PIL image, an array (H, W, 3) or (H, W), a tensor (3, H, W)"
        raise ValueError(f"{wanted}; got {type(image).__name__} of shape {tuple(np.shape(image))}")
    if pixels.dtype.kind == "f":
        pixels = to_bytes(pixels)
    if pixels.dtype != np.uint8:
        raise ValueError(f"a photo must be uint8 or float, got {pixels.dtype}")
    return decode(Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
