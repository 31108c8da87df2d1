"""Which photo is for training, validation or test: published rules that need no seed."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from mlnet_utils.data.photos import SPLITS, Photo


def hash_order(photos: list[Photo]) -> list[Photo]:
    """Photos ordered by the SHA-256 of their stem: an order without a seed or a library in it."""
    return sorted(photos, key=lambda photo: hashlib.sha256(photo.stem.encode()).hexdigest())


def hash_split(photos: list[Photo], n_val: int, n_test: int) -> list[Photo]:
    """Published rule for sets without a split: in hash order, first test, then val, rest train."""
    if n_val + n_test >= len(photos):
        raise ValueError(
            f"cannot take {n_val} validation and {n_test} test photos out of {len(photos)}; with "
            "fewer photos than published, but at least 5, set `fold: 0` in the preset for fifths"
        )
    ordered = hash_order(photos)
    split = {photo.stem: "test" for photo in ordered[:n_test]}
    split |= {photo.stem: "val" for photo in ordered[n_test : n_test + n_val]}
    return [replace(photo, split=split.get(photo.stem, "train")) for photo in photos]


def fold_split(photos: list[Photo], fold: int, folds: int = 5) -> list[Photo]:
    """Cross-validation: in hash order, photo i is tested in fold i mod 5 and validated in the next.

    Raises:
        ValueError: the fold does not exist, or there are fewer photos than folds.
    """
    if not 0 <= fold < folds:
        raise ValueError(
            f"config: fold={fold} must be in 0..{folds - 1}, or -1 for the fixed split"
        )
    if len(photos) < folds:
        raise ValueError(f"config: fold={fold}, but {len(photos)} photos cannot make {folds} folds")
    place = {photo.stem: i % folds for i, photo in enumerate(hash_order(photos))}
    names = {fold: "test", (fold + 1) % folds: "val"}
    return [replace(photo, split=names.get(place[photo.stem], "train")) for photo in photos]


def split_photos(
    photos: list[Photo], name: str, n_val: float, n_test: float, fold: int
) -> list[Photo]:
    """Give every photo its split: its own, that of the published rule, or a fold's.

    Args:
        photos: of one dataset; those of the user's own folders or a published split have one.
        name: of the dataset, for messages.
        n_val: validation photos of the rule, below 1 a share of all; likewise ``n_test``, which is
            0 for datasets with a split of their own.
        fold: 0 to 4, or -1 for the split or the rule.

    Raises:
        ValueError: some photos have a split and others none, a fold is asked of photos that have
            their split, or there are too few photos for the rule.
    """
    unsplit = [photo.stem for photo in photos if not photo.split]
    if fold >= 0:
        if not n_test or len(unsplit) < len(photos):
            raise ValueError(f"config: fold={fold}, but {name} has its own split")
        return fold_split(photos, fold)
    if n_test and len(unsplit) == len(photos):
        counts = (max(1, round(n * len(photos))) if n < 1 else int(n) for n in (n_val, n_test))
        return hash_split(photos, *counts)
    if n_test and unsplit:
        raise ValueError(
            f"{name}: {len(unsplit)} photos are in none of the folders {', '.join(SPLITS)}, e.g. "
            f"{unsplit[0]}, while others are: move them into one, or take all photos out of them"
        )
    return photos


def first(photos: list[Photo], limit: int, splits: Iterable[str]) -> list[Photo]:
    """At most the first ``limit`` photos, in hash order, of each of the ``splits``."""
    left_out = {
        p.stem
        for split in splits
        for p in hash_order([q for q in photos if q.split == split])[limit:]
    }
    return [photo for photo in photos if photo.stem not in left_out]
