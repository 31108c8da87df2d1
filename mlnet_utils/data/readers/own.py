"""Reader of the user's own data: photos, with fixation lists, fixation maps or density maps."""

import codecs
import contextlib
import csv
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mlnet_utils.data.images import PHOTO_SUFFIXES, visible_files
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import DatasetSpec
from mlnet_utils.runtime import progress

COLUMNS = ("image", "x", "y")
OPTIONAL = ("observer", "duration")  # any name; ms
NEAR = {  # column: pattern of names that may mean it
    "observer": "subject|participant|viewer|user|person",
    "duration": "dur",
    "image": "file|photo|picture|stimul|img|name",
    "x": r"(\b|_)x|x(\b|_)|column|left",
    "y": r"(\b|_)y|y(\b|_)|row|top",
}
LOST = {"", ".", "-", "na", "n/a", "nan", "none", "null", "missing"}  # values, in any case
LISTS = (".csv", ".tsv", ".txt")
PARTS = {  # of the dataset ``folder``, by precedence: the argument of read_folder for each
    "fixations.csv": "fixations_csv",
    "fixation_maps": "fixation_maps",
    "density_maps": "density_maps",
    "fixations": "fixations_csv",
}
SPLIT_NAMES = {  # of sub-folders, in any case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
SHARES = {"normalised": 1, "percent": 100}  # units of a list: the photo's side in each
OUTSIDE = 0.1  # share of points outside their photos that makes a list implausible
ENOUGH = (20, 5)  # points, photos: fewer say nothing about a list
FIXATION_SUFFIXES = (*PHOTO_SUFFIXES, ".npy", ".mat")
DENSITY_SUFFIXES = (*PHOTO_SUFFIXES, ".npz", ".npy")


def read_own(root: str | Path, coordinates: Mapping[str, Any] | None = None) -> list[Photo]:
    """The dataset ``folder``: ``images/`` and any of :data:`PARTS`, see :func:`read_folder`.

    Paths in the photos are relative to ``root``. A ValueError too where none of the parts is there.
    """
    root = Path(root)
    there = {key: root / name for name, key in reversed(PARTS.items()) if (root / name).exists()}
    if (root / "fixations.csv").exists() and (root / "fixations").exists():
        warnings.warn(f"{root}: fixations.csv is read, fixations/ beside it is not", stacklevel=2)
    if not there and (root / "images").is_dir():
        found = files.named(sorted(path.name for path in root.iterdir()))
        wanted = f"{', '.join(PARTS)}/ (lists by observer)"
        raise ValueError(f"own photos: {root} holds none of {wanted}, but {found}")
    photos = read_folder(root / "images", **there, coordinates=coordinates)
    for photo in photos:
        photo.image = f"images/{photo.image}"
        photo.density = photo.density.removeprefix("../")
    return photos


def read_folder(
    images: str | Path,
    fixations_csv: str | Path = "",
    fixation_maps: str | Path = "",
    density_maps: str | Path = "",
    coordinates: Mapping[str, Any] | None = None,
) -> list[Photo]:
    """Read photos with their fixations or density maps; files pair by stem.

    Subfolders named as in :data:`SPLIT_NAMES` decide the split; other subfolders are only read.
    Paths are relative to ``images``, the folder of photos. Density maps on their own do not allow
    metrics that need fixations.

    Args:
        fixations_csv: rows of ``image, x, y`` and optionally ``observer`` (any name) and
            ``duration`` (ms), in viewing order; ``image`` is a file name or stem, x and y are in
            pixels of the photo, with pixel centres at integers. Or a folder with such a list of
            each observer.
        fixation_maps: instead, a folder of maps of fixated pixels (pictures, ``.npy``, ``.mat``).
        density_maps: folder of density maps (pictures, ``.npy``, or ``.npz`` with ``density``).
        coordinates: the list's, where they are not such pixels, see :func:`to_pixels`.

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
        raise ValueError("own photos: give a list or maps of fixations (not both), or density maps")
    paths = files.by_stem(visible_files(images), "own photos")
    if not paths:
        raise ValueError(f"own photos: {images} holds none of {', '.join(PHOTO_SUFFIXES)}")
    marked = _maps(images, fixation_maps, paths, "fixation maps", FIXATION_SUFFIXES)
    drawn = _maps(images, density_maps, paths, "density maps", DENSITY_SUFFIXES)
    rows = _read_lists(Path(fixations_csv), images, paths) if fixations_csv else {}
    photos = []
    for stem, path in progress(paths.items(), "reading photos", len(paths), "photo"):
        size, place = files.photo_size(path), path.relative_to(images)
        looked = (np.zeros((0, 2)),)
        if rows:
            points, *rest = rows[stem]
            rows[stem] = looked = to_pixels(points, size, **coordinates or {}), *rest
        if stem in marked:
            looked = (files.fixated_pixels(marked[stem], size),)
        rest = {"split": _split(place), "density": str(drawn.get(stem, ""))}
        photos.append(Photo.from_points(stem, place.as_posix(), size, *looked, **rest))
        if drawn:
            photos[-1].read_density("")  # or an error: training would meet it hours later
            photos[-1].density = Path(os.path.relpath(drawn[stem], images)).as_posix()
    if rows:
        sizes = {photo.stem: (photo.width, photo.height) for photo in photos}
        written = {stem: row[0] for stem, row in rows.items()}
        check_coordinates(fixations_csv, sizes, written, coordinates)
    return files.check_looked_at("own photos", photos)


def to_pixels(
    points: np.ndarray,
    size: tuple[int, int],
    origin: int = 0,
    unit: str = "pixel",
    offset: Sequence[float] = (0, 0),
) -> np.ndarray:
    """(N, 2) x, y in pixels of a photo, 0-based with pixel centres at integers, from those written.

    ``size`` is the photo's width and height. ``origin`` is the coordinate of the first pixel's
    centre: 0, or 1 as in MATLAB. ``unit`` is ``"pixel"``, ``"normalised"`` (0 to 1 from edge to
    edge) or ``"percent"``. ``offset`` is x and y of the photo's left and top edge in that unit,
    such as its place on the screen.
    """
    points = points - np.asarray(offset, float)
    if unit == "pixel":
        return points - origin
    return points * size / SHARES[unit] - 0.5


def check_coordinates(
    path: str | Path,
    sizes: dict[str, tuple[int, int]],
    points: dict[str, np.ndarray],
    coordinates: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a list (``path``) with coordinates that are evidently no pixels of its photos.

    ``sizes`` are width and height of the photos by stem, ``points`` (N, 2) x, y of each, 0-based,
    not finite where gaze was lost; ``coordinates`` has converted them. Warns of a pixel that is
    recorded in most photos, as trackers write lost gaze. Raises ValueError: nine tenths of the
    points lie within 0..1, or within 0..100 of photos at least twice as large, or over a tenth lies
    outside the photos (a fiftieth, if exchanging x and y mends it).
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
    for unit, top in SHARES.items():
        corner = ((xy >= 0) & (xy <= top)).all(axis=1)[seen]
        if corner.size and corner.mean() > 1 - OUTSIDE and (size >= 2 * top).all():
            said = f"{corner.sum()} of {len(corner)} points lie within 0..{top}, shares of a side"
            remedy = f"set `coordinates: {{unit: {unit}}}` in the preset"
            raise ValueError(f"own photos: {path}: {said}: {remedy}")
    out, swapped = outside(xy), outside(xy[:, ::-1])
    exchanged = 4 * swapped < out
    if out > OUTSIDE * len(xy) * (0.2 if exchanged else 1):
        offset = np.median(xy - (size - 1) / 2, axis=0).round()
        moved, used = outside(xy - offset), coordinates or {}
        if exchanged and swapped <= moved:
            cause = f"x and y are exchanged (exchanged back, {swapped} lie outside): exchange them"
        elif used.get("unit", "pixel") != "pixel":
            cause = f"they are not {used['unit']}, as `coordinates` in the preset says"
        else:
            offset += used.get("offset", (0, 0))
            cause = (
                f"they are pixels of the screen: set `coordinates: {{offset: [{offset[0]:.0f}, "
                f"{offset[1]:.0f}]}}` in the preset ({moved} then lie outside), or of another size "
                "of the photos: scale them"
            )
        said = f"{out} of {len(xy)} points lie outside their photos. Likely {cause}"
        raise ValueError(f"own photos: {path}: {said}")
    pixels = Counter()
    for values in points.values():
        pixels.update({*map(tuple, values[np.isfinite(values).all(axis=1)].round())})
    (x, y), count = pixels.most_common(1)[0]
    if count > len(points) / 2 and len(points) >= ENOUGH[1]:
        warnings.warn(
            f"own photos: {path}: pixel {x:.0f}, {y:.0f} is a fixation in {count} of {len(points)} "
            "photos: if it is lost gaze, remove these rows",
            stacklevel=3,
        )


def _split(place: Path) -> str:
    """The split of a photo by its folder, or ``""``; an error for test2014, cats/test and such."""
    folders = place.parts[:-1]
    if folders and (split := SPLIT_NAMES.get(folders[0].lower())):
        return split
    for folder in folders:
        words = re.findall("[a-z]+", folder.lower())
        if any(re.sub("(set|data|images|photos)$", "", word) in SPLIT_NAMES for word in words):
            said = f"own photos: the folder {folder!r} of {place} looks like a split"
            rule = f"splits lie directly in the folder of photos, as {', '.join(SPLIT_NAMES)}"
            raise ValueError(f"{said}: {rule}; rename or move it")
    return ""


def _maps(
    images: Path, folder: str | Path, paths: dict[str, Path], kind: str, suffixes: tuple[str, ...]
) -> dict[str, Path]:
    """The folder's maps by stem, a map for each of the photos ``paths``; all may have an ending."""
    if not folder:
        return {}
    maps = files.by_stem(visible_files(Path(folder), suffixes), "own photos")
    first = next(iter(maps), "")
    for ending in {first.removeprefix(stem) for stem in paths} - {first}:
        if maps.keys() == {f"{stem}{ending}" for stem in paths}:  # such as 001_density of 001
            return {stem: maps[f"{stem}{ending}"] for stem in paths}
    _check_pairs(images, paths, kind, maps)
    return maps


def _check_pairs(images: Path, photos: Iterable[str], kind: str, theirs: Iterable[str]) -> None:
    """:func:`files.check_pairs`, with likely causes in the error."""
    try:
        files.check_pairs("own photos", "photos", photos, kind, theirs)
    except ValueError as error:
        lone, unseen = set(theirs) - set(photos), set(photos) - set(theirs)
        other = sorted(path.name for path in images.rglob("*") if files.composed(path.stem) in lone)
        hints = ""
        if other:
            hints += f". {files.named(other)}: no photo that is read; save it as JPEG or PNG"
        if {name.lstrip("0") for name in lone} & {name.lstrip("0") for name in unseen}:
            hints += ". A spreadsheet has made numbers of names (1 of 001): format them as text"
        raise ValueError(f"{error}{hints}") from None


# ---- lists of fixations ------------------------------------------------------------------------
def _read_lists(
    path: Path, images: Path, photos: Iterable[str]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(N, 2) x, y as they are written, (N,) observers and (N,) durations by stem; NaN = lost gaze.

    ``path`` is a list, or a folder with a list of each observer.
    """
    lists = visible_files(path, LISTS) if path.is_dir() else [path]
    files.by_stem(lists, "own photos")  # or an error: a stem is an observer
    rows, names = defaultdict(list), {"": NOBODY}
    for file in lists:
        for row in _rows(file):
            name = files.composed(row["image"].replace("\\", "/"))
            stem = name if name in photos else PurePosixPath(name).stem
            observer = row.get("observer", file.stem if path.is_dir() else "")
            number = names.setdefault(observer, len(names) - 1)
            rows[stem].append((row["x"], row["y"], number, row["duration"]))
    _check_pairs(images, photos, f"rows of {path.name}", rows)
    arrays = {stem: np.array(values, np.float64) for stem, values in rows.items()}
    return {stem: (v[:, :2], v[:, 2].astype(int), v[:, 3]) for stem, v in arrays.items()}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a list, as dictionaries with the columns that there are; x, y as numbers."""
    lines = _decoded(path.read_bytes()).splitlines(keepends=True)
    body = list(dropwhile(lambda line: line.lstrip().startswith("#"), lines))
    separator = max(",;\t", key=(body or [""])[0].count)
    reader = csv.reader(body, delimiter=separator, skipinitialspace=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        _check_columns(path, columns)
        for values in reader:
            values = [value.strip() for value in values]
            comment = values and values[0].startswith("#") and len(values) < len(COLUMNS)
            if not any(values) or comment or [value.lower() for value in values] == columns:
                continue  # the last: two lists in one file
            if any(values[len(columns) :]):
                raise ValueError(f"over {len(columns)} values; is a comma a decimal point?")
            row = dict(zip(columns, values, strict=False))
            if lacking := [name for name in COLUMNS if name not in row]:
                raise ValueError(f"{', '.join(lacking)} missing: complete or remove the row")
            for name in ("x", "y", "duration"):  # with another separator a comma may be its point
                text = row.get(name, "")
                number = text if separator == "," else text.replace(",", ".")
                row[name] = math.nan if text.lower() in LOST else float(number)
            if row.get("observer", "known").lower() in LOST:
                row["observer"] = ""
            if row["x"] == row["y"] == -1:  # lost gaze
                row["x"] = row["y"] = math.nan
            yield row
    except (ValueError, csv.Error) as error:
        line = len(lines) - len(body) + max(reader.line_num, 1)
        raise ValueError(f"{path}, line {line}: {error}") from error


def _decoded(content: bytes) -> str:
    """The text of a file in UTF-8, in UTF-16 as Excel writes it, or in Windows' Latin-1."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("utf-16" if wide else "utf-8-sig")
    return content.decode("cp1252", errors="replace")


def _check_columns(path: Path, columns: list[str]) -> None:
    """Refuse a list that lacks a needed column or repeats a column; warn of unused columns."""
    used = (*COLUMNS, *OPTIONAL)
    unused = [name for name in columns if name and name not in used]
    near = [
        f"is {name!r} the {known!r}?"
        for name in unused
        for known, pattern in NEAR.items()
        if known not in columns and re.search(pattern, name)
    ]
    hint = f"; {' '.join(near)} Rename it" if near else ""
    counts = Counter(columns)
    if any(counts[name] != 1 for name in COLUMNS) or any(counts[name] > 1 for name in OPTIONAL):
        once = f"give {', '.join(COLUMNS)} once, {' and '.join(OPTIONAL)} at most once"
        raise ValueError(f"columns {columns}: {once}{hint}")
    if unused:
        said = f"columns {files.named(unused)} are not used; the names are {', '.join(used)}{hint}"
        warnings.warn(f"own photos: {path}: {said}", stacklevel=2)


SPEC = DatasetSpec(
    name="folder",
    title="Own photos",
    read=read_own,
    folder="folder",
    val=0.1,
    test=0.2,
    own=True,
    parts=("images", *PARTS),
    by_hand="place images/ and fixations.csv, fixations/, fixation_maps/ or density_maps/",
)
