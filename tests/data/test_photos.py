"""The prepared folder: what is written comes back, and damage is noticed."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mlnet_utils.data.photos import (
    NOBODY,
    Photo,
    check_prepared,
    fixation_statistics,
    prepared_digest,
    read_prepared,
    with_hashes,
    write_prepared,
)
from mlnet_utils.runtime import sha256_file


def test_a_round_trip_keeps_everything(run_folder, tiny_photos):
    photos, _ = tiny_photos
    read, meta = read_prepared(run_folder / "data")
    assert meta["title"] == "Tiny test photos"
    assert len(read) == len(photos) == 19
    for before, after in zip(photos, read, strict=True):
        for name in ("stem", "image", "width", "height", "split", "density", "sha256", "dropped"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("fixations", "observers", "durations"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype


def test_photos_without_fixations_and_durations(tmp_path):
    photos = [Photo("böse name", "a b/ü.png", 9, 7, "train"), Photo("b", "b.png", 9, 7, "val")]
    photos[1].fixations = np.array([[1, 2]], np.float32)
    photos[1].observers = np.array([4], np.int16)
    photos[1].durations = np.array([np.nan], np.float32)
    write_prepared(tmp_path, photos, {"sigma_px": 1.0})
    read, _ = read_prepared(tmp_path)
    assert (read[0].stem, read[0].image, len(read[0].fixations)) == ("böse name", "a b/ü.png", 0)
    assert np.isnan(read[1].durations).all()


def test_a_photo_s_arrays_must_have_one_length():
    with pytest.raises(ValueError, match="photo x: 2 fixations but 0 observers and 2 durations"):
        Photo("x", "x.png", 9, 7, fixations=np.zeros((2, 2), np.float32))


def test_stems_must_be_unique_and_photos_there(tmp_path):
    twins = [Photo("same", "a/same.png", 9, 7), Photo("same", "b/same.png", 9, 7)]
    with pytest.raises(ValueError, match=r"share their stem with another \(same\).*rename"):
        write_prepared(tmp_path, twins, {})
    with pytest.raises(ValueError, match="no photos to write"):
        write_prepared(tmp_path, [], {})


@pytest.mark.parametrize("name", ["meta.json", "index.jsonl", "fixations.npz"])
def test_a_missing_part_names_the_notebook_that_makes_it(run_folder, name):
    (run_folder / "data" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*01_data_preparation"):
        read_prepared(run_folder / "data")


@pytest.mark.parametrize("name", ["index.jsonl", "fixations.npz"])
def test_a_damaged_part_is_an_error(run_folder, name):
    path = run_folder / "data" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"damaged|disagree"):
        read_prepared(run_folder / "data")


def test_index_and_fixations_must_belong_together(run_folder):
    path = run_folder / "data" / "index.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"disagree; run notebook 01"):
        read_prepared(run_folder / "data")


@pytest.mark.parametrize("row", ["7", '"a text"', '{"stem": "train0"}', "[]"])
def test_rows_that_are_none_are_errors(run_folder, row):
    path = run_folder / "data" / "index.jsonl"
    path.write_text("\n".join([row, *path.read_text().splitlines()[1:]]))
    with pytest.raises(ValueError, match=r"index.jsonl or fixations.npz is damaged"):
        read_prepared(run_folder / "data")


def test_arrays_of_unequal_length_are_an_error(run_folder):
    path = run_folder / "data" / "fixations.npz"
    with np.load(path) as arrays:
        values = dict(arrays)
    np.savez(path, **{**values, "observers": values["observers"][:-1]})
    with pytest.raises(ValueError, match=r"disagree; run notebook 01"):
        read_prepared(run_folder / "data")


@pytest.mark.parametrize("name", ["index.jsonl", "fixations.npz"])
def test_a_changed_index_is_noticed(run_folder, tiny_photos, name):
    _, meta = read_prepared(run_folder / "data")
    other = {**meta["files"], name: meta["files"]["index.jsonl"][::-1]}
    (run_folder / "data" / "meta.json").write_text(json.dumps({**meta, "files": other}))
    problems = check_prepared(run_folder / "data", tiny_photos[1])
    assert len(problems) == 1
    assert f"{name} has changed" in problems[0]


def test_an_interrupted_preparation_does_not_look_complete(run_folder, tiny_photos, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_prepared(run_folder / "data", tiny_photos[0], {})
    with pytest.raises(FileNotFoundError, match=r"meta.json is missing"):
        read_prepared(run_folder / "data")


def test_the_digest_tells_what_is_learned_from(run_folder, tiny_photos):
    folder = run_folder / "data"
    digest = prepared_digest(folder)
    photos, meta = read_prepared(folder)
    write_prepared(folder, photos, {**meta, "title": "another title"})
    assert prepared_digest(folder) == digest
    write_prepared(folder, photos, {**meta, "sigma_px": meta["sigma_px"] + 1})
    assert prepared_digest(folder) != digest
    photos[0].fixations[0, 0] += 1
    write_prepared(folder, photos, meta)
    assert prepared_digest(folder) != digest


def test_changed_and_missing_photos_are_found(run_folder, tiny_photos, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tiny_photos[1], root)
    photos, meta = read_prepared(run_folder / "data")
    for photo in photos:
        photo.sha256 = sha256_file(root / photo.image)
    write_prepared(run_folder / "data", photos, meta)
    assert check_prepared(run_folder / "data", root) == []
    (root / "train0.png").unlink()
    (root / "val1.png").write_bytes(b"changed")
    problems = check_prepared(run_folder / "data", root)
    assert [problem.split(":")[0] for problem in problems] == ["train0", "val1"]
    assert "is missing" in problems[0]
    assert "SHA-256 differs" in problems[1]


def test_a_changed_density_map_is_noticed(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    Image.new("L", (40, 40), 9).save(tmp_path / "map.png")
    photo = with_hashes(Photo("x", "x.png", 40, 40, density="map.png"), tmp_path)
    write_prepared(tmp_path / "data", [photo], {})
    assert read_prepared(tmp_path / "data")[0][0].density_sha256 == photo.density_sha256 != ""
    assert check_prepared(tmp_path / "data", tmp_path) == []
    Image.new("L", (40, 40), 8).save(tmp_path / "map.png")
    assert "map.png has changed" in check_prepared(tmp_path / "data", tmp_path)[0]
    (tmp_path / "map.png").unlink()
    assert "map.png is missing" in check_prepared(tmp_path / "data", tmp_path)[0]


def test_index_is_one_line_of_json_per_photo(run_folder):
    lines = (run_folder / "data" / "index.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 19
    assert (first["stem"], first["fixations"], first["observers"]) == ("train0", 12, 3)


def test_statistics_follow_each_observer_in_order():
    photo = Photo(
        "x", "x.png", 99, 99,
        fixations=np.array([[0, 0], [10, 10], [3, 4], [10, 10], [3, 4]], np.float32),
        observers=np.array([0, 1, 0, 1, 0], np.int16),
    )  # fmt: skip
    pixels = fixation_statistics([photo, Photo("empty", "e.png", 9, 9)])
    assert pixels["per_photo"] == [5, 0]
    assert pixels["per_observer"] == [3, 2]
    assert pixels["saccades"].tolist() == [5, 0, 0]
    assert pixels["unit"] == "pixels"
    degrees = fixation_statistics([photo], px_per_degree=10.0)
    assert degrees["saccades"].tolist() == [0.5, 0, 0]
    assert degrees["unit"] == "degrees"


def test_fixations_without_observers_have_no_order(tmp_path):
    pooled = Photo(
        "x", "x.png", 99, 99,
        fixations=np.array([[0, 0], [10, 10], [3, 4]], np.float32),
        observers=np.full(3, NOBODY, np.int16),
    )  # fmt: skip
    found = fixation_statistics([pooled])
    assert (found["per_photo"], found["per_observer"], len(found["saccades"])) == ([3], [], 0)
    write_prepared(tmp_path, [pooled], {"sigma_px": 1})
    assert json.loads((tmp_path / "index.jsonl").read_text())["observers"] == 0


def test_points_outside_a_photo_are_dropped_and_counted():
    points = [[0, 0], [-1, 3], [8.4, 6.4], [8.5, 2], [np.nan, 1]]
    photo = Photo.from_points(
        "x", "x.png", (9, 7), points, observers=[0, 0, 1, 1, 2], durations=[5, 6, 7, 8, 9],
        split="val", density="x.npz",
    )  # fmt: skip
    assert (photo.width, photo.height, photo.dropped) == (9, 7, 3)
    assert (photo.split, photo.density) == ("val", "x.npz")
    np.testing.assert_array_equal(photo.fixations, np.float32([[0, 0], [8.4, 6.4]]))
    assert (photo.observers.tolist(), photo.durations.tolist()) == ([0, 1], [5, 7])
    dtypes = (photo.fixations.dtype, photo.observers.dtype, photo.durations.dtype)
    assert dtypes == (np.float32, np.int16, np.float32)


def test_points_may_come_without_observers_and_durations():
    photo = Photo.from_points("x", "x.png", (9, 7), np.array([[1, 2], [9, 9]]))
    assert photo.observers.tolist() == [NOBODY]
    assert np.isnan(photo.durations).all()
    empty = Photo.from_points("x", "x.png", (9, 7), [])
    assert (empty.fixations.shape, len(empty.observers), empty.dropped) == ((0, 2), 0, 0)


@pytest.mark.parametrize(
    ("rest", "number"), [({"observers": [2**15]}, "32,769"), ({"durations": [1, 2]}, "2 durations")]
)
def test_arrays_that_do_not_fit_the_points(rest, number):
    with pytest.raises(ValueError, match=f"x: .*{number}"):
        Photo.from_points("x", "x.png", (9, 7), [[1, 2]], **rest)
