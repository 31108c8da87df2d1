"""Submissions to public benchmarks: written from a checkpoint, and checked before they are sent.

* ``salicon-2017`` (LSUN 2017, CodaLab 17136): a zip of 8-bit PNG, each named as its photo.
* ``salicon-2015`` (salicon.net/upload): a JSON list of {image_id, saliency_map: base64 of a PNG}.
* ``mit300`` and ``cat2000`` (saliency.tuebingen.ai): log-densities in an HDF5 file with one array
  per photo, which pysaliency reads as ``HDF5Model``; the benchmark derives from them the best map
  for every metric.

Evaluators read photos as they are stored, so the rotation that EXIF asks for is not applied here.
"""

import base64
import io
import json
import shutil
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import logsumexp

from mlnet_utils import runtime
from mlnet_utils.data.images import FORMATS, stored_size, visible_files
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.runtime import progress, reading, require

# Share of a uniform density that is mixed in before the logarithm: a network with a ReLU head
# predicts zeros, and one fixation on a zero would make the mean information gain -infinity.
UNIFORM_SHARE = 1e-6
LOG_SUM = 0.01  # pysaliency's limit to the logarithm of a density's sum
LARGEST = 1 << 28  # bytes of a map in a zip, which may announce any number

Sizes = Mapping[str, tuple[int, int]]  # photo, relative to its folder -> (width, height)


@dataclass(frozen=True)
class Benchmark:
    """The form of a submission, and its photos' place below the folder of the raw data."""

    suffix: str
    photos: str
    splits: tuple[str, ...]
    count: int  # photos of a split


BENCHMARKS = {
    "salicon-2017": Benchmark(".zip", "salicon/images/{split}", ("val", "test"), 5000),
    "salicon-2015": Benchmark(".json", "salicon/images/{split}", ("val", "test"), 5000),
    "mit300": Benchmark(".hdf5", "mit300/BenchmarkIMAGES", ("test",), 300),
    "cat2000": Benchmark(".hdf5", "cat2000/testSet/Stimuli", ("test",), 2000),
}


def benchmark_photos(
    dataset: str, split: str = "test", photos: str | Path = "", root: str | Path = ""
) -> tuple[Path, dict[str, tuple[int, int]]]:
    """The photos of a benchmark: their folder, and path in it -> (width, height) as stored.

    ``dataset`` is a name in ``BENCHMARKS``, ``split`` ``"test"``, or ``"val"`` where it is taken.
    ``photos`` is their folder, by default the dataset's place in the raw data below ``root`` (see
    :func:`~mlnet_utils.runtime.data_root`). Raises ValueError: unknown dataset or split, or not the
    benchmark's number of photos.
    """
    if dataset not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {dataset!r}: use one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[dataset]
    if split not in benchmark.splits:
        raise ValueError(f"{dataset} takes the split {' or '.join(benchmark.splits)}, not {split}")
    folder = Path(photos or runtime.data_root(root) / benchmark.photos.format(split=split))
    files = progress(visible_files(folder), "reading sizes", unit="photo")
    sizes = {file.relative_to(folder).as_posix(): stored_size(file) for file in files}
    names = f"COCO_{split}2014_" if dataset.startswith("salicon") else ""
    if other := [name for name in sizes if not PurePosixPath(name).name.startswith(names)]:
        raise ValueError(f"{folder} holds {other[0]!r}: {dataset}'s {split} photos are {names}...")
    if len(sizes) != benchmark.count:
        wanted = f"{dataset} ({split}) has {benchmark.count}: name the folder that holds them all"
        raise ValueError(f"{folder} holds {len(sizes)} photos, but {wanted}")
    return folder, sizes


def write_submission(
    checkpoint: str | Path,
    dataset: str,
    out: str | Path,
    split: str = "test",
    photos: str | Path = "",
    root: str | Path = "",
) -> Path:
    """Predict all photos of a benchmark and pack the maps as it wants them, into ``out``.

    The maps are collected in ``<out>_maps/``, of a.zip ``a.zip_maps/``, until the file is complete,
    so that a call that was interrupted can be repeated; another call for the same file waits. Under
    ``accelerate launch`` the processes share the work. The 2015 edition wants the name
    ``fixations_<split>2014_<algorithm>_results.json``. The checkpoint is trained or imported; the
    photos are those of :func:`benchmark_photos`.

    Raises:
        ValueError: see :func:`benchmark_photos`; or a wrong suffix of ``out``.
        ImportError: HDF5 is wanted and h5py is not installed.
        RuntimeError: a photo could not be predicted, or the file fails its validation.
    """
    out = Path(out)
    folder, sizes = benchmark_photos(dataset, split, photos, root)
    suffix = BENCHMARKS[dataset].suffix
    if out.suffix != suffix:
        raise ValueError(f"{dataset} takes a file ending in {suffix}, not {out.name}")
    if suffix == ".hdf5":
        require("h5py", "legacy")  # fail before the work, not after it
    maps = out.with_name(f"{out.name}_maps")  # of this file: it is deleted
    with runtime.locked(out):  # another call would lose the maps
        result = predict_folder(checkpoint, [folder], maps, npy=suffix == ".hdf5", upright=False)
        if result.failed:
            raise RuntimeError(f"the submission would not be complete: {result.summary()}")
        if runtime.first_of_launch():
            with runtime.atomic_path(out) as temporary:
                _pack(maps, sizes, temporary)
                if problems := "; ".join(validate_submission(temporary, sizes)):
                    raise RuntimeError(f"{runtime.display_path(out)} would be refused: {problems}")
            shutil.rmtree(maps)
    return out


def validate_submission(path: str | Path, sizes: Sizes) -> list[str]:
    """Check a submission, ours or anybody's, against the photos it should cover.

    ``path`` ends in ``.zip``, ``.json`` or ``.hdf5``; ``sizes`` are those of
    :func:`benchmark_photos`. Returns a sentence per kind of problem, with its number and the first
    names; nothing if all is well.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is of another kind.
        ImportError: HDF5 and h5py is not installed.
    """
    path = Path(path)
    if path.suffix not in NAMES:
        raise ValueError(f"a submission ends in {', '.join(NAMES)}, not {path.name}")
    names: dict[str, list[str]] = defaultdict(list)
    for kind, name in _problems(path, sizes):
        names[kind].append(str(name))
    return [
        f"{kind} ({len(found)}): {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}"
        for kind, found in names.items()
    ]


def _png_name(photo: str, suffix: str = ".png") -> str:
    return PurePosixPath(photo).with_suffix(suffix).as_posix()


def _image_id(photo: str) -> int:
    """COCO_test2014_000000000042.jpg -> 42."""
    digits = PurePosixPath(photo).stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise ValueError(f"the photo {photo} has no COCO image id at the end of its name")
    return int(digits)


# Suffix of a submission -> a photo's name in it.
NAMES = {".zip": _png_name, ".json": _image_id, ".hdf5": str, ".h5": str}


def _pack(maps: Path, sizes: Sizes, path: Path) -> None:
    """Write the maps of all photos into a file of the kind that its suffix says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
            for name in map(_png_name, sizes):
                # A fixed date: the same maps give the same file.
                archive.writestr(zipfile.ZipInfo(name), (maps / name).read_bytes())
    elif path.suffix == ".json":
        texts = {n: base64.b64encode((maps / _png_name(n)).read_bytes()).decode() for n in sizes}
        entries = [{"image_id": _image_id(n), "saliency_map": text} for n, text in texts.items()]
        path.write_text(json.dumps(entries), encoding="utf-8")
    else:
        with require("h5py", "legacy").File(path, "w") as file:
            for name in progress(sizes, "packing", unit="photo"):
                density = np.load(maps / _png_name(name, ".npy")).astype(np.float64)
                density = (1 - UNIFORM_SHARE) * density + UNIFORM_SHARE / density.size
                log_density = np.log(density / density.sum()).astype(np.float32)
                file.create_dataset(name, data=log_density, compression=9)


# ---- checking ----------------------------------------------------------------------------------
def _problems(path: Path, sizes: Sizes) -> Iterator[tuple[str, Any]]:
    """(kind, name) of the problems of the file, of the names in it, and of every map."""
    expected = {NAMES[path.suffix](photo): size for photo, size in sizes.items()}
    with ExitStack() as opened:
        try:
            with reading(path, f"a submission as {path.suffix}", "make it again"):
                maps, read = _open(path, opened)
        except ValueError as error:
            yield "not readable", str(error)
            return
        counts = Counter(name for name, _ in maps)
        yield from (("missing", name) for name in expected if name not in counts)
        yield from (("not asked for", name) for name in counts if name not in expected)
        yield from (("more than once", name) for name, n in counts.items() if n > 1)
        for name, key in progress(maps, "checking the submission", unit="map"):
            if name in expected:
                try:
                    content = read(key)
                    check = _check_png if isinstance(content, Image.Image) else _check_log_density
                    faults = list(check(content, *expected[name]))
                except Exception as error:  # readers raise many types for damaged content
                    faults = [("not readable", error)]
                yield from ((kind, f"{name}{found and f' ({found})'}") for kind, found in faults)


def _open(path: Path, opened: ExitStack) -> tuple[list[tuple[Any, Any]], Callable[[Any], Any]]:
    """(name, key) of every map, and a function that reads the map of a key."""
    if path.suffix == ".zip":
        archive = opened.enter_context(zipfile.ZipFile(path))
        files = [entry for entry in archive.infolist() if not entry.is_dir()]

        def read(file: zipfile.ZipInfo) -> Image.Image:
            if file.file_size > LARGEST:
                raise ValueError(f"{file.file_size} bytes, more than a map can have")
            return _decode(archive.read(file))

        return [(file.filename, file) for file in files], read
    if path.suffix == ".json":
        entries = json.loads(path.read_text(encoding="utf-8"))
        form = {"image_id": int, "saliency_map": str}
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in form.items())
            for entry in entries
        ):
            raise ValueError("not a list of {image_id: number, saliency_map: text}")
        maps = [tuple(entry[key] for key in form) for entry in entries]
        return maps, lambda text: _decode(base64.b64decode(text, validate=True))
    file = opened.enter_context(require("h5py", "legacy").File(path, "r"))
    return [(name, name) for name in maps_in(file)], lambda name: file[name]


def maps_in(file: Any) -> list[str]:
    """Names of all arrays in an open HDF5 file, in groups too."""
    names: list[str] = []
    file.visititems(lambda name, each: names.extend([name] * hasattr(each, "shape")))
    return names


def _decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _check_png(image: Image.Image, width: int, height: int) -> Iterator[tuple[str, str]]:
    """(kind, finding) where a map is no 8-bit greyscale PNG of the photo's size."""
    if image.format != "PNG":
        yield "not a PNG", image.format
    if image.mode != "L":
        yield "not 8-bit greyscale", image.mode
    if image.size != (width, height):
        yield "not of the photo's size", f"{image.width}x{image.height} instead of {width}x{height}"
    elif np.ptp(np.asarray(image)) == 0:
        yield "the same value everywhere, which no metric can score", ""


def _check_log_density(stored: Any, width: int, height: int) -> Iterator[tuple[str, str]]:
    """(kind, finding) where an HDF5 dataset is no log-density of the photo's size."""
    if stored.shape != (height, width):
        yield "not of the photo's size", f"{stored.shape} instead of {(height, width)}"
        return
    values = stored[()]
    if not np.isfinite(values).all():
        yield "values that are not finite", ""
    elif abs(total := float(logsumexp(values.astype(np.float64)))) > LOG_SUM:
        yield "not a log-density that sums to 1", f"sums to exp({total:.2f})"
