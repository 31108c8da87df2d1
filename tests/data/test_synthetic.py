"""The sample's density is known: exactly the distribution that the fixations are drawn from."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mlnet_utils.data import synthetic
from mlnet_utils.data.geometry import inside, pixel_indices
from mlnet_utils.runtime import sha256_file


def stimulus(seed=0):
    return synthetic.make_stimulus(np.random.default_rng(seed))


def test_the_density_is_a_positive_probability():
    for scene in map(stimulus, range(12)):  # with all kinds of odd items
        assert (scene.image.shape, scene.image.dtype) == ((240, 320, 3), np.uint8)
        assert scene.density.shape == (240, 320)
        assert scene.density.min() > 0
        assert scene.density.sum() == pytest.approx(1, abs=1e-12)


def test_fixations_follow_the_density_also_at_the_border():
    # An odd item in the corner: a third of its fixations would leave the photo.
    scene = stimulus(3)
    centres = scene.centres.copy()
    centres[0] = (1.0, 2.0)
    density = synthetic.density_of(centres, scene.salience)
    scene = replace(scene, density=density, centres=centres)
    points, _ = synthetic.draw_fixations(scene, np.random.default_rng(4), observers=5000)
    assert inside(points, 240, 320).all()
    x, y = pixel_indices(points).T
    counts = np.bincount((y // 16) * 20 + x // 16, minlength=300)  # cells of 16x16 pixels
    expected = density.reshape(15, 16, 20, 16).sum((1, 3)).ravel() * len(points)
    # Fixations of one observer share an offset, so the spread is a little above Poisson's.
    z = (counts - expected) / np.sqrt(expected)
    assert np.abs(z).max() < 4.5
    assert z.std() < 1.2
    assert abs(z.mean()) < 0.2


@pytest.fixture(scope="module")
def gaze():
    """Observers of many fixations on a scene, and the distances (N, 2) to the nearest odd item."""
    scene = stimulus(8)
    points, observers = synthetic.draw_fixations(scene, np.random.default_rng(9), observers=4000)
    away = points[:, None] - scene.centres[None, : scene.n_odd]
    nearest = np.hypot(away[..., 0], away[..., 1]).argmin(1)
    return observers, away[np.arange(len(points)), nearest]


def test_observers_differ_in_what_attracts_them(gaze):
    observers, away = gaze
    on_odd = np.hypot(*away.T) < 2 * synthetic.ITEM_SPREAD
    counts, hits = np.bincount(observers), np.bincount(observers, on_odd)
    share = on_odd.mean()
    # 1 +- 0.022 if all observers were alike (chi-square over its degrees of freedom).
    dispersion = ((hits - counts * share) ** 2 / (counts * share * (1 - share))).mean()
    assert 1.1 < dispersion < 1.5


def test_observers_differ_in_where_their_gaze_lands(gaze):
    observers, away = gaze
    near = np.hypot(*away.T) < 3 * synthetic.ITEM_SPREAD
    observers, away = observers[near], away[near] - away[near].mean(0)
    starts = np.flatnonzero(np.diff(observers, prepend=-1))
    starts = starts[np.diff(np.append(starts, len(observers))) > 1]
    # Two fixations of one observer share an offset; 0 +- 2.2 if there were none.
    covariance = (away[starts] * away[starts + 1]).mean()
    assert 0.4 < covariance / synthetic.OFFSET**2 < 1.6


def test_folding_keeps_points_inside_and_leaves_inner_ones_alone():
    points = np.array([[-1.0, 5.0], [10.2, 239.6], [319.4999999, 0.0], [320.0, -0.5]])
    folded = synthetic._fold(points)
    assert inside(folded, 240, 320).all()
    np.testing.assert_allclose(folded[0], [0.0, 5.0])
    np.testing.assert_allclose(folded[1], [10.2, 239.4], rtol=1e-6)


def test_who_reads_the_sample_while_it_is_made_again_reads_whole_files(tmp_path):
    (photo,) = synthetic.write_sample(tmp_path, {"train": 1})
    read = {name: tmp_path / f"held{i}" for i, name in enumerate((photo.image, photo.density))}
    for name, held in read.items():
        (tmp_path / name).write_bytes(b"of another version")
        held.hardlink_to(tmp_path / name)
    synthetic.write_sample(tmp_path, {"train": 1})
    for name, held in read.items():
        assert held.read_bytes() == b"of another version"
        assert len((tmp_path / name).read_bytes()) > 1000


def test_records_can_be_read_back_and_scenes_do_not_depend_on_their_number(tmp_path):
    photos = synthetic.write_sample(tmp_path / "few", {"test": 1, "train": 1}, seed=12)
    assert [photo.stem for photo in photos] == ["test_0000", "train_0000"]
    for photo in photos:
        with Image.open(tmp_path / "few" / photo.image) as image:
            assert image.size == (photo.width, photo.height) == (320, 240)
        assert len(photo.known_observers) == synthetic.OBSERVERS
        assert inside(photo.fixations, photo.height, photo.width).all()
        density = photo.read_density(tmp_path / "few")
        x, y = pixel_indices(photo.fixations).T
        assert density[y, x].mean() > 3 / density.numel()
    # A scene does not depend on how many others are made.
    counts = {"train": 2, "val": 1, "test": 1}
    many = {p.stem: p for p in synthetic.write_sample(tmp_path / "many", counts, seed=12)}
    digests = {stem: sha256_file(tmp_path / "many" / p.image) for stem, p in many.items()}
    assert len(set(digests.values())) == 4
    for photo in photos:
        assert sha256_file(tmp_path / "few" / photo.image) == digests[photo.stem]
        assert (many[photo.stem].fixations == photo.fixations).all()
