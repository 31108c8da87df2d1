"""The ground truth of a photo: its blurred fixations, or its density map where it has no fixations.

Fixations come first, because metrics and several losses need points, and because blurring them is
exact where a published map is rounded to 8 bits.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.data.geometry import Letterbox, density_from_points, density_on_grid, map_on_grid
from mlnet_utils.data.images import read_density
from mlnet_utils.data.photos import Photo


def photo_density(
    photo: Photo, root: str | Path, sigma: float, device: torch.device | str = "cpu"
) -> Tensor:
    """(H, W) float64 density at the photo's size; zero where nothing is known of the photo.

    Args:
        photo: with fixations, a density map, both, or neither (a test photo whose truth is secret).
        root: what the photo's paths are relative to.
        sigma: blur of the fixations, in pixels of the photo.
        device: where the density is made.

    Raises:
        FileNotFoundError: the density map is needed and does not exist.
        ValueError: the density map is needed and is damaged or of another size than the photo.
    """
    if _by_map(photo, photo.fixations):
        return density_of(photo, Path(root) / photo.density).to(device)
    return density_from_points(photo.fixations, photo.height, photo.width, sigma, device)


def grid_density(
    photo: Photo,
    root: str | Path,
    box: Letterbox,
    grid: tuple[int, int],
    sigma: float,
    points: np.ndarray | None = None,
) -> Tensor:
    """(h, w) float64: the same on the grid that covers the letterboxed photo.

    Args:
        photo: see :func:`photo_density`.
        root: what the photo's paths are relative to.
        box: the photo's letterbox.
        grid: rows and columns.
        sigma: blur of the fixations, in pixels of the photo.
        points: (N, 2) fixations to use instead of the photo's own, as a crop leaves them.

    Raises:
        FileNotFoundError: the density map is needed and does not exist.
        ValueError: the density map is needed and is damaged or of another size than the photo.
    """
    points = photo.fixations if points is None else points
    if _by_map(photo, points):
        return map_on_grid(density_of(photo, Path(root) / photo.density), box, grid)
    return density_on_grid(points, box, grid, sigma)


def density_of(photo: Photo, path: Path) -> Tensor:
    """(H, W) float64 that sums to 1: a photo's density map.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no density, or of another size than the photo.
    """
    density = read_density(path)
    if tuple(density.shape) != (photo.height, photo.width):
        raise ValueError(
            f"density map {path} is {density.shape[1]}x{density.shape[0]}, but its photo is "
            f"{photo.width}x{photo.height}: make it again at the photo's size"
        )
    return density


def _by_map(photo: Photo, points: np.ndarray) -> bool:
    return bool(photo.density) and not len(points)
