"""Submissions to public benchmarks: written from a checkpoint, and checked before they are sent.

* ``salicon-2017`` (LSUN 2017, CodaLab 17136): a zip of 8-bit PNG, one per photo, named as it.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from scipy.special import logsumexp

from mlnet_utils.data.images import visible_files
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.runtime import atomic_path, data_root, display_path, progress, require

# Share of a uniform density that is mixed in before the logarithm: a network with a ReLU head
# predicts zeros, and one fixation on a zero would make the mean information gain -infinity.
UNIFORM_SHARE = 1e-6

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
    """The photos of a benchmark: their folder, and their names with their stored sizes.

    Args:
        dataset: a name in ``BENCHMARKS``.
        split: ``"test"``, or ``"val"`` where the benchmark takes it.
        photos: their folder; default: the dataset's place in the raw data.
        root: folder of the raw data, see :func:`~mlnet_utils.runtime.data_root`.

    Returns:
        The folder, and path relative to it -> (width, height), ignoring EXIF.

    Raises:
        ValueError: unknown dataset or split, or not the benchmark's number of photos.
        FileNotFoundError: the folder does not exist.
    """
    if dataset not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {dataset!r}: use one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[dataset]
    if split not in benchmark.splits:
        raise ValueError(f"{dataset} takes the split {' or '.join(benchmark.splits)}, not {split}")
    folder = Path(photos) if str(photos) else data_root(root) / benchmark.photos.format(split=split)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; it should hold the {benchmark.count} photos of {dataset} "
            f"({split}), or name their folder"
        )
    sizes = {}
    for file in progress(visible_files(folder), "reading sizes", unit="photo"):
        with Image.open(file) as image:
            sizes[file.relative_to(folder).as_posix()] = image.size
    if len(sizes) != benchmark.count:
        raise ValueError(
            f"{folder} holds {len(sizes)} photos, but {dataset} ({split}) has {benchmark.count}"
        )
    return folder, sizes


def write_submission(
    checkpoint: str | Path,
    dataset: str,
    out: str | Path,
    split: str = "test",
    photos: str | Path = "",
    root: str | Path = "",
    batch_size: int = 8,
    device: str | None = None,
) -> Path:
    """Predict all photos of a benchmark and pack the maps as it wants them.

    The maps are collected in ``<out>_maps/`` until the file is complete, so that a call that was
    interrupted can be repeated; under ``accelerate launch`` the processes share the work.

    Args:
        checkpoint: a trained or imported network.
        dataset: a name in ``BENCHMARKS``.
        out: the file to write: ``.zip``, ``.json`` or ``.hdf5``, as the benchmark wants. The 2015
            edition wants ``fixations_<split>2014_<algorithm>_results.json``.
        split: ``"test"``, or ``"val"`` where the benchmark takes it.
        photos: their folder; default: the dataset's place in the raw data.
        root: folder of the raw data.
        batch_size: photos per forward pass.
        device: default: a GPU if there is one.

    Returns:
        ``out``.

    Raises:
        ValueError, FileNotFoundError: see :func:`benchmark_photos`; a wrong suffix of ``out``.
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
    maps = out.with_name(f"{out.stem}_maps")
    options = {"batch_size": batch_size, "device": device, "upright": False}
    result = predict_folder(checkpoint, [folder], maps, npy=suffix == ".hdf5", **options)
    if result.failed:
        raise RuntimeError(f"the submission would not be complete: {result.summary()}")
    if PartialState().is_main_process:
        _pack(maps, sizes, out)
        shutil.rmtree(maps)
    return out


def validate_submission(path: str | Path, sizes: Sizes) -> list[str]:
    """Check a submission, ours or anybody's, against the photos it should cover.

    Args:
        path: ``.zip``, ``.json`` or ``.hdf5``.
        sizes: photo -> (width, height), from :func:`benchmark_photos`.

    Returns:
        One sentence per kind of problem, with how often it occurs and the first names; empty if
        there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind.
        ImportError: HDF5 and h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"submission {path} does not exist")
    checks = {".zip": _check_zip, ".json": _check_json, ".hdf5": _check_hdf5, ".h5": _check_hdf5}
    if path.suffix not in checks:
        raise ValueError(f"a submission ends in {', '.join(checks)}, not {path.name}")
    names: dict[str, list[str]] = defaultdict(list)
    for kind, name in checks[path.suffix](path, sizes):
        names[kind].append(name)
    return [
        f"{kind} ({len(found)}): {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}"
        for kind, found in names.items()
    ]


# ---- writing -----------------------------------------------------------------------------------
def _pack(maps: Path, sizes: Sizes, out: Path) -> None:
    write = {".zip": _write_zip, ".json": _write_json, ".hdf5": _write_hdf5}[out.suffix]
    with atomic_path(out) as temporary:
        write(maps, sizes, temporary)
        problems = validate_submission(temporary, sizes)
        if problems:
            raise RuntimeError(f"{display_path(out)} would be refused: {'; '.join(problems)}")


def _write_zip(maps: Path, sizes: Sizes, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for name in map(_png_name, sizes):
            # A fixed date: the same maps give the same file.
            archive.writestr(zipfile.ZipInfo(name), (maps / name).read_bytes())


def _write_json(maps: Path, sizes: Sizes, path: Path) -> None:
    entries = [
        {
            "image_id": _image_id(name),
            "saliency_map": base64.b64encode((maps / _png_name(name)).read_bytes()).decode(),
        }
        for name in sizes
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")


def _write_hdf5(maps: Path, sizes: Sizes, path: Path) -> None:
    with require("h5py", "legacy").File(path, "w") as file:
        for name in progress(sizes, "packing", unit="photo"):
            density = np.load(maps / PurePosixPath(name).with_suffix(".npy")).astype(np.float64)
            density = (1 - UNIFORM_SHARE) * density + UNIFORM_SHARE / density.size
            log_density = np.log(density / density.sum()).astype(np.float32)
            file.create_dataset(name, data=log_density, compression=9)


def _png_name(photo: str) -> str:
    return PurePosixPath(photo).with_suffix(".png").as_posix()


def _image_id(photo: str) -> int:
    """COCO_test2014_000000000042.jpg -> 42.

    Raises:
        ValueError: the name does not end in a number.
    """
    digits = PurePosixPath(photo).stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise ValueError(f"the photo {photo} has no COCO image id at the end of its name")
    return int(digits)


# ---- checking ----------------------------------------------------------------------------------
Problems = Iterator[tuple[str, str]]  # (kind, name)


def _check_zip(path: Path, sizes: Sizes) -> Problems:
    try:
        with zipfile.ZipFile(path) as archive:
            files = [entry for entry in archive.infolist() if not entry.is_dir()]
            maps = [(file.filename, partial(archive.read, file)) for file in files]
            expected = {_png_name(photo): size for photo, size in sizes.items()}
            yield from _check_maps(maps, expected, _check_png)
    except zipfile.BadZipFile as error:
        yield "not a zip file", f"{path.name} ({error})"


def _check_json(path: Path, sizes: Sizes) -> Problems:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield "not a JSON file", f"{path.name} ({error})"
        return
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("image_id"), int)
        and isinstance(entry.get("saliency_map"), str)
        for entry in entries
    ):
        yield "not a list of {image_id: number, saliency_map: text}", path.name
        return
    maps = [
        (entry["image_id"], partial(base64.b64decode, entry["saliency_map"], validate=True))
        for entry in entries
    ]
    expected = {_image_id(photo): size for photo, size in sizes.items()}
    yield from _check_maps(maps, expected, _check_png)


def _check_maps(
    maps: list[tuple[Any, Callable[[], Any]]], expected: dict, check: Callable[..., Problems]
) -> Problems:
    """Problems of the names, and of every map: a name and a function that reads the content."""
    counts = Counter(name for name, _ in maps)
    yield from (("missing", str(name)) for name in expected if name not in counts)
    yield from (("not asked for", str(name)) for name in counts if name not in expected)
    yield from (("more than once", str(name)) for name, n in counts.items() if n > 1)
    for name, read in progress(maps, "checking the submission", unit="map"):
        if name not in expected:
            continue
        try:
            content = read()
        except (zipfile.BadZipFile, RuntimeError, OSError, ValueError) as error:
            yield "cannot be unpacked", f"{name} ({error})"
        else:
            yield from check(content, str(name), expected[name])


def _check_png(content: bytes, name: str, size: tuple[int, int]) -> Problems:
    """Problems of one map that should be an 8-bit greyscale PNG of the photo's size."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        yield "not a readable image", f"{name} ({error})"
        return
    if image.format != "PNG":
        yield "not a PNG", f"{name} ({image.format})"
    if image.mode != "L":
        yield "not 8-bit greyscale", f"{name} ({image.mode})"
    if image.size != tuple(size):
        found, wanted = ("x".join(map(str, pair)) for pair in (image.size, size))
        yield "not of the photo's size", f"{name} ({found} instead of {wanted})"
    if np.ptp(np.asarray(image)) == 0:
        yield "the same value everywhere, which no metric can score", name


def _check_hdf5(path: Path, sizes: Sizes) -> Problems:
    h5py = require("h5py", "legacy")
    try:
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visititems(
                lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
            )
            maps = [(name, partial(np.array, file[name])) for name in names]
            yield from _check_maps(maps, dict(sizes), _check_log_density)
    except OSError as error:
        yield "not a readable HDF5 file", f"{path.name} ({error})"


def _check_log_density(values: np.ndarray, name: str, size: tuple[int, int]) -> Problems:
    width, height = size
    if values.shape != (height, width):
        yield "not of the photo's size", f"{name} {values.shape} instead of {(height, width)}"
    elif not np.isfinite(values).all():
        yield "values that are not finite", name
    elif abs(total := float(logsumexp(values.astype(np.float64)))) > 0.01:  # pysaliency's limit
        yield "not a log-density that sums to 1", f"{name} (sums to exp({total:.2f}))"
