"""Reader of MIT1003 (Judd, Ehinger, Durand, Torralba; ICCV 2009), with its fixation detector.

The authors publish eye positions at 240 Hz and MATLAB code that finds the fixations in them. Here
their detector is in NumPy, so that no MATLAB is needed. It was compared with the original, run in
GNU Octave, on generated recordings (``tests/vectors/mit1003_fixations.npz``).
"""

import warnings
from pathlib import Path

import numpy as np

from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.spec import Archive, DatasetSpec
from mlnet_utils.runtime import progress, reading

# Parameters of the authors' checkFixations.m.
RATE = 240  # samples per second
THRESHOLD = 34 * 6  # pixels per degree times degrees per second
WINDOW = 4  # samples that are averaged
SHORTEST_RUN = 3  # samples above the threshold that make a saccade
SEARCH = 25  # samples after a run within which a saccade must slow down
SHORTEST_FIXATION = 12  # samples (50 ms): a gap between saccades of at most so many joins them


def read_mit1003(root: str | Path) -> list[Photo]:
    """MIT1003: ``ALLSTIMULI/*.jpeg`` with ``DATA/<observer>/*.mat`` or ``ALLFIXATIONMAPS``.

    1003 photos with a longest side of 1024, 15 observers, 3 s. ``DATA`` gives observers, order and
    durations. Each observer's first fixation, which the fixation cross caused, is left out, as the
    authors do. Without ``DATA`` the pixels marked in ``*_fixPts.jpg`` are taken. Raises a
    FileNotFoundError where a part of the layout is missing; a ValueError where files do not pair,
    are damaged, or have another structure or size.
    """
    root, recorded = Path(root), (Path(root) / "DATA").is_dir()
    stimuli = files.need(root / "ALLSTIMULI", "mit1003")
    paths = files.by_stem(files.directly_in(stimuli, ".jpeg"), "mit1003")
    if recorded:
        observers = files.folders_in(root / "DATA")
        if not observers:
            raise ValueError(f"mit1003: {root / 'DATA'} holds no observers; download it again")
        for folder in observers:
            if lacking := [stem for stem in paths if not (folder / f"{stem}.mat").is_file()]:
                names = f"{len(lacking)} photos without a recording in {folder}"
                raise ValueError(f"mit1003: {names}: {files.named(lacking)}; download it again")
    else:
        folder = files.need(root / "ALLFIXATIONMAPS", "mit1003")
        # The underscore passes over a stray copy, ...p1010764fixPts.jpg, that the archive contains.
        maps = [p for p in files.directly_in(folder, ".jpg") if p.stem.endswith("_fixPts")]
        maps = files.by_stem(maps, "mit1003", strip="_fixPts")
        files.check_pairs("mit1003", "photos", paths, "*_fixPts.jpg", maps)
    photos = []
    for stem, path in progress(paths.items(), "reading mit1003", len(paths), "photo"):
        size, image = files.photo_size(path), path.relative_to(root).as_posix()
        if recorded:
            looked = _recorded([folder / f"{stem}.mat" for folder in observers])
        else:
            looked = (files.fixated_pixels(maps[stem], size),)
        photos.append(Photo.from_points(path.stem, image, size, *looked))
    return files.check_looked_at("mit1003", photos)


def _recorded(paths: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, 2) points, (N,) observers and (N,) durations, from a recording of each observer."""
    found = [detect_fixations(_eye_positions(path)) for path in paths]
    # The authors take floor() of a fixation as the 1-based pixel, and leave out the first.
    points = np.concatenate([np.floor(places[1:]) - 1 for places, _ in found])
    observers = np.repeat(np.arange(len(found)), [len(places) - 1 for places, _ in found])
    return points, observers, np.concatenate([durations[1:] for _, durations in found])


def _eye_positions(path: Path) -> np.ndarray:
    """(N, 2) x, y in 1-based pixels, a row every 1/240 s; negative during blinks."""
    values = files.load_mat(path).values()
    with reading(path, "a recording of MIT1003: one struct with DATA(1).eyeData"):
        # The only variable is named after the photo, cut to MATLAB's 63 characters.
        ((record,),) = values
        positions = np.asarray(record[0].DATA[0, 0].eyeData, np.float64)
        if positions.ndim != 2 or positions.shape[1] < 2 or not len(positions):
            raise ValueError(f"eyeData has shape {positions.shape}")
    return positions[:, :2]


# ---- fixation detection ------------------------------------------------------------------------
def detect_fixations(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the fixations in a recording as the authors' ``checkFixations.m`` does.

    A saccade starts where the smoothed speed grows faster than a threshold for three samples, and
    ends where it stops falling that fast. The parts between saccades are fixations. Saccades at
    most 50 ms apart are joined. Takes (N, 2) x, y in pixels at 240 Hz, NaN where the eye was lost;
    returns (M, 2) median positions and (M,) durations in ms, in order.
    """
    n = len(positions)
    saccades = _saccades(_speed_change(positions))
    starts = [0, *(last + 1 for _, last in saccades)]
    ends = [*(first for first, _ in saccades), n]
    parts = [positions[a:b] for a, b in zip(starts, ends, strict=True) if a < n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a lost eye's median, NaN
        medians = [np.nanmedian(part, axis=0) for part in parts]
    return np.array(medians), np.array([1000 * len(part) / RATE for part in parts])


def _speed_change(positions: np.ndarray) -> np.ndarray:
    """(N,) growth of the speed from each sample to the next window, zero near both ends."""
    n = len(positions)
    steps = np.concatenate([[0.0], np.hypot(*np.diff(positions, axis=0).T)])
    speed = np.convolve(steps, np.full(WINDOW, 1 / WINDOW))[:n]
    change = np.zeros(n)
    if n > WINDOW + 2:
        # Sums over [k, k + 4] and [k + 1, k + 5] differ by their ends.
        inner = slice(1, n - WINDOW - 1)
        change[inner] = (speed[WINDOW + 2 :] - speed[inner]) * RATE / WINDOW
    return change


def _saccades(change: np.ndarray) -> list[tuple[int, int]]:
    """First and last sample of every saccade, in order, from the (N,) changes of the speed."""
    end = len(change) - 1
    fast, slowing = change > THRESHOLD, change < -THRESHOLD
    edges = np.flatnonzero(np.diff(np.concatenate([[False], fast, [False]])))
    runs = [(a, b - 1) for a, b in edges.reshape(-1, 2) if b - a >= SHORTEST_RUN]
    merged = []
    for first, last in runs:
        slowed = _end_of_slowing(slowing, last + 1)
        if slowed is None and len(runs) == 1 and last == np.flatnonzero(change != 0)[-1]:
            slowed = end  # the recording ends in its only saccade
        if slowed is None:
            continue
        if merged and first - merged[-1][1] <= SHORTEST_FIXATION:
            first, _ = merged.pop()
        merged.append((first, slowed))
    if merged and end - merged[-1][1] <= SHORTEST_FIXATION:
        merged[-1] = (merged[-1][0], end)
    return merged


def _end_of_slowing(slowing: np.ndarray, at: int) -> int | None:
    """The last sample of the first stretch of slowing down from ``at`` on, within the search."""
    for place in range(at, at + SEARCH):
        if place + 2 > len(slowing) - 1 and place > at:
            return None
        if slowing[place] and not slowing[place + 1]:
            return place
    return None


# ---- the dataset -------------------------------------------------------------------------------
_ADDRESS = "https://people.csail.mit.edu/tjudd/WherePeopleLook"
_FIRST = "i05june05_static_street_boston_p1010764"
SPEC = DatasetSpec(
    name="mit1003",
    title="MIT1003",
    sigma=24.0,
    px_per_degree=35.0,
    read=read_mit1003,
    folder="mit1003",
    val=103,
    test=200,
    archives=tuple(
        Archive.at(_ADDRESS, part, holds, md5)
        for part, holds, md5 in (
            ("ALLSTIMULI", (f"{_FIRST}.jpeg",), "0d7df8b954ecba69b6796e77b9afe4b6"),
            ("DATA", ("ajs", "hp"), "ea19d74ad0a0144428c53e9d75c2d71c"),
            ("ALLFIXATIONMAPS", (f"{_FIRST}_fixMap.jpg",), ""),
        )
    ),
    citation="T. Judd, K. Ehinger, F. Durand, A. Torralba. Learning to Predict Where Humans Look. "
    "ICCV 2009.",
)
MIT300 = DatasetSpec(
    name="mit300",
    title="MIT300",
    folder="mit300",
    archives=(
        Archive.at(
            "http://saliency.mit.edu",
            "BenchmarkIMAGES",
            ("i1.jpg",),
            "03ed32bdf5e4289950cd28df89451260",
        ),
    ),
    citation="T. Judd, F. Durand, A. Torralba. A Benchmark of Computational Models of Saliency to "
    "Predict Human Fixations. MIT Technical Report, 2012.",
)
