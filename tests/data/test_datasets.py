"""Splits that never change, preparation, decoding, and loading that depends on nothing but keys."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIGMA, tiny_config
from miniatures import save_photo, save_salicon_mat
from PIL import Image

from mlnet_utils.data import datasets
from mlnet_utils.data.datasets import (
    EpochSampler,
    SaliencyDataset,
    make_loader,
    prepare,
    read_image,
)
from mlnet_utils.data.geometry import Letterbox, density_on_grid
from mlnet_utils.data.photos import SPLITS, Photo, Prepared
from mlnet_utils.data.readers import DATASETS, dataset_spec
from mlnet_utils.data.readers.spec import DatasetSpec
from mlnet_utils.data.splits import fold_split, hash_order, hash_split, split_photos

OSIE_LIKE = [Photo(str(number), f"{number}.jpg", 800, 600) for number in range(1001, 1701)]


# ---- splits ------------------------------------------------------------------------------------
def test_the_published_order_is_fixed():
    order = [photo.stem for photo in hash_order(OSIE_LIKE)]
    assert order[:5] == ["1039", "1467", "1064", "1392", "1391"]
    assert order[-3:] == ["1522", "1050", "1431"]
    assert [photo.stem for photo in hash_order(OSIE_LIKE[::-1])] == order


def test_the_published_split_is_fixed():
    photos = hash_split(OSIE_LIKE, 50, 150)
    assert Counter(photo.split for photo in photos) == {"train": 500, "val": 50, "test": 150}
    assert [photo.stem for photo in photos] == [photo.stem for photo in OSIE_LIKE]
    digests = {
        split: hashlib.sha256(
            " ".join(photo.stem for photo in photos if photo.split == split).encode()
        ).hexdigest()[:16]
        for split in ("train", "val", "test")
    }
    assert digests == {
        "train": "cb4078cd8fd8921c",
        "val": "b4df900b30b94238",
        "test": "4929951fdfc57af5",
    }


def test_folds_test_every_photo_once():
    folds = [fold_split(OSIE_LIKE, fold) for fold in range(5)]
    for place in range(700):
        assert Counter(photos[place].split for photos in folds) == {"train": 3, "val": 1, "test": 1}
    joined = " ".join(photo.split for photo in folds[0]).encode()
    assert hashlib.sha256(joined).hexdigest()[:16] == "ff4e40242f8a9720"


def test_impossible_splits_are_errors():
    with pytest.raises(
        ValueError, match=r"cannot take 5 validation and 5 test photos out of 10; .*`fold: 0`"
    ):
        hash_split(OSIE_LIKE[:10], 5, 5)
    with pytest.raises(ValueError, match=r"fold=3, but 4 photos cannot make 5 folds"):
        fold_split(OSIE_LIKE[:4], 3)
    with pytest.raises(ValueError, match=r"fold=5 must be in 0..4"):
        fold_split(OSIE_LIKE, 5)
    with pytest.raises(ValueError, match=r"unknown dataset 'ossie': use one of .*osie"):
        dataset_spec("ossie")


def split_of(photos, n_val=0.1, n_test=0.2, fold=-1):
    return split_photos(photos, "folder", n_val, n_test, fold)


def test_every_split_of_few_photos_has_one():
    assert Counter(p.split for p in split_of(OSIE_LIKE[:4])) == {"train": 2, "val": 1, "test": 1}
    assert Counter(p.split for p in split_of(OSIE_LIKE[:3])) == {"train": 1, "val": 1, "test": 1}
    with pytest.raises(ValueError, match="cannot take 1 validation and 1 test photos out of 2"):
        split_of(OSIE_LIKE[:2])


def test_photos_outside_the_user_s_split_are_an_error():
    own = [replace(photo, split="test") for photo in OSIE_LIKE[:9]]
    assert split_of(own) == own
    with pytest.raises(ValueError, match=r"2 photos are in none of the folders .*, e.g. 1010, whi"):
        split_of([*own, *OSIE_LIKE[9:11]])
    with pytest.raises(ValueError, match="fold=0, but folder has its own split"):
        split_of([*own, *OSIE_LIKE[9:11]], fold=0)
    with pytest.raises(ValueError, match="fold=0, but folder has its own split"):
        split_of(OSIE_LIKE, 0, 0, fold=0)


# ---- preparation -------------------------------------------------------------------------------
@pytest.fixture
def registered(monkeypatch, tiny_photos):
    """The tiny photos as a named dataset; returns the folder of the raw datasets."""
    photos, root = tiny_photos
    unsplit = [replace(photo, split="") for photo in photos]
    spec = DatasetSpec("osie", "Tiny", SIGMA, 30.0, lambda _: unsplit, root.name, val=4, test=5)
    monkeypatch.setitem(DATASETS, "osie", spec)
    return root.parent


def test_prepare_splits_hashes_and_describes(registered, tmp_path):
    prepared = prepare(tiny_config(dataset="osie"), registered, tmp_path / "data")
    meta = prepared.meta
    assert meta["photos"] == {"train": 10, "val": 4, "test": 5}
    assert (meta["sigma_px"], meta["px_per_degree"], meta["fixations"]) == (SIGMA, 30.0, 19 * 12)
    read = Prepared.read(tmp_path / "data")
    assert read.meta == {**meta, "files": read.meta["files"]}
    assert [photo.split for photo in read.photos] == [photo.split for photo in prepared.photos]
    assert read.check() == []


def test_limit_fold_and_sigma_are_respected(registered, tmp_path):
    def prepared(**options):
        return prepare(tiny_config(dataset="osie", **options), registered, tmp_path / "data")

    limited, complete = prepared(limit=2, sigma=3.0), prepared()
    assert (limited.meta["photos"], limited.sigma) == ({"train": 2, "val": 2, "test": 2}, 3.0)
    kept = {photo.stem: photo.split for photo in limited.photos}
    assert kept.items() <= {photo.stem: photo.split for photo in complete.photos}.items()
    meta = prepared(fold=1).meta
    assert (meta["fold"], meta["photos"]) == (1, {"train": 11, "val": 4, "test": 4})


def own_photos(tmp_path, rows, names="abcdefghij"):
    """A dataset ``folder`` with ten photos; returns the folder of the raw datasets."""
    for number, name in enumerate(names):
        save_photo(tmp_path / f"folder/images/{name}.png", seed=number)
    text = "image,x,y\n" + "".join(f"{name},{row}\n" for name in names for row in rows)
    (tmp_path / "folder/fixations.csv").write_text(text)
    return tmp_path


def test_own_photos_are_split_by_shares(tmp_path):
    root = own_photos(tmp_path, ["3,4", "70,4"])
    meta = prepare(tiny_config(dataset="folder", sigma=5.0), root, tmp_path / "run").meta
    assert meta["photos"] == {"train": 7, "val": 1, "test": 2}
    assert (meta["sigma_px"], meta["fixations"], meta["dropped_outside"]) == (5.0, 10, 10)
    with pytest.raises(ValueError, match="'folder' has no sigma of its own: set `sigma`"):
        prepare(tiny_config(dataset="folder"), root, tmp_path / "run")


def test_a_split_of_the_files_own_is_kept(tmp_path):
    for split in SPLITS:
        save_photo(tmp_path / f"folder/images/{split}/{split}.png")
    (tmp_path / "folder/fixations.csv").write_text("image,x,y\ntrain,1,1\nval,1,1\ntest,1,1\n")
    meta = prepare(tiny_config(dataset="folder", sigma=5.0), tmp_path, tmp_path / "run").meta
    assert meta["photos"] == {"train": 1, "val": 1, "test": 1}


def test_maps_alone_serve_losses_that_need_no_points(tmp_path):
    save_photo(tmp_path / "folder/images/train/a.png")
    save_photo(tmp_path / "folder/density_maps/a.png")
    config = tiny_config(dataset="folder", sigma=5.0)
    prepared = prepare(config, tmp_path, tmp_path / "run")
    (photo,) = prepared.photos
    assert (photo.density, prepared.meta["fixations"]) == ("density_maps/a.png", 0)
    for loss in ("kl + 0.1*nss", "ce"):
        with pytest.raises(
            ValueError, match=r"1 photos .* e.g. a, and loss=.* needs fixations; use"
        ):
            prepare(replace(config, loss=loss), tmp_path, tmp_path / "run")


@pytest.mark.parametrize("edition", ["2015", "2017"])
def test_the_edition_is_in_the_record(tmp_path, edition):
    for split in SPLITS:
        save_photo(tmp_path / f"salicon/images/{split}/{split}.jpg", 640, 480)
        path = tmp_path / f"salicon/fixations-{edition}/{split}/{split}.mat"
        if split != "test":
            save_salicon_mat(path, [[(1, 1)], [(640, 480)]], edition)
    config = tiny_config(dataset=f"salicon-{edition}")
    meta = prepare(config, tmp_path, tmp_path / "run").meta
    assert (meta["dataset"], meta["title"]) == (f"salicon-{edition}", f"SALICON {edition}")
    assert (meta["photos"], meta["fixations"]) == ({"train": 1, "val": 1, "test": 1}, 4)
    with pytest.raises(ValueError, match=rf"fold=0, but salicon-{edition} has its own split"):
        prepare(replace(config, fold=0), tmp_path, tmp_path / "run")


def test_the_sample_has_no_folds_and_its_maps_are_checked(tmp_path):
    with pytest.raises(ValueError, match="fold=1, but synthetic has its own split"):
        prepare(tiny_config(dataset="synthetic", fold=1), tmp_path, tmp_path / "data")
    prepared = prepare(tiny_config(dataset="synthetic", limit=1), tmp_path, tmp_path / "data")
    assert prepared.check() == []
    density = next((tmp_path / "data" / "densities").glob("test*.npz"))
    density.write_bytes(b"tampered")
    assert "has changed" in prepared.check()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": "osie"},
            r"dataset=osie \(prepared: synthetic\), sigma=24.0 \(prepared: 8.0\)",
        ),
        ({"fold": 2}, r"fold=2 \(prepared: -1\)"),
        ({"limit": 5}, r"limit=5 \(prepared: 12\)"),
        ({"train_limit": 5}, r"train_limit=5 \(prepared: 0\)"),
        ({"sigma": 9.0}, r"sigma=9.0 \(prepared: 8.0\); run the verb `prepare` again"),
    ],
)
def test_data_of_another_configuration_are_refused(changes, message):
    meta = {"dataset": "synthetic", "fold": -1, "limit": 12, "train_limit": 0, "sigma_px": 8.0}
    config = tiny_config(dataset="synthetic", limit=12)
    datasets.check_same_data(config, meta)
    datasets.check_same_data(config, {**meta, "dataset": "by hand", "fold": 3})
    early = {key: value for key, value in meta.items() if "limit" not in key}
    datasets.check_same_data(replace(config, limit=3), early)  # which did not note it
    with pytest.raises(ValueError, match=message):
        datasets.check_same_data(replace(config, **changes), meta)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"synthetic"}))
def test_a_dataset_that_is_absent_says_how_to_get_it(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"download {name}|own photos: .*does not exist"):
        prepare(tiny_config(dataset=name, sigma=5.0), tmp_path, tmp_path / "run")


@pytest.mark.realdata
def test_osie_is_what_was_counted(real_data, tmp_path):
    prepared = prepare(tiny_config(dataset="osie", limit=0), real_data, tmp_path)
    photos, meta = prepared.photos, prepared.meta
    assert meta["photos"] == {"train": 500, "val": 50, "test": 150}
    assert meta["fixations"] + meta["dropped_outside"] == 98321
    assert sorted(len(photo.fixations) for photo in photos)[350] in range(135, 146)
    assert {(photo.width, photo.height) for photo in photos} == {(800, 600)}


# ---- decoding ----------------------------------------------------------------------------------
def save(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return read_image(tmp_path / name)


def test_decoding_gives_rgb_in_order(tmp_path):
    image = Image.new("RGB", (4, 3), (255, 0, 0))
    image.putpixel((3, 0), (0, 0, 255))
    pixels = save(tmp_path, image)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 3, 4)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert pixels[:, 0, 3].tolist() == [0, 0, 255]


def test_greyscale_alpha_palette_cmyk_and_16_bit(tmp_path):
    assert save(tmp_path, Image.new("L", (2, 2), 90))[:, 0, 0].tolist() == [90] * 3
    transparent = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert save(tmp_path, transparent)[:, 0, 0].tolist() == [255] * 3
    palette = Image.new("RGB", (2, 2), (10, 20, 30)).quantize(4)
    assert save(tmp_path, palette)[:, 0, 0].tolist() == [10, 20, 30]
    cmyk = Image.new("CMYK", (8, 8), (0, 0, 0, 255))
    assert int(save(tmp_path, cmyk, "x.jpg").max()) < 10
    deep = Image.fromarray(np.full((2, 2), 40000, np.uint16))
    assert save(tmp_path, deep)[:, 0, 0].tolist() == [156] * 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    pixels = save(tmp_path, image, "x.jpg", exif=exif, quality=95)
    assert pixels.shape == (3, 16, 8)
    assert pixels[:, 2, 4].min() > 240
    assert pixels[:, 13, 4].max() < 15


def test_unreadable_photos_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("not a photo")
    with pytest.raises(ValueError, match=r"text.jpg cannot be decoded"):
        read_image(tmp_path / "text.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut.png cannot be decoded"):
        read_image(tmp_path / "cut.png")


# ---- items -------------------------------------------------------------------------------------
def make_dataset(tiny_photos, augment=False, **overrides):
    photos, root = tiny_photos
    prepared = Prepared(root, photos, {"root": ".", "sigma_px": SIGMA})
    return SaliencyDataset(prepared, "train", tiny_config(**overrides), augment)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_an_item_is_the_letterboxed_photo_with_its_ground_truth(tiny_photos):
    item = make_dataset(tiny_photos)[3]
    photo = tiny_photos[0][3]
    assert item["image"].shape == (3, 32, 40)
    assert item["image"].dtype == torch.uint8
    assert item["density"].shape == item["fixations"].shape == (1, 4, 5)
    assert item["density"].sum().item() == pytest.approx(1)
    assert item["fixations"].sum().item() == len(photo.fixations)
    assert int(item["index"]) == 3
    expected = density_on_grid(
        photo.fixations, Letterbox(photo.height, photo.width, 32, 40), (4, 5), SIGMA
    )
    torch.testing.assert_close(item["density"][0], expected.float())
    # The disc is brighter than all around it, and the fixations are on it.
    brightest = item["image"].float().sum(0).reshape(4, 8, 5, 8).amax((1, 3)).argmax()
    assert item["fixations"].flatten()[brightest] > 0


def test_flips_mirror_everything_together(tiny_photos):
    plain = make_dataset(tiny_photos)[(0, 3)]
    flipped = make_dataset(tiny_photos, augment=True, flip=1.0)[(0, 3)]
    for key in ("image", "density", "fixations"):
        assert torch.equal(flipped[key], plain[key].flip(-1))
        assert not torch.equal(flipped[key], plain[key])


def test_augmentation_depends_on_seed_epoch_and_photo_only(tiny_photos):
    options = {"augment": True, "flip": 0.5}
    first, second = (make_dataset(tiny_photos, **options) for _ in range(2))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(10)]
    ahead = {key: first[key] for key in keys}
    for key in reversed(keys):  # in another order
        assert same(ahead[key], second[key])
    assert any(not same(ahead[0, index], ahead[1, index]) for index in range(10))
    other = make_dataset(tiny_photos, **options, seed=1)
    assert any(not same(ahead[key], other[key]) for key in keys)


def test_the_cache_changes_nothing(tiny_photos):
    dataset = make_dataset(tiny_photos, cache=True, augment=True, flip=0.5)
    before = [dataset[(0, i)] for i in range(10)]
    assert len(dataset.cached) == 10
    assert all(same(dataset[(0, i)], before[i]) for i in range(10))


def test_a_photo_that_changed_size_is_an_error(tiny_photos):
    dataset = make_dataset(tiny_photos)
    dataset.photos = [replace(dataset.photos[0], width=99)]
    with pytest.raises(ValueError, match=r"train0.png is 61x75, but was 99x75.*prepare it again"):
        dataset[0]


def test_items_do_not_depend_on_the_worker(tiny_photos):
    dataset = make_dataset(tiny_photos, augment=True, flip=0.5)
    sampler = EpochSampler(10, 4, 0, True)
    alone, shared = (make_loader(dataset, sampler, workers) for workers in (0, 2))
    for epoch in (0, 1):  # the second time with the same workers
        sampler.epoch = epoch
        pairs = list(zip(alone, shared, strict=True))
        assert len(pairs) == 3
        assert all(same(a, b) for a, b in pairs)


# ---- order -------------------------------------------------------------------------------------
def indices(sampler):
    return [[index for _, index in batch] for batch in sampler]


def test_an_epoch_is_a_fixed_permutation():
    sampler = EpochSampler(10, 4, 0, True)
    assert len(sampler) == 3
    assert indices(sampler) == [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1]]
    sampler.epoch = 1
    assert indices(sampler) == [[9, 1, 3, 8], [7, 6, 0, 4], [2, 5]]
    assert next(iter(sampler))[0] == (1, 9)  # keys carry the epoch
    assert indices(EpochSampler(5, 2, 0, False)) == [[0, 1], [2, 3], [4]]


def test_an_epoch_can_be_entered_at_any_batch():
    sampler = EpochSampler(10, 4, 7, True)
    whole = list(sampler)
    for first in range(4):
        sampler.first_batch = first
        assert len(sampler) == 3 - first
        assert list(sampler) == whole[first:]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_same_global_batches(world):
    whole = indices(EpochSampler(10, 4, 0, True))
    shares = [EpochSampler(10, 4, 0, True, rank, world) for rank in range(world)]
    for number, batch in enumerate(whole):
        own = [list(share)[number] for share in shares]
        sizes = [share.batch_sizes(number) for share in shares]
        assert all(total == len(batch) for _, total in sizes)
        used = [i for keys, (n, _) in zip(own, sizes, strict=True) for _, i in keys[:n]]
        assert sorted(used) == sorted(batch)
        # A process without a share of the last batch of 2 still loads a photo, to step along.
        assert all(len(keys) == max(n, 1) for keys, (n, _) in zip(own, sizes, strict=True))
