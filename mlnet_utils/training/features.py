"""Features of a frozen backbone: computed once per photo, kept on disk, shared by all runs.

Training the encoding and the prior on a frozen backbone would compute the same features in every
epoch; that pass is most of the work. The files of a photo are named after its SHA-256, their folder
after everything else that decides the numbers: weights, input size, normalisation, precision. A
file that is there is therefore the right one, whichever run made it.
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
from mlnet_utils.data.loading import SaliencyDataset
from mlnet_utils.data.photos import Photo
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import atomic_path, feature_root, progress

BATCH = 8
# Beside the weights, what changes features. Not `levels`: those of all three are kept.
DECIDING = ("backbone", "backbone_args", "backbone_drop", "output_stride", "normalisation",
            "compat", "height", "width")  # fmt: skip


def cache_features(
    model: MLNet, config: Config, accelerator: Accelerator, data: Iterable[SaliencyDataset]
) -> None:
    """Compute the features of all photos that are not cached yet, and let datasets give those.

    Args:
        model: with the weights that it will keep: features of others would be cached as its own.
        config: of the run.
        accelerator: device, precision and processes; the processes share the work.
        data: the run's datasets.

    Raises:
        ValueError: features would change from epoch to epoch, or a photo has no SHA-256.
        OSError: there is no room for the files.
    """
    check_cacheable(model, config)
    folder = feature_root() / backbone_key(model, config, accelerator.mixed_precision)
    cache = FeatureCache(folder, config, model.backbone.channels)
    for dataset in data:
        cache.fill(model, dataset, accelerator)
        dataset.features = cache


def check_cacheable(model: MLNet, config: Config) -> None:
    """Refuse to cache features that differ from epoch to epoch.

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
    if not config.freeze_norm and any(
        isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules()
    ):
        raise ValueError(
            "config: cache_features needs freeze_norm, because batch-norm in training mode makes a "
            "photo's features depend on the other photos of its batch"
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


class FeatureCache:
    """The features of all levels, one file per photo and orientation.

    Args:
        folder: of the files.
        config: of the run.
        channels: of the backbone's three levels, from the shallowest.
    """

    def __init__(self, folder: Path, config: Config, channels: tuple[int, ...]):
        self.folder, self.shape = folder, (sum(channels), *config.grid)
        self.first_used = sum(channels[: -config.levels])  # the deepest levels, which come last

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
            if stored.shape != self.shape:
                raise ValueError(f"shape {stored.shape}, expected {self.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"cached features {path} cannot be read ({error}); delete the file and train again"
            ) from error
        return torch.from_numpy(np.array(stored[self.first_used :]))

    def fill(self, model: MLNet, data: SaliencyDataset, accelerator: Accelerator) -> None:
        """Write the files of a dataset that are not there yet, see :func:`cache_features`.

        Photos that training mirrors are kept in both orientations.
        """
        ways = (False, True) if data.augment and data.config.flip else (False,)
        missing = [
            (index, mirrored)
            for index, photo in enumerate(data.photos)
            for mirrored in ways
            if not self.path(photo, mirrored).is_file()
        ][accelerator.process_index :: accelerator.num_processes]
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = 2 * len(missing) * int(np.prod(self.shape))
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise OSError(
                f"the features of {len(missing)} photos need {needed / 1e9:.1f} GB in "
                f"{self.folder}, which has {free / 1e9:.1f} GB left: make room, or set "
                "cache_features to false"
            )
        training = model.training
        model.eval()
        for start in progress(range(0, len(missing), BATCH), "caching features", unit="batch"):
            part = missing[start : start + BATCH]
            images = [data.image(i).flip(-1) if mirrored else data.image(i) for i, mirrored in part]
            with torch.inference_mode(), accelerator.autocast():
                levels = model.extract(torch.stack(images).to(accelerator.device))
            features = torch.cat(levels, dim=1).float().cpu()
            for (index, mirrored), single in zip(part, features, strict=True):
                self.write(self.path(data.photos[index], mirrored), single)
        model.train(training)
        accelerator.wait_for_everyone()

    def write(self, path: Path, features: Tensor) -> None:
        """Write one photo's features atomically, in 16 bits where these hold them."""
        half = features.half()  # 11 significant bits, bf16 has 8
        kept = half if half.isfinite().all() else features
        with atomic_path(path) as temporary:
            np.save(temporary, kept.numpy())
