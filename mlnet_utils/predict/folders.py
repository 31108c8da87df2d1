"""Saliency maps for files and folders of photos: decoding ahead, batches, resuming, reporting."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from mlnet_utils.data.geometry import Letterbox
from mlnet_utils.data.images import PHOTO_SUFFIXES, read_image, visible_files
from mlnet_utils.plots import overlay as paint_overlay
from mlnet_utils.predict.exported import load_network
from mlnet_utils.predict.predictor import Predictor, predict_maps, to_density
from mlnet_utils.runtime import (
    atomic_path,
    cpu_count,
    display_path,
    pick_device,
    progress,
    read_json,
    sha256_file,
    versions,
    write_json,
)

RECORD = "prediction.json"  # in the output folder: which checkpoint made the maps


@dataclass
class FolderResult:
    """What became of every photo."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A sentence, and a line for every photo that failed."""
        lines = [f"{len(self.done)} done, {len(self.skipped)} were done before"]
        lines += [f"failed: {path}: {why}" for path, why in sorted(self.failed.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class Outputs:
    """Which files are written for a photo."""

    overlay: bool = False
    npy: bool = False

    @property
    def suffixes(self) -> list[str]:
        """What is appended to the photo's stem; the map itself comes last."""
        wanted = {".npy": self.npy, "_overlay.png": self.overlay, ".png": True}
        return [suffix for suffix, yes in wanted.items() if yes]

    def paths(self, target: Path) -> list[Path]:
        """``target`` is the output path without suffix (``with_suffix`` would cut ``a.b``)."""
        return [target.with_name(target.name + suffix) for suffix in self.suffixes]

    def write(self, target: Path, pixels: Tensor, density: np.ndarray) -> None:
        """Write a photo's files, each atomically.

        Args:
            target: output path without suffix.
            pixels: (3, H, W) uint8 photo; used for the overlay only.
            density: (H, W) float32, sums to 1.
        """
        for path, suffix in zip(self.paths(target), self.suffixes, strict=True):
            with atomic_path(path) as temporary:
                if suffix == ".npy":
                    np.save(temporary, density)
                elif suffix == ".png":
                    Image.fromarray(to_8_bits(density)).save(temporary)
                else:
                    painted = paint_overlay(pixels.permute(1, 2, 0).numpy(), density)
                    Image.fromarray(painted).save(temporary)


def to_8_bits(density: np.ndarray) -> np.ndarray:
    """(H, W) uint8 with a maximum of 255: what files and challenges take, unfit for KL and IG."""
    return np.round(255 * (density / density.max())).astype(np.uint8)


def predict_folder(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    overlay: bool = False,
    npy: bool = False,
    force: bool = False,
    batch_size: int = 8,
    workers: int = -1,
    device: str | None = None,
    upright: bool = True,
) -> FolderResult:
    """Write the saliency maps of photos and of folders of photos.

    Every photo gets ``<stem>.png`` (8 bits, its own size, maximum 255), on request
    ``<stem>_overlay.png`` and ``<stem>.npy`` (float32 density that sums to 1). Photos inside a
    given folder keep their sub-folders. Photos whose outputs exist are skipped, so that an
    interrupted call can be repeated. Under ``accelerate launch`` every process takes its share
    on its own GPU, and all return the same result.

    Args:
        checkpoint: a trained or imported network, or an exported one.
        paths: photos and folders.
        out: folder for the maps.
        overlay: also write the photo with its map on top.
        npy: also write the density.
        force: redo what exists; files of another checkpoint that will be made again are removed
            first, so that an interrupted call leaves none of them.
        batch_size: photos per forward pass; twice as many are held in memory.
        workers: threads that decode photos and write maps; -1 = chosen from the machine.
        device: default: a GPU if there is one.
        upright: turn photos as their EXIF data say; benchmarks want False.

    Returns:
        Which photos were done, skipped, or failed and why; a broken photo stops nothing.

    Raises:
        FileNotFoundError: a path or the checkpoint does not exist.
        ValueError: no photos; files that would overwrite each other or a photo; ``out`` holds
            maps of another checkpoint and ``force`` is not given.
    """
    outputs = Outputs(overlay, npy)
    predictor, targets, share, result = begin(
        checkpoint, paths, Path(out), outputs, force, batch_size, device
    )
    batches = range(0, len(share), batch_size)
    with ThreadPoolExecutor(workers if workers > 0 else min(8, cpu_count() + 1)) as pool:
        decode = functools.partial(_decode, predictor, upright, overlay)
        stream = _batches(pool, decode, share, batch_size, result)
        if PartialState().is_main_process:
            stream = progress(stream, "predicting", len(batches), unit="batch")
        writing: dict[Path, Future] = {}
        for batch in stream:
            written, writing = writing, _predict_and_write(pool, predictor, batch, targets, outputs)
            _collect(written, result)
        _collect(writing, result)
    return gather(result)


def begin(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: Path,
    outputs: Outputs,
    force: bool,
    batch_size: int,
    device: str | None,
    suffixes: Sequence[str] = PHOTO_SUFFIXES,
) -> tuple[Predictor, dict[Path, Path], list[Path], FolderResult]:
    """What comes before the first prediction, of photos and of videos.

    Returns:
        The network, input -> output path without suffix, this process's share of what is to be
        done, and a result that lists what was done before.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # One process may take hours longer than another, and then nobody should give up on it.
    processes = PartialState(cpu=pick_device() == "cpu", timeout=timedelta(days=7))
    predictor = load_network(checkpoint, device, str(processes.device))
    targets = list_photos(paths, out, outputs, suffixes)
    record, other_maps = _check_record(out, checkpoint, force)
    todo = [
        file
        for file, target in targets.items()
        if force or not all(path.is_file() for path in outputs.paths(target))
    ]
    result = FolderResult(skipped=sorted(set(targets) - set(todo)))
    if processes.is_main_process:
        wanted = {path for file in todo for path in outputs.paths(targets[file])}
        _remove_leftovers(out, wanted)
        if other_maps:
            # Before the record says otherwise: an interrupted call would leave maps of the other
            # network, which the next one would take for done.
            for path in filter(Path.is_file, wanted):
                path.unlink()
    processes.wait_for_everyone()  # all have the same list before the first one writes
    if processes.is_main_process:
        write_json(out / RECORD, record)
    return predictor, targets, todo[processes.process_index :: processes.num_processes], result


def _remove_leftovers(out: Path, wanted: set[Path]) -> None:
    """Delete what ``atomic_path`` of the wanted files left behind in calls that were killed.

    One pass over the folder: looking for each file by itself takes minutes for thousands.
    """
    for leftover in list(out.rglob(".*.tmp.*")):
        stem = leftover.stem[1:].rsplit(".", 2)[0]  # .<stem>.<process>.tmp
        if leftover.with_name(stem + leftover.suffix) in wanted:
            leftover.unlink(missing_ok=True)


def gather(result: FolderResult) -> FolderResult:
    """The results of all processes, in each of them; what was skipped is the same in all."""
    for other in gather_object([result]):
        result = FolderResult(
            sorted({*result.done, *other.done}), result.skipped, {**result.failed, **other.failed}
        )
    return result


def list_photos(
    paths: Sequence[str | Path],
    out: Path,
    outputs: Outputs,
    suffixes: Sequence[str] = PHOTO_SUFFIXES,
) -> dict[Path, Path]:
    """Photo -> its output path without suffix; photos of a folder keep their sub-folders.

    Hidden files, and what lies in ``out``, are not taken for photos.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no photos, or files that would overwrite each other or a photo.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            if path.resolve() == out.resolve():
                raise ValueError(
                    f"the maps of {path} cannot be written into it, or the next call would take "
                    "them for input; choose another output folder"
                )
            for file in visible_files(path, suffixes, out):
                found[file] = out / file.relative_to(path).with_name(file.stem)
        elif path.is_file():
            found[path] = out / path.stem
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not found:
        raise ValueError(f"nothing ending in {', '.join(suffixes)} in {', '.join(map(str, paths))}")
    _check_collisions(found, outputs)
    return found


def _check_collisions(targets: dict[Path, Path], outputs: Outputs) -> None:
    """No two photos write the same file, and none overwrites a photo."""
    # Compared in lower case: macOS and Windows do not tell A.png from a.png.
    photos = {str(photo.resolve()).lower() for photo in targets}
    owners: dict[str, Path] = {}
    for photo, target in targets.items():
        for path in outputs.paths(target):
            name = str(path.resolve()).lower()
            if name in photos:
                raise ValueError(f"{path} is read and would be overwritten; choose another out")
            if name in owners:
                raise ValueError(
                    f"{owners[name]} and {photo} would both be written to {path}; give them "
                    "different names, or predict their folders into different output folders"
                )
            owners[name] = photo


def _check_record(out: Path, checkpoint: str | Path, force: bool) -> tuple[dict, bool]:
    """The record to write, and whether maps in ``out`` may be those of another network.

    Maps of two networks must not be mixed by resuming.
    """
    record = {
        "checkpoint": display_path(checkpoint),
        "sha256": sha256_file(checkpoint),
        "versions": versions(),
    }
    if not (out / RECORD).exists():
        return record, force
    try:
        before = read_json(out / RECORD, "predict")
    except ValueError:
        if not force:
            raise
        before = {}
    other = before.get("sha256") != record["sha256"]
    if other and not force:
        raise ValueError(
            f"the maps in {out} were made by another checkpoint ({before.get('checkpoint')}); "
            "choose another output folder, or force them to be made again"
        )
    return record, other


# ---- the stream of batches ---------------------------------------------------------------------
@dataclass(frozen=True)
class _Prepared:
    """A decoded photo on its way to the network."""

    photo: Path
    image: Tensor  # (3, height, width) uint8, letterboxed
    box: Letterbox
    pixels: Tensor | None  # (3, H, W) uint8, where the overlay needs them


def _decode(predictor: Predictor, upright: bool, keep_pixels: bool, photo: Path) -> _Prepared:
    pixels = read_image(photo, upright)
    image, box = predictor.prepare(pixels)
    return _Prepared(photo, image, box, pixels if keep_pixels else None)


def _batches(
    pool: ThreadPoolExecutor,
    decode: Callable[[Path], _Prepared],
    photos: Sequence[Path],
    batch_size: int,
    result: FolderResult,
) -> Iterator[list[_Prepared]]:
    """Batches of decoded photos, the next one being decoded while this one is used."""
    waiting = iter(photos)

    def submit() -> dict[Path, Future]:
        return {photo: pool.submit(decode, photo) for photo in islice(waiting, batch_size)}

    current = submit()
    while current:
        following = submit()
        batch = []
        for photo, future in current.items():
            try:
                batch.append(future.result())
            except (ValueError, OSError) as error:
                result.failed[photo] = str(error)
        yield batch
        current = following


def _predict_and_write(
    pool: ThreadPoolExecutor,
    predictor: Predictor,
    batch: list[_Prepared],
    targets: dict[Path, Path],
    outputs: Outputs,
) -> dict[Path, Future]:
    """Run the network on a batch and let the pool write the maps."""
    if not batch:  # every photo of it is broken
        return {}
    images = torch.stack([item.image for item in batch]).to(predictor.device)
    maps = predict_maps(predictor.model, predictor.config, images)

    def write(item: _Prepared, single: Tensor) -> None:
        density = to_density(single, predictor.config, item.box).float().numpy()
        outputs.write(targets[item.photo], item.pixels, density)

    return {
        item.photo: pool.submit(write, item, single)
        for item, single in zip(batch, maps, strict=True)
    }


def _collect(written: dict[Path, Future], result: FolderResult) -> None:
    for photo, future in written.items():
        try:
            future.result()
        except OSError as error:
            result.failed[photo] = f"its map cannot be written ({error})"
        else:
            result.done.append(photo)
