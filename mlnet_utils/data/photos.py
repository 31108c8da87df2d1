"""Photos with their fixations, and the prepared folder that every stage after the first reads.

Raw data is never changed. Notebook 01 reads it once and writes a prepared folder:
``index.jsonl`` (one line per photo), ``fixations.npz`` (all the points), ``sources.json`` (SHA-256
of every file that was read) and ``meta.json`` (dataset, edition, sigma, counts, split rule,
versions). Reading the folder fails if a file was changed, removed or added since.
"""

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from mlnet_utils import runtime
from mlnet_utils.data import geometry
from mlnet_utils.data.geometry import Letterbox, density_from_points, inside
from mlnet_utils.data.images import PHOTO_SUFFIXES, read_density, visible_files
from mlnet_utils.runtime import progress, read_json, reading, sha256_file

SPLITS = ("train", "val", "test")
NOBODY = -1  # observer of fixations that are published without observers, and without an order
MADE_BY = "notebook 01_data_preparation (or `python -m mlnet_utils prepare`)"
LARGEST_SIGMA = 10_000  # pixels
INDEX_FILES = ("index.jsonl", "fixations.npz")
SOURCES = "sources.json"
SOURCE_SUFFIXES = (*PHOTO_SUFFIXES, ".csv", ".tsv", ".txt", ".json", ".mat", ".npy", ".npz")
COLUMNS = {  # of the index, with their types
    **{"stem": str, "image": str, "width": int, "height": int},
    **{"split": str, "density": str, "sha256": str},
}
RARE = {"density_sha256": str, "sigma": float}  # only where set: the index decides the digest
ARRAYS = {  # attribute of a photo: its key in fixations.npz, its type
    "fixations": ("points", np.float32),
    "observers": ("observers", np.int16),
    "durations": ("durations", np.float32),
}


@dataclass
class Photo:
    """A photo with its fixations and observers. Paths are relative to the dataset's root.

    Raises ValueError: the numbers of fixations, observers and durations differ.
    """

    stem: str  # file name without extension; photos, fixations and maps are paired by it
    image: str  # path of the photo, with forward slashes
    width: int
    height: int
    split: str = ""  # train, val, test, or "" before splitting
    # (N, 2) float32 x, y, 0-based, pixel centres at integers, all inside the photo
    fixations: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    # (N,) int16, NOBODY where unknown; within an observer fixations are in viewing order
    observers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    durations: np.ndarray | None = None  # (N,) float32 milliseconds, NaN where unknown
    density: str = ""  # path of its density map, if any
    sha256: str = ""  # of the photo's file, or "" before indexing
    density_sha256: str = ""  # of the density map's file
    dropped: int = 0  # fixations that fell outside the photo
    sigma: float = 0.0  # its own blur in its pixels, where datasets are mixed; 0 = the dataset's

    def __post_init__(self):
        if self.durations is None:
            self.durations = np.full(len(self.fixations), np.nan, np.float32)
        lengths = {name: len(getattr(self, name)) for name in ARRAYS}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(f"photo {self.stem}: {counts}, but there must be as many of each")

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
        """A photo of this (width, height) with the (N, 2) recorded points that lie on it.

        The others are dropped and counted: trackers and web pages record them. ``observers`` are
        (N,) numbers from 0, None = published without; ``durations`` (N,) ms, None = unknown. Raises
        ValueError: the arrays differ in length, or an observer's number exceeds int16.
        """
        points = np.asarray(points, np.float32).reshape(-1, 2)
        observers = np.full(len(points), NOBODY) if observers is None else np.asarray(observers)
        if (last := observers.max(initial=0)) > np.iinfo(np.int16).max:
            many = f"{int(last) + 1:,} observers, more than the 32,768 that fit"
            raise ValueError(f"photo {stem}: {many}; number them anew per photo, or omit them")
        durations = None if durations is None else np.asarray(durations, np.float32)
        photo = cls(
            *(stem, image, *size), fixations=points, observers=observers.astype(np.int16),
            durations=durations, **rest,
        )  # fmt: skip
        kept = inside(points, photo.height, photo.width)
        return replace(photo.only(kept), dropped=int((~kept).sum()))

    def only(self, chosen: np.ndarray | slice) -> "Photo":
        """The photo with some of its fixations: an (N,) mask, their numbers, or a slice."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in ARRAYS})

    @property
    def known_observers(self) -> np.ndarray:
        """Observers of the fixations, each once; without :data:`NOBODY`."""
        observers = np.unique(self.observers)
        return observers[observers != NOBODY]

    @property
    def has_truth(self) -> bool:
        """True where fixations or a density map are known."""
        return bool(len(self.fixations) or self.density)

    def read_density(self, root: str | Path) -> Tensor:
        """(H, W) float64 that sums to 1: the photo's density map, which lies below ``root``.

        A smaller or larger map of the whole photo is brought to the photo's size, bilinearly.
        Raises a FileNotFoundError, or a ValueError where it is damaged, no density, or of another
        shape than the photo.
        """
        path, size = Path(root) / self.density, (self.height, self.width)
        density = read_density(path)
        height, width = density.shape
        if (height, width) == size:
            return density
        if abs(width * self.height - height * self.width) > sum(size) / 2:  # half a cell a side
            shapes = f"{width}x{height}, but its photo is {self.width}x{self.height}"
            raise ValueError(f"density map {path} is {shapes}: make it again of the whole photo")
        resized = interpolate(density[None, None], size, mode="bilinear", antialias=True)[0, 0]
        return resized / resized.sum()


class StaleError(ValueError):
    """The sources of prepared data have changed since; ``problem`` names the first."""

    def __init__(self, folder: Path, problems: list[str]):
        super().__init__(folder, problems)  # both, so that other processes can raise it here
        self.problem = problems[0]

    def __str__(self) -> str:
        folder, problems = self.args
        more = f" (and {len(problems) - 1} more files)" if problems[1:] else ""
        return (
            f"the prepared data in {folder} are out of date: {self.problem}{more}. Put it back, or "
            "run `prepare` again; a network trained on the old data then needs another run folder, "
            "or `reproduce --force`"
        )


@dataclass(frozen=True)
class Prepared:
    """A dataset that is ready for training and evaluation.

    The ground truth of a photo is its blurred fixations, or its density map where it has no
    fixations. Fixations come first, because metrics and several losses need points, and because
    blurring them is exact where a published map is rounded to 8 bits.
    """

    folder: Path  # the prepared folder
    photos: list[Photo]  # all, in the order of the index
    meta: dict[str, Any]  # contents of meta.json, to which `write` adds the SHA-256 of `files`
    # contents of sources.json; None = the photos and maps that have a hash
    sources: dict[str, Any] | None = None

    @property
    def root(self) -> Path:
        """The folder that the photos' paths are relative to."""
        return self.folder if self.meta["root"] == "." else Path(self.meta["root"])

    @property
    def sigma(self) -> float:
        """Blur of the fixations, in pixels of the photo."""
        return self.meta["sigma_px"]

    @property
    def scored_split(self) -> str:
        """The split that is evaluated: test, or val where the test photos' truth is secret."""
        photos = [photo for photo in self.photos if photo.split == "test"]
        return "val" if photos and not any(photo.has_truth for photo in photos) else "test"

    def describe(self, split: str = "") -> str:
        """Title, and numbers of photos, fixations and dropped fixations, of a split or of all."""
        photos = [photo for photo in self.photos if split in ("", photo.split)]
        counts = Counter(photo.split for photo in photos)
        sizes = ", ".join(f"{counts[name]} {name}" for name in SPLITS if counts[name])
        dropped = sum(photo.dropped for photo in photos)
        lost = f", {dropped} more dropped (outside the photo, or lost gaze)" if dropped else ""
        fixations = sum(len(photo.fixations) for photo in photos)
        return f"{self.meta['title']}: {sizes}; {fixations} fixations{lost}"

    def with_truth(self, name: str) -> list[Photo]:
        """The photos of one split; a ValueError if there are none, or some cannot be scored."""
        photos = self.split(name)
        if secret := [photo for photo in photos if not photo.has_truth]:
            said = f"{len(secret)} of the {len(photos)} {name} photos in {self.folder}"
            remedy = "evaluate the split 'val', or `submit`"
            raise ValueError(f"{said} have no ground truth (of benchmarks it is secret): {remedy}")
        return photos

    def split(self, name: str) -> list[Photo]:
        """The photos of one split; a ValueError if there are none."""
        photos = [photo for photo in self.photos if photo.split == name]
        if not photos:
            said = f"the prepared data in {self.folder} have no {name} photos"
            raise ValueError(f"{said}: add some to the dataset and prepare it again")
        return photos

    # ---- ground truth --------------------------------------------------------------------------
    def density(self, photo: Photo, sigma: float | None = None) -> Tensor:
        """(H, W) float64 density at the photo's size; zero where nothing is known of the photo.

        ``sigma`` is the blur of the fixations in pixels of the photo; None = the photo's own or the
        dataset's. Raises the errors of :meth:`Photo.read_density`.
        """
        if photo.density and not len(photo.fixations):
            return photo.read_density(self.root)
        sigma = photo.sigma or self.sigma if sigma is None else sigma
        return density_from_points(photo.fixations, photo.height, photo.width, sigma)

    def grid_density(self, photo: Photo, box: Letterbox, grid: tuple[int, int]) -> Tensor:
        """(h, w) float64: the same density on the grid that covers the letterboxed photo."""
        if photo.density and not len(photo.fixations):
            return geometry.map_on_grid(photo.read_density(self.root), box, grid)
        return geometry.density_on_grid(photo.fixations, box, grid, photo.sigma or self.sigma)

    # ---- the folder ----------------------------------------------------------------------------
    def write(self) -> None:
        """Write the folder; ``meta.json`` last, so that its presence means complete.

        A ValueError where there are no photos, or two share a stem.
        """
        if not self.photos:
            raise ValueError(f"there are no photos to write into {self.folder}: add some")
        stems = Counter(photo.stem for photo in self.photos)
        if twice := [stem for stem, count in stems.items() if count > 1]:
            said = f"{len(twice)} stems belong to several photos, e.g. {twice[0]}"
            raise ValueError(f"{said}: pairing is by stem, so rename the files")
        (self.folder / "meta.json").unlink(missing_ok=True)
        sources = self._sources()
        names = (*INDEX_FILES, "meta.json", *sources["files"])  # also photos, of the sample
        runtime.remove_temporaries(self.folder / name for name in names)
        rows = []
        for photo in self.photos:
            row = {key: getattr(photo, key) for key in COLUMNS}
            row |= {key: value for key in RARE if (value := getattr(photo, key))}
            row["fixations"] = len(photo.fixations)
            row["observers"] = len(photo.known_observers)
            rows.append(json.dumps({**row, "dropped": photo.dropped}) + "\n")
        runtime.write_text(self.folder / "index.jsonl", "".join(rows))
        arrays = {"offsets": np.cumsum([0] + [len(photo.fixations) for photo in self.photos])}
        for name, (key, dtype) in ARRAYS.items():
            values = [getattr(photo, name) for photo in self.photos]
            arrays[key] = np.concatenate(values).astype(dtype)
        with runtime.atomic_path(self.folder / "fixations.npz") as temporary:
            np.savez_compressed(temporary, **arrays)
        with runtime.locked(self.folder / SOURCES):  # others may note their checks
            runtime.write_json(self.folder / SOURCES, sources)
        self.meta["sources"] = _digest(sources)
        self.meta["files"] = {name: sha256_file(self.folder / name) for name in INDEX_FILES}
        runtime.write_json(self.folder / "meta.json", self.meta, sealed=True)

    def _sources(self) -> dict[str, Any]:
        """``files``, see :func:`fingerprints`, and ``read_from``, the parts that these lie in."""
        if self.sources is not None:
            return self.sources
        files = {p.image: [p.sha256] for p in self.photos if p.sha256}
        files |= {p.density: [p.density_sha256] for p in self.photos if p.density_sha256}
        return {"read_from": [], "files": files}

    @classmethod
    def read(cls, folder: str | Path, check: bool = True) -> "Prepared":
        """Read a prepared folder; by default only if its sources are unchanged.

        Raises:
            FileNotFoundError: the folder is missing or incomplete; names notebook and verb for it.
            StaleError: a file that it was made from was changed, removed or added since.
            ValueError: index and fixations are damaged or do not belong together.
        """
        folder, again = Path(folder), f"run {MADE_BY} again"
        meta = read_json(folder / "meta.json", MADE_BY, "dataset", "title", "root", "sigma_px")
        with reading(folder / "meta.json", "`root`, a path, and `sigma_px`, pixels", again):
            if not 0 < float(meta["sigma_px"]) <= LARGEST_SIGMA:
                raise ValueError(f"sigma_px is {meta['sigma_px']}")
            Path(meta["root"])
            hashes = meta["files"] = dict(meta.get("files", {}))  # early folders have none
        content = {}  # read once, and hashed as read: another process may prepare meanwhile
        for name in INDEX_FILES:
            with reading(folder / name, "the file that meta.json belongs to", again):
                content[name] = (folder / name).read_bytes()
                digest = hashlib.sha256(content[name]).hexdigest()
                if hashes.setdefault(name, digest) != digest:
                    raise ValueError("its SHA-256 is another")
        with reading(folder / "index.jsonl", "a photo a line, as in fixations.npz", again):
            lines = content["index.jsonl"].decode("utf-8").splitlines()
            with np.load(io.BytesIO(content["fixations.npz"]), allow_pickle=False) as arrays:
                inner = arrays["offsets"][1:-1]
                parts = [np.split(arrays[key], inner) for key, _ in ARRAYS.values()]
            photos = [
                _photo(json.loads(line), dict(zip(ARRAYS, values, strict=True)))
                for line, *values in zip(lines, *parts, strict=True)
            ]
        sources = None  # folders made before there was such a file
        if (folder / SOURCES).is_file() or "sources" in meta:
            sources = read_json(folder / SOURCES, MADE_BY, "read_from", "files")
            with reading(folder / SOURCES, "lists of the files and their SHA-256", again):
                parts, found = map(Path, sources["read_from"]), sources["files"].values()
                within = not any(part.is_absolute() or ".." in part.parts for part in parts)
                if not within or not all(isinstance(known, list) and known for known in found):
                    raise ValueError("paths out of the dataset, or files without SHA-256")
                if "sources" in meta and _digest(sources) != meta["sources"]:
                    raise ValueError("its files or their SHA-256 are others")
        prepared = cls(folder, photos, meta, sources)
        if check and (problems := prepared.check(everything=False)):
            raise StaleError(folder, problems)
        return prepared

    @property
    def digest(self) -> str:
        """SHA-256 over all of the folder that decides a training on it, as it was read."""
        parts = [self.meta["files"][name] for name in INDEX_FILES]
        return hashlib.sha256(" ".join([*parts, repr(float(self.sigma))]).encode()).hexdigest()

    def check(self, everything: bool = True) -> list[str]:
        """A sentence for each file of the folder or its sources that was changed, removed or added.

        Without ``everything`` only files with another size or time than at their last reading are
        read and hashed, which finds any ordinary change at once.
        """
        problems, sources, noted = [], self._sources(), False
        if everything:
            problems += [
                f"{self.folder / name} has changed since preparation (SHA-256 differs)"
                for name, digest in self.meta.get("files", {}).items()
                if sha256_file(self.folder / name) != digest
            ]
        files = sources["files"]
        for name, (digest, *state) in progress(files.items(), "checking files", len(files)):
            path = self.root / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif everything or _state(path) != state:
                now, found = _state(path), sha256_file(path)
                if found != digest:
                    problems.append(f"{path} has changed since preparation (SHA-256 differs)")
                else:
                    files[name], noted = [digest, *now], True
        listed = _listed(self.root, sources["read_from"]) if sources["read_from"] else set()
        problems += [f"{self.root / name} was added" for name in sorted(listed - files.keys())]
        if noted and runtime.first_of_launch():  # of several processes, the first writes
            # The folder may be read-only.
            with contextlib.suppress(OSError), runtime.locked(self.folder / SOURCES):
                runtime.write_json(self.folder / SOURCES, sources)
        return problems


def fingerprints(root: Path, parts: Iterable[str]) -> dict[str, list]:
    """SHA-256, size and times of files, by path relative to ``root``, as are the ``parts`` read."""
    found = {}
    for name in progress(sorted(_listed(root, parts)), "hashing files", unit="file"):
        state = _state(root / name)  # before the hash: a change meanwhile shows next time
        found[name] = [sha256_file(root / name), *state]
    return found


def _listed(root: Path, parts: Iterable[str]) -> set[str]:
    """Paths below ``root`` of the files of the parts that are there."""
    there = [root / part for part in parts]
    paths = [path for part in there for path in (part, *visible_files(part, SOURCE_SUFFIXES))]
    return {path.relative_to(root).as_posix() for path in paths if path.is_file()}


def _digest(sources: dict[str, Any]) -> str:
    """SHA-256 of sources.json but for the files' states, which change when they are looked at."""
    hashes = {name: known[0] for name, known in sources["files"].items()}
    return runtime.digest_of([sources["read_from"], hashes])


def _state(path: Path) -> list[int]:
    """Size and times: a file in the same state is taken for the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _photo(row: dict[str, Any], arrays: dict[str, np.ndarray]) -> Photo:
    """A photo of the index; ValueError where the row or its arrays are no photo."""
    kinds = {**COLUMNS, "dropped": int, **{key: kind for key, kind in RARE.items() if key in row}}
    known = {key: row[key] for key in kinds}
    wrong = [key for key, kind in kinds.items() if not isinstance(known[key], kind)]
    photo = Photo(**known, **arrays)
    if wrong or min(photo.width, photo.height) < 1 or not 0 <= photo.sigma <= LARGEST_SIGMA:
        raise ValueError(f"photo {row['stem']!r} has another {', '.join(wrong) or 'size'}")
    on_photo = inside(photo.fixations, photo.height, photo.width)
    if len(on_photo) != row["fixations"] or not on_photo.all():
        raise ValueError(f"photo {photo.stem!r} has other fixations")
    return photo


def fixation_statistics(photos: list[Photo], px_per_degree: float | None = None) -> dict:
    """Numbers of fixations and saccade amplitudes, for the figure of notebook 01.

    Returns ``per_photo`` and ``per_observer`` (fixation counts), ``saccades`` (distances between an
    observer's consecutive fixations) and ``unit``: "degrees", or "pixels" where ``px_per_degree``
    is unknown. Fixations that are published without observers count in ``per_photo`` only.
    """
    per_observer, saccades = [], [np.zeros(0)]
    for photo in photos:
        for observer in photo.known_observers:
            points = photo.fixations[photo.observers == observer].astype(float)
            per_observer.append(len(points))
            saccades.append(np.linalg.norm(np.diff(points, axis=0), axis=1))
    return {
        "per_photo": [len(photo.fixations) for photo in photos],
        "per_observer": per_observer,
        "saccades": np.concatenate(saccades) / (px_per_degree or 1),
        "unit": "degrees" if px_per_degree else "pixels",
    }
