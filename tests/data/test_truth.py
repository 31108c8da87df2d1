"""The ground truth of a photo: fixations first, a density map where there are none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from mlnet_utils.data.datasets import SaliencyDataset
from mlnet_utils.data.geometry import Letterbox, density_from_points, density_on_grid
from mlnet_utils.data.images import read_density
from mlnet_utils.data.photos import Photo
from mlnet_utils.data.truth import grid_density, photo_density

POINTS = np.array([[10, 20], [30.4, 5], [30, 5]], np.float32)
SIGMA = 3.0


@pytest.fixture
def mapped(tmp_path):
    """A photo with a density map and no fixations; the folder of both."""
    density = density_from_points(POINTS, 48, 64, SIGMA)
    np.savez(tmp_path / "a.npz", density=density.numpy())
    Image.new("RGB", (64, 48), (90, 60, 30)).save(tmp_path / "a.png")
    return Photo("a", "a.png", 64, 48, "train", density="a.npz"), tmp_path


def looked_at(photo):
    return replace(photo, fixations=POINTS, observers=np.zeros(3, np.int16), durations=None)


def test_fixations_come_before_a_map(mapped):
    photo, root = mapped
    Image.new("L", (64, 48), 5).save(root / "flat.png")
    photo = looked_at(replace(photo, density="flat.png"))
    expected = density_from_points(POINTS, 48, 64, SIGMA)
    assert torch.equal(photo_density(photo, root, SIGMA), expected)


def test_a_map_is_used_where_there_are_no_fixations(mapped):
    photo, root = mapped
    torch.testing.assert_close(
        photo_density(photo, root, 99.0), density_from_points(POINTS, 48, 64, SIGMA)
    )


@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 64), (104, 40)])
def test_on_the_grid_map_and_fixations_agree(mapped, height, width):
    photo, root = mapped
    box, grid = Letterbox(48, 64, height, width), (height // 8, width // 8)
    by_map = grid_density(photo, root, box, grid, SIGMA)
    torch.testing.assert_close(by_map, density_on_grid(POINTS, box, grid, SIGMA))
    torch.testing.assert_close(by_map, grid_density(looked_at(photo), root, box, grid, SIGMA))
    assert by_map.sum().item() == pytest.approx(1)


def test_a_photo_whose_truth_is_secret_has_none(tmp_path):
    assert photo_density(Photo("a", "a.png", 6, 5), tmp_path, SIGMA).tolist() == [[0.0] * 6] * 5


def test_a_map_of_another_size_or_lost_is_an_error(mapped):
    photo, root = mapped
    Image.new("L", (48, 64), 5).save(root / "turned.png")
    with pytest.raises(ValueError, match=r"turned.png is 48x64, but its photo is 64x48: make it"):
        photo_density(replace(photo, density="turned.png"), root, SIGMA)
    with pytest.raises(FileNotFoundError, match=r"lost.png does not exist"):
        photo_density(replace(photo, density="lost.png"), root, SIGMA)


def test_a_dataset_learns_from_maps(mapped):
    photo, root = mapped
    config = tiny_config(height=48, width=64, flip=0.0, crop=0.2)
    (by_map, by_points) = (
        SaliencyDataset([one], root, config, SIGMA, augment=False)[0]
        for one in (photo, looked_at(photo))
    )
    torch.testing.assert_close(by_map["density"], by_points["density"])
    assert (by_map["fixations"].sum(), by_points["fixations"].sum()) == (0, 3)
    # A crop would have to keep a fixation, so a photo without any is never cropped.
    cropped = SaliencyDataset([photo], root, config, SIGMA, augment=True)
    assert all(torch.equal(cropped[epoch, 0]["image"], by_map["image"]) for epoch in range(5))


def test_densities_are_cached_when_asked(mapped):
    photo, root = mapped
    for cache in (True, False):
        data = SaliencyDataset([photo], root, tiny_config(cache=cache), SIGMA, augment=False)
        first = data[0]
        density = read_density(root / "a.npz")
        np.savez(root / "a.npz", density=density.flip(0).numpy())
        again = data[0]
        assert torch.equal(first["density"], again["density"]) is cache


@pytest.mark.gpu
def test_densities_are_made_on_the_device(mapped):
    photo, root = mapped
    for one in (photo, looked_at(photo)):
        found = photo_density(one, root, SIGMA, device="cuda")
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), photo_density(one, root, SIGMA))
