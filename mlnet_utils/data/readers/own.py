"""Reader of the user's own data: photos, with fixation lists, fixation maps or density maps."""

import csv
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from mlnet_utils.data.images import PHOTO_SUFFIXES, visible_files
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import DatasetSpec
from mlnet_utils.runtime import progress

COLUMNS = ("image", "x", "y")
OPTIONAL = ("observer", "duration")  # any name; ms
PARTS = {  # of the dataset ``folder``, by argument of read_folder
    "fixations_csv": "fixations.csv",
    "fixation_maps": "fixation_maps",
    "density_maps": "density_maps",
}
SPLIT_NAMES = {  # of sub-folders, in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
UNITS = {1: "width and height", 100: "width / 100 and height / 100"}  # factors to pixels
OUTSIDE = 0.1  # share of points outside their photos that makes a list implausible
ENOUGH = (20, 5)  # points, photos: fewer say nothing about a list
FIXATION_SUFFIXES = (*PHOTO_SUFFIXES, ".npy", ".mat")
DENSITY_SUFFIXES = (*PHOTO_SUFFIXES, ".npz")


def read_own(root: str | Path) -> list[Photo]:
    """The dataset ``folder``: ``images/`` and any of :data:`PARTS`, see :func:`read_folder`.

    Paths in the photos are relative to ``root``.
    """
    root = Path(root)
    there = {key: root / name for key, name in PARTS.items() if (root / name).exists()}
    photos = read_folder(root / "images", **there)
    for photo in photos:
        photo.image = f"images/{photo.image}"
        photo.density = photo.density.removeprefix("../")
    return photos


def read_folder(
    images: str | Path,
    fixations_csv: str | Path = "",
    fixation_maps: str | Path = "",
    density_maps: str | Path = "",
    first_pixel: int = 0,
) -> list[Photo]:
    """Read photos and whatever is known of who looked where; files pair by stem.

    Subfolders named as in :data:`SPLIT_NAMES` decide the split; other subfolders are only read. Of
    fixation lists and fixation maps only one is needed; density maps may come on their own, and
    then metrics that need fixations cannot be computed.

    Args:
        images: folder of photos, which their paths are relative to.
        fixations_csv: rows of ``image, x, y`` and optionally ``observer`` (any name) and
            ``duration`` (ms), in viewing order; ``image`` is a file name or stem, x and y are in
            pixels of the photo, with pixel centres at integers.
        fixation_maps: folder of maps of fixated pixels (pictures, ``.npy`` or ``.mat``).
        density_maps: folder of density maps (pictures, or ``.npz`` with ``density``).
        first_pixel: what the CSV calls the centre of the first pixel: 0, or 1 as in MATLAB.

    Raises:
        FileNotFoundError: a folder or file that does not exist.
        ValueError: nothing to learn from, files or rows that do not pair, damaged files, a
            sub-folder that looks like a split and is none, or see :func:`check_coordinates`.
    """
    images = Path(images)
    for path in filter(str, (images, fixations_csv, fixation_maps, density_maps)):
        if not Path(path).exists():
            raise FileNotFoundError(f"own photos: {path} does not exist")
    if (fixations_csv and fixation_maps) or not (fixations_csv or fixation_maps or density_maps):
        raise ValueError(
            "own photos: give a fixation list or fixation maps (not both), or density maps"
        )
    paths = files.by_stem(visible_files(images), "own photos")
    if not paths:
        raise ValueError(f"own photos: {images} holds none of {', '.join(PHOTO_SUFFIXES)}")
    marked = _maps(fixation_maps, paths, "fixation maps", FIXATION_SUFFIXES)
    drawn = _maps(density_maps, paths, "density maps", DENSITY_SUFFIXES)
    rows = _read_csv(Path(fixations_csv), set(paths), first_pixel) if fixations_csv else {}
    photos = []
    for stem, path in progress(paths.items(), "reading photos", len(paths), "photo"):
        size, place = files.photo_size(path), path.relative_to(images)
        looked = rows.get(stem, (np.zeros((0, 2)),))
        if stem in marked:
            looked = (files.fixated_pixels(marked[stem], size),)
        density = Path(os.path.relpath(drawn[stem], images)).as_posix() if drawn else ""
        rest = {"split": _split(place), "density": density}
        photos.append(Photo.from_points(stem, place.as_posix(), size, *looked, **rest))
        if drawn:
            photos[-1].read_density(images)  # or an error: training would meet it hours later
    if rows:
        sizes = {photo.stem: (photo.width, photo.height) for photo in photos}
        check_coordinates(fixations_csv, sizes, {stem: row[0] for stem, row in rows.items()})
    return files.check_looked_at("own photos", photos)


def check_coordinates(
    path: str | Path, sizes: dict[str, tuple[int, int]], points: dict[str, np.ndarray]
) -> None:
    """Refuse a list with coordinates that are evidently no pixels of its photos.

    A pixel that is recorded in most photos, as trackers write lost gaze, is a warning.

    Args:
        path: of the list, for messages.
        sizes: width and height of the photos by stem.
        points: (N, 2) x, y of each, 0-based; lost gaze is not finite.

    Raises:
        ValueError: nine tenths of the points lie within 0..1, or within 0..100 of photos at least
            twice as large, or over a tenth lies outside the photos (a
            fiftieth, if exchanging x and y mends it).
    """
    size = np.concatenate([np.tile(sizes[stem], (len(points[stem]), 1)) for stem in points])
    xy = np.concatenate(list(points.values()))
    known = np.isfinite(xy).all(axis=1)
    xy, size = xy[known], size[known]
    if len(xy) < ENOUGH[0]:
        return

    def outside(shifted: np.ndarray) -> int:
        return int((~((shifted >= -0.5) & (shifted < size - 0.5)).all(axis=1)).sum())

    seen = xy.any(axis=1)  # 0, 0 is lost gaze in any unit
    for top, factors in UNITS.items():
        corner = ((xy >= 0) & (xy <= top)).all(axis=1)[seen]
        if corner.size and corner.mean() > 1 - OUTSIDE and (size >= 2 * top).all():
            raise ValueError(
                f"own photos: {path}: {corner.sum()} of {len(corner)} points lie within 0..{top}, "
                "a corner of every photo, so they are shares of the photo and not its pixels: "
                f"multiply x and y by {factors} of the photo, and subtract 0.5"
            )
    out, swapped = outside(xy), outside(xy[:, ::-1])
    exchanged = 4 * swapped < out
    if out > OUTSIDE * len(xy) * (0.2 if exchanged else 1):
        offset = np.median(xy - (size - 1) / 2, axis=0).round()
        moved = outside(xy - offset)
        if exchanged and swapped <= moved:
            cause = f"x and y are exchanged (exchanged back, {swapped} lie outside): exchange them"
        else:
            cause = (
                "they are pixels of the screen or of another size of the photos: subtract the "
                f"photo's place on the screen (with {offset[0]:.0f}, {offset[1]:.0f} subtracted, "
                f"{moved} lie outside), or scale them to the photo"
            )
        raise ValueError(
            f"own photos: {path}: {out} of {len(xy)} points lie outside their photos. "
            f"Likely {cause}"
        )
    pixels = Counter(
        tuple(pixel) for values in points.values() for pixel in {*map(tuple, values.round())}
    )
    (x, y), count = pixels.most_common(1)[0]
    if count > len(points) / 2 and len(points) >= ENOUGH[1]:
        warnings.warn(
            f"own photos: {path}: pixel {x:.0f}, {y:.0f} is a fixation in {count} of {len(points)} "
            "photos: if it is lost gaze, remove these rows",
            stacklevel=3,
        )


def _split(place: Path) -> str:
    """The split of a photo by the folder it lies in; ``""`` where no folder names a split.

    Raises:
        ValueError: a folder looks like a split, such as test2014 or cats/test, but is none.
    """
    folders = place.parts[:-1]
    if folders and (split := SPLIT_NAMES.get(folders[0].lower())):
        return split
    for folder in folders:
        words = re.findall("[a-z]+", folder.lower())
        if any(re.sub("(set|data|images|photos)$", "", word) in SPLIT_NAMES for word in words):
            raise ValueError(
                f"own photos: the folder {folder!r} of {place} looks like a split, but splits are "
                f"folders directly in the folder of photos, named {', '.join(SPLIT_NAMES)}: rename "
                "or move it"
            )
    return ""


def _maps(
    folder: str | Path, paths: dict[str, Path], kind: str, suffixes: tuple[str, ...]
) -> dict[str, Path]:
    """The folder's maps by stem, one for each of the photos ``paths``."""
    if not folder:
        return {}
    maps = files.by_stem(visible_files(Path(folder), suffixes), "own photos")
    files.check_pairs("own photos", "photos", paths, kind, maps)
    return maps


def _read_csv(path: Path, stems: set[str], first_pixel: int) -> dict[str, tuple[np.ndarray, ...]]:
    """(N, 2) x, y, (N,) observers and (N,) durations by stem."""
    rows, names, line = defaultdict(list), {"": NOBODY}, 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            if any(columns.count(name) != 1 for name in COLUMNS) or any(
                columns.count(name) > 1 for name in OPTIONAL
            ):
                raise ValueError(
                    f"columns {columns}: give each of {', '.join(COLUMNS)} once, and "
                    f"{' and '.join(OPTIONAL)} at most once"
                )
            for row in reader:
                line = reader.line_num
                if any(row.get(None, ())):
                    raise ValueError(f"over {len(columns)} values; is a comma a decimal point?")
                x, y = (float(row[name]) - first_pixel for name in ("x", "y"))
                if x == y == -1 - first_pixel:  # lost gaze
                    x = y = math.nan
                duration = float(row.get("duration") or math.nan)
                observer = names.setdefault((row.get("observer") or "").strip(), len(names) - 1)
                stem = row["image"] if row["image"] in stems else Path(row["image"]).stem
                rows[stem].append((x, y, observer, duration))
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    files.check_pairs("own photos", "photos", stems, f"rows of {path.name}", rows)
    arrays = {stem: np.array(values, np.float64) for stem, values in rows.items()}
    return {stem: (v[:, :2], v[:, 2].astype(int), v[:, 3]) for stem, v in arrays.items()}


SPEC = DatasetSpec(
    name="folder",
    title="Own photos",
    read=read_own,
    folder="folder",
    val=0.1,
    test=0.2,
    parts=("images", *PARTS.values()),
    by_hand="place images/ and fixations.csv, fixation_maps/ or density_maps/",
)
