"""Readers of OSIE's and CAT2000's layouts: files in, :class:`~mlnet_utils.data.photos.Photo` out.

The other layouts have modules of their own: ``salicon``, ``mit1003``, ``own_photos``.
"""

from pathlib import Path

import numpy as np

from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.layouts import (
    by_stem,
    check_looked_at,
    check_pairs,
    keep_inside,
    load_mat,
    marked_points,
    need,
    photo_size,
    pooled,
)
from mlnet_utils.runtime import progress

OSIE_HEIGHT, OSIE_WIDTH = 600, 800


def read_osie(root: str | Path) -> list[Photo]:
    """OSIE in its original layout: ``data/stimuli/*.jpg`` and ``data/eye/fixations.mat``.

    700 photos of 800x600, 15 observers, 3 s of free viewing (Xu et al., Journal of Vision 2014).
    The MATLAB coordinates are 1-based floats; the authors' pixel is ``round(x)``, so the 0-based
    coordinate is ``x - 1`` with pixel centres at integers.

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: photos and fixation records that do not pair by name, another structure, or
            a photo that is damaged or of another size.
    """
    root = Path(root)
    path = need(root / "data" / "eye" / "fixations.mat", "osie")
    stimuli = need(root / "data" / "stimuli", "osie")
    records = _osie_records(path)
    files = {file.name: file for file in sorted(stimuli.glob("*.jpg"))}
    check_pairs("osie", f"photos in {stimuli}", files, f"records in {path}", records)
    return check_looked_at(
        "osie",
        [
            _osie_photo(file, root, records[name])
            for name, file in progress(files.items(), "reading osie", len(files), "photo")
        ],
    )


def _osie_records(path: Path) -> dict[str, list[np.ndarray]]:
    """(3, N) float32 x, y, duration of every subject, 1-based, by the photo's file name."""
    cells, records = load_mat(path, "fixations")["fixations"], {}
    try:
        for cell in cells.ravel():
            name = str(cell[0, 0].img[0])
            if name in records:
                raise ValueError(f"two records of {name}")
            records[name] = [
                # Stacked for each subject, so that x and y of two subjects never pair.
                np.stack(
                    [
                        np.asarray(getattr(subject[0, 0], field), np.float32).ravel()
                        for field in ("fix_x", "fix_y", "fix_duration")
                    ]
                )
                for subject in cell[0, 0].subjects.ravel()
            ]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not OSIE's: expected a cell array `fixations` of structs with `img` and "
            f"`subjects`, each with as many fix_x as fix_y and fix_duration ({error}); download "
            "it again"
        ) from error
    return records


def _osie_photo(file: Path, root: Path, subjects: list[np.ndarray]) -> Photo:
    width, height = photo_size(file)
    if (width, height) != (OSIE_WIDTH, OSIE_HEIGHT):
        raise ValueError(
            f"osie: {file} is {width}x{height} instead of {OSIE_WIDTH}x{OSIE_HEIGHT}: the "
            "fixations belong to the original photos; download it again"
        )
    x, y, durations = np.concatenate([np.zeros((3, 0), np.float32), *subjects], axis=1)
    observers = np.repeat(np.arange(len(subjects)), [one.shape[1] for one in subjects])
    points, observers, durations, dropped = keep_inside(
        np.stack([x, y], axis=1) - 1, height, width, observers.astype(np.int16), durations
    )
    return Photo(
        stem=file.stem,
        image=file.relative_to(root).as_posix(),
        width=width,
        height=height,
        fixations=points,
        observers=observers,
        durations=durations,
        dropped=dropped,
    )


def read_cat2000(root: str | Path) -> list[Photo]:
    """CAT2000's training set: ``trainSet/{Stimuli,FIXATIONLOCS}/<category>/<number>``.

    2000 photos of 1920x1080 in 20 categories, 18 observers, 5 s (Borji and Itti, 2015). Numbers
    repeat across categories, so the stem is ``<category>_<number>``. ``fixLocs`` marks fixated
    pixels; observers are only in ``allFixData.mat``, a MATLAB object that nothing else reads.

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: photos and maps that do not pair, damaged files, maps of another size.
    """
    root = Path(root)
    stimuli = need(root / "trainSet" / "Stimuli", "cat2000")
    located = need(root / "trainSet" / "FIXATIONLOCS", "cat2000")
    photos = []
    categories = sorted(path.name for path in stimuli.iterdir() if path.is_dir())
    maps = {path.name for path in located.iterdir() if path.is_dir()}
    check_pairs("cat2000", f"categories in {stimuli}", categories, f"in {located}", maps)
    for category in progress(categories, "reading cat2000", unit="category"):
        # Not recursive: some packings keep saliency maps in a folder Output among the stimuli.
        files = by_stem((stimuli / category).glob("*.jpg"), "cat2000")
        points = by_stem((located / category).glob("*.mat"), "cat2000")
        check_pairs(f"cat2000 {category}", "photos", files, "fixation files", points)
        for stem, file in files.items():
            size = photo_size(file)
            marked = marked_points(_fix_locs(points[stem]), points[stem], size)
            image = file.relative_to(root).as_posix()
            photos.append(pooled(f"{category}_{stem}", image, size, marked))
    return check_looked_at("cat2000", photos)


def _fix_locs(path: Path) -> np.ndarray:
    values = load_mat(path, "fixLocs")["fixLocs"]
    if hasattr(values, "toarray"):  # MATLAB's sparse matrices, which suit a map of a few pixels
        values = values.toarray()
    if values.dtype.kind not in "buif":
        raise ValueError(
            f"{path} is not CAT2000's: expected a matrix `fixLocs` of numbers, got "
            f"{values.dtype} of shape {values.shape}; download it again"
        )
    return values
