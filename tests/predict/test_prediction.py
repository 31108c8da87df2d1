"""One photo in any form gives one density at its own size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_checkpoint, tiny_config
from PIL import Image
from torch import nn

import mlnet_utils
from mlnet_utils.data.geometry import Letterbox, unletterbox
from mlnet_utils.model.checkpoints import save_checkpoint
from mlnet_utils.model.network import LEAST, MLNet
from mlnet_utils.predict import predictor as predicting
from mlnet_utils.predict.predictor import SMOOTHLY, Predictor, load, predict_maps, to_density

SIZES = [(60, 80), (32, 32), (33, 200), (200, 33), (61, 75), (400, 300)]  # (height, width)


def random_network(**overrides) -> Predictor:
    """Random weights; biases that keep the paper head alive."""
    config = tiny_config(**overrides)
    torch.manual_seed(0)
    model = MLNet(config).eval()
    with torch.no_grad():
        model.to_map.bias.fill_(0.5)
        model.prior.normal_(0, 0.5)
    return Predictor(model, config)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return random_network()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(60, 80, 3) uint8, smooth and without symmetry."""
    y, x = np.mgrid[:60, :80]
    return np.stack([x * 3, y * 4, 255 - x - y], axis=-1).astype(np.uint8)


class Brightness(nn.Module):
    """Saliency = brightness: a network whose right answer is known."""

    def forward(self, image):
        return F.avg_pool2d(image.float().mean(1, keepdim=True), 8)


# ---- the forms of a photo ----------------------------------------------------------------------
def test_every_form_of_a_photo_gives_the_same_density(predictor, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = {
        "path": tmp_path / "x.png",
        "text": str(tmp_path / "x.png"),
        "PIL": Image.fromarray(pixels),
        "uint8 array": pixels,
        "read-only array": np.broadcast_to(pixels, pixels.shape),
        "mirrored twice": pixels[:, ::-1].copy()[:, ::-1],
        "float array 0..1": pixels / 255,
        "float32 array 0..255": pixels.astype(np.float32),
        "uint8 tensor": tensor,
        "contiguous tensor": tensor.contiguous(),
        "float tensor 0..1": tensor / 255,
        "tensor with gradient": (tensor / 255).requires_grad_(),
        "opaque RGBA": np.dstack([pixels, np.full((60, 80), 255, np.uint8)]),
    }
    expected = predictor.predict(pixels)
    for name, form in forms.items():
        np.testing.assert_array_equal(predictor.predict(form), expected, err_msg=name)


def test_grey_half_precision_and_transparent_photos_are_taken(predictor, pixels):
    grey, tensor = pixels[..., 0], torch.from_numpy(pixels).permute(2, 0, 1)
    expected = predictor.predict(np.dstack([grey] * 3))
    for form in (grey, grey[..., None], grey / 255, Image.fromarray(grey), torch.from_numpy(grey)):
        np.testing.assert_array_equal(predictor.predict(form), expected)
    expected = predictor.predict(tensor)
    assert np.abs(predictor.predict(tensor.bfloat16()) - expected).max() < 0.01 * expected.max()
    transparent = np.dstack([pixels, np.zeros((60, 80), np.uint8)])
    white = predictor.predict(np.full((60, 80, 3), 255, np.uint8))
    for form in (transparent, torch.from_numpy(transparent).permute(2, 0, 1)):
        np.testing.assert_array_equal(predictor.predict(form), white)


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((60, 80, 2), np.uint8), r"\(60, 80, 2\)"),
    (np.zeros((3, 60, 80), np.uint8), r"\(3, 60, 80\)"),
    (torch.zeros(60, 80, 3), r"Tensor .*\(60, 80, 3\)"),
    (np.zeros((1, 60, 80, 3), np.uint8), r"\(1, 60, 80, 3\)"),
    (np.zeros((0, 80, 3), np.uint8), r"\(0, 80, 3\)"),
    (None, "NoneType"),
    (np.zeros((60, 80, 3), np.int64), "int64"),
    (np.zeros((60, 80), bool), "bool"),
    (np.full((60, 80), -0.1), r"0\.\.255"),
    (np.full((60, 80), 256.0), r"0\.\.255"),
    (np.full((60, 80), np.nan), r"0\.\.255"),
    (np.zeros((31, 80, 3), np.uint8), "80x31"),
    (np.zeros((80, 31), np.uint8), "31x80"),
])  # fmt: skip
def test_what_is_no_photo_is_an_error(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(image)


# ---- the density -------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["density", "paper"])
def test_densities_at_the_sizes_of_the_photos_alone_and_in_a_batch(head):
    predictor, rng = random_network(head=head), np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    assert predictor.predict_batch([]) == []
    for together, photo in zip(predictor.predict_batch(photos), photos, strict=True):
        density = predictor.predict(photo)
        assert (density.shape, density.dtype) == (photo.shape[:2], np.float32)
        assert density.min() >= 0
        assert density.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        assert density.std() > 0
        np.testing.assert_allclose(together, density, rtol=1e-4)


@pytest.mark.parametrize("size", [(60, 80), (60, 200), (200, 60), (75, 61)])
@pytest.mark.parametrize("place", [(0.25, 0.25), (0.3, 0.8), (0.75, 0.6)])
def test_the_peak_is_where_the_photo_has_it(size, place):
    photo = np.zeros(size, np.uint8)
    y, x = (int(share * side) for share, side in zip(place, size, strict=True))
    ry, rx = (max(3, side // 10) for side in size)
    photo[y - ry : y + ry, x - rx : x + rx] = 255
    predictor = Predictor(Brightness(), tiny_config(head="paper", height=192, width=256))
    density = predictor.predict(photo).astype(np.float64)
    cell = 8 * max(size[0] / 192, size[1] / 256)  # in pixels of the photo
    centre = [(density * place).sum() for place in np.indices(size)]  # of mass of the square
    assert centre == pytest.approx([y - 0.5, x - 0.5], abs=cell / 4)


SINGLE = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("options", "by_hand"), [
    ({}, lambda maps, box: unletterbox(maps.log(), box).exp()),
    ({"head": "paper"}, unletterbox),
    ({"head": "paper", "compat": "theano"}, lambda m, _: predicting.authors_postprocess(m, 50, 90)),
], ids=["log-density", "as it is", "authors"])  # fmt: skip
def test_every_head_has_its_interpolation(options, by_hand):
    box = Letterbox(50, 90, 32, 40)
    density = to_density(SINGLE, tiny_config(**options), box)
    expected = by_hand(SINGLE[None], box)[0]
    torch.testing.assert_close(density, expected / expected.sum())
    if "compat" not in options:  # the scale does not matter
        scaled = to_density(SINGLE * 1e-7, tiny_config(**options), box)
        torch.testing.assert_close(scaled, density)
    else:
        ours = to_density(SINGLE, tiny_config(head="paper"), box)
        assert (ours - density).abs().max() > 1e-3 * density.max()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_dead_map_becomes_uniform_with_a_warning(value):
    single = torch.full((4, 5), value).double()
    with pytest.warns(UserWarning, match="uniform map"):
        density = to_density(single, tiny_config(head="paper"), Letterbox(33, 44, 32, 40))
    torch.testing.assert_close(density, torch.full((33, 44), 1 / (33 * 44)).double())
    # With the density head a zero stays positive.
    single = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]] * 4).double()
    for head in ("density", "paper"):
        density = to_density(single, tiny_config(head=head), Letterbox(32, 40, 32, 40)).float()
        assert (density.min() > 0) == (head == "density")


# ---- mirrored, in other sizes, fast ------------------------------------------------------------
@pytest.mark.parametrize("head", ["density", "paper"])
def test_averaging_with_the_mirrored_photo(head, pixels):
    plain, averaging = random_network(head=head), random_network(head=head, test_flip=True)
    density, mirrored = averaging.predict(pixels), averaging.predict(pixels[:, ::-1])
    np.testing.assert_allclose(density, mirrored[:, ::-1], rtol=1e-4)
    assert np.abs(density - plain.predict(pixels)).max() > 1e-3 * density.max()
    image, _ = plain.prepare(torch.from_numpy(pixels).permute(2, 0, 1))
    one, other = (predict_maps(plain.model, plain.config, x[None]) for x in (image, image.flip(-1)))
    expected = (one * other.flip(-1)).sqrt() if head == "density" else (one + other.flip(-1)) / 2
    found = predict_maps(averaging.model, averaging.config, image[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["no", "bf16"])
def test_a_fast_network_skips_the_mirrored_photo_and_computes_as_the_device_does(
    kind, pixels, tmp_path, monkeypatch
):
    checkpoint = tiny_checkpoint(tmp_path / "x.pt", test_flip=True, test_scales=(1.0, 1.5))
    monkeypatch.setattr("mlnet_utils.predict.predictor.native_precision", lambda device: kind)
    slow, fast = load(checkpoint, "cpu"), load(checkpoint, "cpu", fast=True)
    assert {value.dtype for value in fast.model.parameters()} == {predicting.PRECISIONS[kind]}
    slow.config = replace(slow.config, test_flip=False, test_scales=(1.0,))
    expected, found = slow.predict(pixels), fast.predict(pixels)
    assert np.abs(found - expected).max() < (0.05 if kind == "bf16" else 1e-4) * expected.max()
    assert found.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("head", ["density", "paper"])
def test_averaging_over_sizes_of_the_photo(head, pixels):
    plain = random_network(head=head)
    image = plain.prepare(torch.from_numpy(pixels).permute(2, 0, 1))[0][None]
    larger = F.interpolate(image.float(), size=(48, 64), **SMOOTHLY)  # 1.5 times 32x40, in cells
    found = predict_maps(plain.model, replace(plain.config, test_scales=(1.0, 1.5)), image)
    assert found.shape == (1, 4, 5)
    with torch.no_grad():
        maps = [plain.model(sized).double() for sized in (image, larger)]
    if head == "density":
        maps = [one.clamp_min(LEAST).log() for one in maps]
    mean = torch.stack([F.interpolate(one, size=(4, 5), **SMOOTHLY) for one in maps]).mean(0)[:, 0]
    torch.testing.assert_close(found, mean.exp() if head == "density" else mean)
    assert (found - predict_maps(plain.model, plain.config, image)).abs().max() > 0


# ---- loading -----------------------------------------------------------------------------------
@pytest.fixture
def saved(predictor, tmp_path):
    save_checkpoint(tmp_path / "x.pt", predictor.config, predictor.model.state_dict())
    return tmp_path / "x.pt"


def test_load_from_the_package(predictor, pixels, saved):
    loaded = mlnet_utils.load(saved, device="cpu")
    assert not loaded.model.training
    np.testing.assert_array_equal(loaded.predict(pixels), predictor.predict(pixels))
    assert load(saved).device in ("cpu", "cuda", "mps")


def test_what_is_missing_is_an_error(predictor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        predictor.predict(tmp_path / "gone.jpg")
    with pytest.raises(AttributeError, match="'laod'"):
        _ = mlnet_utils.laod


# ---- looking inside ----------------------------------------------------------------------------
def test_looking_inside(predictor, pixels):
    parts = predictor.explain(pixels)
    assert list(parts) == ["level 1", "level 2", "level 3", "raw", "prior", "saliency"]
    assert {part.shape for part in parts.values()} == {(60, 80)}
    assert all(np.isfinite(part).all() for part in parts.values())
    chosen = predictor.feature_maps(pixels, per_level=2)
    assert {channel.shape for channel in chosen.values()} == {(60, 80)}
    assert [title.split(",")[0] for title in chosen] == [f"level {n}" for n in (1, 1, 2, 2, 3, 3)]


def test_feature_maps_are_chosen_inside_the_photo(predictor, monkeypatch):
    rows, columns = predictor.config.grid
    level = torch.zeros(1, 2, rows, columns)
    level[0, 0, :, 0] = 100  # in the padding beside a tall photo
    level[0, 1, 0, columns // 2] = 1
    monkeypatch.setattr(predictor.model, "extract", lambda image: [level] * 3)
    chosen = predictor.feature_maps(np.zeros((80, 40, 3), np.uint8), per_level=1)
    assert list(chosen) == [f"level {number}, channel 1" for number in (1, 2, 3)]


@pytest.mark.gpu
def test_a_gpu_predicts_the_same(predictor, pixels, saved):
    on_gpu = load(saved, device="cuda").predict(pixels)
    np.testing.assert_allclose(on_gpu, predictor.predict(pixels), rtol=1e-2)
