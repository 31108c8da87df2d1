"""Readers of SALICON (Jiang, Huang, Duan, Zhao; CVPR 2015) in its two editions and as JSON.

The editions of 2015 and 2017 hold other fixations for the same photos, and the same predictions
score very differently on them, so nothing here reads one without being told which.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.photos import SPLITS, Photo
from mlnet_utils.data.readers.layouts import (
    by_stem,
    check_looked_at,
    check_pairs,
    keep_inside,
    load_mat,
    named,
    need,
    photo_size,
)
from mlnet_utils.data.truth import density_of
from mlnet_utils.runtime import progress

EDITIONS = ("2015", "2017")
POINTS = ("fixations", "location")  # detected fixations, or all mouse samples


def read_salicon_mat(root: str | Path, edition: str, points: str = "fixations") -> list[Photo]:
    """SALICON's MATLAB files: ``images/<split>``, ``fixations-<edition>/<split>``.

    10,000 training and 5,000 validation photos of 640x480 with about 60 workers each, who looked
    with the mouse, and 5,000 test photos whose fixations are secret. Density maps in
    ``maps-<edition>/<split>``, where there are any, become the photos' ``density``. Coordinates
    in the files are 1-based x, y.

    Args:
        root: folder with the above.
        edition: ``"2015"`` or ``"2017"``.
        points: ``"fixations"``, or ``"location"`` for all mouse samples.

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: files that do not pair, are damaged, of the other edition or another size.
    """
    for value, allowed in ((edition, EDITIONS), (points, POINTS)):
        if value not in allowed:
            raise ValueError(f"SALICON: {value!r} is not one of {', '.join(allowed)}")
    root, dataset = Path(root), f"salicon-{edition}"
    images = need(root / "images", dataset)
    fixations = need(root / f"fixations-{edition}", dataset)
    maps = root / f"maps-{edition}"
    photos = []
    for split in SPLITS:
        files = by_stem((images / split).glob("*.jpg"), dataset)
        recorded = by_stem((fixations / split).glob("*.mat"), dataset)
        if split != "test":
            check_pairs(f"{dataset} {split}", "photos", files, "fixation files", recorded)
        drawn = by_stem((maps / split).glob("*.png"), dataset)
        if drawn:
            check_pairs(f"{dataset} {split}", "photos", files, "density maps", drawn)
        for stem, path in progress(files.items(), f"reading {split}", len(files), "photo"):
            photo = _photo(path, root, split)
            if drawn:
                photo.density = drawn[stem].relative_to(root).as_posix()
                density_of(photo, drawn[stem])  # or an error: training would meet it hours later
            if split != "test":
                workers = _workers(recorded[stem], edition, points, (photo.width, photo.height))
                _look(photo, workers)
            photos.append(photo)
    if not photos:
        raise ValueError(f"{dataset}: {images} holds no photos in train, val or test")
    check_looked_at(dataset, [photo for photo in photos if photo.split != "test"])
    return photos


def read_salicon_json(root: str | Path) -> list[Photo]:
    """The JSON of 2014: ``annotations/fixations_<split>*.json``, photos anywhere in ``images``.

    Despite their name its ``fixations`` are raw mouse samples, 1-based (row, column).

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: another structure, or photos that are missing, damaged or of another size.
    """
    root, dataset = Path(root), "salicon-json"
    annotations = sorted(need(root / "annotations", dataset).glob("fixations_*.json"))
    if not annotations:
        raise FileNotFoundError(f"{dataset}: no fixations_<split>.json in {root / 'annotations'}")
    files = by_stem(need(root / "images", dataset).rglob("*.jpg"), dataset)
    photos = []
    for path in annotations:
        split = next((s for s in SPLITS if path.stem.startswith(f"fixations_{s}")), None)
        if split is None:
            raise ValueError(f"{path}: its name must start with fixations_train, _val or _test")
        entries, workers = _read_annotations(path)
        missing = sorted(stem for stem in entries if stem not in files)
        if missing:
            raise ValueError(
                f"{dataset}: {len(missing)} photos of {path} are missing in {root / 'images'}: "
                f"{named(missing)}"
            )
        for stem, entry in progress(entries.items(), f"reading {split}", len(entries), "photo"):
            photo = _photo(files[stem], root, split)
            if (photo.width, photo.height) != (entry["width"], entry["height"]):
                raise ValueError(
                    f"{files[stem]} is {photo.width}x{photo.height}, but {path} says "
                    f"{entry['width']}x{entry['height']}: get the original photo"
                )
            _look(photo, workers[entry["id"]])
            photos.append(photo)
    known = {photo.stem for photo in photos}
    if len(known) < len(photos):
        raise ValueError(f"{dataset}: the files in {root / 'annotations'} share photos; keep one")
    check_pairs(dataset, f"photos in {root / 'images'}", files, "annotations", known)
    return check_looked_at(dataset, photos)


def fit_sigma(photos: list[Photo], root: str | Path, low: float = 2, high: float = 60) -> float:
    """The blur that turns the fixations into the published maps; for 2017 nobody states it.

    Args:
        photos: records with fixations and density maps; a few dozen are enough.
        root: what their paths are relative to.
        low: the smallest sigma that is considered, in pixels.
        high: the largest.

    Returns:
        The sigma, to 0.05 pixels, whose densities correlate best with the maps on average.

    Raises:
        ValueError: no photo has both fixations and a map, or a map is damaged, of another size
            than its photo, or the same everywhere.
    """
    from scipy.optimize import minimize_scalar

    both = [photo for photo in photos if photo.density and len(photo.fixations)]
    if not both:
        raise ValueError("fitting sigma needs photos with both fixations and density maps")
    maps = []
    for photo in both:
        path = Path(root) / photo.density
        values = density_of(photo, path).numpy()
        if values.min() == values.max():
            raise ValueError(f"density map {path} is the same everywhere: it shows no blur to fit")
        maps.append(values.ravel())

    def distance(sigma: float) -> float:
        ours = (density_from_points(p.fixations, p.height, p.width, sigma) for p in both)
        return -float(
            np.mean([np.corrcoef(d.ravel(), m)[0, 1] for d, m in zip(ours, maps, strict=True)])
        )

    return float(minimize_scalar(distance, bounds=(low, high), options={"xatol": 0.05}).x)


def _photo(path: Path, root: Path, split: str) -> Photo:
    return Photo(path.stem, path.relative_to(root).as_posix(), *photo_size(path), split=split)


def _look(photo: Photo, workers: list[np.ndarray]) -> None:
    """Give a photo the (N, 2) x, y of each worker, 0-based; workers are numbered per photo."""
    points = np.concatenate([np.zeros((0, 2)), *workers]).astype(np.float32)
    observers = np.repeat(np.arange(len(workers)), [len(worker) for worker in workers])
    photo.fixations, photo.observers, photo.dropped = keep_inside(
        points, photo.height, photo.width, observers.astype(np.int16)
    )
    photo.durations = np.full(len(photo.fixations), np.nan, np.float32)


def _workers(path: Path, edition: str, points: str, size: tuple[int, int]) -> list[np.ndarray]:
    """(N, 2) float64 x, y, 0-based, of every worker in a file of either edition."""
    values = load_mat(path, "gaze", "resolution")
    try:
        height, width = map(int, values["resolution"].ravel())
        rows, columns = values["gaze"].shape
        # As floats, since 1 less than 0 would wrap around in the files' unsigned integers.
        workers = [_pairs(getattr(worker, points)) - 1 for worker in values["gaze"].ravel()]
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not SALICON's: expected `gaze` structs with `{points}` of x, y, and a "
            f"`resolution` of rows and columns ({error}); get it again"
        ) from error
    if (width, height) != size:
        raise ValueError(
            f"{path} is of a photo of {width}x{height}, but the photo is "
            f"{'x'.join(map(str, size))}: get the original of both"
        )
    # The editions store workers along different axes, which tells them apart.
    if {"2015": rows, "2017": columns}[edition] > 1:
        raise ValueError(
            f"{path} is not of SALICON's {edition} edition: it holds {rows}x{columns} workers; "
            "the editions' fixations differ and must not be mixed"
        )
    return workers


def _pairs(values: Any) -> np.ndarray:
    """(N, 2) float64 from N x 2 numbers in a file; nothing at all has whatever shape it likes."""
    pairs = np.asarray(values, np.float64)
    if not pairs.size:
        return np.zeros((0, 2))
    # Reshaping instead would make pairs of numbers that are none: of rows x, y, or of x, y, time.
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"points of shape {pairs.shape} instead of N x 2")
    return pairs


def _read_annotations(path: Path) -> tuple[dict[str, dict], dict[int, list[np.ndarray]]]:
    """Entries by stem, and the workers' (N, 2) x, y, 0-based, by image id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {Path(entry["file_name"]).stem: entry for entry in content["images"]}
        known = {entry["id"] for entry in entries.values()}
        if not len(known) == len(entries) == len(content["images"]):
            raise ValueError("images that share a name or an id")
        samples = defaultdict(lambda: defaultdict(list))
        for note in content["annotations"]:
            row_column = _pairs(note["fixations"])
            samples[note["image_id"]][note["worker_id"]].append(row_column[:, ::-1] - 1)
        for entry in entries.values():
            entry["width"], entry["height"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not SALICON's JSON: expected `images` with file_name, id, width, height "
            f"and `annotations` with image_id, worker_id, fixations of row, column ({error!r})"
        ) from error
    unknown = sorted(map(str, set(samples) - known))  # as text, since ids of both kinds do not sort
    if unknown:
        raise ValueError(f"{path}: annotations of unknown images {named(unknown)}")
    workers = {
        image: [np.concatenate(parts) for parts in by_worker.values()]
        for image, by_worker in samples.items()
    }
    return entries, defaultdict(list, workers)
