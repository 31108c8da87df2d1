"""Readers of SALICON (Jiang, Huang, Duan, Zhao; CVPR 2015) in its two editions and as JSON.

The editions of 2015 and 2017 hold different fixations of the same photos, and the same predictions
score very differently on them. The reader of both is therefore told the edition.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.images import visible_files
from mlnet_utils.data.photos import SPLITS, Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import Archive, DatasetSpec
from mlnet_utils.runtime import progress, reading


def read_salicon_mat(root: str | Path, edition: str, points: str = "fixations") -> list[Photo]:
    """SALICON's MATLAB files: ``images/<split>``, ``fixations-<edition>/<split>``.

    10,000 training and 5,000 validation photos of 640x480 with about 60 workers each, who looked
    with the mouse, and 5,000 test photos with secret fixations; 1-based x, y. Density maps in
    ``maps-<edition>/<split>``, where there are any, become the photos' ``density``. The
    ``edition`` is ``"2015"`` or ``"2017"``; ``points`` are ``"fixations"``, which were detected, or
    ``"location"``, all mouse samples.

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: files that do not pair, are damaged, of the other edition or another size.
    """
    root, dataset = Path(root), f"salicon-{edition}"
    images = files.need(root / "images", dataset)
    fixations = files.need(root / f"fixations-{edition}", dataset)
    photos = []
    for split in SPLITS:
        paths = files.by_stem(files.directly_in(images / split, ".jpg"), dataset)
        recorded = files.by_stem(files.directly_in(fixations / split, ".mat"), dataset)
        maps = root / f"maps-{edition}" / split
        drawn = files.by_stem(files.directly_in(maps, ".png"), dataset)
        if split != "test":
            files.check_pairs(f"{dataset} {split}", "photos", paths, "fixation files", recorded)
        if drawn:
            files.check_pairs(f"{dataset} {split}", "photos", paths, "density maps", drawn)
        for stem, path in progress(paths.items(), f"reading {split}", len(paths), "photo"):
            size = files.photo_size(path)
            workers = [] if split == "test" else _workers(recorded[stem], edition, points, size)
            density = drawn[stem].relative_to(root).as_posix() if drawn else ""
            photos.append(_photo(path, root, size, workers, split=split, density=density))
            if drawn:
                photos[-1].read_density(root)  # or an error: training would meet it later
    if not photos:
        raise ValueError(f"{dataset}: {images} holds no photos in train, val or test")
    files.check_looked_at(dataset, [photo for photo in photos if photo.split != "test"])
    return photos


def read_salicon_json(root: str | Path) -> list[Photo]:
    """The JSON of 2014: ``annotations/fixations_<split>*.json``, photos anywhere in ``images``.

    Despite their name its ``fixations`` are raw mouse samples, 1-based (row, column). A
    FileNotFoundError where a part of the layout is missing; a ValueError for another structure, or
    photos that are missing, damaged or of another size.
    """
    root, dataset = Path(root), "salicon-json"
    annotations = sorted(files.need(root / "annotations", dataset).glob("fixations_*.json"))
    paths = files.by_stem(visible_files(files.need(root / "images", dataset), (".jpg",)), dataset)
    found = {}
    for path in annotations:
        split = next((s for s in SPLITS if path.stem.startswith(f"fixations_{s}")), None)
        if split is None:
            raise ValueError(f"{path}: its name must start with fixations_train, _val or _test")
        for stem, (size, workers) in _read_annotations(path).items():
            if stem in found:
                raise ValueError(f"{dataset}: {path} and {found[stem][0]} share {stem}; keep one")
            found[stem] = (path, split, size, workers)
    files.check_pairs(dataset, f"photos in {root / 'images'}", paths, "annotations", found)
    photos = []
    entries = progress(found.items(), f"reading {dataset}", len(found), "photo")
    for stem, (path, split, said, workers) in entries:
        if (size := files.photo_size(paths[stem])) != said:
            sizes = " and ".join(f"{width}x{height}" for width, height in (size, said))
            raise ValueError(f"{paths[stem]} and {path} differ in size: {sizes}; get the original")
        photos.append(_photo(paths[stem], root, size, workers, split=split))
    return files.check_looked_at(dataset, photos)


def fit_sigma(photos: list[Photo], root: str | Path) -> float:
    """The blur that turns the fixations into the published maps; for 2017 nobody states it.

    It is the sigma of 2 to 60 pixels, to 0.05, by which densities correlate best with the maps on
    average. A few dozen ``photos`` are enough, with paths below ``root``. Raises ValueError: no
    photo has fixations and a map, or see :meth:`Photo.read_density`.
    """
    from scipy.optimize import minimize_scalar

    both = [photo for photo in photos if photo.density and len(photo.fixations)]
    if not both:
        raise ValueError("fitting sigma needs photos with both fixations and density maps")
    maps = [photo.read_density(root).numpy().ravel() for photo in both]

    def distance(sigma: float) -> float:
        ours = (density_from_points(p.fixations, p.height, p.width, sigma).ravel() for p in both)
        return -float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(ours, maps, strict=True)]))

    return float(minimize_scalar(distance, bounds=(2, 60), options={"xatol": 0.05}).x)


def _photo(
    path: Path, root: Path, size: tuple[int, int], workers: list[np.ndarray], **rest: str
) -> Photo:
    """A photo with the (N, 2) x, y of each worker, 0-based; workers are numbered per photo."""
    points = np.concatenate([np.zeros((0, 2)), *workers])
    observers = np.repeat(np.arange(len(workers)), [len(worker) for worker in workers])
    image = path.relative_to(root).as_posix()
    return Photo.from_points(path.stem, image, size, points, observers, **rest)


def _workers(path: Path, edition: str, points: str, size: tuple[int, int]) -> list[np.ndarray]:
    """(N, 2) float64 x, y, 0-based, of every worker in a file of either edition."""
    values = files.load_mat(path, "gaze", "resolution")
    expected = f"`gaze` structs with `{points}` of x, y, and a `resolution` of rows and columns"
    with reading(path, f"fixations of SALICON: {expected}"):
        height, width = map(int, values["resolution"].ravel())
        rows, columns = values["gaze"].shape
        # As floats, since 1 less than 0 would wrap around in the files' unsigned integers.
        workers = [_pairs(getattr(worker, points)) - 1 for worker in values["gaze"].ravel()]
    if (width, height) != size:
        sizes = f"{width}x{height}, but the photo is {size[0]}x{size[1]}"
        raise ValueError(f"{path} is of a photo of {sizes}: get the original of both")
    # The editions store workers along different axes, which tells them apart.
    if {"2015": rows, "2017": columns}[edition] > 1:
        said = f"it holds {rows}x{columns} workers; the editions must not be mixed"
        raise ValueError(f"{path} is not of SALICON's {edition} edition: {said}")
    return workers


def _pairs(values: Any) -> np.ndarray:
    """(N, 2) float64 from N x 2 numbers in a file, or from an empty array of any shape."""
    pairs = np.asarray(values, np.float64)
    if not pairs.size:
        return np.zeros((0, 2))
    # Reshaping instead would make pairs of numbers that are none: of rows x, y, or of x, y, time.
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"points of shape {pairs.shape} instead of N x 2")
    return pairs


def _read_annotations(path: Path) -> dict[str, tuple[tuple[int, int], list[np.ndarray]]]:
    """Size of each photo and its workers' (N, 2) x, y, 0-based, by stem."""
    expected = (
        "SALICON's JSON: `images` with file_name, id, width, height and `annotations` of these "
        "with image_id, worker_id, fixations of row, column"
    )
    with reading(path, expected):
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        stems = {Path(image["file_name"]).stem for image in images.values()}
        if not len(images) == len(stems) == len(content["images"]):
            raise ValueError("images that share a name or an id")
        samples = {number: defaultdict(list) for number in images}
        for note in content["annotations"]:
            row_column = _pairs(note["fixations"])
            samples[note["image_id"]][note["worker_id"]].append(row_column[:, ::-1] - 1)
        return {
            Path(image["file_name"]).stem: (
                (image["width"], image["height"]),
                [np.concatenate(parts) for parts in samples[number].values()],
            )
            for number, image in images.items()
        }


# ---- the datasets ------------------------------------------------------------------------------
_FILES = (  # the folder, the id on Google Drive, and the MD5 (maps have none)
    ("images", "1g8j-hTT-51IG1UFwP0xTGhLdgIUCW5e5", "eb2a1bb706633d1b31fc2e01422c5757"),
    ("fixations-2015", "1WVEiXba-I4GN33f0uUl4KhaN1rK7qzs6", "9a22db9d718200fb90252e5010c004c4"),
    ("fixations-2017", "1P-jeZXCsjoKO79OhFUgnj6FGcyvmLDPj", "462b70f4f9e8ea446ac628e46cea8d3d"),
    ("maps-2017", "1PnO7szbdub1559LfjYHMy65EDC4VhJC8", ""),
)
_ARCHIVES = {
    part: Archive(
        name=f"{part}.zip",
        into=part,
        holds=SPLITS if part == "images" else ("train", "val"),
        drive=drive,
        published=f"{part.partition('-')[0]}.zip",
        md5=md5,
    )
    for part, drive, md5 in _FILES
}
_SHARED = {
    "sigma": 19.0,  # that of the evaluators of 2015; for 2017 it is not stated, see fit_sigma
    "citation": "M. Jiang, S. Huang, J. Duan, Q. Zhao. SALICON: Saliency in Context. CVPR 2015.",
}
SPECS = (
    *(
        DatasetSpec(
            name=f"salicon-{edition}",
            title=f"SALICON {edition}",
            read=partial(read_salicon_mat, edition=edition),
            folder="salicon",
            archives=tuple(_ARCHIVES[part] for part in parts),
            **_SHARED,
        )
        for edition, parts in (
            ("2015", ("fixations-2015", "images")),
            ("2017", ("fixations-2017", "maps-2017", "images")),
        )
    ),
    DatasetSpec(
        name="salicon-json",
        title="SALICON 2014 (JSON, mouse samples)",
        read=read_salicon_json,
        folder="salicon_examples",
        parts=("annotations", "images"),
        by_hand="place annotations/fixations_<split>.json and the photos below images/",
        **_SHARED,
    ),
)
