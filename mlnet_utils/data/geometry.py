"""Geometry: letterbox and its inverse, fixations to densities, densities on a coarse grid.

Everything linear is written as a pair of small matrices applied to rows and columns: blur,
area resize and letterbox then compose exactly, run on any device, and have an exact adjoint.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---- letterbox ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Letterbox:
    """The fit of a photo into the network's input: resized to the content size, then centred.

    The aspect ratio is kept, and the side that would overflow decides the scale; the rest is
    padding, as in the authors' code (``padding()`` in their ``utilities.py``).
    """

    photo_height: int
    photo_width: int
    height: int
    width: int

    @property
    def content_height(self) -> int:
        """Rows of the resized photo inside the input."""
        return min(self.height, max(1, self.photo_height * self.width // self.photo_width))

    @property
    def content_width(self) -> int:
        """Columns of the resized photo inside the input."""
        return min(self.width, max(1, self.photo_width * self.height // self.photo_height))

    @property
    def top(self) -> int:
        """Rows of padding above (the odd row goes below)."""
        return (self.height - self.content_height) // 2

    @property
    def left(self) -> int:
        """Columns of padding on the left (the odd column goes to the right)."""
        return (self.width - self.content_width) // 2

    @property
    def axes(self) -> tuple["Axis", "Axis"]:
        """The vertical and the horizontal axis."""
        return (
            Axis(self.photo_height, self.height, self.content_height, self.top),
            Axis(self.photo_width, self.width, self.content_width, self.left),
        )


class Axis(NamedTuple):
    """One axis of a letterbox, in pixels."""

    photo: int  # of the photo
    size: int  # of the input
    content: int  # of the resized photo inside the input
    offset: int  # of padding before it


def letterbox(image: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Fit an image into (height, width): aspect-preserving bilinear resize, centred, zeros.

    The image is (C, H, W), uint8 or float in any range; the result is (C, height, width), uint8 of
    uint8 and float32 of float. ``antialias`` averages over the photo's pixels when shrinking; False
    samples the nearest four, as OpenCV's ``INTER_LINEAR`` in both earlier implementations does.
    """
    _, rows, columns = image.shape
    box = Letterbox(rows, columns, height, width)
    size, content = (box.content_height, box.content_width), image.float()
    if (rows, columns) != size:
        content = F.interpolate(content[None], size=size, mode="bilinear", antialias=antialias)[0]
    if image.dtype == torch.uint8:
        content = content.round_().clamp_(0, 255).to(torch.uint8)
    right, below = width - size[1] - box.left, height - size[0] - box.top
    return F.pad(content, (box.left, right, box.top, below))


def unletterbox(maps: Tensor, box: Letterbox) -> Tensor:
    """Bring (B, h, w) maps on the network's grid back to the photo's own pixels.

    They become (B, photo_height, photo_width), interpolated, not renormalised. Every photo pixel
    centre is read bilinearly at its place on the grid, of any stride. No rounding to whole cells
    occurs even where the padding is not a multiple of the stride, and the padding is never read.
    """
    rows, columns = (
        _sampling_matrix(axis, cells).to(maps)
        for axis, cells in zip(box.axes, maps.shape[-2:], strict=True)
    )
    return rows @ maps @ columns.T


@functools.lru_cache(maxsize=256)
def _sampling_matrix(axis: Axis, grid: int) -> Tensor:
    """(photo, grid) bilinear weights that read a map of ``grid`` cells at photo pixel centres."""
    photo, size, content, offset = axis
    centre = (np.arange(photo) + 0.5) * content / photo + offset  # in input pixels
    position = centre * grid / size - 0.5  # in grid cells
    # Cells that lie wholly in the padding hold no prediction of the photo: clamp to content.
    first = int(np.floor(offset * grid / size))
    last = int(np.ceil((offset + content) * grid / size)) - 1
    position = position.clip(first, last)
    low = np.floor(position).astype(int).clip(0, max(grid - 2, 0))
    weight = position - low
    matrix = np.zeros((photo, grid))
    matrix[np.arange(photo), low] = 1 - weight
    matrix[np.arange(photo), np.minimum(low + 1, grid - 1)] += weight
    return torch.from_numpy(matrix)


# ---- fixations ---------------------------------------------------------------------------------
def pixel_indices(points: np.ndarray) -> np.ndarray:
    """(N, 2) x, y coordinates (0-based, pixel centres at integers) to integer x, y pixels."""
    return np.floor(np.asarray(points, dtype=np.float64) + 0.5).astype(np.int64)


def inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N,) bool: True for points on a pixel of a height x width photo."""
    # Compared as floats: NaN is outside, and no integer overflows.
    x, y = np.floor(np.asarray(points, dtype=np.float64).reshape(-1, 2) + 0.5).T
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _checked_pixels(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """(2, N) integer x and y; an error for a point outside, which would index another pixel."""
    points = np.asarray(points).reshape(-1, 2)
    within = inside(points, height, width)
    if not within.all():
        x, y = points[~within][0]
        raise ValueError(f"fixation x={x:.1f}, y={y:.1f} lies outside the {width}x{height} photo")
    return pixel_indices(points).T


def fixation_counts(points: np.ndarray, height: int, width: int) -> Tensor:
    """(H, W) int64: number of fixations on each pixel; a ValueError for a fixation outside."""
    x, y = _checked_pixels(points, height, width)
    counts = np.bincount(y * width + x, minlength=height * width)
    return torch.from_numpy(counts.reshape(height, width))


@functools.lru_cache(maxsize=8)  # 8 MB for 1024 pixels
def blur_matrix(size: int, sigma: float) -> Tensor:
    """(size, size) float64 matrix of a Gaussian blur along one axis.

    Equals ``scipy.ndimage.gaussian_filter1d(mode="reflect", truncate=4)``: the kernel is cut at
    4 sigma and mass that would leave the photo is reflected back, so columns sum to 1. A sigma
    that is not positive is a ValueError.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive (pixels of the photo), got {sigma}")
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    index = np.arange(size)[:, None] + offsets  # places that each output reads
    index %= 2 * size  # reflection has period 2 * size: d c b a | a b c d | d c b a
    index = np.where(index >= size, 2 * size - 1 - index, index)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], index), kernel)
    return torch.from_numpy(matrix)


@functools.lru_cache(maxsize=64)
def _target_matrix(axis: Axis, cells: int, sigma: float) -> Tensor:
    """(cells, photo) float64: blur along one photo axis, letterbox it, add up each cell."""
    return _spread_matrix(axis, cells) @ blur_matrix(axis.photo, sigma)


def _spread_matrix(axis: Axis, cells: int) -> Tensor:
    """(cells, photo) float64: letterbox one photo axis and add up each cell; keeps the mass."""
    # Area resize keeps mass: each photo pixel spreads over the input pixels that it covers.
    photo, size, content, offset = axis
    edges = np.arange(photo + 1) * content / photo + offset
    cell_edges = np.arange(cells + 1) * size / cells
    low = np.maximum(edges[None, :-1], cell_edges[:-1, None])
    high = np.minimum(edges[None, 1:], cell_edges[1:, None])
    return torch.from_numpy(np.clip(high - low, 0, None) * photo / content)


def density_from_points(points: np.ndarray, height: int, width: int, sigma: float) -> Tensor:
    """Fixation density at the photo's size: (N, 2) x, y blurred with a Gaussian, ``sigma`` pixels.

    (H, W) float64 that sums to 1; all zeros if there is no fixation. The blur is separable, so the
    map is a sum of outer products, one per fixation: exact, and cheaper than filtering an image.
    Raises ValueError: a point lies outside the photo, or sigma is not positive.
    """
    x, y = _checked_pixels(points, height, width)
    rows = blur_matrix(height, sigma)[:, y]  # (H, N)
    columns = blur_matrix(width, sigma)[:, x]  # (W, N)
    return rows @ columns.T / max(len(x), 1)


def density_on_grid(
    points: np.ndarray, box: Letterbox, grid: tuple[int, int], sigma: float
) -> Tensor:
    """The density of :func:`density_from_points`, letterboxed and summed onto a coarse grid.

    (h, w) float64 that sums to 1 (all zeros without fixations), equal to blurring at the photo's
    size, area-resizing into the letterbox and adding up each grid cell. Raises the same errors.
    """
    x, y = _checked_pixels(points, box.photo_height, box.photo_width)
    vertical, horizontal = box.axes
    rows = _target_matrix(vertical, grid[0], sigma)[:, y]
    columns = _target_matrix(horizontal, grid[1], sigma)[:, x]
    return rows @ columns.T / max(len(x), 1)


def map_on_grid(density: Tensor, box: Letterbox, grid: tuple[int, int]) -> Tensor:
    """A photo's (H, W) float64 density, letterboxed and summed onto a grid: (h, w), same sum."""
    rows, columns = map(_spread_matrix, box.axes, grid)
    return rows @ density @ columns.T


def counts_on_grid(points: np.ndarray, box: Letterbox, grid: tuple[int, int]) -> Tensor:
    """(h, w) int64: fixations, (N, 2) x, y inside the photo, per cell of a letterboxed grid."""
    x, y = pixel_indices(points).T
    row, column = (  # the cells on which the pixels' centres fall
        (((at + 0.5) * axis.content / axis.photo + axis.offset) * cells / axis.size)
        .astype(int)
        .clip(0, cells - 1)
        for at, axis, cells in zip((y, x), box.axes, grid, strict=True)
    )
    counts = np.bincount(row * grid[1] + column, minlength=grid[0] * grid[1])
    return torch.from_numpy(counts.reshape(grid))
