"""Statements drawn from a saliency map: likely looks, and a crop that keeps them."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import fftconvolve

from mlnet_utils.data.images import PHOTO_SUFFIXES, output_stems, read_image, visible_files
from mlnet_utils.runtime import require

WORKING_SIDE = 320  # pixels of the longer side while searching; a fixation is no sharper
RADIUS = 0.06  # of the longer side: 2 degrees where a photo fills 33, as OSIE's do


class Look(NamedTuple):
    """A place and the probability of a look within ``radius`` pixels of it."""

    x: float
    y: float
    share: float
    radius: float


def chosen_photos(place: str = "", example: str = "astronaut") -> dict[str, np.ndarray]:
    """Photos to try the network on, (H, W, 3) uint8 each by its place in the folder.

    ``place`` is a photo or a folder of photos. Where it is ``""``, Colab shows a button for the
    user's photos; elsewhere, and where nothing is uploaded, the photo is the ``example``, a name in
    ``skimage.data``. The keys are without suffix, unless two photos differ in nothing else. Of
    several photos those that cannot be read are left out with a warning.

    Raises:
        FileNotFoundError: there is no such photo, or no photo in the folder.
        ImportError: the example is wanted without the extra ``notebooks``.
        ValueError: the photo cannot be read.
    """
    path = Path(place).expanduser()
    if not place:
        places = {Path(name): Path(name) for name in _uploaded()}
        if not places:
            return {example: getattr(require("skimage.data", "notebooks"), example)()}
    elif path.is_dir():
        places = {file: file.relative_to(path) for file in visible_files(path)}
    else:
        places = {path: Path(path.name)}
    if not places:
        raise FileNotFoundError(f"no photo in {place!r}: looked for {', '.join(PHOTO_SUFFIXES)}")
    photos = {}
    for path, stem in output_stems(places).items():
        try:
            photos[stem.as_posix()] = read_image(path).permute(1, 2, 0).numpy()
        except (ValueError, OSError) as error:
            if len(places) == 1:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
    if not photos:
        raise ValueError(f"none of the {len(places)} photos in {place!r} can be read")
    return photos


def _uploaded() -> Iterable[str]:
    """Names of the files that the user uploads in Colab, into the working folder."""
    try:
        from google.colab import files
    except ModuleNotFoundError:
        return ()
    return files.upload()


def first_looks(density: np.ndarray, count: int = 5, radius: float = RADIUS) -> list[Look]:
    """The ``count`` most likely places of a look, in falling order; no pixel is counted twice.

    ``density`` is (H, W), non-negative, as ``Predictor.predict`` gives it; ``radius`` that of a
    place, as a share of the photo's longer side. Raises ValueError: the density is not 2-D, is
    negative or not finite somewhere, or is all zero.
    """
    small = _reduced(density)
    down, across = np.divide(np.shape(density), small.shape).tolist()  # a cell's sides
    longer = max(np.shape(density)) / max(small.shape)
    size = max(1, round(radius * max(small.shape)))
    y, x = np.ogrid[-size : size + 1, -size : size + 1]
    window = np.exp(-(x**2 + y**2) / (2 * (size / 2) ** 2))  # a disc's sum has no clear peak
    rows, columns = np.indices(small.shape)
    looks = []
    for _ in range(count):
        nearby = fftconvolve(small, window, mode="same")
        row, column = np.unravel_index(int(nearby.argmax()), nearby.shape)
        within = (rows - row) ** 2 + (columns - column) ** 2 <= size**2
        place = ((column + 0.5) * across - 0.5, (row + 0.5) * down - 0.5)
        looks.append(Look(*place, float(small[within].sum()), size * longer))
        small = np.where(within, 0, small)
    return sorted(looks, key=lambda look: -look.share)


def crop_that_keeps(density: np.ndarray, share: float = 0.9) -> tuple[int, int, int, int]:
    """A small rectangle that keeps a share of the looks: left, top, right, bottom in pixels.

    In each step the row or column goes that holds the least probability per pixel at a side. Right
    and bottom are exclusive: ``photo[top:bottom, left:right]``. ``density`` is (H, W), as for
    :func:`first_looks`; ``share``, which the crop keeps at least, is above 0 and at most 1. Raises
    ValueError: the share is outside that range, or the density as for :func:`first_looks`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1")
    small = _reduced(density)
    sums = np.pad(small.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def mass(box: tuple[int, int, int, int]) -> float:
        left, top, right, bottom = box
        return sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]

    box = (0, 0, small.shape[1], small.shape[0])
    while True:
        left, top, right, bottom = box
        candidates = [
            (left + 1, top, right, bottom),
            (left, top + 1, right, bottom),
            (left, top, right - 1, bottom),
            (left, top, right, bottom - 1),
        ]
        area = (right - left) * (bottom - top)
        kept = [
            ((mass(box) - mass(new)) / (area - (new[2] - new[0]) * (new[3] - new[1])), new)
            for new in candidates
            if new[2] > new[0] and new[3] > new[1] and mass(new) >= share - 1e-12
        ]
        if not kept:
            break
        box = min(kept)[1]
    (height, width), (rows, columns), (left, top, right, bottom) = density.shape, small.shape, box
    right, bottom = -(-right * width // columns), -(-bottom * height // rows)  # rounded up
    return left * width // columns, top * height // rows, right, bottom


def _reduced(density: np.ndarray) -> np.ndarray:
    """The density summed into at most ``WORKING_SIDE`` cells a side."""
    density = np.ascontiguousarray(density, dtype=np.float64)  # torch takes no turned arrays
    if density.ndim != 2 or not np.isfinite(density).all() or density.min() < 0:
        raise ValueError(f"a density is (H, W), finite and not negative, not {density.shape}")
    if density.sum() == 0:
        raise ValueError("a density must not be zero everywhere: nothing could be looked at")
    scale = max(1.0, max(density.shape) / WORKING_SIDE)
    size = [max(1, round(side / scale)) for side in density.shape]
    small = F.interpolate(torch.from_numpy(density)[None, None], size=size, mode="area")[0, 0]
    return (small / small.sum()).numpy()
