"""Readers of OSIE and CAT2000, and what all readers share: pairing, damage, fixation maps."""

import shutil

import numpy as np
import pytest
from miniatures import cells, save_mat, save_osie, save_photo, truncate
from PIL import Image
from scipy.io import loadmat
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_matrix

from mlnet_utils.data.geometry import density_from_points, pixel_indices
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.data.readers.cat2000 import read_cat2000
from mlnet_utils.data.readers.files import (
    by_stem,
    check_looked_at,
    check_pairs,
    load_mat,
    marked_points,
    named,
    photo_size,
    read_map,
)
from mlnet_utils.data.readers.osie import read_osie


# ---- OSIE --------------------------------------------------------------------------------------
@pytest.fixture
def osie(tmp_path):
    """Two photos; the second's first subject has a fixation outside, its second only one."""
    save_osie(
        tmp_path,
        {
            "1001.jpg": [([1.0, 800.4], [1.0, 600.0], [200, 300]), ([400.6], [300.4], [150])],
            "1002.jpg": [([0.2, 10.0, 20.0], [5.0, 5.0, 900.0], [1, 2, 3]), ([7.0], [8.0], [4])],
        },
    )
    return tmp_path


def test_osie_is_read_as_published(osie):
    first, second = read_osie(osie)
    assert (first.stem, first.image) == ("1001", "data/stimuli/1001.jpg")
    assert (first.width, first.height, first.split) == (800, 600, "")
    # The authors' 1-based pixel is round(x): 0-based, that is the nearest pixel of x - 1.
    assert pixel_indices(first.fixations).tolist() == [[0, 0], [799, 599], [400, 299]]
    assert first.observers.tolist() == [0, 0, 1]
    assert first.durations.tolist() == [200, 300, 150]
    assert first.fixations.dtype == np.float32
    assert second.fixations.tolist() == [[9, 4], [6, 7]]
    assert second.observers.tolist() == [0, 1]
    assert second.durations.tolist() == [2, 4]
    assert second.dropped == 2


def test_osie_lacking_a_part(osie):
    (osie / "data/stimuli/1001.jpg").unlink()
    save_photo(osie / "data/stimuli/1003.jpg", 800, 600)
    with pytest.raises(ValueError, match=r"1 photos in .*stimuli without .*: 1003.jpg; 1 records"):
        read_osie(osie)
    shutil.rmtree(osie / "data/stimuli")
    with pytest.raises(FileNotFoundError, match=r"stimuli is missing; `python -m .* download osie"):
        read_osie(osie)


def test_osie_photo_of_another_size(osie):
    save_photo(osie / "data/stimuli/1002.jpg", 400, 300)
    with pytest.raises(ValueError, match=r"1002.jpg is 400x300 instead of 800x600"):
        read_osie(osie)


def test_osie_photo_cut_off(osie):
    truncate(osie / "data/stimuli/1002.jpg", 0.9)
    with pytest.raises(ValueError, match=r"photo .*1002.jpg cannot be decoded \(.*truncated"):
        read_osie(osie)


def test_osie_photo_nobody_looked_at(osie):
    save_osie(osie, {"1001.jpg": [([1.0], [1.0], [1])], "1002.jpg": [([900.0], [1.0], [1])]})
    with pytest.raises(
        ValueError, match=r"1 photos have no fixation on them \(1 .*outside\): 1002"
    ):
        read_osie(osie)


def osie_record(*subjects):
    return {"img": "1001.jpg", "subjects": cells(subjects)}


def osie_subject(x, y, durations):
    return {"fix_x": np.ones(x), "fix_y": np.ones(y), "fix_duration": np.ones(durations)}


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((1, 3)),
        cells([{"img": "1001.jpg"}]),
        cells([1, 2]),
        cells([osie_record(1, 2)]),
        cells([{"img": "1001.jpg", "subjects": np.zeros((1, 3))}]),
        cells([osie_record({"fix_x": np.ones(2), "fix_y": np.ones(2)})]),
        cells([osie_record({key: {"x": 1} for key in ("fix_x", "fix_y", "fix_duration")})]),
        cells([osie_record({"fix_x": "a", "fix_y": "b", "fix_duration": "c"})]),
        cells([osie_record(osie_subject(3, 2, 2))]),
        # As many x as y in all, which must not pair across the subjects.
        cells([osie_record(osie_subject(3, 2, 2), osie_subject(2, 3, 3))]),
        cells([osie_record(osie_subject(1, 1, 1))] * 2),
        cells([{"img": "", "subjects": cells([])}]),
    ],
    ids=[
        *("numbers", "no subjects", "cells of numbers", "subjects of numbers", "subjects a matrix"),
        *(
            "no durations",
            "structs",
            "text",
            "lengths",
            "lengths that add up",
            "two records",
            "no name",
        ),
    ],
)
def test_osie_of_another_structure(osie, content):
    save_mat(osie / "data/eye/fixations.mat", fixations=content)
    with pytest.raises(ValueError, match=r"fixations.mat is not that of osie: expected a cell"):
        read_osie(osie)


def test_osie_record_without_subjects(osie):
    records = [osie_record(), {**osie_record(osie_subject(1, 1, 1)), "img": "1002.jpg"}]
    save_mat(osie / "data/eye/fixations.mat", fixations=cells(records))
    with pytest.raises(ValueError, match=r"1 photos have no fixation on them .*: 1001"):
        read_osie(osie)


def test_osie_cut_off(osie):
    truncate(osie / "data/eye/fixations.mat")
    with pytest.raises(ValueError, match=r"fixations.mat is empty, damaged"):
        read_osie(osie)


@pytest.mark.realdata
def test_osie_is_what_was_counted(real_data):
    photos = read_osie(real_data / "osie")
    counts = [len(photo.fixations) for photo in photos]
    assert len(photos) == 700
    assert (sum(counts), min(counts), max(counts)) == (98321, 111, 179)
    assert sum(photo.dropped for photo in photos) == 0
    assert {len(np.unique(photo.observers)) for photo in photos} == {15}
    points = np.concatenate([photo.fixations for photo in photos])
    assert points.min(0) + 1 == pytest.approx([1.2, 1.2], abs=0.05)
    assert points.max(0) + 1 == pytest.approx([799.2, 599.2], abs=0.05)
    durations = np.concatenate([photo.durations for photo in photos])
    assert (durations.min(), np.median(durations), durations.max()) == (20, 190, 1975)


@pytest.mark.realdata
def test_osie_densities_agree_with_scipy(real_data):
    """Against the authors' rule, read independently: MATLAB's round, clamped, 1-based."""
    raw = loadmat(real_data / "osie/data/eye/fixations.mat", squeeze_me=True)["fixations"]
    subjects = {str(record["img"]): record["subjects"].item() for record in raw}
    for photo in read_osie(real_data / "osie")[::140]:
        counts = np.zeros((600, 800))
        for subject in subjects[f"{photo.stem}.jpg"]:
            points = np.stack([np.atleast_1d(subject[k].item()) for k in ("fix_x", "fix_y")], 1)
            for column, row in np.floor(points + 0.5).astype(int):
                counts[min(max(row, 1), 600) - 1, min(max(column, 1), 800) - 1] += 1
        expected = gaussian_filter(counts / counts.sum(), 24.0, mode="reflect", truncate=4)
        ours = density_from_points(photo.fixations, 600, 800, 24.0).numpy()
        assert np.abs(ours - expected).max() < 1e-6 * expected.max()


# ---- CAT2000 -----------------------------------------------------------------------------------
@pytest.fixture
def cat2000(tmp_path):
    """Two categories with a photo of the same number; saliency maps lie among the stimuli."""
    for category, seed in (("Action", 0), ("Art", 1)):
        save_photo(tmp_path / f"trainSet/Stimuli/{category}/001.jpg", seed=seed)
        save_photo(tmp_path / f"trainSet/Stimuli/{category}/Output/001_SaliencyMap.jpg")
        marks = np.zeros((48, 64), np.uint8)
        marks[10 + seed, [0, 20, 63]] = 1
        save_mat(tmp_path / f"trainSet/FIXATIONLOCS/{category}/001.mat", fixLocs=marks)
    return tmp_path


def test_cat2000_is_read_as_published(cat2000):
    action, art = read_cat2000(cat2000)
    assert (action.stem, action.image) == ("Action_001", "trainSet/Stimuli/Action/001.jpg")
    assert (art.width, art.height) == (64, 48)
    assert action.fixations.tolist() == [[0, 10], [20, 10], [63, 10]]
    assert art.fixations.tolist() == [[0, 11], [20, 11], [63, 11]]
    assert set(action.observers) == {NOBODY}


@pytest.mark.parametrize("kind", [csc_matrix, lambda values: values == 1])
def test_cat2000_as_sparse_and_as_logical_matrices(cat2000, kind):
    path = cat2000 / "trainSet/FIXATIONLOCS/Art/001.mat"
    save_mat(path, fixLocs=kind(loadmat(path)["fixLocs"].astype(float)))
    _, art = read_cat2000(cat2000)
    assert art.fixations.tolist() == [[0, 11], [20, 11], [63, 11]]


@pytest.mark.parametrize(
    "content",
    [{"a": 1}, np.full((48, 64), "", object), np.full((48, 64), 1j), "text"],
    ids=["struct", "cells", "complex", "text"],
)
def test_cat2000_of_another_structure(cat2000, content):
    save_mat(cat2000 / "trainSet/FIXATIONLOCS/Art/001.mat", fixLocs=content)
    with pytest.raises(ValueError, match=r"Art/001.mat is not CAT2000's: expected a matrix"):
        read_cat2000(cat2000)


def test_cat2000_faults(cat2000):
    locations = cat2000 / "trainSet/FIXATIONLOCS"
    save_mat(locations / "Art/001.mat", fixLocs=np.ones((64, 48), np.uint8))
    with pytest.raises(ValueError, match=r"Art/001.mat is 48x64, but its photo is 64x48"):
        read_cat2000(cat2000)
    save_mat(locations / "Art/001.mat", fixLocs=np.zeros((48, 64), np.uint8))
    with pytest.raises(ValueError, match=r"1 photos have no fixation on them .*: Art_001"):
        read_cat2000(cat2000)
    save_mat(locations / "Art/001.mat", other=1)
    with pytest.raises(ValueError, match=r"001.mat holds other instead of fixLocs"):
        read_cat2000(cat2000)
    (locations / "Art/001.mat").unlink()
    with pytest.raises(ValueError, match="cat2000 Art: 1 photos without fixation files: 001"):
        read_cat2000(cat2000)
    shutil.rmtree(locations / "Art")
    with pytest.raises(ValueError, match=r"1 categories in .* without in .*FIXATIONLOCS: Art"):
        read_cat2000(cat2000)


# ---- pairing -----------------------------------------------------------------------------------
def test_stems_must_be_unique(tmp_path):
    files = [tmp_path / name for name in ("b.jpg", "a_x.png", "a_x.jpg")]
    with pytest.raises(ValueError, match=r"1 stems belong to several files, such as .*a_x.jpg and"):
        by_stem(files, "set")
    assert list(by_stem(files[:2], "set", strip="_x")) == ["a", "b"]


def test_mismatches_are_counted_and_named():
    check_pairs("set", "photos", "abc", "maps", "cab")
    with pytest.raises(
        ValueError, match="set: 2 photos without maps: a, b; 1 maps without photos: d"
    ):
        check_pairs("set", "photos", "abc", "maps", "cd")
    assert named(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_photos_with_a_map_need_no_fixations():
    photo = Photo("a", "a.jpg", 4, 3, density="a.png")
    assert check_looked_at("set", [photo]) == [photo]


# ---- files -------------------------------------------------------------------------------------
def test_photo_sizes(tmp_path):
    assert photo_size(save_photo(tmp_path / "a.jpg", 31, 17)) == (31, 17)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (31, 17)).save(tmp_path / "turned.jpg", exif=exif)
    assert photo_size(tmp_path / "turned.jpg") == (17, 31)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_photos_that_are_cut_off(tmp_path, suffix):
    path = truncate(save_photo(tmp_path / f"a{suffix}", 200, 100), 0.8)
    with pytest.raises(ValueError, match=rf"photo .*a{suffix} cannot be decoded .*get it again"):
        photo_size(path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"MATLAB 7.3 MAT-file" + bytes(600)])
def test_mat_files_that_are_none(tmp_path, content):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.mat is empty, damaged or not MATLAB's"):
        load_mat(tmp_path / "x.mat")


def test_mat_files_of_version_7_3(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.mat", "w", userblock_size=512) as file:
        file["gaze"] = 1
    with open(tmp_path / "x.mat", "r+b") as file:  # as MATLAB marks them
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    with pytest.raises(ValueError, match=r"x.mat is empty, damaged or not MATLAB's \(.*7.3"):
        load_mat(tmp_path / "x.mat")


def test_damaged_mat_files_are_always_our_error(tmp_path):
    path = save_osie(tmp_path, {"1.jpg": [([1.0], [1.0], [1])] * 5})
    rng, content = np.random.default_rng(0), path.read_bytes()
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 2:
            damaged = damaged[: rng.integers(len(damaged))]
        else:
            damaged[rng.integers(128, len(damaged))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fixations.mat"):
            load_mat(path, "fixations")


def test_mat_files_without_variables(tmp_path):
    with pytest.raises(ValueError, match="holds nothing instead of gaze, image"):
        load_mat(save_mat(tmp_path / "x.mat"), "gaze", "image")


# ---- fixation maps -----------------------------------------------------------------------------
def fixation_map(points, width=200, height=100):
    values = np.zeros((height, width), np.uint8)
    values[[y for _, y in points], [x for x, _ in points]] = 255
    return values


POINTS = [(0, 0), (199, 99), (50, 40), (51, 40), (120, 3)]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npy", ".mat"])
def test_maps_give_their_points_back(tmp_path, suffix):
    path, values = tmp_path / f"map{suffix}", fixation_map(POINTS)
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".mat":
        save_mat(path, I=values / 255)
    else:
        Image.fromarray(values).save(path)
    points = marked_points(read_map(path), path, (200, 100))
    assert sorted(map(tuple, points.astype(int).tolist())) == sorted(POINTS)
    assert points.dtype == np.float32


def test_jpeg_does_not_change_crowded_maps(tmp_path):
    """MATLAB's quality of 75, 135 fixations of which most lie close together."""
    rng = np.random.default_rng(0)
    points = np.round(rng.normal((512, 384), 25, (135, 2))).astype(int)
    Image.fromarray(fixation_map(points, 1024, 768)).save(tmp_path / "map.jpg", quality=75)
    found = marked_points(read_map(tmp_path / "map.jpg"), tmp_path, (1024, 768)).astype(int)
    assert {tuple(p) for p in found.tolist()} == {tuple(p) for p in points.tolist()}


def test_maps_that_are_not_what_they_should_be(tmp_path):
    blurred = gaussian_filter(fixation_map(POINTS).astype(float), 5)
    with pytest.raises(ValueError, match=r"m.png is a blurred density map"):
        marked_points(blurred, "m.png", (200, 100))
    with pytest.raises(ValueError, match=r"m.png is 200x100, but its photo is 100x200"):
        marked_points(blurred, "m.png", (100, 200))
    assert marked_points(np.zeros((100, 200)), "m.png", (200, 100)).shape == (0, 2)
    np.save(tmp_path / "m.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"m.npy must be one matrix, got shape \(3,\)"):
        read_map(tmp_path / "m.npy")
    truncate(save_photo(tmp_path / "m.png", 200, 100))
    save_mat(tmp_path / "m.mat", a=1, b=2)
    for name in ("m.png", "m.mat"):
        with pytest.raises(ValueError, match=rf"map .*{name} cannot be read"):
            read_map(tmp_path / name)
