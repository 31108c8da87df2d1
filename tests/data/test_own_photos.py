"""The user's own photos with lists, maps of fixated pixels, or density maps."""

import numpy as np
import pytest
from miniatures import save_photo, truncate
from PIL import Image

from mlnet_utils.data.images import read_density
from mlnet_utils.data.photos import NOBODY
from mlnet_utils.data.readers.own import read_folder, read_own


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.v2.jpg"):
        save_photo(tmp_path / "images" / name)
    return tmp_path / "images"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


CSV = """image, x, y, observer, duration
a.jpg, 0, 0, Ann, 200
a.jpg, 63.4, 47, Bob, 250.5
a.jpg, 64, 10, Ann,
b, 5, 6, Bob, 100
c.v2.jpg, 1, 1, ,
"""


def test_a_list_of_fixations(images, tmp_path):
    a, b, c = read_folder(images, fixations_csv=write(tmp_path / "f.csv", CSV))
    assert (a.stem, a.image, a.width, a.height, a.split) == ("a", "a.jpg", 64, 48, "")
    assert a.fixations == pytest.approx(np.array([[0, 0], [63.4, 47]]))
    assert a.observers.tolist() == [0, 1]
    assert a.durations.tolist() == [200, 250.5]
    assert a.dropped == 1
    assert (b.image, b.observers.tolist(), b.durations.tolist()) == ("b.PNG", [1], [100])
    assert (c.stem, c.observers.tolist()) == ("c.v2", [NOBODY])
    assert np.isnan(c.durations).all()


def test_a_list_that_counts_from_one(images, tmp_path):
    text = "\ufeffimage,x,y\na,1,1\na,64,48\nb,1,1\nc.v2,1,1\n"
    photo = read_folder(images, write(tmp_path / "f.csv", text), first_pixel=1)[0]
    assert photo.fixations.tolist() == [[0, 0], [63, 47]]
    assert set(photo.observers) == {NOBODY}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"f.csv, line 1: columns \[\], but image, x, y is needed"),
        ("image,x\na,1\n", r"line 1: columns \['image', 'x'\], but y is needed"),
        ("image,x,y\na,1,2\na,one,2\n", "line 3: could not convert string to float: 'one'"),
        ("image,x,y\na,1\n", "line 2: "),
        ("image,x,y\na,1,1\nd,1,1\n", r"2 photos without rows of f.csv: b, c.v2; 1 rows of .*: d"),
        ("image,x,y\na,1,1\nb,-9,1\nc.v2,nan,1\n", r"2 photos have no fixation.*\(2 .*: b, c.v2"),
        ("image,x,y\na,\x00,1\n", "line 2: "),
        ("image,x,y,x\na,1,1,2\n", "line 1: columns .* but only one x can be meant"),
        (b"image,x,y\n\xff\xfe,1,1\n", "line 1: .*utf-8"),
        ("image,x,y\na,1,5,2\n", "line 2: more than 3 values; is a comma a decimal point"),
    ],
)
def test_faulty_lists(images, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_folder(images, write(tmp_path / "f.csv", text))


def test_more_observers_than_can_be_told_apart(images, tmp_path):
    rows = [f"{stem},1,1,{n}" for stem in ("a", "b", "c.v2") for n in range(32_769)]
    path = write(tmp_path / "f.csv", "\n".join(["image,x,y,observer", *rows]))
    with pytest.raises(ValueError, match=r"photo a: 32,769 observers, at most 32,768 can be told"):
        read_folder(images, path)


def test_suffixes_in_capitals(images, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    marked = np.zeros((48, 64))
    marked[3, 4] = 1
    for stem in ("a", "b", "c.v2"):
        with open(folder / f"{stem}.NPY", "wb") as file:
            np.save(file, marked)
    assert read_folder(images, fixation_maps=folder)[0].fixations.tolist() == [[4, 3]]
    densities = tmp_path / "densities"
    densities.mkdir()
    for stem in ("a", "b", "c.v2"):
        with open(densities / f"{stem}.NPZ", "wb") as file:
            np.savez(file, density=np.ones((48, 64)))
    assert len(read_folder(images, density_maps=densities)) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((48, 64)), "not zero everywhere"),
        (-np.ones((48, 64)), "non-negative"),
        (np.ones((10, 10)), "is 10x10, but"),
    ],
)
def test_densities_are_looked_at_when_they_are_read(images, tmp_path, values, message):
    folder = make_maps(tmp_path / "maps", names=("a.png", "b.png"))
    np.savez(folder / "c.v2.npz", density=values)
    with pytest.raises(ValueError, match=rf"c.v2.npz .*{message}"):
        read_folder(images, density_maps=folder)


def make_maps(folder, size=(64, 48), names=("a.png", "b.jpg", "c.v2.png")):
    folder.mkdir()
    for number, name in enumerate(names):
        values = np.zeros(size[::-1], np.uint8)
        values[number + 3, [2, size[0] - 1]] = 255
        Image.fromarray(values).save(folder / name)
    return folder


def test_fixation_maps(images, tmp_path):
    photos = read_folder(images, fixation_maps=make_maps(tmp_path / "maps"))
    assert [photo.fixations.tolist() for photo in photos] == [
        [[2, number + 3], [63, number + 3]] for number in range(3)
    ]


def test_density_maps_alone(images, tmp_path):
    folder = make_maps(tmp_path / "maps", names=("a.png", "b.jpg"))
    np.savez(folder / "c.v2.npz", density=np.ones((48, 64)))
    photos = read_folder(images, density_maps=folder)
    assert [photo.density for photo in photos] == [
        *("../maps/a.png", "../maps/b.jpg", "../maps/c.v2.npz"),
    ]
    assert [len(photo.fixations) for photo in photos] == [0, 0, 0]
    assert read_density(images / photos[2].density).shape == (48, 64)


def test_subfolders_are_splits(tmp_path):
    for path in ("train/a.jpg", "val/cats/b.jpg", "test/c.jpg", "d.jpg"):
        save_photo(tmp_path / "images" / path)
        target = tmp_path / "maps" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (64, 48), 255).save(target.with_suffix(".png"))
    photos = read_folder(tmp_path / "images", density_maps=tmp_path / "maps")
    assert [(photo.image, photo.split) for photo in photos] == [
        ("train/a.jpg", "train"),
        ("val/cats/b.jpg", "val"),
        ("test/c.jpg", "test"),
        ("d.jpg", ""),
    ]


@pytest.mark.parametrize("kind", ["fixation_maps", "density_maps"])
def test_faulty_maps(images, tmp_path, kind):
    folder = make_maps(tmp_path / "maps", size=(48, 64))
    with pytest.raises(ValueError, match=r"a.png is 48x64, but its photo is 64x48"):
        read_folder(images, **{kind: folder})
    folder = make_maps(tmp_path / "maps2")
    truncate(folder / "b.jpg", 0.6)
    with pytest.raises(ValueError, match=r"b.jpg cannot be (read|decoded)"):
        read_folder(images, **{kind: folder})
    (folder / "b.jpg").unlink()
    with pytest.raises(ValueError, match=rf"1 photos without {kind.replace('_', ' ')}: b"):
        read_folder(images, **{kind: folder})


def test_faulty_folders(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"own photos: .*nowhere does not exist"):
        read_folder(tmp_path / "nowhere", density_maps=images)
    with pytest.raises(ValueError, match="give a fixation list, fixation maps or density maps"):
        read_folder(images)
    with pytest.raises(ValueError, match="not both"):
        read_folder(images, write(tmp_path / "f.csv", CSV), fixation_maps=images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds none of .jpg"):
        read_folder(tmp_path / "empty", density_maps=images)
    save_photo(images / "more/a.png")
    with pytest.raises(ValueError, match=r"1 stems belong to several files.*a.jpg and .*a.png"):
        read_folder(images, density_maps=images)


def test_the_dataset_called_folder(images, tmp_path):
    write(tmp_path / "fixations.csv", CSV)
    make_maps(tmp_path / "density_maps")
    photo = read_own(tmp_path)[0]
    assert (photo.image, photo.density) == ("images/a.jpg", "density_maps/a.png")
    assert len(photo.fixations) == 2
