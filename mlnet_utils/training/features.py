"""Features of a frozen backbone: computed once per photo, kept on disk, shared by all runs.

Training the encoding and the prior on a frozen backbone would compute the same features in every
epoch; that pass is most of the work. Here it is done once. The files of a photo are named after
its SHA-256, their folder after everything else that decides the numbers: weights, input size,
normalisation, precision. A file that is there is therefore the right one, whichever run made it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlnet_utils.config import Config
from mlnet_utils.data.datasets import SaliencyDataset
from mlnet_utils.data.photos import Photo
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import atomic_path, feature_root, progress

BATCH = 8
# Beside the weights, what changes features. Not `levels`: those of all three are kept.
DECIDING = ("backbone", "backbone_args", "backbone_drop", "normalisation", "compat", "height",
            "width")  # fmt: skip


def check_cacheable(model: MLNet, config: Config) -> None:
    """Refuse to cache what is not the same in every epoch.

    Raises:
        ValueError: a part of the backbone trains, or its batch-norm does.
    """
    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"config: cache_features needs a frozen backbone, but {len(trained)} of its parameters "
            f"train, e.g. backbone.{trained[0]}: set freeze to ['backbone.*'], or cache_features "
            "to false"
        )
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms and not config.freeze_norm:
        raise ValueError(
            "config: cache_features needs freeze_norm, because batch-norm in training mode makes a "
            "photo's features depend on the other photos of its batch"
        )


def cache_features(
    model: MLNet, config: Config, accelerator: Accelerator, data: Iterable[SaliencyDataset]
) -> None:
    """Compute the features of all photos that are not cached yet, and let datasets give those.

    Args:
        model: with the weights that it will keep: features of others would be cached as its own.
        config: of the run.
        accelerator: device, precision and processes.
        data: the run's datasets.

    Raises:
        ValueError, OSError: see :class:`FeatureCache` and :meth:`FeatureCache.fill`.
    """
    cache = FeatureCache(model, config, accelerator.mixed_precision, feature_root())
    for dataset in data:
        cache.fill(model, dataset, accelerator)
        dataset.features = cache


class FeatureCache:
    """The features of all levels, one file per photo and orientation, and how to read them."""

    def __init__(self, model: MLNet, config: Config, precision: str, root: Path):
        """
        Args:
            model: its backbone is hashed, not kept: loader processes get a copy of this object.
            config: of the run.
            precision: accelerate's name of it.
            root: folder of all caches.

        Raises:
            ValueError: see :func:`check_cacheable`.
        """
        check_cacheable(model, config)
        self.folder = root / backbone_key(model, config, precision)
        self.shape = (sum(model.backbone.channels), *config.grid)
        # The deepest levels, which are used, come last.
        self.first_used = self.shape[0] - sum(model.backbone.channels[-config.levels :])

    def path(self, photo: Photo, mirrored: bool) -> Path:
        """The file of one photo.

        Raises:
            ValueError: the photo has no hash to tell it from others.
        """
        if not photo.sha256:
            raise ValueError(
                f"photo {photo.stem} was indexed without its SHA-256; prepare the data again"
            )
        return self.folder / f"{photo.sha256}{'-mirrored' if mirrored else ''}.npy"

    def __call__(self, photo: Photo, mirrored: bool) -> Tensor:
        """(C, H/8, W/8) float16 (or float32) features of the levels in use, concatenated.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(photo, mirrored)
        try:
            stored = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"cached features {path} cannot be read ({error}); delete it and train again"
            ) from error
        if stored.shape != self.shape:
            raise ValueError(
                f"cached features {path} have the shape {stored.shape}, expected {self.shape}; "
                "delete it and train again"
            )
        return torch.from_numpy(np.array(stored[self.first_used :]))

    def fill(self, model: MLNet, data: SaliencyDataset, accelerator: Accelerator) -> None:
        """Compute what is not there yet; several processes share the work.

        Args:
            model: the network, on the accelerator's device.
            data: its photos; those that training mirrors are kept in both orientations.
            accelerator: device, precision and processes.

        Raises:
            OSError: there is no room for the files.
        """
        ways = (False, True) if data.augment and data.config.flip else (False,)
        missing = [
            (index, mirrored)
            for index, photo in enumerate(data.photos)
            for mirrored in ways
            if not self.path(photo, mirrored).is_file()
        ][accelerator.process_index :: accelerator.num_processes]
        self._check_room(len(missing))
        training = model.training
        model.eval()
        for start in progress(range(0, len(missing), BATCH), "caching features", unit="batch"):
            part = missing[start : start + BATCH]
            images = [data.image(i).flip(-1) if mirrored else data.image(i) for i, mirrored in part]
            with torch.inference_mode(), accelerator.autocast():
                levels = model.extract(torch.stack(images).to(accelerator.device))
            features = torch.cat(levels, dim=1).float().cpu()
            for (index, mirrored), single in zip(part, features, strict=True):
                self._write(self.path(data.photos[index], mirrored), single)
        model.train(training)
        accelerator.wait_for_everyone()

    def _write(self, path: Path, features: Tensor) -> None:
        half = features.half()  # 11 significant bits, bf16 has 8
        kept = half if half.isfinite().all() else features
        with atomic_path(path) as temporary:
            np.save(temporary, kept.numpy())

    def _check_room(self, files: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        needed, free = 2 * files * int(np.prod(self.shape)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"the features of {files} photos need {needed / 1e9:.1f} GB in {self.folder}, "
                f"which has {free / 1e9:.1f} GB left: make room, or set cache_features to false"
            )


def backbone_key(model: MLNet, config: Config, precision: str) -> str:
    """A name for the function from photo to features: equal names, equal features."""
    digest = hashlib.sha256()
    values = config.to_dict()
    digest.update(json.dumps([precision, *(values[key] for key in DECIDING)]).encode())
    state = {**model.backbone.state_dict(), "mean": model.mean, "std": model.std}
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return f"{config.backbone}-{config.height}x{config.width}-{digest.hexdigest()[:16]}"
