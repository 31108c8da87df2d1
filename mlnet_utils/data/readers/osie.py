"""OSIE (Xu et al., 2014): 700 photos of 800x600, 15 observers, 3 s of free viewing.

``data/stimuli/1001.jpg .. 1700.jpg`` and ``data/eye/fixations.mat``. EyeCrowd has the same structs.
"""

from pathlib import Path

import numpy as np

from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import Archive, DatasetSpec
from mlnet_utils.runtime import progress, reading

SIZE = (800, 600)  # width, height
FIELDS = ("fix_x", "fix_y", "fix_duration")


def read_osie(root: str | Path, dataset: str = "osie", size: tuple[int, int] = SIZE) -> list[Photo]:
    """OSIE or another dataset of its group as published: ``data/stimuli``, ``data/eye``.

    The MATLAB coordinates are 1-based floats; the authors' pixel is ``round(x)``, so the 0-based
    coordinate is ``x - 1`` with pixel centres at integers. All photos have the ``size``, width and
    height. A FileNotFoundError where a part of the layout is missing; a ValueError where photos and
    records do not pair by name, have another structure or size, or are damaged.
    """
    root = Path(root)
    path = files.need(root / "data" / "eye" / "fixations.mat", dataset)
    stimuli = files.need(root / "data" / "stimuli", dataset)
    records = _records(path, dataset)
    paths = {file.name: file for file in files.directly_in(stimuli, ".jpg")}
    files.check_pairs(dataset, f"photos in {stimuli}", paths, f"records in {path}", records)
    photos = []
    for name, file in progress(paths.items(), f"reading {dataset}", len(paths), "photo"):
        width, height = files.photo_size(file)
        if (width, height) != size:
            wrong = f"{width}x{height} instead of {size[0]}x{size[1]}"
            raise ValueError(f"{dataset}: {file} is {wrong}: the fixations are of the original")
        subjects = records[name]
        x, y, durations = np.concatenate([np.zeros((3, 0), np.float32), *subjects], axis=1)
        observers = np.repeat(np.arange(len(subjects)), [subject.shape[1] for subject in subjects])
        points = np.stack([x, y], axis=1) - 1
        image = file.relative_to(root).as_posix()
        photos.append(Photo.from_points(file.stem, image, size, points, observers, durations))
    return files.check_looked_at(dataset, photos)


def _records(path: Path, dataset: str) -> dict[str, list[np.ndarray]]:
    """(3, N) float32 x, y, duration of every subject, 1-based, by the photo's file name."""
    cells, records = files.load_mat(path, "fixations")["fixations"], {}
    expected = f"structs with `img` and `subjects`, each with as many {', '.join(FIELDS)}"
    with reading(path, f"the fixations of {dataset}: a cell array `fixations` of {expected}"):
        for cell in cells.ravel():
            name = str(cell[0, 0].img[0])
            if name in records:
                raise ValueError(f"two records of {name}")
            records[name] = [
                # Stacked for each subject, so that x and y of two subjects never pair.
                np.stack([np.asarray(getattr(one[0, 0], k), np.float32).ravel() for k in FIELDS])
                for one in cell[0, 0].subjects.ravel()
            ]
    return records


def github_archive(name: str, repository: str, sha256: str) -> Archive:
    """The group's repository; ``sha256`` is that of its fixations.

    GitHub packs a branch anew at any time: the fixations' checksum holds, not the zip's.
    """
    return Archive(
        name=f"{name}.zip",
        into="data",
        holds=("stimuli", "eye/fixations.mat"),
        url=f"https://github.com/NUS-VIP/{repository}/archive/master.zip",
        published=f"{repository}-master.zip",
        known={"eye/fixations.mat": sha256},
    )


_FIXATIONS = "2aab9133a407e4eff3f57ab5799872b162dbc77ca462c0391762eb5e67deadb9"
SPEC = DatasetSpec(
    name="osie",
    title="OSIE",
    sigma=24.0,  # the authors'; others use 16 or 18.7
    px_per_degree=24.0,
    read=read_osie,
    folder="osie",
    val=50,
    test=150,
    archives=(github_archive("osie", "predicting-human-gaze-beyond-pixels", _FIXATIONS),),
    citation="J. Xu, M. Jiang, S. Wang, M. Kankanhalli, Q. Zhao. Predicting Human Gaze Beyond "
    "Pixels. Journal of Vision 14(1), 2014.",
)
