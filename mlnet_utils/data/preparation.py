"""Prepare a raw dataset: read, split, hash, write the folder; by rules that need no seed."""

import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np

from mlnet_utils.config import Config
from mlnet_utils.data import synthetic
from mlnet_utils.data.images import SMALLEST_SIDE
from mlnet_utils.data.photos import MADE_BY, SPLITS, Photo, Prepared, StaleError, fingerprints
from mlnet_utils.data.readers import DATASETS, dataset_spec
from mlnet_utils.data.readers.spec import DatasetSpec
from mlnet_utils.runtime import locked, read_json, versions

NEEDS_POINTS = re.compile(r"\b(ce|nss)\b")  # losses that a density map cannot serve
SAMPLE = {"train": 960, "val": 60, "test": 100}  # stimuli of the synthetic sample
FOLDS = 5
DATA_KEYS = ("fold", "limit", "train_limit", "coordinates", "sigma_share")  # beside name and sigma


def prepare(config: Config, data_root: Path, folder: Path) -> Prepared:
    """Read a dataset, split it, hash its files, and write the prepared ``folder``.

    ``config`` names the dataset, the fold and the limits; ``data_root`` holds the raw datasets and
    is not written to. While another process prepares the same folder, this call waits. Raises a
    FileNotFoundError with the way to a missing part, a ValueError for damaged or unfit parts.
    """
    with locked(folder):
        return _prepare(config, data_root, folder)


def _prepare(config: Config, data_root: Path, folder: Path) -> Prepared:
    spec = dataset_spec(config.dataset)
    sigma = config.sigma or spec.sigma
    if np.isnan(sigma) and not config.sigma_share:
        remedy = "`sigma` (pixels of a degree of visual angle) or `sigma_share` (of the width)"
        raise ValueError(f"{spec.name!r} has no sigma of its own: set {remedy} in the preset")
    if config.coordinates and not spec.own:
        raise ValueError(f"config: coordinates are for own photos, not for {spec.name!r}")
    if spec.name == "synthetic":
        _refuse_fold(config.fold, spec.name)
        limit = config.limit or max(SAMPLE.values())
        counts = {split: min(count, limit) for split, count in SAMPLE.items()}
        photos, root = synthetic.write_sample(folder, counts), "."
        source, parts, sources = folder, [], {}
    else:
        source = data_root / spec.folder
        parts = [
            str(PurePath(of.folder if spec.joins else "", part))
            for of in map(dataset_spec, spec.joins or [spec.name])
            for part in of.read_from
        ]
        sources = fingerprints(source, parts)  # before they are read: a change meanwhile shows
        more = {"coordinates": config.coordinates} if spec.own else {}
        photos = (
            _joined(spec.joins, source, config.sigma) if spec.joins else spec.read(source, **more)
        )
        photos = split_photos(photos, spec, config.fold)
        if config.limit:
            photos = first(photos, config.limit, SPLITS)
        check_points(config, photos)
        root = str(source.resolve())
    if config.train_limit:
        photos = first(photos, config.train_limit, ("train",))
    if config.sigma_share:
        photos = [replace(photo, sigma=config.sigma_share * photo.width) for photo in photos]
        sigma = float(np.median([photo.sigma for photo in photos]))
    for split in SPLITS:
        if not any(photo.split == split for photo in photos):
            needed = "`train` needs train and val, `evaluate` test"
            warnings.warn(f"{spec.name}: no {split} photos; {needed}", stacklevel=3)
    if tiny := [photo for photo in photos if min(photo.width, photo.height) < SMALLEST_SIDE]:
        said = f"{len(tiny)} photo(s) have a side shorter than {SMALLEST_SIDE} pixels"
        size = f"{tiny[0].width}x{tiny[0].height}"
        raise ValueError(f"{spec.name}: {said}, e.g. {tiny[0].image} ({size}): remove them")
    used = {name for photo in photos for name in (photo.image, photo.density) if name}
    sources |= fingerprints(source, used - sources.keys())
    for photo in photos:
        photo.sha256 = sources[photo.image][0]
        photo.density_sha256 = sources[photo.density][0] if photo.density else ""
    meta = {
        "dataset": spec.name,
        "title": spec.title,
        "root": root,
        "sigma_px": sigma,
        "px_per_degree": None if np.isnan(spec.px_per_degree) else spec.px_per_degree,
        **{key: getattr(config, key) for key in DATA_KEYS},
        "photos": {split: sum(p.split == split for p in photos) for split in SPLITS},
        "fixations": sum(len(p.fixations) for p in photos),
        "dropped_outside": sum(p.dropped for p in photos),
        "versions": versions(),
    }
    prepared = Prepared(folder, photos, meta, {"read_from": parts, "files": sources})
    prepared.write()
    return prepared


def ensure(config: Config, data_root: Path, folder: Path) -> Prepared:
    """The prepared folder, made where it is missing or its sources have changed since.

    Raises the errors of :func:`prepare` and :func:`check_same_data`, and a StaleError where the
    sources have changed and something was trained on them, in ``checkpoints`` beside the folder.
    """
    with locked(folder):
        if (folder / "meta.json").is_file():
            check_same_data(config, read_json(folder / "meta.json", MADE_BY))
            try:
                return Prepared.read(folder)
            except StaleError as error:
                if any(folder.with_name("checkpoints").glob("*.pt")):
                    raise
                warnings.warn(f"{error.problem}: preparing the data again", stacklevel=2)
        return _prepare(config, data_root, folder)


def _joined(names: Iterable[str], root: Path, sigma: float) -> list[Photo]:
    """All photos of the first dataset, and the others' training photos with their own sigma, or
    with ``sigma`` where it is not 0."""
    photos = []
    for spec in map(dataset_spec, names):
        read = split_photos(spec.read(root / spec.folder), spec)
        own = (sigma or spec.sigma) if photos else 0.0
        photos += [
            replace(photo, image=f"{spec.folder}/{photo.image}", sigma=own)
            for photo in read
            if photo.split == "train" or not own
        ]
    return photos


def check_points(config: Config, photos: list[Photo]) -> None:
    """Raise a ValueError where the loss needs fixations, and photos to learn from have none."""
    unseen = [p.stem for p in photos if p.split != "test" and not len(p.fixations)]
    if unseen and NEEDS_POINTS.search(config.loss):
        said = f"{len(unseen)} photos to learn from have no fixations, e.g. {unseen[0]}"
        wanted = f"loss={config.loss!r} needs fixations; use mse, mlnet, kl, cc or sim"
        raise ValueError(f"{config.dataset}: {said}, and {wanted}")


def check_same_data(config: Config, meta: dict) -> None:
    """Raise a ValueError where a key that decides the data differs from a folder's ``meta``.

    Folders of a dataset that no preset can name were written by hand, and are taken as they are.
    """
    if meta["dataset"] not in DATASETS:
        return
    wanted = {key: getattr(config, key) for key in ("dataset", *DATA_KEYS)}
    if not config.sigma_share:
        wanted["sigma"] = config.sigma or dataset_spec(config.dataset).sigma
    known = {**wanted, **meta, "sigma": meta["sigma_px"]}  # early folders do not note the limits
    different = [f"{k}={v} (prepared: {known[k]})" for k, v in wanted.items() if known[k] != v]
    if different:
        said = f"the prepared data are of another configuration: {', '.join(different)}"
        raise ValueError(f"{said}; run the verb `prepare` again, or choose another run folder")


# ---- splits ------------------------------------------------------------------------------------
def hash_order(photos: list[Photo]) -> list[Photo]:
    """Photos ordered by the SHA-256 of their stem: an order without a seed or a library in it."""
    return sorted(photos, key=lambda photo: hashlib.sha256(photo.stem.encode()).hexdigest())


def hash_split(photos: list[Photo], n_val: int, n_test: int) -> list[Photo]:
    """Published rule for sets without a split: in hash order, first test, then val, rest train.

    A ValueError where no photo would be left to train on.
    """
    if n_val + n_test >= len(photos):
        taken = f"cannot take {n_val} validation and {n_test} test photos out of {len(photos)}"
        raise ValueError(f"{taken}: add photos, or with {FOLDS} or more set `fold: 0`")
    split = {photo.stem: "val" for photo in hash_order(photos)[: n_test + n_val]}
    split |= {photo.stem: "test" for photo in hash_order(photos)[:n_test]}
    return [replace(photo, split=split.get(photo.stem, "train")) for photo in photos]


def fold_split(photos: list[Photo], fold: int) -> list[Photo]:
    """Cross-validation: in hash order, photo i is tested in fold i mod 5 and validated in the next.

    A ValueError where the fold does not exist, or there are fewer photos than folds.
    """
    if not 0 <= fold < FOLDS <= len(photos):
        known = f"folds are 0 to {FOLDS - 1}, of at least {FOLDS} photos; -1 is the fixed split"
        raise ValueError(f"config: fold={fold} of {len(photos)} photos: {known}")
    place = {photo.stem: i % FOLDS for i, photo in enumerate(hash_order(photos))}
    names = {fold: "test", (fold + 1) % FOLDS: "val"}
    return [replace(photo, split=names.get(place[photo.stem], "train")) for photo in photos]


def split_photos(photos: list[Photo], spec: DatasetSpec, fold: int = -1) -> list[Photo]:
    """Give every photo of a dataset its split: its own, that of the published rule, or a fold's.

    ``fold`` is 0 to 4, or -1 for the split or the rule. A ValueError where some photos have a split
    and others none, where a fold is asked of photos with a split, or for too few photos.
    """
    unsplit = [photo.stem for photo in photos if not photo.split]
    if not spec.test or len(unsplit) < len(photos):
        _refuse_fold(fold, spec.name)
        if spec.test and unsplit:
            lone = f"{len(unsplit)} photos are in none of the folders {', '.join(SPLITS)}"
            raise ValueError(f"{spec.name}: {lone}, e.g. {unsplit[0]}, while others are: move them")
        return photos
    if fold >= 0:
        return fold_split(photos, fold)
    shares = (spec.val, spec.test)
    counts = (max(1, round(n * len(photos))) if n < 1 else int(n) for n in shares)
    return hash_split(photos, *counts)


def _refuse_fold(fold: int, name: str) -> None:
    """Raise a ValueError for a fold of a dataset that has its own split."""
    if fold >= 0:
        raise ValueError(f"config: fold={fold}, but {name} has its own split: set fold to -1")


def first(photos: list[Photo], limit: int, splits: Iterable[str]) -> list[Photo]:
    """At most the first ``limit`` photos, in hash order, of each of the ``splits``."""
    kept = {
        photo.stem
        for split in splits
        for photo in hash_order([p for p in photos if p.split == split])[:limit]
    }
    return [photo for photo in photos if photo.stem in kept or photo.split not in splits]
