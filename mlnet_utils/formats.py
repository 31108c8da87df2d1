"""Readers of the datasets' own layouts: files in, ``photos.Photo`` records out."""

from pathlib import Path

import numpy as np

from mlnet_utils.photos import Photo
from mlnet_utils.transforms import inside

OSIE_HEIGHT, OSIE_WIDTH = 600, 800


def _need(path: Path, dataset: str) -> Path:
    """The path, or an error that says what was expected where."""
    if not path.exists():
        raise FileNotFoundError(
            f"{dataset}: {path} is missing; set MLNET_DATA (or --data-root) to the folder that "
            f"holds {dataset}/ in its original layout, which data/README.md describes"
        )
    return path


def _keep_inside(points: np.ndarray, height: int, width: int, *others: np.ndarray):
    """Drop fixations outside the photo: (points, *others, number dropped)."""
    keep = inside(points, height, width)
    return (points[keep], *(other[keep] for other in others), int((~keep).sum()))


def read_osie(root: str | Path) -> list[Photo]:
    """OSIE in its original layout: ``data/stimuli/*.jpg`` and ``data/eye/fixations.mat``.

    700 photos of 800x600, 15 observers, 3 s of free viewing (Xu et al., Journal of Vision 2014).
    The MATLAB coordinates are 1-based floats; the authors' pixel is ``round(x)``, so the 0-based
    coordinate is ``x - 1`` with pixel centres at integers.

    Raises:
        FileNotFoundError: a part of the layout is missing.
        ValueError: photos and fixation records that do not pair by name, or another structure.
    """
    from scipy.io import loadmat

    root = Path(root)
    path = _need(root / "data" / "eye" / "fixations.mat", "osie")
    stimuli = _need(root / "data" / "stimuli", "osie")
    try:
        records = loadmat(path, squeeze_me=True, struct_as_record=False)["fixations"]
        by_name = {str(record.img): np.atleast_1d(record.subjects) for record in records}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not OSIE's: expected a cell array `fixations` of structs with `img` and "
            f"`subjects` ({error}); download it again"
        ) from error
    files = {file.name: file for file in sorted(stimuli.glob("*.jpg"))}
    unpaired = sorted(set(files) ^ set(by_name))
    if unpaired:
        raise ValueError(
            f"osie: {len(unpaired)} names are not in both {stimuli} and {path}: "
            f"{', '.join(unpaired[:5])}"
        )
    photos = []
    for name, file in files.items():
        x, y, duration, observer = [], [], [], []
        for number, subject in enumerate(by_name[name]):
            x.append(np.atleast_1d(subject.fix_x).astype(np.float32) - 1)
            y.append(np.atleast_1d(subject.fix_y).astype(np.float32) - 1)
            duration.append(np.atleast_1d(subject.fix_duration).astype(np.float32))
            observer.append(np.full(len(x[-1]), number, np.int16))
        points, observers, durations, dropped = _keep_inside(
            np.stack([np.concatenate(x), np.concatenate(y)], axis=1),
            OSIE_HEIGHT,
            OSIE_WIDTH,
            np.concatenate(observer),
            np.concatenate(duration),
        )
        photos.append(
            Photo(
                stem=file.stem,
                image=file.relative_to(root).as_posix(),
                width=OSIE_WIDTH,
                height=OSIE_HEIGHT,
                fixations=points,
                observers=observers,
                durations=durations,
                dropped=dropped,
            )
        )
    return photos
