"""The user's own photos with lists, maps of fixated pixels, or density maps."""

import numpy as np
import pytest
from miniatures import save_map, save_photo, truncate
from PIL import Image

from mlnet_utils.data.photos import NOBODY
from mlnet_utils.data.readers.own import check_coordinates, read_folder, read_own

CSV = """image, x, y, observer, duration
a.jpg, 0, 0, Ann, 200
a.jpg, 63.4, 47, Bob, 250.5
a.jpg, 64, 10, Ann,
b, 5, 6, Bob, 100
c.v2.jpg, 1, 1, ,
"""
DRAWN = ("a.png", "b.jpg", "c.v2.png")


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.v2.jpg"):
        save_photo(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.fixture
def listed(images):
    """Reads the photos with a list."""

    def read(text):
        (images.parent / "fixations.csv").write_text(text)
        return read_folder(images, images.parent / "fixations.csv")

    return read


def make_maps(folder, *names):
    """Maps with two marked pixels in row 3, 4 or 5."""
    folder.mkdir()
    for row, name in enumerate(names, start=3):
        values = np.zeros((48, 64), np.uint8)
        values[row, [2, 63]] = 255
        with open(folder / name, "wb") as file:
            np.save(file, values) if "NPY" in name else Image.fromarray(values).save(file)
    return folder


def test_a_list_of_fixations(listed):
    a, b, c = listed(CSV)
    assert (a.stem, a.image, a.width, a.height, a.split) == ("a", "a.jpg", 64, 48, "")
    assert a.fixations == pytest.approx(np.array([[0, 0], [63.4, 47]]))
    assert a.observers.tolist() == [0, 1]
    assert a.durations.tolist() == [200, 250.5]
    assert a.dropped == 1
    assert (b.image, b.observers.tolist(), b.durations.tolist()) == ("b.PNG", [1], [100])
    assert (c.stem, c.observers.tolist()) == ("c.v2", [NOBODY])
    assert np.isnan(c.durations).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"fixations\.csv, line 1: columns \[\]"),
        ("image,x\na,1\n", r"line 1: columns \['image', 'x'\]"),
        ("image,x,y,x\na,1,1,2\n", "line 1: columns"),
        ("image,x,y,observer,observer\na,1,1,A,B\n", "line 1: columns"),
        ("image,x,y\na,1,2\na,one,2\n", "line 3: .*'one'"),
        ("image,x,y\na,1\n", "line 2: y missing"),
        ("# of May\nimage,x,y\na,1,2\na,one,2\n", "line 4: .*'one'"),
        ("image,x,y\na,1,5,2\n", "line 2: "),
        ("image,x,y\na,\x00,1\n", "line 2: "),
        ("image,x,y\na,1,1\nd,1,1\n", r"2 photos .*: 'b', 'c.v2'; 1 rows .*: 'd'"),
        ("image,x,y\na,1,1\nb,-9,1\nc.v2,nan,1\n", r"2 photos .*\(2 .*: 'b', 'c.v2'"),
    ],
)
def test_faulty_lists(listed, text, message):
    with pytest.raises(ValueError, match=message):
        listed(text)


def test_percent_of_photos():
    points = {"a": np.random.default_rng(0).uniform(0, 100, (30, 2))}
    with pytest.raises(ValueError, match=r"30 of 30 .* 0\.\.100, .*unit: percent"):
        check_coordinates("list", {"a": (640, 480)}, points)
    check_coordinates("list", {"a": (160, 120)}, points)


def test_fixation_maps(images, tmp_path):
    maps = make_maps(tmp_path / "maps", "a.png", "b.jpg", "c.v2.NPY")
    photos = read_folder(images, fixation_maps=maps)
    found = [photo.fixations.tolist() for photo in photos]
    assert found == [[[2, row], [63, row]] for row in (3, 4, 5)]
    assert {observer for photo in photos for observer in photo.observers} == {NOBODY}
    (maps / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 photos .*fixation maps: 'b'"):
        read_folder(images, fixation_maps=maps)


NAMES = [("train", "val/cats", "test"), ("Train", "VALID", "Test"), ("TRAINING", "dev", "eval")]


@pytest.mark.parametrize("names", NAMES)
def test_subfolders_are_splits(tmp_path, names):
    for stem, name in zip("abcd", (*names, "."), strict=True):
        save_photo(tmp_path / f"images/{name}/{stem}.jpg")
        save_map(tmp_path / f"maps/{stem}.png")
    photos = read_folder(tmp_path / "images", density_maps=tmp_path / "maps")
    assert [photo.split for photo in photos] == ["train", "val", "test", ""]
    paths = [f"{name}/{stem}.jpg" for name, stem in zip(names, "abc", strict=True)]
    assert [photo.image for photo in photos] == [*paths, "d.jpg"]
    assert photos[0].density == "../maps/a.png"


@pytest.mark.parametrize("name", ["test2014", "Trainset", "my-val", "mine/test"])
def test_folders_that_look_like_splits(tmp_path, name):
    save_photo(tmp_path / f"images/{name}/a.jpg")
    save_map(tmp_path / "maps/a.png")
    with pytest.raises(ValueError, match=f"'{name.split('/')[-1]}' of {name}/a.jpg"):
        read_folder(tmp_path / "images", density_maps=tmp_path / "maps")


def test_faulty_folders(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(tmp_path / "nowhere", density_maps=images)
    for given in ({}, {"fixations_csv": images, "fixation_maps": images}):
        with pytest.raises(ValueError, match="own photos: give"):
            read_folder(images, **given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds none"):
        read_folder(tmp_path / "empty", density_maps=images)
    save_photo(images / "more/a.png")
    with pytest.raises(ValueError, match=r"1 stems .*a\.jpg.*a\.png"):
        read_folder(images, density_maps=images)


def test_the_dataset_called_folder_has_its_own_maps(images, tmp_path):
    """Not those beside the photos that a link leads to."""
    own, _ = tmp_path / "own", make_maps(tmp_path / "density_maps", *DRAWN)
    own.mkdir()
    (own / "images").symlink_to(images, target_is_directory=True)
    (own / "fixations.csv").write_text(CSV)
    make_maps(own / "density_maps", *DRAWN)
    photo = read_own(own)[0]
    assert (photo.image, photo.density) == ("images/a.jpg", "density_maps/a.png")
    assert len(photo.fixations) == 2
    assert photo.read_density(own).shape == (48, 64)
    truncate(own / "density_maps/a.png")
    with pytest.raises(ValueError, match=r"own/density_maps/a\.png"):
        read_own(own)


def test_observers_are_as_many_as_there_are(images, listed):
    """Neither one for two lists of one name, nor one that a missing value makes."""
    assert listed(CSV.replace("Bob", "NA"))[0].observers.tolist() == [0, NOBODY]
    lists = images.parent / "lists"
    for observer in ("Ann", "Bob"):
        (lists / observer).mkdir(parents=True)
        (lists / observer / "gaze.csv").write_text("image,x,y\na,1,1\nb,1,1\nc.v2,1,1\n")
    with pytest.raises(ValueError, match=r"1 stems .*Ann/gaze\.csv.*Bob/gaze\.csv"):
        read_folder(images, lists)
