"""Splits that never change, and the preparation of datasets."""

import hashlib
import pickle
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from conftest import SIGMA, files, tiny_config
from miniatures import save_map, save_photo
from test_runtime import abandon

from mlnet_utils.config import load_config
from mlnet_utils.data import preparation, synthetic
from mlnet_utils.data.photos import SPLITS, Photo, Prepared, StaleError
from mlnet_utils.data.preparation import check_same_data, ensure, prepare, split_photos
from mlnet_utils.data.readers import DATASETS, dataset_spec
from mlnet_utils.data.readers.spec import DatasetSpec

OSIE_LIKE = [Photo(str(number), f"{number}.jpg", 800, 600) for number in range(1001, 1701)]


# ---- splits ------------------------------------------------------------------------------------
def digest(words):
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def test_the_published_order_is_fixed():
    order = [photo.stem for photo in preparation.hash_order(OSIE_LIKE)]
    assert order[:5] == ["1039", "1467", "1064", "1392", "1391"]
    assert order[-3:] == ["1522", "1050", "1431"]
    assert [photo.stem for photo in preparation.hash_order(OSIE_LIKE[::-1])] == order


def test_the_published_split_is_fixed():
    photos = preparation.hash_split(OSIE_LIKE, 50, 150)
    assert [photo.stem for photo in photos] == [photo.stem for photo in OSIE_LIKE]
    stems = {split: [p.stem for p in photos if p.split == split] for split in SPLITS}
    assert {split: (len(stems[split]), digest(stems[split])) for split in SPLITS} == {
        "train": (500, "cb4078cd8fd8921c"),
        "val": (50, "b4df900b30b94238"),
        "test": (150, "4929951fdfc57af5"),
    }


def test_folds_test_every_photo_once():
    folds = [preparation.fold_split(OSIE_LIKE, fold) for fold in range(5)]
    for photos in zip(*folds, strict=True):
        assert Counter(photo.split for photo in photos) == {"train": 3, "val": 1, "test": 1}
    assert digest(photo.split for photo in folds[0]) == "ff4e40242f8a9720"


def test_impossible_splits_are_errors():
    for photos, fold in ((OSIE_LIKE[:4], 3), (OSIE_LIKE, 5)):
        with pytest.raises(ValueError, match=rf"fold={fold} of {len(photos)} photos"):
            preparation.fold_split(photos, fold)
    with pytest.raises(ValueError, match=r"'ossie': .* osie,"):
        dataset_spec("ossie")
    with pytest.raises(ValueError, match=r"1 validation .* 1 test .* 2\b"):
        split_of(OSIE_LIKE[:2])


def split_of(photos, n_val=0.1, n_test=0.2, fold=-1):
    return split_photos(photos, DatasetSpec("folder", "", "", val=n_val, test=n_test), fold)


@pytest.mark.parametrize("n", [3, 4])
def test_every_split_of_few_photos_has_one(n):
    counts = Counter(photo.split for photo in split_of(OSIE_LIKE[:n]))
    assert counts == {"train": n - 2, "val": 1, "test": 1}


def test_photos_outside_the_user_s_split_are_an_error():
    own = [replace(photo, split="test") for photo in OSIE_LIKE[:9]]
    assert split_of(own) == own
    with pytest.raises(ValueError, match=r"2 photos .*train, val, test.* 1010\b"):
        split_of([*own, *OSIE_LIKE[9:11]])
    for photos, shares in (([*own, *OSIE_LIKE[9:11]], (0.1, 0.2)), (OSIE_LIKE, (0, 0))):
        with pytest.raises(ValueError, match=r"fold=0, .*folder.* -1"):
            split_of(photos, *shares, fold=0)


# ---- preparation -------------------------------------------------------------------------------
@pytest.fixture
def registered(monkeypatch, tiny_photos):
    """The tiny photos as a named dataset; returns the folder of the raw datasets."""
    photos, root = tiny_photos
    unsplit = [replace(photo, split="") for photo in photos]
    spec = DatasetSpec("osie", "Tiny", root.name, lambda _: unsplit, SIGMA, 30.0, val=4, test=5)
    monkeypatch.setitem(DATASETS, "osie", spec)
    return root.parent


def test_prepare_splits_hashes_and_describes(registered, tmp_path):
    prepared = prepare(tiny_config(dataset="osie"), registered, tmp_path / "data")
    meta, read = prepared.meta, Prepared.read(tmp_path / "data")
    assert meta["photos"] == {"train": 10, "val": 4, "test": 5}
    assert (meta["sigma_px"], meta["px_per_degree"], meta["fixations"]) == (SIGMA, 30.0, 19 * 12)
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


OWN = tiny_config(dataset="folder", sigma=5.0)


def own_photos(tmp_path, *rows):
    """A dataset ``folder`` with ten photos and these rows of each; the raw datasets' folder."""
    for number, name in enumerate("abcdefghij"):
        save_photo(tmp_path / f"folder/images/{name}.png", seed=number)
    text = "image,x,y\n" + "".join(f"{name},{row}\n" for name in "abcdefghij" for row in rows)
    (tmp_path / "folder/fixations.csv").write_text(text)
    return tmp_path


def test_own_photos_are_split_by_shares_and_small_ones_refused(tmp_path):
    root = own_photos(tmp_path, *(f"{x},4" for x in range(3, 22)), "70,4")  # one is outside
    meta = prepare(OWN, root, tmp_path / "run").meta
    assert meta["photos"] == {"train": 7, "val": 1, "test": 2}
    assert (meta["sigma_px"], meta["fixations"], meta["dropped_outside"]) == (5.0, 190, 10)
    with pytest.raises(ValueError, match=r"'folder' .*`sigma`"):
        prepare(replace(OWN, sigma=0), root, tmp_path / "run")
    # What no network takes is refused before it is trained on.
    save_photo(tmp_path / "folder/images/c.png", height=31)
    with pytest.raises(ValueError, match=r"1 photo.* images/c.png \(64x31\)"):
        prepare(OWN, root, tmp_path / "run")


def test_changed_sources_are_prepared_again_unless_something_was_trained_on_them(tmp_path):
    root, data = own_photos(tmp_path, "3,4"), tmp_path / "run/data"
    first = ensure(OWN, root, data).digest
    assert ensure(OWN, root, data).digest == first
    own_photos(tmp_path, "3,5")
    with pytest.warns(UserWarning, match=r"fixations\.csv .*changed"):
        assert ensure(OWN, root, data).digest != first
    with pytest.raises(ValueError, match=r"sigma=6.0 \(prepared: 5.0\)"):
        ensure(replace(OWN, sigma=6.0), root, data)
    save_photo(root / "folder/images/more.png")
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/best.pt").touch()
    with pytest.raises(StaleError, match=r"more\.png was added") as caught:
        ensure(OWN, root, data)
    sent = pickle.loads(pickle.dumps(caught.value))  # as a loader's process or a study's does
    assert str(sent) == str(caught.value)


def test_maps_alone_serve_losses_that_need_no_points(tmp_path):
    save_photo(tmp_path / "folder/images/train/a.png")
    save_map(tmp_path / "folder/density_maps/a.png")
    prepared = prepare(OWN, tmp_path, tmp_path / "run")
    assert [photo.density for photo in prepared.photos] == ["density_maps/a.png"]
    assert prepared.meta["fixations"] == 0
    for loss in ("kl + 0.1*nss", "ce"):
        with pytest.raises(ValueError, match=rf"1 photos .* a, .*loss='{re.escape(loss)}'"):
            prepare(replace(OWN, loss=loss), tmp_path, tmp_path / "run")


def test_the_sample_has_no_folds_and_its_maps_are_checked(tmp_path):
    sample = tiny_config(dataset="synthetic", limit=1)
    with pytest.raises(ValueError, match=r"fold=1, .*synthetic.* -1"):
        prepare(replace(sample, fold=1), tmp_path, tmp_path / "data")
    prepared = prepare(sample, tmp_path, tmp_path / "data")
    assert prepared.check() == []
    (tmp_path / "data/densities/test_0000.npz").write_bytes(b"tampered")
    assert "has changed" in prepared.check()[0]


OTHERS = [
    ({"dataset": "osie"}, r"dataset=osie \(prepared: synthetic\), sigma=24.0 \(prepared: 8"),
    ({"fold": 2}, r"fold=2 \(prepared: -1\)"),
    ({"limit": 5}, r"limit=5 \(prepared: 12\)"),
    ({"train_limit": 5}, r"train_limit=5 \(prepared: 0\)"),
    ({"sigma": 9.0}, r"sigma=9.0 \(prepared: 8.0\); run the verb `prepare` again"),
]


def test_data_of_another_configuration_are_refused():
    early = {"dataset": "synthetic", "fold": -1, "sigma_px": 8.0}
    meta = {**early, "limit": 12, "train_limit": 0}
    config = tiny_config(dataset="synthetic", limit=12)
    check_same_data(config, meta)
    check_same_data(config, {**meta, "dataset": "by hand", "fold": 3})
    check_same_data(replace(config, limit=3), early)  # which did not note it
    for changes, message in OTHERS:
        with pytest.raises(ValueError, match=message):
            check_same_data(replace(config, **changes), meta)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"synthetic"}))
def test_a_dataset_that_is_absent_says_how_to_get_it(name, tmp_path):
    said = rf"download {name.partition('+')[0]}.*--root|own photos: .*not exist"
    with pytest.raises(FileNotFoundError, match=said):
        prepare(tiny_config(dataset=name, sigma=5.0), tmp_path, tmp_path / "run")


def test_a_killed_preparation_or_check_leaves_nothing_for_long(tmp_path):
    data = tmp_path / "data"
    config = load_config("tiny", limit=1)
    made = files(prepare(config, tmp_path, data).folder)
    for name in made:
        abandon(data / name)
    prepare(config, tmp_path, data)
    assert files(data) == made
    abandon(data / "sources.json")
    (data / "images/test_0000.png").touch()  # its new time is noted
    Prepared.read(data)
    assert files(data) == made


def test_two_processes_prepare_a_folder_once(tmp_path, monkeypatch):
    """The second must not write the photos anew while the first already trains on them."""
    real, written = synthetic.write_sample, []

    def write_sample(*arguments):
        written.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(synthetic, "write_sample", write_sample)
    config = load_config("tiny", limit=2)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(ensure, config, tmp_path, tmp_path / "data") for _ in range(2)]
    assert calls[0].result().digest == calls[1].result().digest
    assert len(written) == 1
