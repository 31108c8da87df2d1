"""Photos, their ground truth, and the prepared folder: what is written comes back."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SIGMA
from PIL import Image

from mlnet_utils.data import photos as photo_module
from mlnet_utils.data.geometry import Letterbox, density_from_points, density_on_grid
from mlnet_utils.data.photos import NOBODY, Photo, Prepared, StaleError, fingerprints
from mlnet_utils.runtime import read_json, write_json

META = {"root": ".", "sigma_px": SIGMA, "dataset": "tiny", "title": "Tiny test photos"}


# ---- a photo -----------------------------------------------------------------------------------
def test_points_outside_a_photo_are_dropped_and_counted():
    points = [[0, 0], [-1, 3], [8.4, 6.4], [8.5, 2], [np.nan, 1]]
    looked = {"observers": [0, 0, 1, 1, 2], "durations": [5, 6, 7, 8, 9]}
    photo = Photo.from_points("x", "x.png", (9, 7), points, **looked, split="val", density="x.npz")
    assert (photo.width, photo.height, photo.dropped) == (9, 7, 3)
    assert (photo.split, photo.density) == ("val", "x.npz")
    for found, expected in (
        (photo.fixations, np.float32([[0, 0], [8.4, 6.4]])),
        (photo.observers, np.int16([0, 1])),
        (photo.durations, np.float32([5, 7])),
    ):
        np.testing.assert_array_equal(found, expected, strict=True)


def test_arrays_that_do_not_fit_the_points():
    with pytest.raises(ValueError, match=r"x: .*32,769"):
        Photo.from_points("x", "x.png", (9, 7), [[1, 2]], observers=[2**15])
    with pytest.raises(ValueError, match=r"x: .*2 durations"):
        Photo.from_points("x", "x.png", (9, 7), [[1, 2]], durations=[1, 2])


def test_statistics_follow_each_observer_in_order():
    statistics = photo_module.fixation_statistics
    points = [[0, 0], [10, 10], [3, 4], [10, 10], [3, 4]]
    photo = Photo.from_points("x", "x.png", (99, 99), points, observers=[0, 1, 0, 1, 0])
    pixels = statistics([photo, Photo("empty", "e.png", 9, 9)])
    assert (pixels["per_photo"], pixels["per_observer"]) == ([5, 0], [3, 2])
    assert (pixels["saccades"].tolist(), pixels["unit"]) == ([5, 0, 0], "pixels")
    degrees = statistics([photo], px_per_degree=10.0)
    assert (degrees["saccades"].tolist(), degrees["unit"]) == ([0.5, 0, 0], "degrees")
    pooled = statistics([Photo.from_points("x", "x.png", (99, 99), points)])
    assert (pooled["per_photo"], pooled["per_observer"]) == ([5], [])
    assert len(pooled["saccades"]) == 0


# ---- ground truth ------------------------------------------------------------------------------
POINTS = np.array([[10, 20], [30.4, 5], [30, 5]], np.float32)


@pytest.fixture
def mapped(tmp_path):
    """Data of one photo, which has a density map and no fixations."""
    density = density_from_points(POINTS, 48, 64, SIGMA)
    np.savez(tmp_path / "a.npz", density=density.numpy())
    Image.new("RGB", (64, 48), (90, 60, 30)).save(tmp_path / "a.png")
    photo = Photo("a", "a.png", 64, 48, "train", density="a.npz")
    return Prepared(tmp_path, [photo], META)


def looked_at(density):
    return Photo.from_points("a", "a.png", (64, 48), POINTS, split="train", density=density)


def test_fixations_come_before_a_map_and_a_photos_own_sigma_before_the_datasets(mapped):
    for own, given, used in ((0, None, SIGMA), (0, 2.0, 2.0), (3.0, 2.0, 2.0), (3.0, None, 3.0)):
        photo = replace(looked_at("flat.png"), sigma=own)  # which is not even there
        found = mapped.density(photo, given)
        assert torch.equal(found, density_from_points(POINTS, 48, 64, used))
    replace(mapped, photos=[photo]).write()
    read = Prepared.read(mapped.folder)
    assert [p.sigma for p in read.photos] == [3.0]
    box, grid = Letterbox(48, 64, 48, 64), (6, 8)
    assert torch.equal(read.grid_density(photo, box, grid), density_on_grid(POINTS, box, grid, 3.0))


@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 64), (104, 40)])
def test_map_and_fixations_agree(mapped, height, width):
    (photo,), box, grid = mapped.photos, Letterbox(48, 64, height, width), (height // 8, width // 8)
    close = torch.testing.assert_close
    close(mapped.density(photo), density_from_points(POINTS, 48, 64, SIGMA))
    by_map = mapped.grid_density(photo, box, grid)
    close(by_map, density_on_grid(POINTS, box, grid, SIGMA))
    close(by_map, mapped.grid_density(looked_at("a.npz"), box, grid))


def test_a_map_of_another_size_or_lost_is_an_error_and_none_is_zeros(mapped):
    assert mapped.density(Photo("a", "a.png", 6, 5)).tolist() == [[0.0] * 6] * 5  # it is secret
    (photo,) = mapped.photos
    Image.fromarray(np.eye(64, 48) > 0).save(mapped.root / "turned.png")
    with pytest.raises(ValueError, match=r"turned.png is 48x64, .* 64x48"):
        mapped.density(replace(photo, density="turned.png"))
    with pytest.raises(FileNotFoundError, match=r"lost.png"):
        mapped.density(replace(photo, density="lost.png"))


# ---- the prepared folder -----------------------------------------------------------------------
def test_a_round_trip_keeps_everything(run_folder, tiny_photos):
    photos, root = tiny_photos
    read = Prepared.read(run_folder / "data")
    assert (read.meta["title"], read.root, read.sigma) == ("Tiny test photos", root, SIGMA)
    assert len(read.photos) == len(photos) == 19
    for before, after in zip(photos, read.photos, strict=True):
        for name, value in vars(before).items():
            np.testing.assert_array_equal(value, getattr(after, name), strict=True)


def test_photos_without_fixations_durations_or_observers(tmp_path):
    named = Photo("böse name", "a b/ü.png", 9, 7, "train")
    looked = Photo.from_points("b", "b.png", (9, 7), np.array([[1, 2], [9, 9]]))
    nothing = Photo.from_points("c", "c.png", (9, 7), [])
    Prepared(tmp_path, [named, looked, nothing], META).write()
    empty, pooled, nothing = Prepared.read(tmp_path).photos
    assert (empty.stem, empty.image, len(empty.fixations)) == ("böse name", "a b/ü.png", 0)
    assert (pooled.observers.tolist(), pooled.dropped) == ([NOBODY], 1)
    assert np.isnan(pooled.durations).all()
    assert (nothing.fixations.shape, len(nothing.observers), nothing.dropped) == ((0, 2), 0, 0)
    rows = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [(row["fixations"], row["observers"]) for row in rows] == [(0, 0), (1, 0), (0, 0)]


def test_stems_must_be_unique_and_photos_there(tmp_path):
    twins = [Photo("same", f"{folder}/same.png", 9, 7) for folder in "ab"]
    with pytest.raises(ValueError, match="same"):
        Prepared(tmp_path, twins, {}).write()
    with pytest.raises(ValueError, match="no photos"):
        Prepared(tmp_path, [], {}).write()


@pytest.mark.parametrize("name", ["meta.json", "index.jsonl", "fixations.npz"])
def test_changed_and_missing_parts(run_folder, name):
    path, data = run_folder / "data" / name, run_folder / "data"
    content = path.read_bytes()
    changed = content.replace(b'"sigma_px": 6.0', b'"sigma_px": 2.0')
    path.write_bytes(content[:-40] if changed == content else changed)
    with pytest.raises(ValueError, match=rf"{path}.*SHA-256"):
        Prepared.read(data)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*01_data_preparation.*utils prepare"):
        Prepared.read(data)


def test_an_interrupted_preparation_does_not_look_complete(run_folder, monkeypatch):
    prepared, full = Prepared.read(run_folder / "data"), OSError("No space left on device")
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        prepared.write()
    with pytest.raises(FileNotFoundError, match=r"meta.json"):
        Prepared.read(run_folder / "data")


def test_the_digest_tells_what_is_learned_from(run_folder):
    prepared = Prepared.read(run_folder / "data")
    digest = prepared.digest
    replace(prepared, meta={**prepared.meta, "title": "another title"}).write()
    assert Prepared.read(run_folder / "data").digest == digest
    assert replace(prepared, meta={**prepared.meta, "sigma_px": SIGMA + 1}).digest != digest
    prepared.photos[0].fixations[0, 0] += 1
    before = Prepared.read(run_folder / "data")
    prepared.write()
    assert prepared.digest != digest
    assert before.digest == digest  # whatever was written since


def test_changed_and_missing_files_are_found(tmp_path):
    for name in ("a.png", "b.png", "maps/b.png", "maps/c.png", "list.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    parts = ["a.png", "b.png", "maps", "list.csv", "other"]
    photos, meta = [Photo("a", "a.png", 40, 40)], {**META, "root": str(tmp_path)}
    sources = {"read_from": parts, "files": fingerprints(tmp_path, parts)}
    Prepared(tmp_path / "data", photos, meta, sources).write()
    prepared = Prepared.read(tmp_path / "data")
    assert prepared.check() == []
    (index,) = replace(prepared, meta={**meta, "files": {"index.jsonl": "0"}}).check()
    assert "index.jsonl has changed" in index
    for path in tmp_path.rglob("*.png"):  # other times, the same content
        os.utime(path, (1, 1))
    assert Prepared.read(tmp_path / "data").photos[0].stem == "a"
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").write_bytes(b"other")  # as long as it was
    (tmp_path / "maps/c.png").write_bytes(b"more")
    (tmp_path / "maps/d.png").write_bytes(b"new")
    (tmp_path / "maps/notes.md").write_bytes(b"is not read")
    words = {"a.png is missing", "b.png has changed", "maps/c.png has changed", "d.png was added"}
    for problems in (prepared.check(), prepared.check(everything=False)):
        assert len(problems) == 4
        assert all(any(word in line for line in problems) for word in words)
    with pytest.raises(StaleError, match=r"a\.png .*missing .* 3 more"):
        Prepared.read(tmp_path / "data")


def test_folders_that_do_not_know_their_sources_know_their_photos(run_folder, tiny_photos):
    (run_folder / "data/sources.json").unlink()
    meta = read_json(run_folder / "data/meta.json", "prepare")
    del meta["sources"]
    write_json(run_folder / "data/meta.json", meta, sealed=True)
    prepared = Prepared.read(run_folder / "data")
    assert len(prepared.photos) == 19
    shutil.copytree(tiny_photos[1], run_folder / "photos")
    Image.new("RGB", (80, 60)).save(run_folder / "photos/val0.png")
    replace(prepared, meta={**prepared.meta, "root": str(run_folder / "photos")}).write()
    with pytest.raises(StaleError, match=r"val0\.png has changed"):
        Prepared.read(run_folder / "data")


def test_sources_that_were_edited_or_lost_vouch_for_nothing(run_folder):
    path = run_folder / "data/sources.json"
    known = json.loads(path.read_text())
    Prepared.read(run_folder / "data").check()  # notes other states of the same files
    assert path.read_text() != json.dumps(known)
    name, other = next(iter(known["files"])), {"read_from": [], "files": {}}
    for changed in (other, {**known, "files": {**known["files"], name: ["0" * 64]}}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"sources\.json.*SHA-256"):
            Prepared.read(run_folder / "data")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"sources\.json"):
        Prepared.read(run_folder / "data")


def test_a_split_without_truth_is_not_scored(tmp_path):
    seen = Photo.from_points("a", "a.png", (9, 7), [[1, 2]], split="val")
    photos = [seen, Photo("b", "b.png", 9, 7, "test")]
    prepared = Prepared(tmp_path, photos, {})
    assert prepared.scored_split == "val"
    with pytest.raises(ValueError, match=r"no dev photos"):
        prepared.split("dev")
    assert [photo.stem for photo in prepared.with_truth("val")] == ["a"]
    with pytest.raises(ValueError, match=r"1 of the 1 test photos .* 'val'"):
        prepared.with_truth("test")
    photos.append(Photo("c", "c.png", 9, 7, "test", density="c.npz"))
    assert prepared.scored_split == "test"
