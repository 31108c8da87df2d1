"""OSIE, and EyeCrowd, which comes in the same layout."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_config
from miniatures import cells, save_mat, save_osie, truncate
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter

from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.preparation import prepare, split_photos
from mlnet_utils.data.readers import DATASETS, dataset_spec
from mlnet_utils.data.readers.osie import read_osie


@pytest.fixture
def osie(tmp_path):
    """Two photos; the second's first subject has a fixation outside, its second only one."""
    one = [([1.0, 800.4], [1.0, 600.0], [200, 300]), ([400.6], [300.4], [150])]
    two = [([0.2, 10.0, 20.0], [5.0, 5.0, 900.0], [1, 2, 3]), ([7.0], [8.0], [4])]
    save_osie(tmp_path, {"1001.jpg": one, "1002.jpg": two})
    return tmp_path


def test_osie_is_read_as_published(osie):
    first, second = read_osie(osie)
    assert (first.stem, first.image, first.split) == ("1001", "data/stimuli/1001.jpg", "")
    assert (first.width, first.height) == (800, 600)
    # The authors' 1-based pixel is round(x): 0-based, that is the nearest pixel of x - 1.
    assert np.floor(first.fixations + 0.5).tolist() == [[0, 0], [799, 599], [400, 299]]
    assert first.observers.tolist() == [0, 0, 1]
    assert first.durations.tolist() == [200, 300, 150]
    assert first.fixations.dtype == np.float32
    assert second.fixations.tolist() == [[9, 4], [6, 7]]
    assert second.observers.tolist() == [0, 1]
    assert second.durations.tolist() == [2, 4]
    assert second.dropped == 2


def test_eyecrowd_has_empty_scanpaths(tmp_path):
    looked = [([1024.0], [768.0], [200]), ([], [], []), ([1.0, 2.0], [1.0, 2.0], [3, 4])]
    save_osie(tmp_path, {"001.jpg": looked}, 1024, 768)
    (photo,) = dataset_spec("eyecrowd").read(tmp_path)
    assert photo.fixations.tolist() == [[1023, 767], [0, 0], [1, 1]]
    assert photo.observers.tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"001\.jpg .*1024x768.* 800x600"):
        read_osie(tmp_path)


def test_missing_and_faulty_files(osie):
    truncate(osie / "data/stimuli/1002.jpg", 0.9)
    with pytest.raises(ValueError, match=r"1002\.jpg' cannot be read"):
        read_osie(osie)
    save_osie(osie, {"1001.jpg": [], "1002.jpg": [([900.0], [1.0], [1])]})
    with pytest.raises(ValueError, match=r"2 photos .*\(1 .*\): '1001', '1002'"):
        read_osie(osie)
    (osie / "data/stimuli/1001.jpg").rename(osie / "data/stimuli/1003.jpg")
    with pytest.raises(ValueError, match=r"1 photos .*: '1003\.jpg'; 1 records .*: '1001\.jpg'"):
        read_osie(osie)


def record(*subjects):
    """Of 1001.jpg; subjects are the lengths of their fields."""
    fields = ("fix_x", "fix_y", "fix_duration")
    made = [{name: np.ones(n) for name, n in zip(fields, of, strict=False)} for of in subjects]
    return {"img": "1001.jpg", "subjects": cells(made)}


STRUCTURES = {
    "no durations": [record((2, 2))],
    "lengths": [record((3, 2, 2))],
    "lengths that add up, but not of each subject": [record((3, 2, 2), (2, 3, 3))],
    "two records": [record((1, 1, 1))] * 2,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_another_structure(osie, name):
    save_mat(osie / "data/eye/fixations.mat", fixations=cells(STRUCTURES[name]))
    with pytest.raises(ValueError, match=r"fixations\.mat' .*osie"):
        read_osie(osie)


# ---- both together -----------------------------------------------------------------------------
def test_two_datasets_are_trained_on_together(tmp_path, monkeypatch):
    looked, both = [([40.0, 500.0], [300.0, 200.0], [200, 300])], tmp_path
    save_osie(both / "osie", {f"{1001 + i}.jpg": looked for i in range(10)})
    save_osie(both / "eyecrowd", {f"00{i}.jpg": looked for i in range(10)}, 1024, 768)
    for name in ("osie", "eyecrowd"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], val=1, test=2))
    prepared, alone, crowd = (
        prepare(tiny_config(dataset=name), both, both / "run" / name)
        for name in ("osie+eyecrowd", "osie", "eyecrowd")
    )
    assert prepared.meta["photos"] == {"train": 14, "val": 1, "test": 2}
    sigmas = {(photo.width, photo.sigma) for photo in prepared.photos}
    assert (prepared.sigma, sigmas) == (24, {(800, 0), (1024, 26)})
    assert prepared.check() == []
    for split in ("val", "test"):
        stems, wanted = ([p.stem for p in data.split(split)] for data in (prepared, alone))
        assert stems == wanted
    added = [photo.stem for photo in prepared.photos if photo.width == 1024]
    assert added == [photo.stem for photo in crowd.split("train")]
    wider = prepare(tiny_config(dataset="osie+eyecrowd", sigma=30), both, both / "run" / "wider")
    assert (wider.sigma, {photo.sigma for photo in wider.split("train")}) == (30, {0, 30})
    with pytest.raises(ValueError, match=r"fold=0, .*osie\+eyecrowd.* -1"):
        prepare(tiny_config(dataset="osie+eyecrowd", fold=0), both, both / "run")


# ---- the real data -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(real_data):
    return read_osie(real_data / "osie")


def counted(photos):
    """Photos, fixations in all, fewest and most of a photo, those dropped, and all points."""
    counts = [len(photo.fixations) for photo in photos]
    points = np.concatenate([photo.fixations for photo in photos]) + 1
    dropped = sum(photo.dropped for photo in photos)
    return (len(photos), sum(counts), min(counts), max(counts), dropped), points


@pytest.mark.realdata
def test_osie_is_what_was_counted(photos):
    counts, points = counted(photos)
    assert counts == (700, 98321, 111, 179, 0)
    assert {len(np.unique(photo.observers)) for photo in photos} == {15}
    assert points.min(0) == pytest.approx([1.2, 1.2], abs=0.05)
    assert points.max(0) == pytest.approx([799.2, 599.2], abs=0.05)
    durations = np.concatenate([photo.durations for photo in photos])
    assert (durations.min(), np.median(durations), durations.max()) == (20, 190, 1975)


@pytest.mark.realdata
def test_eyecrowd_is_what_was_counted(real_data):
    spec = dataset_spec("eyecrowd")
    photos = split_photos(spec.read(real_data / "eyecrowd"), spec)
    counts, points = counted(photos)
    assert counts == (500, 126348, 206, 301, 0)
    scanpaths = sum(len(np.unique(photo.observers)) for photo in photos)
    assert 500 * 16 - scanpaths == 3  # which are empty
    assert points.min(0) == pytest.approx([1, 1.9], abs=0.05)
    assert points.max(0).tolist() == [1024, 768]
    assert Counter(photo.split for photo in photos) == {"train": 350, "val": 50, "test": 100}


@pytest.mark.realdata
def test_osie_densities_agree_with_scipy(real_data, photos):
    """Against the authors' rule, read independently: MATLAB's round, clamped, 1-based."""
    raw = loadmat(real_data / "osie/data/eye/fixations.mat", squeeze_me=True)["fixations"]
    subjects = {str(record["img"]): record["subjects"].item() for record in raw}
    for photo in photos[::140]:
        counts = np.zeros((600, 800))
        for subject in subjects[f"{photo.stem}.jpg"]:
            points = np.stack([np.atleast_1d(subject[k].item()) for k in ("fix_x", "fix_y")], 1)
            for column, row in np.floor(points + 0.5).astype(int):
                counts[min(max(row, 1), 600) - 1, min(max(column, 1), 800) - 1] += 1
        expected = gaussian_filter(counts / counts.sum(), 24.0, mode="reflect", truncate=4)
        ours = density_from_points(photo.fixations, 600, 800, 24.0).numpy()
        assert np.abs(ours - expected).max() < 1e-6 * expected.max()
