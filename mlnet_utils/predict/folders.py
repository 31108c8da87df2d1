"""Saliency maps for files and folders of photos: decoding ahead, batches, resuming, reporting."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from mlnet_utils.data.geometry import Letterbox
from mlnet_utils.data.images import PHOTO_SUFFIXES, read_image, visible_files
from mlnet_utils.plots import overlay as paint_overlay
from mlnet_utils.predict.predictor import Predictor, load, predict_maps, to_density
from mlnet_utils.runtime import (
    atomic_path,
    cpu_count,
    display_path,
    locked,
    pick_device,
    progress,
    read_json,
    remove_temporaries,
    sha256_file,
    versions,
    write_json,
)

RECORD = "prediction.json"  # in the output folder: the checkpoint that made the maps
Targets = dict[Path, list[Path]]  # photo or video -> its output files, the map itself last


@dataclass
class FolderResult:
    """The photos (or videos) that were done, done before, and failed with a reason."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> str:
        """A sentence, and a line for every photo that failed."""
        lines = [f"{len(self.done)} done, {len(self.skipped)} were done before"]
        lines += [f"failed: {path}: {why}" for path, why in sorted(self.failed.items())]
        return "\n".join(lines)


def predict_folder(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    overlay: bool = False,
    npy: bool = False,
    force: bool = False,
    batch_size: int = 8,
    device: str | None = None,
    upright: bool = True,
) -> FolderResult:
    """Write the saliency maps of photos and of folders of photos.

    Every photo gets ``<stem>.png`` (8 bits, its own size, maximum 255), with ``overlay`` also
    ``<stem>_overlay.png`` (the photo with its map on top), and with ``npy`` ``<stem>.npy``
    (float32 density that sums to 1). Photos inside a given folder keep their sub-folders. Photos
    with all outputs in place are skipped, so that an interrupted call can be repeated. Under
    ``accelerate launch`` every process takes its share on its own GPU; all return the same result.

    Args:
        checkpoint: a trained, imported or exported network.
        paths: photos and folders; ``out`` is the maps' folder.
        force: redo what exists; files of another checkpoint that will be made again are removed
            first, so that an interrupted call leaves none of them.
        batch_size: photos per forward pass; twice as many are held in memory.
        device: default: a GPU if there is one.
        upright: turn photos as their EXIF data say; benchmarks want False.

    Returns:
        The photos that were done, skipped, or failed and why; a broken photo stops nothing.

    Raises:
        FileNotFoundError: a path or the checkpoint does not exist.
        ValueError: no photos; files that would overwrite each other or a photo; ``out`` holds
            maps of another checkpoint and ``force`` is not given.
    """
    endings = [*([".npy"] if npy else []), *(["_overlay.png"] if overlay else []), ".png"]
    call = (checkpoint, paths, Path(out), endings, force, batch_size, device)
    with begin(*call) as (predictor, targets, result):
        _predict_photos(predictor, targets, result, endings, batch_size, upright)
        return gather(result)


def _predict_photos(
    predictor: Predictor,
    targets: Targets,
    result: FolderResult,
    endings: Sequence[str],
    batch_size: int,
    upright: bool,
) -> None:
    """Write the files of all photos, and note in ``result`` how each of them went."""
    overlay = "_overlay.png" in endings

    def decode(photo: Path) -> tuple[Tensor | None, Tensor, Letterbox]:
        pixels = read_image(photo, upright)
        return (pixels if overlay else None), *predictor.prepare(pixels)

    def write(photo: Path, pixels: Tensor | None, box: Letterbox, single: Tensor) -> None:
        density = to_density(single, predictor.config, box).float().numpy()
        for path, ending in zip(targets[photo], endings, strict=True):
            with atomic_path(path) as temporary:
                if ending == ".npy":
                    np.save(temporary, density)
                elif ending == "_overlay.png":
                    painted = paint_overlay(pixels.permute(1, 2, 0).numpy(), density)
                    Image.fromarray(painted).save(temporary)
                else:
                    Image.fromarray(to_8_bits(density)).save(temporary)

    def finished(futures: dict[Path, Future], problem: str = "") -> dict[Path, Any]:
        """Wait for all; the values of those that have one. The others' errors are noted."""
        values = {}
        for photo, future in futures.items():
            try:
                values[photo] = future.result()
            except (ValueError, OSError) as error:
                result.failed[photo] = f"{problem}{error}"
        return values

    photos = list(targets)
    batches = [photos[start : start + batch_size] for start in range(0, len(photos), batch_size)]
    if PartialState().is_main_process:
        batches = progress(batches, "predicting", unit="batch")
    with ThreadPoolExecutor(min(8, cpu_count() + 1)) as pool:
        decoding, writing = {}, {}
        for batch in itertools.chain(batches, [[]]):  # decoded while the one before is predicted
            ready = finished(decoding)
            decoding = {photo: pool.submit(decode, photo) for photo in batch}
            maps = []
            if ready:
                images = torch.stack([image for _, image, _ in ready.values()])
                maps = predict_maps(predictor.model, predictor.config, images.to(predictor.device))
            result.done += finished(writing, "its map cannot be written: ")
            writing = {
                photo: pool.submit(write, photo, pixels, box, single)
                for (photo, (pixels, _, box)), single in zip(ready.items(), maps, strict=True)
            }
        result.done += finished(writing, "its map cannot be written: ")


def to_8_bits(density: np.ndarray) -> np.ndarray:
    """(H, W) uint8 with a maximum of 255: what files and challenges take, unfit for KL and IG."""
    return np.round(255 * (density / density.max())).astype(np.uint8)


# ---- before and after the predictions, of photos and of videos ---------------------------------
@contextmanager
def begin(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: Path,
    endings: Sequence[str],
    force: bool,
    batch_size: int,
    device: str | None,
    suffixes: Sequence[str] = PHOTO_SUFFIXES,
) -> Iterator[tuple[Predictor, Targets, FolderResult]]:
    """The network, this process's share of the work, and a result with what was done before.

    Meanwhile other calls that would write into ``out`` wait. Arguments and errors as those of
    :func:`list_targets` and :func:`predict_folder`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    # One process may take hours longer than another, and then nobody should give up on it.
    processes = PartialState(cpu=pick_device() == "cpu", timeout=timedelta(days=7))
    predictor = load(checkpoint, device)  # PartialState has chosen this process's GPU
    targets = list_targets(paths, out, endings, suffixes)
    record = {
        "checkpoint": display_path(checkpoint),
        "sha256": sha256_file(checkpoint),
        "versions": versions(),
    }
    with locked(out):
        processes.wait_for_everyone()
        before = {} if force else record  # of the network that made the maps in ``out``
        if (out / RECORD).exists():
            try:
                before = read_json(out / RECORD, "predict")
            except ValueError:
                if not force:
                    raise
        other_maps = before.get("sha256") != record["sha256"]
        if other_maps and not force:
            raise ValueError(
                f"the maps in {out} were made by another checkpoint ({before.get('checkpoint')}); "
                "choose another output folder, or force them to be made again"
            )
        done = {f for f, made in targets.items() if not force and all(p.is_file() for p in made)}
        todo = {file: made for file, made in targets.items() if file not in done}
        processes.wait_for_everyone()  # all have the same list before the first one writes
        if processes.is_main_process:
            wanted = [path for made in todo.values() for path in made]
            remove_temporaries(wanted)
            if other_maps:
                # Before the record says otherwise: an interrupted call would leave maps of the
                # other network, which the next one would take for done.
                for path in filter(Path.is_file, wanted):
                    path.unlink()
            write_json(out / RECORD, record)
        processes.wait_for_everyone()
        share = list(todo)[processes.process_index :: processes.num_processes]
        work = {file: todo[file] for file in share}
        yield predictor, work, FolderResult(skipped=sorted(done))


def gather(result: FolderResult) -> FolderResult:
    """The results of all processes, in each of them; the list of skipped files is the same."""
    results = gather_object([result])
    done = sorted(path for each in results for path in each.done)
    failed = {path: why for each in results for path, why in each.failed.items()}
    return FolderResult(done, result.skipped, failed)


def list_targets(
    paths: Sequence[str | Path], out: Path, endings: Sequence[str], suffixes=PHOTO_SUFFIXES
) -> Targets:
    """Every photo with its output files, one for each ending (``.png``), the map's last.

    Photos of a folder keep their sub-folders. Hidden files, files without one of the suffixes, and
    the files in ``out``, are not taken for photos.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no photos, or files that would overwrite each other or a photo.
    """
    stems: dict[Path, Path] = {}  # photo -> output path without ending
    for path in map(Path, paths):
        if path.is_dir():
            if path.resolve() == out.resolve():
                raise ValueError(
                    f"maps in {path} would be the next call's input; choose another out"
                )
            for file in visible_files(path, suffixes, out):
                stems[file] = out / file.relative_to(path).with_name(file.stem)
        elif path.is_file():
            stems[path] = out / path.stem
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not stems:
        raise ValueError(f"nothing ending in {', '.join(suffixes)} in {', '.join(map(str, paths))}")
    # with_suffix() would cut a.b
    targets = {f: [stem.with_name(stem.name + e) for e in endings] for f, stem in stems.items()}

    def key(path: Path) -> str:  # macOS and Windows do not tell A.png from a.png
        return str(path.resolve()).lower()

    owners = {key(file): file for file in targets}
    for file, made in targets.items():
        for path in made:
            if key(path) in owners:
                raise ValueError(
                    f"{path}, for {file}, would overwrite a photo or another's map, that of "
                    f"{owners[key(path)]}: choose another out, or rename a photo"
                )
            owners[key(path)] = file
    return targets
