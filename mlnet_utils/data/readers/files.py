"""The files of all datasets: pairing by stem, photos, MATLAB's files, maps of fixated pixels.

Every mismatch is one error with the number of files and the first names.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlnet_utils.data.images import open_checked, open_image, orientation, visible_files
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.matlab import read_mat
from mlnet_utils.runtime import reading

MOST_COUNTED = 50  # fixations of one pixel in a map that counts
MOST_MARKED = 0.5  # share of a map's pixels


def need(path: Path, dataset: str) -> Path:
    """The path; where it is missing, a FileNotFoundError with the way to get the dataset."""
    if not path.exists():
        fetch = f"`python -m mlnet_utils download {dataset}` fetches it"
        where = "`--root` or $MLNET_DATA names the folder of the datasets (data/README.md)"
        raise FileNotFoundError(f"{dataset}: {path} is missing; {fetch}; {where}")
    return path


def directly_in(folder: Path, suffix: str) -> list[Path]:
    """The visible files of a kind that lie in the folder itself; none where there is no folder."""
    return visible_files(folder, (suffix,), nested=False)


def folders_in(folder: Path) -> list[Path]:
    """The visible sub-folders, in alphabetical order."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


# ---- pairing -----------------------------------------------------------------------------------
def by_stem(paths: Iterable[Path], dataset: str, strip: str = "") -> dict[str, Path]:
    """Files by their stem without the ending ``strip`` (such as ``_fixPts``), in the stems' order.

    Raises a ValueError that names both where two files share a stem.
    """
    found = defaultdict(list)
    for path in paths:
        found[composed(path.stem).removesuffix(strip)].append(path)
    twice = [sorted(repr(str(path)) for path in same) for same in found.values() if len(same) > 1]
    if twice:
        first = " and ".join(twice[0])
        raise ValueError(f"{dataset}: {len(twice)} stems belong to several files ({first}): rename")
    return {stem: found[stem][0] for stem in sorted(found)}


def composed(name: str) -> str:
    """The name with its accents composed: macOS writes them as characters of their own."""
    return unicodedata.normalize("NFC", name)


def check_pairs(dataset: str, first: str, ours: Iterable[str], second: str, theirs: Iterable[str]):
    """Raise a ValueError that counts and names the stems of two sets that lack a partner."""
    ours, theirs = set(ours), set(theirs)
    parts = [
        f"{len(lone)} {kind} without {other}: {named(sorted(lone))}"
        for lone, kind, other in ((ours - theirs, first, second), (theirs - ours, second, first))
        if lone
    ]
    if parts:
        raise ValueError(f"{dataset}: {'; '.join(parts)}. Files pair by name: complete or remove")


def check_looked_at(dataset: str, photos: list[Photo]) -> list[Photo]:
    """The photos; a ValueError that counts and names those without a fixation or density map."""
    empty = [photo for photo in photos if not len(photo.fixations) and not photo.density]
    if empty:
        outside = sum(photo.dropped for photo in empty)
        said = f"{len(empty)} photos have no fixation on them ({outside} lie outside)"
        names = named([photo.stem for photo in empty])
        raise ValueError(f"{dataset}: {said}: {names}. Correct their coordinates or remove them")
    return photos


def named(names: Sequence[str]) -> str:
    """The first five names, in quotes."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


# ---- files -------------------------------------------------------------------------------------
def photo_size(path: Path) -> tuple[int, int]:
    """Width and height of a photo as it is shown; a ValueError if any of it cannot be decoded."""
    with reading(path, "a photo"), open_image(path) as image:
        width, height = image.size
        image.draft("L", (1, 1))  # the cheapest way through all of a JPEG
        image.load()  # this turns a TIFF, and removes its orientation
        return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)


def load_mat(path: Path, *names: str) -> dict[str, Any]:
    """The variables of a MATLAB file, see :func:`~.matlab.read_mat`.

    Raises a ValueError if it is empty, damaged, of another version, or lacks one of ``names``.
    """
    with reading(path, "a MATLAB file of version 5 to 7"):
        values = read_mat(path)
    if missing := [name for name in names if name not in values]:
        found = f"{', '.join(sorted(values)) or 'nothing'} instead of {', '.join(missing)}"
        raise ValueError(f"{path} holds {found}: it belongs to another dataset or edition")
    return values


def fixated_pixels(path: Path, size: tuple[int, int], variable: str = "") -> np.ndarray:
    """The marked pixels of a fixation map: (N, 2) float32 x, y, 0-based.

    In a JPEG a pixel is marked if it exceeds half of the map's maximum, which undoes JPEG's effect
    on single white pixels. Other files are exact: they hold 0 and a single other value, or counts;
    then a pixel is returned as often as it was fixated.

    ``path`` is a picture, ``.npy`` or ``.mat`` (``variable`` in it, or the only matrix), ``size``
    the width and height of the photo. Raises a ValueError where the map is unreadable, not a single
    matrix, of another size, not finite, or blurred. Blurred maps would silently falsify all metrics
    on fixations.
    """
    with reading(path, "a map of fixated pixels, one matrix"):
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".mat":
            matrices = load_mat(path, variable) if variable else load_mat(path)
            (values,) = [matrices[variable]] if variable else matrices.values()
        else:
            with open_checked(path) as image:
                values = image.convert("F")
        values = np.asarray(values, np.float64)
    if values.shape != size[::-1]:
        shape, photo = ("x".join(map(str, sides)) for sides in (values.shape[::-1], size))
        raise ValueError(f"map {path} is {shape}, but its photo is {photo}: get the unresized map")
    if not np.isfinite(values).all():
        raise ValueError(f"map {path} holds values that are not finite: use 0 where nobody looked")
    top = values.max()
    marked = (values > top / 2) & (top > 0)
    between = (values > top / 4) & (values <= 3 * top / 4)
    whole = (values == values.round()).all() and values.min() >= 0 and top <= MOST_COUNTED
    sparse = np.count_nonzero(values) <= MOST_MARKED / 5 * values.size
    if between.sum() > marked.sum() and not (whole and sparse):
        raise ValueError(f"map {path} is blurred: give it as a density map, or get the fixations")
    counts = marked.astype(int)
    if path.suffix.lower() not in (".jpg", ".jpeg") and top > 0:
        if whole:
            counts = values.astype(int)
        elif not np.isin(values, (0, top)).all():
            wanted = f"0 and one other value, or whole numbers to {MOST_COUNTED}, counts"
            raise ValueError(f"map {path} holds values between 0 and {top:g}: expected {wanted}")
    if np.count_nonzero(counts) > MOST_MARKED * counts.size:
        share = f"{np.count_nonzero(counts)} of {counts.size}"
        raise ValueError(f"map {path} marks {share} pixels: expected 0 where nobody looked")
    y, x = np.nonzero(counts)
    points = np.stack([x, y], axis=1).astype(np.float32)
    return points.repeat(counts[y, x], axis=0)
