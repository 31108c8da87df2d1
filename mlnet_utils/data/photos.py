"""One record per photo, and the prepared folder: index, fixations, provenance.

Raw data is never changed. Notebook 01 reads it once and writes a *prepared* folder that every
later stage reads: ``index.jsonl`` (one line per photo), ``fixations.npz`` (all the points) and
``meta.json`` (dataset, edition, sigma, counts, split rule, versions).
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mlnet_utils.data.geometry import inside
from mlnet_utils.runtime import (
    atomic_path,
    progress,
    read_json,
    sha256_file,
    write_json,
    write_text,
)

SPLITS = ("train", "val", "test")
NOBODY = -1  # observer of fixations that are published without theirs, and without an order
MADE_BY = "notebook 01_data_preparation"
INDEX_FILES = ("index.jsonl", "fixations.npz")
COLUMNS = (
    *("stem", "image", "width", "height", "split", "density", "sha256"),
    *("fixations", "observers", "dropped"),
)


def _empty_points() -> np.ndarray:
    return np.zeros((0, 2), np.float32)


@dataclass
class Photo:
    """A photo and who looked where.

    Attributes:
        stem: file name without extension; photos, fixations and maps are paired by it.
        image: path relative to the dataset's root, with forward slashes.
        width: columns of the photo.
        height: rows of the photo.
        split: ``train``, ``val``, ``test``, or ``""`` before splitting.
        fixations: (N, 2) float32 x, y, 0-based, pixel centres at integers, all inside the photo.
        observers: (N,) int16 observer of each fixation, :data:`NOBODY` where it is unknown; order
            within one observer is viewing order.
        durations: (N,) float32 milliseconds, NaN where unknown.
        density: path of a density map where one exists, relative to the root, or ``""``.
        sha256: of the photo's file, or ``""`` before indexing.
        density_sha256: of the density map's file, or ``""``.
        dropped: fixations that fell outside the photo and were dropped.
    """

    stem: str
    image: str
    width: int
    height: int
    split: str = ""
    fixations: np.ndarray = field(default_factory=_empty_points)
    observers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    durations: np.ndarray | None = None
    density: str = ""
    sha256: str = ""
    density_sha256: str = ""
    dropped: int = 0

    def __post_init__(self):
        n = len(self.fixations)
        if self.durations is None:
            self.durations = np.full(n, np.nan, np.float32)
        if len(self.observers) != n or len(self.durations) != n:
            raise ValueError(
                f"photo {self.stem}: {n} fixations but {len(self.observers)} observers and "
                f"{len(self.durations)} durations"
            )

    @classmethod
    def from_points(
        cls,
        stem: str,
        image: str,
        size: tuple[int, int],
        points: np.ndarray,
        observers: np.ndarray | None = None,
        durations: np.ndarray | None = None,
        **rest: str,
    ) -> "Photo":
        """A photo with the recorded points that lie on it; the others are dropped and counted.

        Points outside are never an error: trackers and web pages record them.

        Args:
            stem: see :class:`Photo`; likewise ``image``.
            image: path of the photo.
            size: width and height of the photo.
            points: (N, 2) x, y, 0-based, pixel centres at integers.
            observers: (N,) numbers from 0; None = published without observers.
            durations: (N,) milliseconds; None = unknown.
            **rest: ``split`` and ``density``.

        Raises:
            ValueError: the arrays differ in length, or an observer's number exceeds int16.
        """
        points = np.asarray(points, np.float32).reshape(-1, 2)
        observers = np.full(len(points), NOBODY) if observers is None else np.asarray(observers)
        most = np.iinfo(np.int16).max
        if observers.max(initial=0) > most:
            raise ValueError(
                f"photo {stem}: {int(observers.max()) + 1:,} observers, at most {most + 1:,} can "
                "be told apart; number those of each photo from the same few, or leave them out"
            )
        if durations is None:
            durations = np.full(len(points), np.nan)
        given = {
            "fixations": points,
            "observers": observers.astype(np.int16),
            "durations": np.asarray(durations, np.float32),
        }
        photo = cls(stem, image, *size, **given, **rest)  # or an error: lengths that differ
        kept = inside(points, photo.height, photo.width)
        on_photo = {name: values[kept] for name, values in given.items()}
        return replace(photo, **on_photo, dropped=int((~kept).sum()))

    @property
    def known_observers(self) -> np.ndarray:
        """Observers of the fixations, each once; without :data:`NOBODY`."""
        observers = np.unique(self.observers)
        return observers[observers != NOBODY]


def with_hashes(photo: Photo, root: Path) -> Photo:
    """The record with the SHA-256 of its files, which lie below ``root``."""
    density = sha256_file(root / photo.density) if photo.density else ""
    return replace(photo, sha256=sha256_file(root / photo.image), density_sha256=density)


def write_prepared(folder: str | Path, photos: list[Photo], meta: dict) -> None:
    """Write the prepared folder; ``meta.json`` last, so that its presence means complete.

    Raises:
        ValueError: there are no photos, or two share a stem.
    """
    folder = Path(folder)
    if not photos:
        raise ValueError(f"there are no photos to write into {folder}")
    twice = [stem for stem, n in Counter(photo.stem for photo in photos).items() if n > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} photos share their stem with another ({', '.join(sorted(twice)[:5])}): "
            "pairing is by stem, so every stem must be unique; rename the files"
        )
    (folder / "meta.json").unlink(missing_ok=True)
    lines = [
        json.dumps(
            {
                "stem": photo.stem,
                "image": photo.image,
                "width": photo.width,
                "height": photo.height,
                "split": photo.split,
                "density": photo.density,
                "sha256": photo.sha256,
                # Only where there is a map: it is part of what a training's data are known by.
                **({"density_sha256": photo.density_sha256} if photo.density_sha256 else {}),
                "fixations": len(photo.fixations),
                "observers": len(photo.known_observers),
                "dropped": photo.dropped,
            }
        )
        for photo in photos
    ]
    write_text(folder / "index.jsonl", "\n".join(lines) + "\n")
    with atomic_path(folder / "fixations.npz") as temporary:
        np.savez_compressed(
            temporary,
            offsets=np.cumsum([0] + [len(photo.fixations) for photo in photos]),
            points=np.concatenate([photo.fixations for photo in photos]).astype(np.float32),
            observers=np.concatenate([photo.observers for photo in photos]).astype(np.int16),
            durations=np.concatenate([photo.durations for photo in photos]).astype(np.float32),
        )
    files = {name: sha256_file(folder / name) for name in INDEX_FILES}
    write_json(folder / "meta.json", {**meta, "files": files})


def read_prepared(folder: str | Path) -> tuple[list[Photo], dict]:
    """Read what :func:`write_prepared` wrote.

    Raises:
        FileNotFoundError: the folder is missing or incomplete; names what makes it.
        ValueError: index and fixations are damaged or do not belong together.
    """
    folder = Path(folder)
    meta = read_json(folder / "meta.json", MADE_BY)
    for name in INDEX_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: run {MADE_BY} again")
    try:
        lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        lacking = sorted({key for row in rows for key in COLUMNS if key not in row})
        if lacking:
            raise KeyError(f"rows without {', '.join(lacking)}")
        with np.load(folder / "fixations.npz", allow_pickle=False) as arrays:
            points, observers = arrays["points"], arrays["observers"]
            durations, offsets = arrays["durations"], arrays["offsets"]
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{folder}: index.jsonl or fixations.npz is damaged ({error}); run {MADE_BY} again"
        ) from error
    counted = [row["fixations"] for row in rows]
    lengths = {int(offsets[-1]), *map(len, (points, observers, durations))}
    if counted != np.diff(offsets).tolist() or len(lengths) > 1:
        raise ValueError(f"{folder}: index.jsonl and fixations.npz disagree; run {MADE_BY} again")
    photos = [
        Photo(
            stem=row["stem"],
            image=row["image"],
            width=row["width"],
            height=row["height"],
            split=row["split"],
            fixations=points[start:stop],
            observers=observers[start:stop],
            durations=durations[start:stop],
            density=row["density"],
            sha256=row["sha256"],
            density_sha256=row.get("density_sha256", ""),
            dropped=row["dropped"],
        )
        for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True)
    ]
    return photos, meta


def prepared_digest(folder: str | Path) -> str:
    """SHA-256 over everything in a prepared folder that decides what is learned from it."""
    folder = Path(folder)
    sigma = read_json(folder / "meta.json", MADE_BY)["sigma_px"]
    parts = [sha256_file(folder / name) for name in INDEX_FILES]
    return hashlib.sha256(" ".join([*parts, repr(float(sigma))]).encode()).hexdigest()


def check_prepared(folder: str | Path, root: str | Path) -> list[str]:
    """Re-verify a prepared dataset against its files.

    Returns:
        One sentence per photo, density map or file of the index that is missing or has changed
        since preparation; empty if none. The files that fixations were read from are not looked
        at: what was in them is in the index.
    """
    photos, meta = read_prepared(folder)
    problems = [
        f"{Path(folder) / name} has changed since preparation (SHA-256 differs)"
        for name, digest in meta.get("files", {}).items()
        if sha256_file(Path(folder) / name) != digest
    ]
    for photo in progress(photos, "checking photos", unit="photo"):
        files = [(photo.image, photo.sha256)]
        files += [(photo.density, photo.density_sha256)] if photo.density else []
        for name, digest in files:
            path = Path(root) / name
            if not path.is_file():
                problems.append(f"{photo.stem}: {path} is missing")
            elif digest and sha256_file(path) != digest:
                problems.append(
                    f"{photo.stem}: {path} has changed since preparation (SHA-256 differs)"
                )
    return problems


def fixation_statistics(photos: list[Photo], px_per_degree: float | None = None) -> dict:
    """What the statistics figure of notebook 01 shows.

    Args:
        photos: records whose fixations are in viewing order within each observer.
        px_per_degree: pixels per degree of visual angle, or None where it is unknown.

    Returns:
        ``per_photo`` and ``per_observer`` (fixation counts), ``saccades`` (distances between an
        observer's consecutive fixations) and ``unit`` ("degrees" or "pixels"). Fixations that are
        published without observers have no order: they count in ``per_photo`` only.
    """
    per_observer, saccades = [], []
    for photo in photos:
        for observer in photo.known_observers:
            points = photo.fixations[photo.observers == observer].astype(float)
            per_observer.append(len(points))
            saccades.append(np.linalg.norm(np.diff(points, axis=0), axis=1))
    amplitudes = np.concatenate(saccades) if saccades else np.zeros(0)
    return {
        "per_photo": [len(photo.fixations) for photo in photos],
        "per_observer": per_observer,
        "saccades": amplitudes / px_per_degree if px_per_degree else amplitudes,
        "unit": "degrees" if px_per_degree else "pixels",
    }
