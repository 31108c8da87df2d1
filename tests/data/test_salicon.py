"""SALICON in its two editions, which must never be taken for each other, and as JSON."""

import json

import numpy as np
import pytest
from miniatures import save_map, save_mat, save_photo, save_salicon, save_salicon_mat
from PIL import Image
from scipy.ndimage import gaussian_filter

from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.readers.salicon import fit_sigma, read_salicon_json, read_salicon_mat

FIRST = "COCO_train2014_000000000001"
WORKERS = [[(1, 1), (640, 480)], [(0, 7), (320, 240), (900, 2)], []]


@pytest.fixture(params=["2015", "2017"])
def edition(request):
    return request.param


@pytest.fixture
def root(tmp_path, edition):
    return save_salicon(tmp_path, edition, WORKERS)


@pytest.fixture
def first(root, edition):
    """The first photo's fixation file."""
    return root / f"fixations-{edition}/train/{FIRST}.mat"


def test_both_editions_are_read(root, edition):
    photos = read_salicon_mat(root, edition)
    assert [photo.split for photo in photos] == ["train", "train", "val", "test"]
    one, *_, test = photos
    assert (one.image, one.density) == (f"images/train/{FIRST}.jpg", "")
    # 1-based x, y; an x of 0 is outside and must not wrap around in the files' unsigned integers.
    assert one.fixations.tolist() == [[0, 0], [639, 479], [319, 239]]
    assert one.observers.tolist() == [0, 0, 1]
    assert one.dropped == 2
    assert np.isnan(one.durations).all()
    assert len(test.fixations) == 0
    samples = read_salicon_mat(root, edition, points="location")[0]
    assert (len(samples.fixations), samples.dropped) == (9, 6)


def test_maps_are_noted_where_they_are(tmp_path, edition):
    root = save_salicon(tmp_path, edition, WORKERS, maps=True)
    first, _, val, test = read_salicon_mat(root, edition)
    assert val.density == f"maps-{edition}/val/COCO_val2014_000000000003.png"
    assert test.density == ""
    drawn = save_map(root / first.density, 320, 200)
    with pytest.raises(ValueError, match=rf"{drawn.name} is 320x200, .* 640x480"):
        read_salicon_mat(root, edition)
    drawn.unlink()
    with pytest.raises(ValueError, match=f"train: 1 photos .*density maps: '{first.stem}'"):
        read_salicon_mat(root, edition)


def test_an_edition_is_not_taken_for_the_other(root, edition):
    other = {"2015": "2017", "2017": "2015"}[edition]
    (root / f"fixations-{edition}").rename(root / f"fixations-{other}")
    with pytest.raises(ValueError, match=rf"{FIRST}.* {other} edition"):
        read_salicon_mat(root, other)


def test_missing_parts_and_photos_nobody_looked_at(root, edition, first, tmp_path):
    save_salicon_mat(first, [[], [(641, 1)]], edition)
    with pytest.raises(ValueError, match=rf"1 photos .*\(1 .*{FIRST}"):
        read_salicon_mat(root, edition)
    first.unlink()
    with pytest.raises(ValueError, match=rf"train: 1 photos .*fixation files: '{FIRST}'"):
        read_salicon_mat(root, edition)
    (tmp_path / "x/images").mkdir(parents=True)
    (tmp_path / f"x/fixations-{edition}").mkdir()
    with pytest.raises(ValueError, match=r"x/images .*train, val or test"):
        read_salicon_mat(tmp_path / "x", edition)


def gaze(points, resolution=((480, 640),)):
    """Variables of a file whose only worker has these points."""
    worker = np.empty((1, 1), [("location", object), ("fixations", object)])
    worker[0, 0] = (points, points)
    return {"gaze": worker, "resolution": resolution}


FAULTS = {
    "rows of x and of y": (gaze(np.arange(8).reshape(2, 4)), "SALICON"),
    "columns": (gaze(np.arange(6).reshape(2, 3)), "SALICON"),
    "no resolution": (gaze([[1, 1]], [[np.nan, 640]]), "SALICON"),
    "LSUN'15's older packages": ({"I": np.eye(9)}, "holds I instead of gaze, resolution"),
    "size": (gaze([[1, 1]], [[240, 320]]), "320x240.*640x480"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files(first, root, edition, fault):
    content, said = FAULTS[fault]
    save_mat(first, **content)
    with pytest.raises(ValueError, match=rf"0001\.mat.*{said}"):
        read_salicon_mat(root, edition)


@pytest.mark.parametrize("sigma", [6.0, 19.0])
def test_the_blur_of_published_maps_is_found(tmp_path, sigma):
    """Maps of 8 bits, scaled to their maximum, as SALICON publishes them."""
    rng, photos = np.random.default_rng(0), []
    for number in range(3):
        points = rng.uniform(20, 100, (40, 2))
        photos.append(Photo.from_points("a", "", (160, 120), points, density=f"{number}.png"))
        density = density_from_points(photos[-1].fixations, 120, 160, sigma).numpy()
        pixels = np.round(255 * density / density.max()).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert fit_sigma(photos, tmp_path) == pytest.approx(sigma, abs=0.15)
    with pytest.raises(ValueError, match="needs photos with both"):
        fit_sigma([Photo("a", "a.jpg", 160, 120)], tmp_path)


# ---- JSON --------------------------------------------------------------------------------------
IMAGE = {"file_name": "a.jpg", "id": 7, "width": 64, "height": 48}
NOTES = [
    {"id": 1, "image_id": 7, "worker_id": 30, "fixations": [[1, 1], [48, 64]]},
    {"id": 2, "image_id": 7, "worker_id": 20, "fixations": [[49, 5], [10, 20]]},
    {"id": 3, "image_id": 7, "worker_id": 30, "fixations": []},
]


def annotations(*images, **note):
    """The JSON with these changes of the image, one for each, and of the first note."""
    first = {**NOTES[0], **note}
    return {"images": [IMAGE | image for image in images], "annotations": [first, *NOTES[1:]]}


@pytest.fixture
def example(tmp_path):
    save_photo(tmp_path / "images/train2014examples/a.jpg")
    write_json(tmp_path, annotations({}))
    return tmp_path


def write_json(root, content, name="fixations_train2014examples.json"):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content))


def test_json_is_read(example):
    (photo,) = read_salicon_json(example)
    assert (photo.image, photo.split) == ("images/train2014examples/a.jpg", "train")
    assert photo.fixations.tolist() == [[0, 0], [63, 47], [19, 9]]  # from 1-based (row, column)
    assert photo.observers.tolist() == [0, 0, 1]
    assert photo.dropped == 1


FAULTY = {
    "no annotations": ({"images": []}, "'annotations'"),
    "no height": ({"images": [{"file_name": "a", "id": 7}], "annotations": []}, "'width'"),
    "null": (annotations({"width": None}), r"a\.jpg and .*\.json .* 64x48 and Nonex48"),
    "size": (annotations({"width": 640}), r"a\.jpg and .*\.json .* 64x48 and 640x48"),
    "another photo": (
        annotations({"file_name": "b.jpg"}),
        r"1 photos in .*images .*: 'a'; 1 .*: 'b'",
    ),
    "unknown image": (annotations({"id": 8}), r"examples\.json.*7"),
    "an id twice": (annotations({}, {"file_name": "b.jpg"}), "share a name or an id"),
    "a name twice": (annotations({}, {"id": 8, "file_name": "x/a.jpg"}), "share a name or an id"),
    "three columns": (annotations({}, fixations=[[1, 2, 3], [4, 5, 6]]), r"\(2, 3\)"),
    "one row": (annotations({}, fixations=[1, 2, 3, 4]), r"\(4,\)"),
    "no fixations": (annotations({}, fixations=None), r"\(\)"),
    "nobody looked": ({"images": [IMAGE], "annotations": []}, r"1 photos .*: 'a'\."),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_json(example, fault):
    content, said = FAULTY[fault]
    write_json(example, content)
    with pytest.raises(ValueError, match=said):
        read_salicon_json(example)


def test_annotations_that_are_there_twice_or_unknown_or_missing(example):
    write_json(example, annotations({}), "fixations_val.json")
    with pytest.raises(ValueError, match=r"fixations_val\.json .*examples\.json .*\ba\b"):
        read_salicon_json(example)
    write_json(example, annotations({}), "fixations_other.json")
    with pytest.raises(ValueError, match=r"fixations_other\.json.*_train, _val"):
        read_salicon_json(example)
    for path in (example / "annotations").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"1 photos .*: 'a'\."):
        read_salicon_json(example)


# ---- the real example --------------------------------------------------------------------------
@pytest.mark.realdata
def test_the_real_example_is_what_was_counted(real_data):
    """Coordinates that were swapped, flipped or shifted would not find contrast.

    The local contrast under the fixations is compared with that under the same fixations mirrored:
    on all but a few photos the true ones win.
    """
    root = real_data / "salicon_examples"
    photos = read_salicon_json(root)
    assert {(p.split, p.width, p.height) for p in photos} == {("train", 640, 480)}
    assert sum(photo.dropped for photo in photos) == 0
    workers = [len(np.unique(photo.observers)) for photo in photos]
    assert (len(photos), sum(workers), min(workers), max(workers)) == (10, 610, 55, 67)
    points = np.concatenate([photo.fixations for photo in photos])
    # 1-based rows 1..480 and columns 1..640: as 0-based x, y they span the photo exactly.
    found = [len(points), points.min(0).tolist(), points.max(0).tolist()]
    assert found == [73630, [0, 0], [639, 479]]
    wins = 0
    for photo in photos:
        with Image.open(root / photo.image) as image:
            grey = np.asarray(image.convert("L"), np.float64)
        mean = gaussian_filter(grey, 8)
        contrast = np.sqrt(np.maximum(gaussian_filter(grey**2, 8) - mean**2, 0))
        x, y = photo.fixations.astype(int).T
        wins += contrast[y, x].mean() > contrast[479 - y, 639 - x].mean()
    assert wins >= 8
