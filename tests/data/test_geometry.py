"""Letterbox and its inverse, and fixations to densities, each against an independent route."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from mlnet_utils.data.geometry import (
    Letterbox,
    blur_matrix,
    density_from_points,
    density_on_grid,
    fixation_counts,
    inside,
    letterbox,
    pixel_indices,
    unletterbox,
)

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


def test_letterbox_refuses_nonsense():
    with pytest.raises(ValueError, match="expected 3, got 2"):
        letterbox(torch.zeros(4, 4), 32, 32)
    with pytest.raises(ValueError, match="sigma"):
        blur_matrix(5, 0.0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_letterbox_puts_the_photo_in_the_centre_and_zeros_around(height, width):
    box = Letterbox(height, width, 96, 128)
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    result = letterbox(image, 96, 128)
    assert result.shape == (3, 96, 128)
    content = torch.zeros(96, 128, dtype=torch.bool)
    content[box.top : box.top + box.content_height, box.left : box.left + box.content_width] = True
    assert torch.allclose(result[:, content], torch.tensor(200.0))
    assert not result[:, ~content].any()


def test_letterbox_of_the_right_size_changes_nothing():
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    assert torch.equal(letterbox(image, 40, 56), image.float())


def grid_coordinates(box, stride):
    """Photo coordinates (x, y) of the cells of the network's grid, by the definition."""
    y = (np.arange(box.height // stride) + 0.5) * stride
    x = (np.arange(box.width // stride) + 0.5) * stride
    y = (y - box.top) * box.photo_height / box.content_height - 0.5
    x = (x - box.left) * box.photo_width / box.content_width - 0.5
    return x, y


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize(("height", "width"), SIZES[:-1])
def test_unletterbox_is_the_exact_inverse(height, width, stride):
    """A map that holds, in every cell, where in the photo it is, comes back as the coordinates.

    Bilinear reading is exact for such a map, so this finds any shift, scale or rounding.
    """
    box = Letterbox(height, width, 480, 640)
    x, y = grid_coordinates(box, stride)
    maps = torch.from_numpy(np.stack(np.meshgrid(x, y)))
    back = unletterbox(maps, box)
    assert back.shape == (2, height, width)
    # Beside the photo's edge there is no cell centre further out to interpolate with.
    scale = max(height / box.content_height, width / box.content_width)
    edge = int(np.ceil(stride / 2 * scale)) + 1
    assert min(height, width) > 2 * edge
    rows, columns = slice(edge, height - edge), slice(edge, width - edge)
    expected = np.stack(np.meshgrid(np.arange(width), np.arange(height))).astype(float)
    expected = torch.from_numpy(expected[:, rows, columns])
    torch.testing.assert_close(back[:, rows, columns], expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unletterbox_never_reads_the_padding(height, width):
    box = Letterbox(height, width, 96, 128)
    maps = torch.full((1, 12, 16), float("nan"))
    first_row, last_row = box.top // 8, -(-(box.top + box.content_height) // 8)
    first_column, last_column = box.left // 8, -(-(box.left + box.content_width) // 8)
    maps[:, first_row:last_row, first_column:last_column] = 1.0
    weights = unletterbox(torch.nan_to_num(maps, nan=1e6), box)
    torch.testing.assert_close(weights, torch.ones(1, height, width))


# ---- fixations ---------------------------------------------------------------------------------
def test_pixels_are_those_whose_centre_is_nearest():
    points = np.array([[0.0, 0.49], [-0.5, 0.5], [2.499, 1.5], [7.4, 2.6]])
    assert pixel_indices(points).tolist() == [[0, 0], [0, 1], [2, 2], [7, 3]]


def test_inside_uses_pixels_and_survives_odd_values():
    assert inside([[-0.5, 0], [7.49, 3]], 4, 8).all()
    outside = [[-0.51, 0], [7.5, 3], [np.nan, 1], [np.inf, 1], [1e30, 0]]
    assert not inside(outside, 4, 8).any()
    assert inside(np.zeros((0, 2)), 4, 8).tolist() == []


def test_fixation_counts():
    counts = fixation_counts(np.array([[0, 0], [3.2, 1], [2.8, 1.4], [7, 3]]), 4, 8)
    assert counts.dtype == torch.int64
    assert counts.shape == (4, 8)
    assert {tuple(p): int(counts[tuple(p)]) for p in counts.nonzero().tolist()} == {
        (0, 0): 1, (1, 3): 2, (3, 7): 1,
    }  # fmt: skip
    assert not fixation_counts(np.zeros((0, 2)), 4, 8).any()


@pytest.mark.parametrize("point", [(8, 1), (-0.6, 1), (1, 4), (np.nan, 1)])
def test_a_fixation_outside_is_an_error_everywhere(point):
    """Unchecked, x = -1 would silently count for the last column."""
    points = np.array([(1, 1), point])
    box = Letterbox(4, 8, 32, 64)
    for make in (
        lambda: fixation_counts(points, 4, 8),
        lambda: density_from_points(points, 4, 8, 1.0),
        lambda: density_on_grid(points, box, (4, 8), 1.0),
    ):
        with pytest.raises(ValueError, match="outside the 8x4 photo"):
            make()


@pytest.mark.parametrize("sigma", [0.4, 1.0, 7.3, 24.0, 200.0])
@pytest.mark.parametrize("size", [1, 2, 9, 61])
def test_blur_matrix_is_scipys_filter(size, sigma):
    expected = gaussian_filter1d(np.eye(size), sigma, axis=0, mode="reflect", truncate=4)
    matrix = blur_matrix(size, sigma).numpy()
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(0), 1, rtol=0, atol=1e-12)


@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.5, 30), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_density_is_scipys_filter_of_the_counts(height, width, sigma, seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-0.5, (width - 0.5001, height - 0.5001), (7, 2))
    counts = fixation_counts(points, height, width).double().numpy()
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
    assert not density_from_points(empty, 9, 7, 2.0).any()
    assert not density_on_grid(empty, Letterbox(9, 7, 32, 40), (4, 5), 2.0).any()
