"""Datasets to and from pysaliency, and a predictor in pysaliency's evaluation."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from miniatures import TURNED, save_photo
from PIL import Image

from mlnet_utils.data.geometry import pixel_indices
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import NOBODY, Photo
from mlnet_utils.predict.pysaliency import as_pysaliency_model, from_pysaliency, to_pysaliency

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pysaliency imports a deprecated part of setuptools
    pysaliency = pytest.importorskip("pysaliency", reason="needs pysaliency", exc_type=ImportError)

XS = [[0.0, 19.999999, 3.5], [7.0], [0.5, 25.0]]
YS = [[0.0, 9.999999, 4.5], [8.0], [0.5, 3.0]]


@pytest.fixture
def stimuli():
    rng = np.random.default_rng(0)
    return pysaliency.Stimuli(
        [rng.integers(0, 256, (10, 20, 3), np.uint8), rng.integers(0, 256, (12, 24), np.uint8)]
    )


@pytest.fixture
def trains():
    seconds = {"durations": [[0.2, 0.3, 0.1], [0.25], [0.1, 0.2]]}
    options = {"scanpath_fixation_attributes": seconds}
    options |= {"scanpath_attribute_mapping": {"durations": "duration"}}
    make, times = pysaliency.FixationTrains.from_fixation_trains, [np.arange(len(x)) for x in XS]
    return make(XS, YS, times, [0, 0, 1], [5, 9, 5], **options)


def photo_of(folder, fixations, observers):
    looked = {"fixations": np.array(fixations, np.float32), "observers": np.array(observers)}
    return Photo("a", save_photo(folder / "a.png", 20, 10).name, 20, 10, **looked)


def test_a_dataset_comes_over(stimuli, trains, tmp_path):
    first, second = from_pysaliency(stimuli, trains, tmp_path)
    assert (first.stem, first.image) == ("stimulus_00000", "images/stimulus_00000.png")
    assert (first.width, first.height) == (20, 10)
    with Image.open(tmp_path / first.image) as image:
        np.testing.assert_array_equal(np.asarray(image), stimuli.stimuli[0])
    with Image.open(tmp_path / second.image) as image:
        assert image.mode == "RGB"
    # pysaliency's pixel is int(x), also where float32 would round 19.999999 up to 20.
    assert pixel_indices(first.fixations).tolist() == [[0, 0], [19, 9], [3, 4], [7, 8]]
    assert first.fixations[2].tolist() == [3, 4]
    assert first.observers.tolist() == [0, 0, 0, 1]
    assert first.durations == pytest.approx([200, 300, 100, 250])
    assert (len(second.fixations), second.dropped) == (1, 1)


def test_files_are_copied_under_their_names(tmp_path, trains):
    files = [save_photo(tmp_path / f"raw/{name}.jpg", 20, 10) for name in ("one", "two")]
    photos = from_pysaliency(pysaliency.FileStimuli(list(map(str, files))), trains, tmp_path)
    assert [photo.image for photo in photos] == ["images/one.jpg", "images/two.jpg"]
    assert (tmp_path / "images/two.jpg").read_bytes() == files[1].read_bytes()
    same = [str(save_photo(tmp_path / f"{name}/x.jpg", 20, 10)) for name in ("one", "two")]
    photos = from_pysaliency(pysaliency.FileStimuli(same), trains, tmp_path / "numbered")
    assert [photo.stem for photo in photos] == ["stimulus_00000", "stimulus_00001"]


def test_what_does_not_fit_is_an_error(stimuli, trains, tmp_path):
    for wrong, looked, message in (
        (stimuli[:1], trains, "0 to 1 of 1"),
        (stimuli, trains[trains.n == 0], "1 photos"),
        (pysaliency.Stimuli([]), trains, "no stimuli"),
        (pysaliency.Stimuli([np.zeros((10, 20, 3))] * 2), trains, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            from_pysaliency(wrong, looked, tmp_path)
    assert len(from_pysaliency(stimuli, trains, tmp_path)) == 2  # nothing was left behind
    with pytest.raises(FileExistsError, match="images exists"):
        from_pysaliency(stimuli, trains, tmp_path)


def test_photos_turned_by_their_exif(trains, tmp_path):
    pixels = np.arange(10 * 26 * 3, dtype=np.uint8).reshape(10, 26, 3)
    for name, exif in (("turned.png", TURNED), ("upright.png", b"")):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    stimuli = pysaliency.FileStimuli([tmp_path / "turned.png", tmp_path / "upright.png"])
    photos = from_pysaliency(stimuli, trains, tmp_path)
    for photo in photos:  # as pysaliency sees them, which is where the fixations are
        assert read_image(tmp_path / photo.image).shape == (3, photo.height, photo.width)
    with pytest.raises(ValueError, match=r"turned\.png"):
        to_pysaliency([replace(photos[0], image="turned.png")], tmp_path)


def test_there_and_back(stimuli, trains, tmp_path):
    photos = from_pysaliency(stimuli, trains, tmp_path)
    there, fixations = to_pysaliency(photos, tmp_path)
    assert [tuple(size) for size in there.sizes] == [(10, 20), (12, 24)]
    assert fixations.x_int.tolist() == [0, 19, 3, 7, 0]
    assert fixations.y_int.tolist() == [0, 9, 4, 8, 0]
    assert fixations.n.tolist() == [0, 0, 0, 0, 1]
    back = from_pysaliency(there, fixations, tmp_path / "back")
    for one, other in zip(photos, back, strict=True):
        np.testing.assert_array_equal(one.fixations, other.fixations)
        np.testing.assert_array_equal(one.observers, other.observers)


def test_unknown_observers_stay_unknown(tmp_path):
    photo = photo_of(tmp_path, [[1, 1]] * 3, [-1, 0, 1])
    (back,) = from_pysaliency(*to_pysaliency([photo], tmp_path), tmp_path / "back")
    assert back.observers.tolist() == [NOBODY, 0, 1]


# ---- a predictor as a model --------------------------------------------------------------------
def left_to_right(image):
    """Density that grows from left to right: known likelihoods."""
    return np.tile(np.arange(image.shape[1], dtype=np.float32), (image.shape[0], 1))


def test_the_log_density_is_one():
    def predict(image):
        shapes.append((image.shape, image.dtype))
        return left_to_right(image)

    shapes, model = [], as_pysaliency_model(predict)
    for value, shape in enumerate([(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)]):
        values = model.log_density(np.full(shape, value, np.uint8))  # equal ones would be cached
        assert np.exp(values).sum() == pytest.approx(1, abs=1e-12)
        assert np.isfinite(values).all()  # also in the first column, which is zero
        assert values[0, 4] - values[0, 2] == pytest.approx(np.log(2))
    assert shapes == [((4, 6, 3), np.dtype(np.uint8))] * 4


@pytest.mark.slow
def test_pysaliency_evaluates_it(tmp_path):
    photo = photo_of(tmp_path, [[10, 3], [19, 9]], [0, 0])
    stimuli, fixations = to_pysaliency([photo], tmp_path)
    model = as_pysaliency_model(left_to_right)
    expected = np.log2(np.array([10, 19]) / (10 * 190)) + np.log2(200)
    gain = model.information_gain(stimuli, fixations, pysaliency.UniformModel())
    assert gain == pytest.approx(expected.mean())
    assert pysaliency.DensitySaliencyMapModel(model).AUC(stimuli, fixations) > 0.7


@pytest.mark.parametrize(("density", "message"), [
    (np.ones((6, 4)), r"\(6, 4\) for a photo of \(4, 6\)"),
    (np.zeros((4, 6)), "not all zero"),
    (-np.ones((4, 6)), ">= 0"),
    (np.full((4, 6), np.nan), "finite"),
])  # fmt: skip
def test_predictions_that_are_no_densities(density, message):
    model = as_pysaliency_model(lambda image: density)
    with pytest.raises(ValueError, match=message):
        model.log_density(np.zeros((4, 6, 3), np.uint8))
