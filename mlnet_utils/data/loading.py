"""The Dataset, the order of its photos, and the loader that feed training and validation."""

import signal
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mlnet_utils.config import Config
from mlnet_utils.data.geometry import Letterbox, counts_on_grid, letterbox
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.runtime import cpu_count


class SaliencyDataset(Dataset):
    """Photos letterboxed to the network's input, densities and fixations on its output grid.

    Items are keyed by ``(epoch, index)``. The augmentation of a photo depends only on the seed, the
    epoch and the photo, so that a resumed or a distributed run sees exactly the same data.
    """

    def __init__(self, prepared: Prepared, split: str, config: Config, augment: bool = False):
        """``augment`` mirrors photos at random. Raises ValueError where the split is empty."""
        self.prepared, self.config, self.augment = prepared, config, augment
        self.photos = prepared.split(split)
        self.images: dict[int, Tensor] = {}  # kept if the configuration says so, by index
        self.truths: dict[int, tuple[Tensor, Tensor]] = {}
        # (photo, mirrored) -> features to give instead of the photo, see features.FeatureCache
        self.features: Callable[[Photo, bool], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Tensor]:
        """A photo with its ground truth on the grid of (h, w) cells.

        ``image`` (3, height, width) uint8, or ``features`` (C, h, w) where these are cached;
        ``density`` (1, h, w) float32 that sums to 1; ``fixations`` (1, h, w) float32, counts;
        ``index``, the photo's place in ``photos``. Raises a FileNotFoundError or ValueError for a
        file that is missing, damaged, or has changed its size.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.config.seed, epoch, index])
        mirrored = bool(self.augment and rng.random() < self.config.flip)
        density, counts = self._truth(index)
        if mirrored:
            density, counts = density.flip(-1), counts.flip(-1)
        if self.features:
            seen = {"features": self.features(self.photos[index], mirrored)}
        else:
            image = self.image(index)
            seen = {"image": image.flip(-1) if mirrored else image}
        truth = {"density": density[None], "fixations": counts[None]}
        return {**seen, **truth, "index": torch.tensor(index)}

    def _truth(self, index: int) -> tuple[Tensor, Tensor]:
        """(h, w) float32 density and fixation counts on the grid."""
        if index in self.truths:
            return self.truths[index]
        photo, grid = self.photos[index], self.config.grid
        box = Letterbox(photo.height, photo.width, self.config.height, self.config.width)
        density = self.prepared.grid_density(photo, box, grid).float()
        found = density, counts_on_grid(photo.fixations, box, grid).float()
        if self.config.cache:
            self.truths[index] = found
        return found

    def image(self, index: int) -> Tensor:
        """(3, height, width) uint8: a photo, letterboxed; a ValueError where its size changed."""
        if index in self.images:
            return self.images[index]
        photo = self.photos[index]
        image = read_image(self.prepared.root / photo.image)
        if tuple(image.shape[1:]) != (photo.height, photo.width):
            sizes = f"{image.shape[2]}x{image.shape[1]}, but was prepared as {photo.width}x"
            raise ValueError(f"{photo.image} is {sizes}{photo.height}: prepare the dataset again")
        image = letterbox(image, self.config.height, self.config.width, self.config.antialias)
        if self.config.cache:
            self.images[index] = image
        return image


class EpochSampler(Sampler):
    """Batches of ``(epoch, index)`` keys: shuffled from (seed, epoch), resumable at any batch.

    In a run of several processes each takes every ``world``-th photo of the same global batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        return -(-self.n // self.batch_size) - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for start in range(self.first_batch * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            # A process without a share of a short last batch loads its first photo, so that all
            # processes step together; batch_sizes() tells the training loop to ignore the photo.
            own = batch[self.rank :: self.world] if self.rank < len(batch) else batch[:1]
            yield [(self.epoch, int(index)) for index in own]

    def batch_sizes(self, batch: int) -> tuple[int, int]:
        """(photos of this process, photos of all processes) in a batch of the epoch."""
        total = min(self.batch_size, self.n - batch * self.batch_size)
        return len(range(self.rank, total, self.world)), total


def make_loader(
    dataset: SaliencyDataset, batches: Iterable[list[tuple[int, int]]], workers: int
) -> DataLoader:
    """A loader of batches of keys; ``workers`` = -1 takes their number from the machine."""
    if workers < 0:
        workers = min(8, cpu_count() - 1) if torch.cuda.is_available() else 0
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_main_process,
    )


def _leave_signals_to_main_process(_: int) -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the main process ends loading."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
