"""Letterbox and its inverse, and fixations to densities, each against an independent route."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from mlnet_utils.data import geometry
from mlnet_utils.data.geometry import Letterbox, density_from_points, density_on_grid

SIZES = [(600, 800), (480, 640), (100, 800), (800, 100), (333, 501), (501, 333), (33, 47), (1, 9)]


# ---- letterbox ---------------------------------------------------------------------------------
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(4, 80), st.integers(4, 80))
@settings(max_examples=200, deadline=None)
def test_the_content_fits_and_touches_two_sides(height, width, rows, columns):
    box = Letterbox(height, width, 8 * rows, 8 * columns)
    assert 1 <= box.content_height <= box.height
    assert 1 <= box.content_width <= box.width
    assert box.content_height == box.height or box.content_width == box.width
    assert 0 <= box.top <= box.height - box.content_height - box.top <= box.top + 1
    assert 0 <= box.left <= box.width - box.content_width - box.left <= box.left + 1


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="expected 3, got 2"):
        geometry.letterbox(torch.zeros(4, 4), 32, 32)
    with pytest.raises(ValueError, match="sigma"):
        geometry.blur_matrix(5, 0.0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_letterbox_puts_the_photo_in_the_centre_and_zeros_around(height, width):
    box = Letterbox(height, width, 96, 128)
    result = geometry.letterbox(torch.full((3, height, width), 200, dtype=torch.uint8), 96, 128)
    expected = torch.zeros(3, 96, 128, dtype=torch.uint8)
    rows, columns = slice(box.top, box.top + box.content_height), slice(box.left, None)
    expected[:, rows, columns][..., : box.content_width] = 200
    torch.testing.assert_close(result, expected)
    assert not result[expected == 0].any()


def test_letterbox_of_the_right_size_changes_nothing():
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    assert torch.equal(geometry.letterbox(image, 40, 56), image)
    assert torch.equal(geometry.letterbox(image / 7, 40, 56), image / 7)


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize(("height", "width"), SIZES[:-1])
def test_unletterbox_is_the_exact_inverse(height, width, stride):
    """A map that holds, in every cell, where in the photo it is, comes back as the coordinates.

    Bilinear reading is exact for such a map, so this finds any shift, scale or rounding.
    """
    box = Letterbox(height, width, 480, 640)
    # Photo coordinates of the cells of the network's grid, by the definition.
    y = ((np.arange(480 // stride) + 0.5) * stride - box.top) * height / box.content_height - 0.5
    x = ((np.arange(640 // stride) + 0.5) * stride - box.left) * width / box.content_width - 0.5
    back = geometry.unletterbox(torch.from_numpy(np.stack(np.meshgrid(x, y))), box)
    assert back.shape == (2, height, width)
    # Beside the photo's edge there is no cell centre further out to interpolate with.
    scale = max(height / box.content_height, width / box.content_width)
    edge = int(np.ceil(stride / 2 * scale)) + 1
    assert min(height, width) > 2 * edge
    expected = torch.from_numpy(np.stack(np.meshgrid(np.arange(width), np.arange(height))))
    inner = np.s_[:, edge : height - edge, edge : width - edge]
    torch.testing.assert_close(back[inner], expected[inner].double())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unletterbox_never_reads_the_padding(height, width):
    box = Letterbox(height, width, 96, 128)
    maps = torch.full((1, 12, 16), 1e6)
    last_row, last_column = box.top + box.content_height, box.left + box.content_width
    maps[:, box.top // 8 : -(-last_row // 8), box.left // 8 : -(-last_column // 8)] = 1.0
    torch.testing.assert_close(geometry.unletterbox(maps, box), torch.ones(1, height, width))


# ---- fixations ---------------------------------------------------------------------------------
def test_pixels_are_those_whose_centre_is_nearest_and_inside_survives_odd_values():
    points = np.array([[0.0, 0.49], [-0.5, 0.5], [2.499, 1.5], [7.4, 2.6]])
    assert geometry.pixel_indices(points).tolist() == [[0, 0], [0, 1], [2, 2], [7, 3]]
    assert geometry.inside([[-0.5, 0], [7.49, 3]], 4, 8).all()
    outside = [[-0.51, 0], [7.5, 3], [np.nan, 1], [np.inf, 1], [1e30, 0]]
    assert not geometry.inside(outside, 4, 8).any()
    assert geometry.inside(np.zeros((0, 2)), 4, 8).tolist() == []


def test_fixation_counts():
    counts = geometry.fixation_counts(np.array([[0, 0], [3.2, 1], [2.8, 1.4], [7, 3]]), 4, 8)
    assert (counts.dtype, counts.shape) == (torch.int64, (4, 8))
    found = [[*place, int(counts[tuple(place)])] for place in counts.nonzero().tolist()]
    assert found == [[0, 0, 1], [1, 3, 2], [3, 7, 1]]


@pytest.mark.parametrize("point", [(8, 1), (-0.6, 1), (1, 4), (np.nan, 1)])
def test_a_fixation_outside_is_an_error_everywhere(point):
    """Unchecked, x = -1 would silently count for the last column."""
    points = np.array([(1, 1), point])
    with pytest.raises(ValueError, match="outside the 8x4 photo"):
        geometry.fixation_counts(points, 4, 8)
    with pytest.raises(ValueError, match="outside the 8x4 photo"):
        density_from_points(points, 4, 8, 1.0)
    with pytest.raises(ValueError, match="outside the 8x4 photo"):
        density_on_grid(points, Letterbox(4, 8, 32, 64), (4, 8), 1.0)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 7.3, 24.0, 200.0])
@pytest.mark.parametrize("size", [1, 2, 9, 61])
def test_blur_matrix_is_scipys_filter(size, sigma):
    expected = gaussian_filter1d(np.eye(size), sigma, axis=0, mode="reflect", truncate=4)
    matrix = geometry.blur_matrix(size, sigma).numpy()
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-12)


@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.5, 30), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_density_is_scipys_filter_of_the_counts(height, width, sigma, seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.5, (width - 0.5001, height - 0.5001), (7, 2))
    counts = geometry.fixation_counts(points, height, width).double().numpy()
    expected = gaussian_filter(counts / 7, sigma, mode="reflect", truncate=4)
    density = density_from_points(points, height, width, sigma)
    np.testing.assert_allclose(density.numpy(), expected, rtol=0, atol=1e-6 / counts.size)
    assert abs(density.sum().item() - 1) < 1e-9


@pytest.mark.parametrize(
    ("photo", "padding"),
    [((64, 80), (0, 0)), ((40, 80), (12, 0)), ((64, 48), (0, 16)), ((128, 160), (0, 0))],
)
def test_density_on_grid_is_the_padded_density_summed_by_cells(photo, padding):
    """Where photo pixels and cells align, letterboxing and averaging is padding and summing."""
    height, width = photo
    points = np.random.default_rng(1).uniform(0, (width - 1, height - 1), (9, 2))
    density = density_from_points(points, height, width, 5.0)
    padded = torch.nn.functional.pad(density, (padding[1],) * 2 + (padding[0],) * 2)
    cell = len(padded) // 4
    expected = padded.reshape(4, cell, 5, cell).sum((1, 3))
    result = density_on_grid(points, Letterbox(height, width, 32, 40), (4, 5), 5.0)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@given(st.integers(2, 200), st.integers(2, 200), st.floats(0.5, 20), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_density_on_grid_keeps_mass_and_place(height, width, sigma, seed):
    points = np.random.default_rng(seed).uniform(0, (width - 1, height - 1), (5, 2))
    box = Letterbox(height, width, 32, 40)
    # On the finest grid the cells are the input's pixels, so that the centre of mass is known.
    fine = density_on_grid(points, box, (32, 40), sigma)
    coarse = density_on_grid(points, box, (4, 5), sigma)
    torch.testing.assert_close(coarse, fine.reshape(4, 8, 5, 8).sum((1, 3)))
    assert abs(coarse.sum().item() - 1) < 1e-9
    density = density_from_points(points, height, width, sigma)
    x = (density.sum(0) * (torch.arange(width) + 0.5)).sum() * box.content_width / width
    centre = (fine.sum(0) * (torch.arange(40) + 0.5)).sum()
    assert abs(x + box.left - centre) < 0.5


def test_without_fixations_densities_are_zero():
    empty = np.zeros((0, 2), np.float32)
    assert not geometry.fixation_counts(empty, 4, 8).any()
    assert not density_from_points(empty, 9, 7, 2.0).any()
    assert not density_on_grid(empty, Letterbox(9, 7, 32, 40), (4, 5), 2.0).any()
