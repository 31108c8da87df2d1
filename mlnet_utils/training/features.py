"""Features of a frozen backbone: computed once per photo, kept on disk, shared by all runs.

Training the encoding and the prior on a frozen backbone would compute the same features in every
epoch; that pass is most of the work. The files of a photo are named after its SHA-256, their folder
after everything else that decides the numbers: weights, input size, normalisation, precision. An
existing file is therefore right, whichever run made it.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from mlnet_utils import runtime
from mlnet_utils.config import Config
from mlnet_utils.data.loading import SaliencyDataset
from mlnet_utils.data.photos import Photo
from mlnet_utils.model.network import MLNet

BATCH = 8
# Keys that change features, as the weights do. Not `levels`: those of all three are kept.
DECIDING = ("backbone", "backbone_args", "backbone_drop", "output_stride", "normalisation",
            "compat", "height", "width")  # fmt: skip


def cache_features(
    model: MLNet, config: Config, accelerator: Accelerator, data: Iterable[SaliencyDataset]
) -> None:
    """Compute the features of all photos that are not cached yet, and let datasets give them.

    The model must have the weights that it will keep: features of others would be cached as its
    own. The accelerator's processes share the work.

    Raises:
        ValueError: features would change from epoch to epoch, because a part of the backbone or
            its batch-norm trains, or a photo has no SHA-256.
        OSError: there is no room for the files.
    """
    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    if trained:
        remedy = "set freeze to ['backbone.*'], or cache_features to false"
        raise ValueError(f"config: cache_features, but backbone.{trained[0]} trains: {remedy}")
    norms = any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())
    if norms and not config.freeze_norm:
        raise ValueError("config: cache_features needs freeze_norm: features depend on the batch")
    cache = FeatureCache(model, config, accelerator.mixed_precision)
    for dataset in data:
        cache.fill(model, dataset, accelerator)
        dataset.features = cache


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

    The files are zips of one array: their checksums are compared when they are read.
    """

    def __init__(self, model: MLNet, config: Config, precision: str):
        channels = model.backbone.channels
        self.folder = runtime.runs_root() / "features" / backbone_key(model, config, precision)
        self.shape = (sum(channels), *config.grid)
        self.first_used = sum(channels[: -config.levels])  # the deepest levels, which come last

    def path(self, photo: Photo, mirrored: bool) -> Path:
        """The file of one photo; ValueError for a photo without a hash to tell it from others."""
        if not photo.sha256.isalnum():  # nor "../../x"
            raise ValueError(f"photo {photo.stem} has no SHA-256; prepare the data again")
        return self.folder / f"{photo.sha256}{'-mirrored' if mirrored else ''}.npz"

    def __call__(self, photo: Photo, mirrored: bool) -> Tensor:
        """(C, H/8, W/8) float16 or float32: the levels in use; ValueError for a damaged file."""
        path = self.path(photo, mirrored)
        remedy = "delete the file and run the same command again"
        with runtime.reading(path, f"cached features of shape {self.shape}", remedy):
            with np.load(path, allow_pickle=False) as arrays:
                stored = arrays["features"]
            if stored.shape != self.shape:
                raise ValueError(f"shape {stored.shape}")
            return torch.from_numpy(stored[self.first_used :])

    def fill(self, model: MLNet, data: SaliencyDataset, accelerator: Accelerator) -> None:
        """Write the files of a dataset that are not there yet; mirrored files if it mirrors."""
        with runtime.locked(self.folder):
            accelerator.wait_for_everyone()
            self._fill(model, data, accelerator)
            accelerator.wait_for_everyone()

    def _fill(self, model: MLNet, data: SaliencyDataset, accelerator: Accelerator) -> None:
        ways = (False, True) if data.augment and data.config.flip else (False,)
        missing = [
            (index, mirrored)
            for index, photo in enumerate(data.photos)
            for mirrored in ways
            if not self.path(photo, mirrored).is_file()
        ][accelerator.process_index :: accelerator.num_processes]
        self.folder.mkdir(parents=True, exist_ok=True)
        runtime.remove_temporaries(self.path(data.photos[i], mirrored) for i, mirrored in missing)
        needed = 2 * len(missing) * int(np.prod(self.shape))
        purpose, remedy = f"the cache of {len(missing)} photos", "set cache_features to false"
        runtime.need_space(self.folder, needed, purpose, remedy)
        training = model.training
        model.eval()
        parts = list(BatchSampler(missing, BATCH, drop_last=False))
        for part in runtime.progress(parts, "caching features", unit="batch"):
            images = [data.image(i).flip(-1) if mirrored else data.image(i) for i, mirrored in part]
            with torch.inference_mode(), accelerator.autocast():
                levels = model.extract(torch.stack(images).to(accelerator.device))
            features = torch.cat(levels, dim=1).float().cpu()
            for (index, mirrored), single in zip(part, features, strict=True):
                self.write(self.path(data.photos[index], mirrored), single)
        model.train(training)

    def write(self, path: Path, features: Tensor) -> None:
        """Write one photo's features atomically, in 16 bits where these hold them."""
        half = features.half()  # 11 significant bits, bf16 has 8
        kept = half if half.isfinite().all() else features
        with runtime.atomic_path(path) as temporary:
            np.savez(temporary, features=kept.numpy())
