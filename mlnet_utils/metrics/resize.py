"""Resizing predictions to the ground truth's size as each benchmark does it, in float64.

The metrics never resize. Where a prediction has another size than the fixations, the choice of
the resizer alone moves sAUC by up to 0.02 and KL by 5 %, so it belongs to the protocol.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import zoom
from torch import Tensor


def resize(maps: Tensor, height: int, width: int, *, protocol: str = "mit300") -> Tensor:
    """Resize maps as a protocol's reference code does.

    * ``"mit300"``: bilinear with aligned corners, as pysaliency's ``ResizingSaliencyMapModel``.
      The benchmark itself refuses maps of another size.
    * ``"salicon"``: MATLAB's ``imresize``: bicubic (a = -0.5) with aligned pixel centres,
      antialiased when shrinking, borders mirrored. Can overshoot, below zero too.
    * ``"salicon2015"``: ``scipy.ndimage.zoom`` with cubic splines and aligned corners, on the CPU.
      Can overshoot. Has no gradient.

    Takes (B, h, w) of any number type; returns (B, height, width) float64 on the maps' device.
    Raises ValueError: the maps are not (B, h, w), a size is not positive, or the protocol is
    unknown.
    """
    if maps.ndim != 3 or height < 1 or width < 1:
        shape = tuple(maps.shape)
        raise ValueError(f"maps (B, H, W) to a positive size: got {shape} to {height} x {width}")
    resizers = {"mit300": _bilinear, "salicon": _bicubic, "salicon2015": _spline}
    if protocol not in resizers:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(resizers)}")
    maps = maps.to(torch.float64)
    same = tuple(maps.shape[1:]) == (height, width)
    return maps if same else resizers[protocol](maps, height, width)


def _bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    size = (height, width)
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def _bicubic(maps: Tensor, height: int, width: int) -> Tensor:
    rows = _imresize_matrix(maps.shape[1], height).to(maps.device)
    columns = _imresize_matrix(maps.shape[2], width).to(maps.device)
    return rows @ maps @ columns.T


def _spline(maps: Tensor, height: int, width: int) -> Tensor:
    factors = (height / maps.shape[1], width / maps.shape[2])
    resized = np.empty((len(maps), height, width))
    for place, one in enumerate(maps.detach().cpu().numpy()):
        resized[place] = zoom(one, factors, order=3)
    return torch.from_numpy(resized).to(maps.device)


@functools.lru_cache(maxsize=64)
def _imresize_matrix(size: int, new_size: int) -> Tensor:
    """(new_size, size) float64: MATLAB's bicubic interpolation along one axis as a matrix.

    A matrix because torch's bicubic kernels differ from MATLAB's: the plain one has a = -0.75,
    the antialiased one treats the borders otherwise.
    """
    scale = new_size / size
    stretch = min(scale, 1.0)  # a wider kernel when shrinking is the antialiasing
    centre = (np.arange(new_size) + 0.5) / scale - 0.5
    reach = int(np.ceil(4 / stretch)) + 2
    index = np.floor(centre - 2 / stretch).astype(int)[:, None] + np.arange(reach)
    weight = _cubic(stretch * (centre[:, None] - index))
    weight /= weight.sum(1, keepdims=True)
    index %= 2 * size  # mirrored borders have period 2 * size: c b a | a b c | c b a
    index = np.where(index >= size, 2 * size - 1 - index, index)
    matrix = np.zeros((new_size, size))
    np.add.at(matrix, (np.arange(new_size)[:, None], index), weight)
    return torch.from_numpy(matrix)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE ASSP 1981, equation 15)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
