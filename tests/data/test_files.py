"""What all readers share: pairing by name, photos, MATLAB's files, maps of fixated pixels."""

import re

import numpy as np
import pytest
from miniatures import TURNED, cells, save_mat, save_photo, truncate
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_matrix

from mlnet_utils.data.readers import files
from mlnet_utils.data.readers.files import fixated_pixels, load_mat, photo_size


# ---- pairing -----------------------------------------------------------------------------------
def test_stems_must_be_unique(tmp_path):
    paths = [tmp_path / name for name in ("b.jpg", "a_x.png", "a_x.jpg")]
    with pytest.raises(ValueError, match=r"1 stems .*a_x\.jpg.*a_x\.png"):
        files.by_stem(paths, "set")
    assert list(files.by_stem(paths[:2], "set", strip="_x")) == ["a", "b"]


def test_mismatches_are_counted_and_named():
    files.check_pairs("set", "photos", "abc", "maps", "cab")
    with pytest.raises(ValueError, match=r"set: 2 photos .*: 'a', 'b'; 1 maps .*: 'd'"):
        files.check_pairs("set", "photos", "abc", "maps", "cd")
    assert re.fullmatch(r"'a', 'b', 'c', 'd', 'e'\D+2\D+", files.named(list("abcdefg")))


# ---- files -------------------------------------------------------------------------------------
def test_photo_sizes(tmp_path):
    assert photo_size(save_photo(tmp_path / "a.jpg", 31, 17)) == (31, 17)
    Image.new("RGB", (31, 17)).save(tmp_path / "turned.jpg", exif=TURNED)
    assert photo_size(tmp_path / "turned.jpg") == (17, 31)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_photos_that_are_cut_off(tmp_path, suffix):
    path = truncate(save_photo(tmp_path / f"a{suffix}", 200, 100), 0.8)
    with pytest.raises(ValueError, match=rf"a{suffix}' cannot be read"):
        photo_size(path)


NO_MAT = {
    **{"empty": b"", "page": b"<html>"},
    "of 7.3": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600),  # and then HDF5
}


@pytest.mark.parametrize("kind", NO_MAT)
def test_mat_files_that_are_none(tmp_path, kind):
    (tmp_path / "x.mat").write_bytes(NO_MAT[kind])
    with pytest.raises(ValueError, match=r"x\.mat' .*MATLAB"):
        load_mat(tmp_path / "x.mat")
    with pytest.raises(ValueError, match=r"x\.mat' .*MATLAB"):
        load_mat(truncate(save_mat(tmp_path / "x.mat", a=np.arange(99))))
    with pytest.raises(ValueError, match=r"x\.mat .*nothing.* gaze, image"):
        load_mat(save_mat(tmp_path / "x.mat"), "gaze", "image")


MATRICES = {
    "numbers": np.arange(24, dtype=np.int16).reshape(2, 3, 4),
    "complex numbers": np.array([[1 + 2j, 3]]),
    "text": np.array(["first", "second"]),
    "truth": np.eye(3) > 0,
    "sparse": csc_matrix(np.diag([1.0, 0, 2.5])),
    "sparse truth": csc_matrix(np.eye(3) > 0),
    "nothing": np.zeros((0, 3)),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", MATRICES)
def test_matrices_are_those_of_scipy(tmp_path, kind, packed):
    savemat(tmp_path / "x.mat", {"a": MATRICES[kind]}, do_compression=packed)
    expected, found = (read(tmp_path / "x.mat")["a"] for read in (loadmat, load_mat))
    expected = expected.toarray() if hasattr(expected, "toarray") else expected
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape


def test_cells_and_structs(tmp_path):
    inner = cells([{"a": np.eye(2), "long": "text"}, np.arange(3)])
    found = load_mat(save_mat(tmp_path / "x.mat", x=inner, y=1.0))
    assert found["y"] == [[1.0]]
    assert found["x"].shape == (1, 2)
    struct = found["x"][0, 0][0, 0]
    assert (struct.a.tolist(), struct.long.tolist()) == ([[1, 0], [0, 1]], ["text"])
    assert found["x"][0, 1].tolist() == [[0, 1, 2]]


# ---- fixation maps -----------------------------------------------------------------------------
SIZE = (200, 100)
POINTS = [(0, 0), (199, 99), (50, 40), (51, 40), (120, 3)]


def fixation_map(points, width=200, height=100):
    values = np.zeros((height, width), np.uint8)
    values[[y for _, y in points], [x for x, _ in points]] = 255
    return values


def save_map(path, values):
    if path.suffix == ".mat":
        return save_mat(path, I=values / 255)
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".npy", ".mat"])
def test_maps_give_their_points_back(tmp_path, suffix):
    points = fixated_pixels(save_map(tmp_path / f"map{suffix}", fixation_map(POINTS)), SIZE)
    assert sorted(map(tuple, points.astype(int).tolist())) == sorted(POINTS)
    assert points.dtype == np.float32


@pytest.mark.parametrize("suffix", [".png", ".npy", ".mat"])
def test_maps_that_count(tmp_path, suffix):
    values = fixation_map(POINTS) // 255
    values[50, 60:64] = 9, 4, 4, 2  # half of the maximum would leave one pixel of these
    values = values.astype(int) * 255 if suffix == ".mat" else values  # which is divided
    points = fixated_pixels(save_map(tmp_path / f"map{suffix}", values), SIZE)
    assert len(points) == len(POINTS) + 19
    assert (points == (61, 50)).all(axis=1).sum() == 4


def test_jpeg_does_not_change_crowded_maps(tmp_path):
    """MATLAB's quality of 75, 135 fixations of which most lie close together."""
    rng = np.random.default_rng(0)
    points = np.round(rng.normal((512, 384), 25, (135, 2))).astype(int)
    Image.fromarray(fixation_map(points, 1024, 768)).save(tmp_path / "map.jpg", quality=75)
    found = fixated_pixels(tmp_path / "map.jpg", (1024, 768)).astype(int)
    assert {tuple(p) for p in found.tolist()} == {tuple(p) for p in points.tolist()}


FAULTY = {
    "is blurred": gaussian_filter(fixation_map(POINTS).astype(float), 5),
    "is 100x200, but its photo is 200x100": np.zeros((200, 100)),
    "is 3, but its photo is 200x100": np.zeros(3),
    "not finite": np.full((100, 200), np.nan),
    "marks 20000 of 20000": np.ones((100, 200)),
    "between 0 and": fixation_map(POINTS) + np.eye(100, 200),
}


def test_maps_that_are_not_what_they_should_be(tmp_path):
    path = tmp_path / "m.npy"
    assert fixated_pixels(save_map(path, np.zeros((100, 200))), SIZE).shape == (0, 2)
    for said, values in FAULTY.items():
        with pytest.raises(ValueError, match=rf"m\.npy .*{said}"):
            fixated_pixels(save_map(path, values), SIZE)
    cut = truncate(save_photo(tmp_path / "m.png", *SIZE))
    for path in (cut, save_mat(tmp_path / "m.mat", a=1, b=2)):
        with pytest.raises(ValueError, match=rf"{path.name}' cannot be read"):
            fixated_pixels(path, SIZE)
