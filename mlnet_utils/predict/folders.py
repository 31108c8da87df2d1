"""Saliency maps for files and folders of photos: decoding ahead, batches, resuming, reporting."""

import itertools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, PngImagePlugin
from torch import Tensor

from mlnet_utils import runtime
from mlnet_utils.data import images
from mlnet_utils.data.geometry import Letterbox
from mlnet_utils.predict.predictor import Predictor, load, predict_maps, to_density

LARGE = 16e6  # pixels of a photo that has the memory for itself
RECORD = "prediction.json"  # in the output folder: the checkpoint that made the maps
MADE_OF = "made_of"  # in the metadata of every map: the text that `begin` makes of its photo
Targets = dict[Path, list[Path]]  # photo or video -> its output files, the map itself last
Mark = Callable[[str], str]  # SHA-256 of a photo or video -> the text in its map's metadata


@dataclass
class FolderResult:
    """The photos (or videos) that were done, done before, failed with a reason, or left out."""

    done: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)
    left_out: list[Path] = field(default_factory=list)  # pictures of formats that are not read

    def summary(self) -> str:
        """A sentence, and a line for every photo that failed or was left out."""
        lines = [f"{len(self.done)} done, {len(self.skipped)} were done before"]
        lines += [f"failed: {str(path)!r}: {why}" for path, why in sorted(self.failed.items())]
        lines += [f"left out: {str(p)!r}: save it as JPEG, PNG or TIFF" for p in self.left_out]
        return "\n".join(lines)


def predict_folder(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out: str | Path,
    overlay: bool = False,
    npy: bool = False,
    force: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    fast: bool = False,
    upright: bool = True,
    megapixels: float = images.MEGAPIXELS,
) -> FolderResult:
    """Write the saliency maps of photos and of folders of photos, into the folder ``out``.

    Every photo gets ``<stem>.png`` (8 bits, its own size, maximum 255), with ``overlay`` also
    ``<stem>_overlay.png`` (the photo under its map), and with ``npy`` ``<stem>.npy`` (float32
    density, sum 1). Where two photos differ in their suffix only, it is kept: ``x.jpg.png``. Photos
    of a folder keep their sub-folders. Photos with all outputs in place are skipped, unless they
    changed since or some outputs are of another call: a map's metadata hold the SHA-256 of photo
    and checkpoint, and name the files made with it. ``force`` redoes them, and first removes files
    of another checkpoint that will be made again. Under ``accelerate launch`` every process takes
    its share on its own GPU; all return the same result.

    The checkpoint may be exported. ``batch_size`` photos pass at once, by default 8, on a CPU 1:
    more would be slower. ``device`` and ``fast`` are those of :func:`load`. ``upright`` turns
    photos as their EXIF data say; benchmarks want False. Photos of more ``megapixels`` fail; the
    largest takes 20 bytes of memory per pixel. A photo that is broken, or has files that would
    overwrite another file, stops nothing: the result names it.

    Raises:
        FileNotFoundError: a path or the checkpoint does not exist.
        ValueError: no photos, or ``out`` holds maps of another checkpoint without ``force``.
    """
    endings = [".npy"] * npy + ["_overlay.png"] * overlay + [".png"]
    if batch_size is None:
        batch_size = 1 if (device or runtime.pick_device()) == "cpu" else 8
    call = (checkpoint, paths, Path(out), endings, force, batch_size, device, fast)
    with (
        begin(*call, upright=upright) as (predictor, targets, result, mark),
        images.photo_limit(megapixels),
    ):
        _predict_photos(predictor, targets, result, mark, endings, batch_size, upright)
        return gather(result)


def _predict_photos(
    predictor: Predictor,
    targets: Targets,
    result: FolderResult,
    mark: Mark,
    endings: Sequence[str],
    batch_size: int,
    upright: bool,
) -> None:
    """Write the files of all photos, and note the outcome of each in ``result``."""
    one_at_a_time = threading.Lock()

    def turn(width: int, height: int) -> AbstractContextManager:
        return one_at_a_time if width * height > LARGE else nullcontext()

    def decode(photo: Path) -> tuple[Tensor, Letterbox, str]:
        with turn(*images.stored_size(photo)):
            digest = runtime.sha256_file(photo)  # first: a change while it is read will show
            return *predictor.prepare(images.read_image(photo, upright)), digest

    def write(photo: Path, box: Letterbox, digest: str, single: Tensor) -> None:
        with turn(box.photo_width, box.photo_height):
            density = to_density(single, predictor.config, box).float().numpy()
            for path, ending in zip(targets[photo], endings, strict=True):
                with runtime.atomic_path(path) as temporary:
                    if ending == ".npy":
                        np.save(temporary, density)
                    elif ending == "_overlay.png":
                        # Here: seaborn takes a second to import.
                        from mlnet_utils.plots import overlay as paint_overlay

                        # Read again: to keep the pixels of all photos would fill the memory.
                        pixels = images.read_image(photo, upright).permute(1, 2, 0).numpy()
                        Image.fromarray(paint_overlay(pixels, density)).save(temporary)
                    else:
                        about = PngImagePlugin.PngInfo()
                        about.add_text(MADE_OF, mark(digest))
                        # Level 6, the usual one, takes twice as long for a fifth less.
                        how = {"compress_level": 3, "pnginfo": about}
                        Image.fromarray(to_8_bits(density)).save(temporary, **how)

    def finished(futures: dict[Path, Future], problem: str = "") -> dict[Path, Any]:
        """Wait for all; return the values, and note the errors of photos without a value."""
        values = {}
        for photo, future in futures.items():
            try:
                values[photo] = future.result()
            except Exception as error:  # whatever it is, the other photos go on
                result.failed[photo] = f"{problem}{str(error) or type(error).__name__}"
        return values

    photos = list(targets)
    batches = [photos[start : start + batch_size] for start in range(0, len(photos), batch_size)]
    if runtime.first_of_launch():
        batches = runtime.progress(batches, "predicting", unit="batch")
    with ThreadPoolExecutor(min(8, runtime.cpu_count() + 1)) as pool:
        decoding, writing = {}, {}
        for batch in itertools.chain(batches, [[]]):  # decoded while the batch before is predicted
            ready = finished(decoding)
            decoding = {photo: pool.submit(decode, photo) for photo in batch}
            maps = []
            if ready:
                batched = torch.stack([image for image, *_ in ready.values()]).to(predictor.device)
                maps = predict_maps(predictor.model, predictor.config, batched)
            result.done += finished(writing, "its map cannot be written: ")
            writing = {
                photo: pool.submit(write, photo, *about, single)
                for (photo, (_, *about)), single in zip(ready.items(), maps, strict=True)
            }
        result.done += finished(writing, "its map cannot be written: ")


def _made_of(path: Path) -> str:
    with images.open_checked(path, ("PNG",)) as image:
        return image.info.get(MADE_OF, "")


def to_8_bits(density: np.ndarray) -> np.ndarray:
    """(H, W) uint8 with a maximum of 255, for files and challenges; unfit for KL and IG."""
    scaled = density / density.max()
    scaled *= 255  # in place: photos may be large
    return np.round(scaled, out=scaled).astype(np.uint8)


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
    fast: bool,
    suffixes: Sequence[str] = images.PHOTO_SUFFIXES,
    made_of: Callable[[Path], str] = _made_of,
    upright: bool = True,
) -> Iterator[tuple[Predictor, Targets, FolderResult, Mark]]:
    """The network, this process's share of the work, a result with earlier photos, the marks.

    Meanwhile other calls that would write into ``out`` wait. Arguments and errors as those of
    :func:`list_targets` and :func:`predict_folder`; ``made_of`` reads the mark of a map.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    processes = runtime.processes()
    predictor = load(checkpoint, device, fast)  # after the processes: they have chosen their GPUs
    targets, result = list_targets(paths, out, endings, suffixes)
    record = {"checkpoint": runtime.display_path(checkpoint), "versions": runtime.versions()}
    record |= {"sha256": runtime.sha256_file(checkpoint), "fast": fast}

    def mark(digest: str) -> str:
        photo = f"{digest}{'' if upright else '-stored'}"
        return " ".join((photo, f"{record['sha256']}{'-fast' * fast}", *endings))

    with runtime.locked(out):
        processes.wait_for_everyone()
        before = {} if force else record  # of the network that made the maps in ``out``
        if (out / RECORD).exists():
            with suppress(ValueError) if force else nullcontext():
                before = runtime.read_json(out / RECORD, "predict")
        elif there := [p for made in before and targets.values() for p in made if p.is_file()]:
            remedy = "choose another folder, or force"
            raise ValueError(f"'{there[0]}' exists, and `predict` did not make it: {remedy}")
        made_by = (before.get("sha256"), before.get("fast", False))
        other_maps = made_by != (record["sha256"], fast)
        if other_maps and not force:
            other = f"are of another checkpoint ({before.get('checkpoint')}), or of another `fast`"
            remedy = "choose another folder, delete this folder, or force new maps"
            raise ValueError(f"the maps in {out} {other}; {remedy}")
        kept = {} if force else targets
        done = {f for f, made in kept.items() if _is_done(f, made, made_of, mark)}
        todo = {file: made for file, made in targets.items() if file not in done}
        processes.wait_for_everyone()  # all have the same list before the first writes
        if processes.is_main_process:
            wanted = [path for made in todo.values() for path in made]
            runtime.remove_temporaries([*wanted, out / RECORD])
            # Before the record says otherwise: an interrupted call would leave maps of the other
            # network, which the next call would take for done.
            for path in filter(Path.is_file, wanted if other_maps else ()):
                path.unlink()
            runtime.write_json(out / RECORD, record)
        processes.wait_for_everyone()
        share = list(todo)[processes.process_index :: processes.num_processes]
        result.skipped = sorted(done)
        yield predictor, {file: todo[file] for file in share}, result, mark


def _is_done(file: Path, made: Sequence[Path], made_of: Callable[[Path], str], mark: Mark) -> bool:
    """True where all output files of the present photo are there, made together by this network."""
    if not all(path.is_file() for path in (file, *made)):
        return False
    try:
        return {*mark(runtime.sha256_file(file)).split()} <= {*made_of(made[-1]).split()}
    except Exception:  # a damaged map is made again; a damaged photo fails in its reader
        return False


def gather(result: FolderResult) -> FolderResult:
    """The results of all processes, in each of them; those of begin() are the same in all."""
    results = gather_object([result])
    done = sorted(path for each in results for path in each.done)
    failed = {path: why for each in results for path, why in each.failed.items()}
    return FolderResult(done, result.skipped, failed, result.left_out)


def list_targets(
    paths: Sequence[str | Path], out: Path, endings: Sequence[str], suffixes=images.PHOTO_SUFFIXES
) -> tuple[Targets, FolderResult]:
    """Every photo with its output files, a file for each ending (``.png``), the map's last.

    Photos of a folder keep their sub-folders. Hidden files, files of other suffixes, and the files
    in ``out``, are not taken for photos. The result names the other pictures in the folders, and
    photos that cannot be done: their files would overwrite another's, or a photo.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no photos, or ``out`` is one of the folders.
    """
    places: dict[Path, Path] = {}  # photo -> its path below ``out``
    result = FolderResult()
    for path in map(Path, paths):
        if path.is_dir():
            if path.resolve() == out.resolve():
                raise ValueError(f"maps in {path} would be the next call's input; choose another")
            for file in images.visible_files(path, (*suffixes, *images.OTHER_PICTURES), out):
                if file.suffix.lower() in suffixes:
                    places[file] = out / file.relative_to(path)
                else:
                    result.left_out.append(file)
        elif os.path.lexists(path):
            places[path] = out / path.name
        else:
            raise FileNotFoundError(f"{path} does not exist")
    if not places:
        raise ValueError(f"nothing ending in {', '.join(suffixes)} in {', '.join(map(str, paths))}")

    def key(path: Path) -> str:  # macOS and Windows do not tell A.png from a.png
        return os.path.realpath(path).lower()

    stems = images.output_stems(places, endings)
    # with_suffix() would cut a.b
    targets = {f: [stem.with_name(stem.name + e) for e in endings] for f, stem in stems.items()}
    owners: dict[str, list[Path]] = defaultdict(list)
    for file, made in targets.items():
        for path in (file, *made):
            owners[key(path)].append(file)
    for file, made in targets.items():
        for path in made:
            if len(sharing := owners[key(path)]) > 1:
                other = next((one for one in sharing if one != file), file)
                problem = f"{str(path)!r} would overwrite {str(other)!r} or a file of it"
                result.failed[file] = f"{problem}: rename it, or choose another out"
    return {f: made for f, made in targets.items() if f not in result.failed}, result
