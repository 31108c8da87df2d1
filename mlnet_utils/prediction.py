"""Saliency maps for photos, from Python and for folders of files."""

import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlnet_utils.checkpoints import load_model
from mlnet_utils.config import Config
from mlnet_utils.datasets import decode, read_image
from mlnet_utils.model import MLNet
from mlnet_utils.plots import overlay as paint_overlay
from mlnet_utils.runtime import atomic_path, cpu_count, pick_device, progress
from mlnet_utils.transforms import Letterbox, authors_postprocess, letterbox, unletterbox

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a photo
FLOOR = 1e-12  # of a probability, before its logarithm is taken

Photo = str | Path | Image.Image | np.ndarray | Tensor


def load(checkpoint: str | Path, device: str | None = None) -> "Predictor":
    """A trained network, ready to predict.

    Args:
        checkpoint: ``checkpoints/best.pt`` of a run, or an imported one.
        device: e.g. ``"cuda"``; default: a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it cannot be read.

    Example:
        >>> import mlnet_utils
        >>> density = mlnet_utils.load("best.pt").predict("photo.jpg")  # doctest: +SKIP
    """
    model, config, _ = load_model(checkpoint)
    return Predictor(model.to(device or pick_device()), config)


@dataclass
class Predictor:
    """A network in eval mode with the configuration it was trained with."""

    model: MLNet
    config: Config

    def predict(self, image: Photo) -> np.ndarray:
        """Where people look on one photo.

        Args:
            image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W);
                arrays and tensors are uint8, or float in 0..1 or 0..255.

        Returns:
            (H, W) float32 density at the photo's size, sums to 1.

        Raises:
            FileNotFoundError, ValueError: the photo is missing, unreadable, or of another shape.
        """
        return self.predict_many([image])[0]

    def predict_many(self, images: Sequence[Photo]) -> list[np.ndarray]:
        """:meth:`predict` for several photos of any sizes, in one pass through the network."""
        photos = [to_tensor(image) for image in images]
        inputs, boxes = zip(*(self.prepare(photo) for photo in photos), strict=True)
        densities = predict_densities(self.model, self.config, torch.stack(inputs), boxes)
        return [density.float().cpu().numpy() for density in densities]

    def prepare(self, photo: Tensor) -> tuple[Tensor, Letterbox]:
        """(3, H, W) uint8 photo -> the network's uint8 input, and its geometry."""
        height, width = self.config.height, self.config.width
        if min(photo.shape[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"the photo is {photo.shape[2]}x{photo.shape[1]} pixels; both sides must be at "
                f"least {SMALLEST_SIDE}"
            )
        boxed = letterbox(photo, height, width, antialias=not self.config.compat)
        box = Letterbox(photo.shape[1], photo.shape[2], height, width)
        return boxed.round().clamp(0, 255).to(torch.uint8), box

    def explain(self, image: Photo) -> dict[str, np.ndarray]:
        """:meth:`MLNet.explain` at the photo's size: name -> (H, W) float32."""
        boxed, box = self.prepare(to_tensor(image))
        parts = self.model.explain(boxed[None].to(self.model.mean.device))
        return {
            name: unletterbox(part[:, 0].double(), box)[0].float().cpu().numpy()
            for name, part in parts.items()
        }

    @torch.inference_mode()
    def feature_maps(self, image: Photo, per_level: int = 4) -> dict[str, np.ndarray]:
        """The channels of every level that vary most over a photo: title -> (h, w) float32."""
        boxed, _ = self.prepare(to_tensor(image))
        levels = self.model.extract(boxed[None].to(self.model.mean.device))[-self.model.levels :]
        chosen = {}
        for number, level in enumerate(levels, start=1):
            order = level[0].float().flatten(1).std(1).argsort(descending=True)[:per_level]
            for channel in order.tolist():
                chosen[f"level {number}, channel {channel}"] = (
                    level[0, channel].float().cpu().numpy()
                )
        return chosen


@torch.inference_mode()
def predict_densities(
    model: MLNet, config: Config, images: Tensor, boxes: Sequence[Letterbox]
) -> list[Tensor]:
    """The network's output brought to each photo's own size, as a probability density.

    A density head is interpolated as a log-density, which keeps peaks sharp: on OSIE's validation
    photos it scored higher than interpolating the density itself in every metric. Imported
    networks of the authors are postprocessed as theirs (``authors_postprocess``).

    Args:
        model: in eval mode.
        config: the one it was trained with.
        images: (B, 3, height, width) letterboxed, 0..255.
        boxes: how each photo was letterboxed.

    Returns:
        One (H, W) float64 tensor per photo, positive or zero, sums to 1. A map without any
        saliency (a dead network) becomes uniform, with a warning.
    """
    images = images.to(model.mean.device)
    maps = model(images)
    if config.test_flip:
        mirrored = model(images.flip(-1)).flip(-1)
        geometric = config.head == "density"
        maps = (maps * mirrored).sqrt() if geometric else (maps + mirrored) / 2
    maps = maps[:, 0].double()  # (B, h, w)
    densities = []
    for single, box in zip(maps[:, None], boxes, strict=True):
        if config.head == "density":
            density = unletterbox(single.clamp_min(FLOOR).log(), box)[0].exp()
        elif config.compat == "theano":
            density = authors_postprocess(single, box.photo_height, box.photo_width)[0]
        else:
            density = unletterbox(single, box)[0]
        total = density.sum()
        if not total > 0:
            warnings.warn("the predicted map is zero everywhere; using a uniform one", stacklevel=2)
            density, total = torch.ones_like(density), density.numel()
        densities.append(density / total)
    return densities


def to_tensor(image: Photo) -> Tensor:
    """Any accepted form of a photo as (3, H, W) uint8.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unreadable file, or an array that is not a photo.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return decode(image)
    array = torch.as_tensor(image)
    if array.ndim == 2:
        array = array[None].expand(3, -1, -1)
    elif array.ndim == 3 and not isinstance(image, Tensor):
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
        raise ValueError(
            "a photo is a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W); "
            f"got shape {tuple(torch.as_tensor(image).shape)}"
        )
    if array.is_floating_point():
        if not torch.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise ValueError("a float photo must be finite and in 0..1 or 0..255")
        array = (array * 255 if array.max() <= 1 else array).round().to(torch.uint8)
    if array.dtype != torch.uint8:
        raise ValueError(f"a photo must be uint8 or float, got {array.dtype}")
    return array.expand(3, -1, -1).contiguous() if len(array) == 1 else array[:3].contiguous()


# ---- folders -----------------------------------------------------------------------------------
@dataclass
class FolderResult:
    """What became of every photo."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A sentence, and a line for every photo that failed."""
        lines = [f"{len(self.done)} photos done, {len(self.skipped)} were done before"]
        lines += [f"failed: {path}: {why}" for path, why in self.failed.items()]
        return "\n".join(lines)


def predict_folder(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    overlay: bool = False,
    npy: bool = False,
    force: bool = False,
    batch_size: int = 8,
    device: str | None = None,
) -> FolderResult:
    """Write the saliency maps of photos and of folders of photos.

    Every photo gets ``<stem>.png`` (8 bits, its own size, maximum 255), on request
    ``<stem>_overlay.png`` and ``<stem>.npy`` (float32 density that sums to 1). Photos inside a
    given folder keep their sub-folders. Photos whose outputs exist are skipped, so that an
    interrupted call can be repeated. Under ``accelerate launch`` every process takes its share.

    Args:
        checkpoint: a trained or imported network.
        paths: photos and folders.
        out: folder for the maps.
        overlay: also write the photo with its map on top.
        npy: also write the density.
        force: redo what exists.
        batch_size: photos per forward pass.
        device: default: a GPU if there is one.

    Returns:
        Which photos were done, skipped, or failed and why; a broken photo stops nothing.

    Raises:
        FileNotFoundError: a path or the checkpoint does not exist.
        ValueError: no photos, or two photos that would write the same file.
    """
    targets = list_photos(paths, Path(out))
    suffixes = [".png", *(["_overlay.png"] if overlay else []), *([".npy"] if npy else [])]
    result = FolderResult()
    todo = []
    for photo, target in targets.items():
        complete = all(_output(target, suffix).exists() for suffix in suffixes)
        if complete and not force:
            result.skipped.append(photo)
        else:
            todo.append(photo)
    if not todo:
        return result
    predictor = load(checkpoint, device)
    with ThreadPoolExecutor(max_workers=min(8, cpu_count() + 1)) as pool:
        batches = _decoded(pool, todo, batch_size, result)
        total = math.ceil(len(todo) / batch_size)
        for batch in progress(batches, "predicting", total, unit="batch"):
            for photo, pixels, density in _predicted(predictor, batch, result):
                try:
                    _write(targets[photo], pixels, density, overlay, npy)
                except OSError as error:
                    result.failed[photo] = f"its map cannot be written ({error})"
                else:
                    result.done.append(photo)
    return result


def list_photos(paths: Sequence[str | Path], out: Path) -> dict[Path, Path]:
    """Photo -> its output path without suffix.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no photos, or two photos that would write the same file.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file():
                    found[file] = out / file.relative_to(path).parent / file.stem
        elif path.is_file():
            found[path] = out / path.stem
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not found:
        raise ValueError(f"no photos ({', '.join(PHOTO_SUFFIXES)}) in {', '.join(map(str, paths))}")
    owners: dict[Path, Path] = {}
    for photo, target in found.items():
        if target in owners:
            raise ValueError(
                f"{owners[target]} and {photo} would both be written to {target}.png; give them "
                "different names, or predict their folders into different --out folders"
            )
        owners[target] = photo
    return found


def _decoded(
    pool: ThreadPoolExecutor, photos: Sequence[Path], batch_size: int, result: FolderResult
) -> Iterator[list[tuple[Path, Tensor]]]:
    """Batches of decoded photos, the next one being decoded while this one is used."""
    waiting = iter(photos)

    def submit() -> list:
        return [(photo, pool.submit(read_image, photo)) for photo in islice(waiting, batch_size)]

    current = submit()
    while current:
        following = submit()
        batch = []
        for photo, future in current:
            try:
                batch.append((photo, future.result()))
            except (ValueError, OSError) as error:
                result.failed[photo] = str(error)
        yield batch
        current = following


def _predicted(
    predictor: Predictor, batch: list[tuple[Path, Tensor]], result: FolderResult
) -> Iterator[tuple[Path, Tensor, np.ndarray]]:
    """(photo, pixels, density); photos the network cannot take are noted as failed."""
    usable = []
    for photo, pixels in batch:
        if min(pixels.shape[1:]) < SMALLEST_SIDE:
            size = f"{pixels.shape[2]}x{pixels.shape[1]}"
            result.failed[photo] = f"{size} pixels; both sides must be at least {SMALLEST_SIDE}"
        else:
            usable.append((photo, pixels))
    if usable:
        densities = predictor.predict_many([pixels for _, pixels in usable])
        for (photo, pixels), density in zip(usable, densities, strict=True):
            yield photo, pixels, density


def _write(target: Path, pixels: Tensor, density: np.ndarray, overlay: bool, npy: bool) -> None:
    """Write a photo's outputs, each atomically, the map itself last."""
    if npy:
        with atomic_path(_output(target, ".npy")) as temporary:
            np.save(temporary, density)
    if overlay:
        painted = paint_overlay(pixels.permute(1, 2, 0).numpy(), density)
        with atomic_path(_output(target, "_overlay.png")) as temporary:
            Image.fromarray(painted).save(temporary)
    with atomic_path(_output(target, ".png")) as temporary:
        Image.fromarray(to_8_bits(density)).save(temporary)


def _output(target: Path, suffix: str) -> Path:
    """The target with a suffix appended; ``with_suffix`` would cut a stem that has a dot."""
    return target.with_name(target.name + suffix)


def to_8_bits(density: np.ndarray) -> np.ndarray:
    """(H, W) uint8 with a maximum of 255: what files and challenges take, unfit for KL and IG."""
    return np.round(255 * density / density.max()).astype(np.uint8)
