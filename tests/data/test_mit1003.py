"""MIT1003: recordings with its fixation detector, and fixation maps without MATLAB."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from miniatures import save_mat, save_photo, save_recording
from PIL import Image

from mlnet_utils.data.photos import NOBODY
from mlnet_utils.data.readers.mit1003 import detect_fixations, read_mit1003

LONG = "i1" * 40  # MATLAB cuts names of variables to 63 characters, SciPy's writer to 31
VECTORS = Path(__file__).parents[1] / "vectors" / "mit1003_fixations.npz"
PLACES = ((400, 300), (100.5, 80.25), (700, 500), (1500, 90))  # the last is outside


def recording(places, samples=70):
    """Fixations of 70 samples with saccades of 8 samples between them."""
    pieces = [np.tile(places[0], (samples, 1))]
    for before, place in itertools.pairwise(places):
        share = (1 - np.cos(np.linspace(0, np.pi, 10)[1:-1])) / 2
        pieces.append(np.array(before) + share[:, None] * np.subtract(place, before))
        pieces.append(np.tile(place, (samples, 1)))
    return np.concatenate(pieces).astype(float)


@pytest.fixture
def root(tmp_path):
    """Two photos, two observers, maps of both photos, and the stray file of the original."""
    for seed, stem in enumerate(("i1", LONG)):
        save_photo(tmp_path / f"ALLSTIMULI/{stem}.jpeg", 1024, 768, seed)
        for observer in ("zb", "ajs"):
            places = PLACES if observer == "zb" else PLACES[:2]
            save_recording(tmp_path / f"DATA/{observer}/{stem}.mat", recording(places))
        marks = np.zeros((768, 1024), np.uint8)
        marks[5, 7] = marks[767, 1023] = 255
        (tmp_path / "ALLFIXATIONMAPS").mkdir(exist_ok=True)
        for name in (f"{stem}_fixPts", f"{stem}fixPts", f"{stem}_fixMap"):
            Image.fromarray(marks).save(tmp_path / f"ALLFIXATIONMAPS/{name}.jpg", quality=75)
    return tmp_path


@pytest.fixture
def maps(root):
    """The same without recordings."""
    shutil.rmtree(root / "DATA")
    return root


def test_recordings_give_observers_order_and_durations(root):
    photo, long = read_mit1003(root)
    assert (photo.stem, photo.image) == ("i1", "ALLSTIMULI/i1.jpeg")
    assert long.stem == LONG
    # ajs, then zb; the fixation on the cross is left out; floor() of 1-based coordinates.
    assert photo.fixations.tolist() == [[99, 79], [99, 79], [699, 499]]
    assert photo.observers.tolist() == [0, 1, 1]
    assert photo.dropped == 1
    assert photo.durations == pytest.approx([280, 260, 255], abs=10)


def test_maps_give_fixations_without_observers(maps):
    photo, _ = read_mit1003(maps)
    assert photo.fixations.tolist() == [[7, 5], [1023, 767]]
    assert set(photo.observers) == {NOBODY}
    assert np.isnan(photo.durations).all()


def test_missing_recordings(root):
    (root / "DATA/zb/i1.mat").unlink()
    with pytest.raises(ValueError, match=r"1 photos .*zb: 'i1';"):
        read_mit1003(root)
    shutil.rmtree(root / "DATA")
    (root / "DATA").mkdir()
    with pytest.raises(ValueError, match="DATA holds no observers"):
        read_mit1003(root)


def test_missing_maps(maps):
    (maps / "ALLFIXATIONMAPS/i1_fixPts.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 photos .*: 'i1'\."):
        read_mit1003(maps)
    shutil.rmtree(maps / "ALLFIXATIONMAPS")
    with pytest.raises(FileNotFoundError, match=r"ALLFIXATIONMAPS .*download mit1003"):
        read_mit1003(maps)


def eye(*shape):
    return {"i1": {"DATA": {"eyeData": np.zeros(shape)}}}


OTHERS = [{"i1": {"other": 1}}, {"i1": np.eye(2)}, {"a": 1, "b": 2}, eye(0, 2), eye(9, 1)]


@pytest.mark.parametrize("content", OTHERS)
def test_another_structure(root, content):
    save_mat(root / "DATA/zb/i1.mat", **content)
    with pytest.raises(ValueError, match=r"i1\.mat' .*MIT1003"):
        read_mit1003(root)


# ---- the detector ------------------------------------------------------------------------------
def test_the_detector_equals_the_authors():
    """40 generated recordings with blinks, lost samples, hasty and missing saccades.

    The expected values are those of the authors' checkFixations.m in GNU Octave 7.3.
    """
    with np.load(VECTORS) as vectors:
        samples = vectors["samples"].astype(float)
        samples[vectors["samples"] == -32768] = np.nan
        recordings = np.split(samples / 10, np.cumsum(vectors["lengths"])[:-1])
        ends = np.cumsum(vectors["counts"])[:-1]
        medians = np.split(vectors["medians"], ends)
        durations = np.split(vectors["durations"], ends)
    assert len(recordings) == 40
    for positions, median, duration in zip(recordings, medians, durations, strict=True):
        found, lasting = detect_fixations(positions)
        np.testing.assert_allclose(found, median, equal_nan=True)
        np.testing.assert_allclose(lasting, duration)


@pytest.mark.parametrize("n", [*range(1, 8), 240])
def test_short_recordings_and_a_still_eye_are_one_fixation(n):
    recordings = [np.full((n, 2), 7.0), np.full((n, 2), np.nan)]  # NaN: the eye was lost
    if n < 8:
        recordings.append(np.random.default_rng(n).uniform(0, 1000, (n, 2)))
    for recording in recordings:
        found, lasting = detect_fixations(recording)
        np.testing.assert_equal(found, np.median(recording, axis=0)[None])
        assert lasting.tolist() == [1000 * n / 240]
