"""The resizers equal those of the reference implementations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlnet_utils.metrics.resize import resize

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = ("up4", "up1p6", "down2")
REFERENCES = {
    "mit300": ("pysaliency_zoom1", "resizing_model"),
    "salicon": ("octave_imresize", "imresize_bicubic"),
    "salicon2015": ("scipy_zoom3", "zoom_order3"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("protocol", REFERENCES)
def test_equals_the_reference(case, protocol):
    file, key = REFERENCES[protocol]
    expected = np.load(VECTORS / f"resized_{file}.npz")[f"{case}__{key}"]
    given = np.load(VECTORS / "cases.npz")[f"{case}__pred"]
    found = resize(torch.from_numpy(given)[None], *expected.shape, protocol=protocol)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("protocol", REFERENCES)
def test_maps_of_the_same_size_none_and_with_a_gradient(protocol):
    maps = torch.rand(2, 5, 6)
    assert torch.equal(resize(maps, 5, 6, protocol=protocol), maps.double())
    expected = resize(maps, 6, 8, protocol=protocol)
    assert torch.equal(resize(maps.requires_grad_(), 6, 8, protocol=protocol), expected)
    assert resize(maps[:0], 6, 8, protocol=protocol).shape == (0, 6, 8)


def test_refuses_what_it_cannot_do():
    maps = torch.rand(1, 5, 6)
    with pytest.raises(ValueError, match=r"maps \(B, H, W\)"):
        resize(maps[0], 5, 6)
    with pytest.raises(ValueError, match="positive size"):
        resize(maps, 0, 6)
    with pytest.raises(ValueError, match="protocol 'bicubic' is not one of"):
        resize(maps, 5, 6, protocol="bicubic")
