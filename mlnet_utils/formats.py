"""Readers of OSIE's and CAT2000's layouts: files in, :class:`~mlnet_utils.photos.Photo` out.

The other layouts have modules of their own: ``salicon``, ``mit1003``, ``own_photos``.
"""

from pathlib import Path

import numpy as np

from mlnet_utils.layouts import (
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
from mlnet_utils.photos import Photo
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
    cells = load_mat(path, "fixations")["fixations"].ravel()
    try:
        records = {str(c[0, 0].img[0]): c[0, 0].subjects.ravel() for c in cells}
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} is not OSIE's: expected a cell array `fixations` of structs with `img` and "
            f"`subjects` ({error}); download it again"
        ) from error
    files = {file.name: file for file in sorted(stimuli.glob("*.jpg"))}
    check_pairs("osie", f"photos in {stimuli}", files, f"records in {path}", records)
    return check_looked_at(
        "osie",
        [
            _osie_photo(file, root, records[name])
            for name, file in progress(files.items(), "reading osie", len(files), "photo")
        ],
    )


def _osie_photo(file: Path, root: Path, subjects: np.ndarray) -> Photo:
    width, height = photo_size(file)
    if (width, height) != (OSIE_WIDTH, OSIE_HEIGHT):
        raise ValueError(
            f"osie: {file} is {width}x{height} instead of {OSIE_WIDTH}x{OSIE_HEIGHT}: the "
            "fixations belong to the original photos; download it again"
        )
    seen = [subject[0, 0] for subject in subjects]
    x, y, durations = (
        np.concatenate([getattr(one, name).ravel() for one in seen]).astype(np.float32)
        for name in ("fix_x", "fix_y", "fix_duration")
    )
    observers = np.repeat(np.arange(len(seen)), [one.fix_x.size for one in seen])
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
            values = load_mat(points[stem], "fixLocs")["fixLocs"]
            marked = marked_points(values, points[stem], size)
            image = file.relative_to(root).as_posix()
            photos.append(pooled(f"{category}_{stem}", image, size, marked))
    return check_looked_at("cat2000", photos)
