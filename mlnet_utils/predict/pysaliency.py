"""Exchange with pysaliency (github.com/matthias-k/pysaliency): datasets both ways, and a predictor
as a model of pysaliency, for its evaluation.

pysaliency is imported only when a function here is called: ``pip install 'mlnet-utils[parity]'``.
Its pixel is ``int(x)``; here it is ``floor(x + 0.5)``. Coordinates therefore differ by one half,
and the pixels are the same.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlnet_utils.data.images import FORMATS, orientation
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.data.readers.files import check_looked_at
from mlnet_utils.runtime import progress, reading, require

LOWEST = 1e-20  # density of a pixel that a model thinks impossible


def from_pysaliency(stimuli: Any, fixations: Any, folder: str | Path) -> list[Photo]:
    """A pysaliency dataset as photos, one per stimulus, in their order, without a split.

    ``Stimuli`` are written as PNG, ``FileStimuli`` copied, into ``folder/images/``; the photos'
    paths are relative to ``folder``. ``fixations`` are ``Fixations`` or ``FixationTrains``; a
    ``duration`` is in seconds, the subject -1 is unknown.

    Raises:
        ValueError: no stimuli, fixations on stimuli that do not exist, or stimuli without any.
        FileExistsError: ``images/`` exists; it is made only when everything is in order.
    """
    folder = Path(folder)
    if not len(stimuli):
        raise ValueError("pysaliency: there are no stimuli")
    owners = np.asarray(fixations.n)
    if len(owners) and not 0 <= owners.min() <= owners.max() < len(stimuli):
        found = f"fixations on stimuli {owners.min()} to {owners.max()} of {len(stimuli)}"
        raise ValueError(f"pysaliency: {found}; pass stimuli and fixations of one dataset")
    if (folder / "images").exists():
        raise FileExistsError(f"{folder / 'images'} exists: choose an empty folder, or remove it")
    staging = folder / "images.part"
    shutil.rmtree(staging, ignore_errors=True)  # of a call that failed
    staging.mkdir(parents=True)
    files = getattr(stimuli, "filenames", None)
    stems = [Path(name).stem for name in files or ()]
    if not stems or len(set(stems)) < len(stems):
        stems = [f"stimulus_{number:05d}" for number in range(len(stimuli))]
    points = _half_a_pixel_less(np.stack([fixations.x, fixations.y], axis=1).reshape(-1, 2))
    subjects = np.asarray(fixations.subjects)
    observers = np.searchsorted(np.unique(subjects[subjects != NOBODY]), subjects)
    observers = np.where(subjects == NOBODY, NOBODY, observers)
    seconds = np.asarray(getattr(fixations, "duration", np.full(len(owners), np.nan)), np.float64)
    photos = []
    for number, stem in enumerate(progress(stems, "reading stimuli", unit="photo")):
        copied = files is not None and _is_upright(files[number])
        path = staging / (stem + (Path(files[number]).suffix.lower() if copied else ".png"))
        if copied:
            shutil.copyfile(files[number], path)
        else:
            Image.fromarray(_as_rgb(stimuli.stimuli[number])).save(path)
        height, width = (int(side) for side in stimuli.sizes[number])
        own = owners == number
        looked = (points[own], observers[own], 1000 * seconds[own])
        photos.append(Photo.from_points(stem, f"images/{path.name}", (width, height), *looked))
    check_looked_at("pysaliency", photos)
    staging.rename(folder / "images")
    return photos


def to_pysaliency(photos: list[Photo], root: str | Path) -> tuple[Any, Any]:
    """Photos as ``(FileStimuli, Fixations)``; the photos' paths are relative to ``root``.

    Raises ValueError: a photo is turned by its EXIF.
    """
    pysaliency = require("pysaliency", "parity")
    counts = [len(photo.fixations) for photo in photos]
    points = np.concatenate([photo.fixations for photo in photos]).astype(np.float64) + 0.5
    fixations = pysaliency.Fixations.create_without_history(
        points[:, 0],
        points[:, 1],
        np.repeat(np.arange(len(photos)), counts),
        subjects=np.concatenate([photo.observers for photo in photos]).astype(int),
    )
    files = [str(Path(root) / photo.image) for photo in photos]
    turned = [path for path in files if not _is_upright(path)]
    if turned:
        found = f"{len(turned)} photos are turned by EXIF, which pysaliency ignores: {turned[0]}"
        raise ValueError(f"{found}; save them upright and prepare the dataset again")
    return pysaliency.FileStimuli(files, cached=False), fixations


def as_pysaliency_model(predict: Callable[[np.ndarray], np.ndarray]) -> Any:
    """A predictor as a ``pysaliency.Model``, of natural logarithms of densities.

    ``predict`` takes (H, W, 3) uint8 RGB and gives a (H, W) density, non-negative, of any sum; the
    model raises a ValueError for any other. Densities are at least :data:`LOWEST`: a fixation on a
    zero would make a score infinite. Raises ImportError: the extra ``parity`` is not installed.

    Example::

        model = as_pysaliency_model(mlnet_utils.load("best.pt").predict)
        model.information_gain(stimuli, fixations, baseline)
    """

    class Predicted(require("pysaliency", "parity").Model):
        def _log_density(self, stimulus: np.ndarray) -> np.ndarray:
            image = _as_rgb(stimulus)
            density = np.asarray(predict(image), np.float64)
            if density.shape != image.shape[:2]:
                raise ValueError(f"predicted {density.shape} for a photo of {image.shape[:2]}")
            if not (np.isfinite(density).all() and density.min() >= 0 and density.sum() > 0):
                raise ValueError("a predicted density must be finite, >= 0 and not all zero")
            density = np.maximum(density / density.sum(), LOWEST)
            return np.log(density) - np.log(density.sum())

    return Predicted(memory_cache_size=32)  # by default every map would be kept


def _as_rgb(stimulus: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 1, 3 or 4) stimulus as (H, W, 3) uint8."""
    stimulus = np.asarray(stimulus)
    if stimulus.dtype != np.uint8:
        raise ValueError(f"pysaliency: stimuli must be uint8, got {stimulus.dtype}")
    if stimulus.ndim == 2 or stimulus.shape[2] == 1:
        return np.repeat(stimulus.reshape(*stimulus.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(stimulus[:, :, :3])


def _half_a_pixel_less(points: np.ndarray) -> np.ndarray:
    """(N, 2) float32 coordinates with pysaliency's pixels here, whatever the rounding."""
    # int() rounds towards zero: points just above and left of a photo are on its first pixel.
    whole = np.trunc(np.where(np.isfinite(points), points, -1))
    moved = (points - 0.5).astype(np.float32)
    return np.where(np.floor(moved + np.float32(0.5)) == whole, moved, whole).astype(np.float32)


def _is_upright(path: str | Path) -> bool:
    """True where pysaliency, which ignores EXIF, sees a photo as it is shown."""
    with reading(path, "a photo"), Image.open(path, formats=FORMATS) as image:
        return orientation(image) == 1
