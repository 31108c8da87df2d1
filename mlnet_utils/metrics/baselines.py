"""Baseline models that put a score in context.

:func:`uniform`, the floor; :class:`CentreBias`, fitted on *training* fixations, which a model must
beat; :class:`LeaveOneOut`, the negatives of shuffled AUC; :func:`inter_observer`, the agreement of
people; :class:`GoldStandard`, an upper bound. All but :class:`LeaveOneOut`, which counts, give
(H, W) float64 densities that sum to 1. They take ``photos.Photo`` records.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mlnet_utils.data.geometry import (
    blur_matrix,
    density_from_points,
    fixation_counts,
    pixel_indices,
)
from mlnet_utils.data.photos import NOBODY, Photo

FOLDS = 5
CELLS = 256  # the unit square's grid on which kernel densities are fitted
BANDWIDTHS = tuple(float(b) for b in np.geomspace(0.01, 0.2, 14))  # shares of the photo's sides
UNIFORM_SHARES = (1e-4, 1e-3, 1e-2, 5e-2)
SIGMA_SHARES = tuple(float(s) for s in np.geomspace(0.01, 0.1, 10))  # of the photo's width
PRIOR_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


def uniform(height: int, width: int) -> Tensor:
    """(H, W) float64: every pixel alike."""
    return torch.full((height, width), 1 / (height * width), dtype=torch.float64)


# ---- centre bias -------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)  # compared by identity, which makes it a key of the cache below
class CentreBias:
    """A kernel-density centre bias with cross-validated bandwidth, in units of the photo's sides.

    The kernel is a Gaussian on the unit square, reflected at its edges; a share of the uniform
    density keeps the result positive everywhere, so that gains over it are finite.
    """

    counts: Tensor  # (256, 256) training fixations per cell of the unit square
    bandwidth: float  # deviation of the kernel, as a share of the photo's sides
    uniform_share: float
    source: str  # the data that it was fitted on, in words

    @classmethod
    def fit(cls, photos: Sequence[Photo]) -> "CentreBias":
        """Choose bandwidth and uniform share by the likelihood of held-out photos.

        Fold k of 5 holds out every training photo with index % 5 == k. Raises ValueError: fewer
        than two photos have fixations.
        """
        seen = [photo for photo in photos if len(photo.fixations)]
        source = f"{sum(len(photo.fixations) for photo in seen)} training fixations"
        return cls._fit(map(_cell_counts, seen), source)

    @classmethod
    def fit_densities(cls, densities: Iterable[Tensor]) -> "CentreBias":
        """The same from the training photos' (H, W) densities; zero ones are left out."""
        cells = (adaptive_avg_pool2d(each.double()[None], CELLS)[0] for each in densities)
        shares = (each / each.sum() for each in cells if each.any())
        return cls._fit(shares, "the training density maps")

    @classmethod
    def _fit(cls, cells: Iterable[Tensor], source: str) -> "CentreBias":
        held_out: list[Tensor] = []  # one sum per fold: thousands of maps would not fit in memory
        for index, counts in enumerate(cells):
            if index < FOLDS:
                held_out.append(counts)
            else:
                held_out[index % FOLDS] = held_out[index % FOLDS] + counts
        if len(held_out) < 2:
            raise ValueError("a centre bias needs at least two training photos with fixations")
        total, best = sum(held_out), (-np.inf, 0.0, 0.0)
        for bandwidth in BANDWIDTHS:
            kernel = _reflected_kernel(_centres(CELLS), bandwidth)
            blurred = [kernel @ (total - part) @ kernel.T for part in held_out]
            for share in UNIFORM_SHARES:
                likelihood = 0.0
                for density, part in zip(blurred, held_out, strict=True):
                    density = (1 - share) * density / density.sum() + share / CELLS**2
                    likelihood += (density.log() * part).sum().item()
                best = max(best, (likelihood, bandwidth, share))
        return cls(total, best[1], best[2], source)

    def without(self, photo: Photo) -> "CentreBias":
        """The same bandwidth and share on the fixations of all the other photos."""
        return replace(self, counts=self.counts - _cell_counts(photo))

    @property
    def description(self) -> str:
        """One line for reports."""
        chosen = f"bandwidth {self.bandwidth:.3f} of the sides, {self.uniform_share:.2g} uniform"
        return f"centre bias: kernel density of {self.source}, {chosen} (both cross-validated)"

    def __call__(self, height: int, width: int) -> Tensor:
        """(H, W) float64 density."""
        return _kernel_density(self, height, width)


@functools.lru_cache(maxsize=8)  # most datasets have few photo sizes
def _kernel_density(bias: CentreBias, height: int, width: int) -> Tensor:
    rows = _reflected_kernel(_centres(height), bias.bandwidth)
    columns = _reflected_kernel(_centres(width), bias.bandwidth)
    density = rows @ bias.counts @ columns.T
    density = (1 - bias.uniform_share) * density / density.sum()
    return density + bias.uniform_share / (height * width)


def _centres(size: int) -> Tensor:
    """Pixel centres of one side, as shares of it."""
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def _reflected_kernel(positions: Tensor, bandwidth: float) -> Tensor:
    """(P, 256) Gaussian weights of the grid's cells at positions in 0..1, reflected at 0 and 1."""
    cells = _centres(CELLS)
    images = torch.stack([cells, -cells, 2 - cells])  # one reflection: bandwidths are below 0.5
    distance = (positions[:, None, None] - images) / bandwidth  # (P, 3, 256)
    return torch.exp(-0.5 * distance**2).sum(1)


def _cell_counts(photo: Photo) -> Tensor:
    """(256, 256) float64 fixations per cell of the unit square."""
    shares = (np.asarray(photo.fixations, np.float64) + 0.5) / (photo.width, photo.height)
    x, y = (shares * CELLS).astype(int).clip(0, CELLS - 1).T
    counts = np.bincount(y * CELLS + x, minlength=CELLS**2).reshape(CELLS, CELLS)
    return torch.from_numpy(counts).to(torch.float64)


# ---- other photos ------------------------------------------------------------------------------
class LeaveOneOut:
    """Counts of the fixations on all the other photos of a split.

    Fixations of photos of another size are scaled: pixel x becomes floor(x * width / their width),
    as in pysaliency. Raises ValueError: two photos have one stem, or, when called, the photo is not
    one of the split.
    """

    def __init__(self, photos: Sequence[Photo]):
        self._photos = {photo.stem: photo for photo in photos}
        if len(self._photos) != len(photos):
            raise ValueError("the photos of a split must have different stems")
        sizes = [(len(photo.fixations), photo.width, photo.height) for photo in photos]
        self._of_photo = np.repeat(np.arange(len(photos)), [n for n, _, _ in sizes])
        self._pixels = np.concatenate(
            [np.zeros((0, 2), np.int64), *(pixel_indices(photo.fixations) for photo in photos)]
        )
        self._sizes = np.array([size for _, *size in sizes], np.int64)[self._of_photo]
        self._total = functools.lru_cache(maxsize=8)(self._make_total)

    def __call__(self, photo: Photo) -> Tensor:
        """(H, W) int32 counts of the other photos' fixations, at this photo's size."""
        return self._total(photo.height, photo.width) - self._own(photo)

    def photo_counts(self, photo: Photo) -> Tensor:
        """(H, W) int32: number of other photos on which a pixel was fixated (for salicon2015)."""
        total = self._total(photo.height, photo.width, each_photo_once=True)
        return total - self._own(photo).clamp(max=1)

    def _own(self, photo: Photo) -> Tensor:
        if photo.stem not in self._photos:
            raise ValueError(f"photo {photo.stem} is not one of the {len(self._photos)} photos")
        own = self._photos[photo.stem]
        return fixation_counts(own.fixations, own.height, own.width).to(torch.int32)

    def _make_total(self, height: int, width: int, each_photo_once: bool = False) -> Tensor:
        x, y = (self._pixels * (width, height) // self._sizes).T
        flat = y * width + x
        if each_photo_once:
            flat = np.unique(self._of_photo * (height * width) + flat) % (height * width)
        counts = np.bincount(flat, minlength=height * width).reshape(height, width)
        return torch.from_numpy(counts).to(torch.int32)


# ---- observers ---------------------------------------------------------------------------------
def inter_observer(
    photo: Photo, sigma: float, prior: Tensor | None = None, prior_share: float = 0.0
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """Each observer predicted by the blurred fixations of all the others.

    ``sigma`` is that of the Gaussian, in pixels of the photo; ``prior``, a (H, W) density such as a
    centre bias (default: uniform), is mixed in by ``prior_share``. Fixations without an observer
    predict nobody: they may be of the observer who is left out. Yields (observer, (H, W) float64
    density that predicts them, their own (N, 2) fixations). Raises ValueError: the photo has fewer
    than two known observers.
    """
    photo, observers = _attributed(photo), photo.known_observers
    if len(observers) < 2:
        raise ValueError(f"photo {photo.stem}: leaving one observer out needs at least two")
    for observer in observers:
        own = photo.observers == observer
        density = _mixed(photo, photo.fixations[~own], sigma, prior, prior_share)
        yield int(observer), density, photo.fixations[own]


@dataclass(frozen=True)
class GoldStandard:
    """The density of all the observers' fixations: an upper bound for predicting these fixations.

    Blur and share of the prior are those that predict left-out observers best, so the density is
    as sharp as the agreement of people; scored on its own fixations it is still optimistic.
    """

    sigma_share: float  # of the Gaussian blur, as a share of the photo's width
    prior_share: float
    prior: Callable[[int, int], Tensor] = uniform  # height, width -> (H, W) density

    @classmethod
    def fit(cls, photos: Sequence[Photo], prior: Callable = uniform) -> "GoldStandard":
        """Choose both values by the likelihood of each observer given the others.

        Raises ValueError: no photo has two observers.
        """
        photos = [_attributed(photo) for photo in photos if len(photo.known_observers) > 1]
        if not photos:
            raise ValueError("a gold standard needs photos with at least two observers")
        best = (-np.inf, 0.0, 0.0)
        for sigma_share in SIGMA_SHARES:
            likelihood = np.zeros(len(PRIOR_SHARES))
            for photo in photos:
                others, base = _left_out(photo, sigma_share * photo.width, prior)
                for k, share in enumerate(PRIOR_SHARES):
                    likelihood[k] += np.log((1 - share) * others + share * base).mean()
            k = int(likelihood.argmax())
            best = max(best, (likelihood[k], sigma_share, PRIOR_SHARES[k]))
        return cls(best[1], best[2], prior)

    def __call__(self, photo: Photo) -> Tensor:
        """(H, W) float64 density of the photo's fixations; the prior alone without any."""
        prior, sigma = self.prior(photo.height, photo.width), self.sigma_share * photo.width
        return _mixed(photo, photo.fixations, sigma, prior, self.prior_share)


def _attributed(photo: Photo) -> Photo:
    """The photo with the fixations of known observers only."""
    return photo.only(photo.observers != NOBODY)


def _mixed(
    photo: Photo, points: np.ndarray, sigma: float, prior: Tensor | None, share: float
) -> Tensor:
    prior = uniform(photo.height, photo.width) if prior is None else prior
    if len(points) == 0:
        return prior
    blurred = density_from_points(points, photo.height, photo.width, sigma)
    return (1 - share) * blurred + share * prior


def _left_out(photo: Photo, sigma: float, prior: Callable) -> tuple[np.ndarray, np.ndarray]:
    """At each fixation: density of the other observers' fixations, and of the prior.

    The blurred map is a sum of outer products, so its value at a pixel is a sum over fixations,
    and no map needs to be made.
    """
    x, y = pixel_indices(photo.fixations).T
    rows, columns = blur_matrix(photo.height, sigma), blur_matrix(photo.width, sigma)
    kernel = (rows[y][:, y] * columns[x][:, x]).numpy()  # (N, N)
    others = photo.observers[:, None] != photo.observers
    return (kernel * others).sum(1) / others.sum(1), prior(photo.height, photo.width)[y, x].numpy()
