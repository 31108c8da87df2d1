"""Anybody's saliency maps, read from files and scored as a network's are: the verb ``score``."""

import warnings
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp
from torch import Tensor

from mlnet_utils.data.images import PHOTO_SUFFIXES, read_map, visible_files
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.files import composed, load_mat, named
from mlnet_utils.experiments.evaluation import MODELS, TestSet, save_scores
from mlnet_utils.experiments.study import compare
from mlnet_utils.metrics import METRICS
from mlnet_utils.metrics.inputs import Map
from mlnet_utils.metrics.resize import resize
from mlnet_utils.metrics.summary import format_table, score_table
from mlnet_utils.predict.predictor import MODEL
from mlnet_utils.predict.submission import LOG_SUM, maps_in
from mlnet_utils.runtime import display_path, progress, reading, refuse_run, require

RESIZED, LOGS, BYTES = "resized", "log-densities", "of 8 bits"
CONSTANT, NEGATIVE = "constant", "negative somewhere, and no log-densities that sum to 1"
EXTRA = "more without a photo of the split"
BASELINES = tuple(model for model in MODELS if model != MODEL)


def score(
    maps: str | Path,
    data: str | Path,
    out: str | Path,
    split: str = "",
    protocol: str = "mit300",
    other: str | Path | None = None,
) -> dict:
    """Score saliency maps and the baselines; write ``metrics.json`` and ``per_image.csv``.

    ``maps`` and ``other`` are places as of :class:`MapFiles`; maps of ``other`` are scored too, and
    subtracted photo by photo. ``data`` is a run with prepared data, or the prepared folder, ``out``
    the folder to write into; ``split`` is by default test, or val where the test photos' fixations
    are secret. ``protocol`` decides definitions and the resizing of maps (docs/metrics.md).
    Returns the contents of ``metrics.json``: as :func:`evaluation.evaluate`, and ``maps``, a line
    on every place, and ``differences``, rows of :func:`study.compare`. Raises the errors of
    :class:`TestSet` and :class:`MapFiles`, and a ValueError where ``out`` is a run.
    """
    refuse_run(Path(out))
    testset = TestSet(Path(data), split)
    places = [MapFiles(Path(place), testset.photos) for place in (maps, other) if place]
    names = [place.name for place in places]
    if len({*names, *BASELINES}) < len(names) + len(BASELINES):
        raise ValueError(f"two models are called {names[-1]!r}: compare other maps, or rename them")
    predict = {place.name: lambda photo, p=place: p.read(photo, protocol) for place in places}
    with warnings.catch_warnings():  # the notes count them
        warnings.filterwarnings("ignore", "image .* 8-bit", UserWarning)
        rows = testset.score_models(predict, protocol, (*names, *BASELINES))
    report = {**testset.describe(protocol), "data": testset.prepared.digest}
    report["maps"] = {place.name: place.describe() for place in places}
    if other:
        table = pd.DataFrame(rows).assign(seed=0).rename(columns={"model": "cell"})
        found = compare(table, names[:1], names[1])
        found = found[["model", "reference", "metric", "mean", "low", "high", "infinite"]]
        report["differences"] = found.astype(object).where(found.notna(), None).to_dict("records")
    return save_scores(Path(out), report, rows, 2000)


def describe(report: dict) -> str:
    """The table of scores, the paired differences, and the notes on the maps."""
    parts = [score_table(report)]
    if rows := report.get("differences"):
        cells = dict.fromkeys(METRICS)
        for row in rows:
            if row["mean"] is not None:
                cells[row["metric"]] = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row)
        label = f"{rows[0]['model']} minus {rows[0]['reference']}"
        parts.append(format_table(pd.DataFrame(cells, index=pd.Index([label], name="difference"))))
    parts += [f"{name}: {notes}" for name, notes in report["maps"].items()]
    return "\n\n".join(parts)


class MapFiles:
    """A map for each photo, in a folder of files or in an HDF5 file as pysaliency writes it.

    Files are pictures, ``.npy``, ``.npz`` and ``.mat``. Maps belong to photos by their stem; of
    maps that share it, floats come before pictures, which have 8 bits. A map with exponentials
    that sum to 1 is a log-density, as pysaliency and the verb `submit` write it.

    Attributes:
        name: the place, which names the model in tables.
        notes: stems of the maps that are resized, of 8 bits and so on; files of no photo.

    Raises:
        FileNotFoundError: there is no such place.
        ValueError: photos without a map, maps of another shape than the photos, files that share a
            stem or cannot be read; counts and names them.
    """

    def __init__(self, place: Path, photos: Sequence[Photo]):
        self.place, self.name = place, display_path(place)
        stems, found = {photo.stem for photo in photos}, defaultdict(list)
        for name in self._names():
            path = PurePosixPath(composed(name)).with_suffix("")
            whole = "_".join(path.parts)  # stems of CAT2000 begin with the category
            found[whole if whole in stems else path.name].append(name)
        for same in found.values():
            floats = [n for n in same if PurePosixPath(n).suffix.lower() not in PHOTO_SUFFIXES]
            same[:] = floats or same
        several = [" and ".join(found[stem]) for stem in stems if len(found.get(stem, ())) > 1]
        self._refuse("photos have no map of their stem", stems - found.keys())
        self._refuse("photos have several maps", several)
        self.files = {stem: found[stem][0] for stem in stems}
        extra = sorted(name for stem in found.keys() - stems for name in found[stem])
        self.notes = {EXTRA: extra, **self._inspect(photos)}

    def _refuse(self, problem: str, names: Collection[str]) -> None:
        if names:
            found = f"{len(names)} {problem}: {named(sorted(names))}"
            wanted = "every photo of the split needs one map of its name and shape, of any size"
            raise ValueError(f"{self.place}: {found}; {wanted}")

    def _inspect(self, photos: Sequence[Photo]) -> dict[str, list[str]]:
        """Stems of the maps of each kind; an error where some have another shape."""
        found, misshapen = {kind: [] for kind in (RESIZED, LOGS, BYTES, CONSTANT, NEGATIVE)}, []
        for photo in progress(photos, f"reading {self.name}", unit="map"):
            single, is_log = self._read(photo)
            (height, width), stored = single.shape, Map(single, "prediction", photo.stem)
            # Rounding to whole pixels moves a side by less than one.
            if abs(height * photo.width - width * photo.height) > max(photo.width, photo.height):
                sizes = f"{width}x{height} of {photo.width}x{photo.height}"
                misshapen.append(f"{self.files[photo.stem]}, {sizes}")
            resized = (height, width) != (photo.height, photo.width)
            state = (resized, is_log, stored.looks_8bit, stored.constant, stored.low < 0)
            for kind, applies in zip(found, state, strict=True):
                found[kind] += [photo.stem] * applies
        self._refuse("maps have another shape (width x height) than their photos", misshapen)
        return found

    def describe(self) -> str:
        """One line: the number of maps of each kind, and names where it is not all of them."""
        text = f"{len(self.files)} maps"
        for kind, found in self.notes.items():
            if found:
                text += f"; {len(found)} {kind}"
                text += f" ({named(found)})" if len(found) != len(self.files) else ""
        few = "; 8 bits made small values 0: KL and IG say little of these"
        return text + (few if self.notes[BYTES] else "")

    def read(self, photo: Photo, protocol: str = "mit300") -> Tensor:
        """(H, W) float64: the map at the photo's size, see :func:`metrics.resize`."""
        return resize(self._read(photo)[0][None], photo.height, photo.width, protocol=protocol)[0]

    def _names(self) -> list[str]:
        """Names of all maps, relative to the place."""
        if self.place.is_dir():
            files = visible_files(self.place, (*PHOTO_SUFFIXES, ".npy", ".npz", ".mat"))
            return [path.relative_to(self.place).as_posix() for path in files]
        with (
            reading(self.place, "a folder of maps, or an HDF5 file", "name another"),
            require("h5py", "legacy").File(self.place) as file,
        ):
            return maps_in(file)

    def _read(self, photo: Photo) -> tuple[Tensor, bool]:
        """A map as it is stored, (h, w) float64, and True if its logarithm was stored."""
        name = self.files[photo.stem]
        path = self.place / name if self.place.is_dir() else self.place
        with reading(path, f"the map {name!r}, one matrix of finite numbers", "save it anew"):
            if path == self.place:
                with require("h5py", "legacy").File(path) as file:
                    values = file[name][()]
            elif path.suffix.lower() == ".mat":
                (values,) = load_mat(path).values()
            else:
                values = read_map(path)
            values = np.array(values, np.float64)  # a copy: those of some files are read-only
            if values.ndim != 2 or not values.size:
                raise ValueError(f"its shape is {values.shape}")
            is_log = abs(logsumexp(values)) < LOG_SUM
            values = np.exp(values) if is_log else values
            if not np.isfinite(values).all():
                raise ValueError("NaN or infinity in it")
        return torch.from_numpy(values), bool(is_log)
