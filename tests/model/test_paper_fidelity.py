"""The paper and the earlier implementations, fact by fact.

Every expected number is written here a second time, by hand or by an independent formula, from
the paper (Cornia et al., ICPR 2016), the authors' code (Keras 1.1 on Theano) and MLNet-Pytorch
(immortal3, 2018). docs/fidelity.md is the table of these facts, and names the tests.
"""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import linear
from torch import nn

from mlnet_utils.config import load_config
from mlnet_utils.data.geometry import Letterbox, density_on_grid, letterbox, unletterbox
from mlnet_utils.data.loading import EpochSampler
from mlnet_utils.model.backbones import max_pool
from mlnet_utils.model.losses import Objective, mlnet_loss
from mlnet_utils.model.network import MLNet, freeze, trainable
from mlnet_utils.predict.predictor import authors_postprocess
from mlnet_utils.training.trainer import learning_rate, make_optimizer

PAPER = load_config("paper", backbone_weights="none")
INTENT = load_config("mlnet-pytorch", backbone_weights="none")
AS_IS = load_config("mlnet-pytorch-asis", backbone_weights="none")


@pytest.fixture(scope="module")
def network():
    """The paper's network with random weights, as it is before training."""
    torch.manual_seed(0)
    return MLNet(PAPER).eval()


@pytest.fixture(scope="module")
def as_is():
    torch.manual_seed(0)
    return MLNet(AS_IS).eval()


@pytest.fixture(scope="module")
def photo():
    return torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(1)) * 255


@pytest.fixture(scope="module")
def levels(network, photo):
    with torch.inference_mode():
        return network.extract(photo)


def maps(*rows):
    """One map (1, 1, h, w) from nested lists."""
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def random_maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# ---- A. feature extraction ---------------------------------------------------------------------
def test_1280_channels_at_one_eighth(network, photo, levels):
    # pool3, pool4, conv5_3
    assert [level.shape for level in levels] == [(1, width, 8, 10) for width in (256, 512, 512)]
    assert network.encode.in_channels == 1280
    assert PAPER.grid == (60, 80)
    with torch.inference_mode():
        assert network(photo).shape == (1, 1, 8, 10)


def test_pool4_has_stride_1_and_the_others_2(network, levels):
    """2x2 windows from x[i] to x[i + 1]; beyond the border there is nothing."""
    with torch.inference_mode():
        before = network.backbone.features[17:23](levels[0])[0]
    below = torch.cat([before[:, 1:], before[:, -1:]], 1)
    rows = torch.maximum(before, below)
    right = torch.cat([rows[:, :, 1:], rows[:, :, -1:]], 2)
    assert torch.equal(torch.maximum(rows, right), levels[1][0])
    line = torch.tensor([5.0, 1, 2, 9, 3, 4]).reshape(1, 1, 1, 6)
    assert max_pool(line.expand(1, 1, 6, 6), 2)[0, 0, 0].tolist() == [5, 9, 4]


def test_parameter_count(network):
    channels = [3] + [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    vgg16 = sum(9 * i * o + o for i, o in pairwise(channels))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert vgg16 == 14_714_688
    assert count == vgg16 + (9 * 1280 * 64 + 64 + 64 + 1) + 6 * 8 == 15_452_145
    assert trainable(network) == (count, count)
    assert PAPER.backbone_lr_scale == 1


# ---- A. encoding network -----------------------------------------------------------------------
def test_dropout_is_element_wise_and_only_in_training(network):
    ones = torch.ones(1, 1280, 8, 10)
    assert network.dropout(ones) is ones
    torch.manual_seed(0)
    try:
        dropped = network.train().dropout(ones)
    finally:
        network.eval()
    assert set(dropped.unique().tolist()) == {0, 2}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    mixed = (dropped.flatten(2).std(2) > 0).float().mean()
    assert mixed > 0.99, "single elements, not whole channels"


def test_relu_before_and_after_the_prior(network):
    raw = random_maps(1, 1, 12, 16)
    with torch.no_grad():
        network.prior.fill_(-2)  # 1 + W = -1
        before = network.apply_prior(raw)
        network.prior.zero_()
    # With only the last ReLU, negative values would come out positive; with only the first,
    # positive ones negative.
    assert raw.min() < 0 < raw.max()
    assert not before.any()


def test_glorot_normal_initialisation(network):
    for layer, neurons in ((network.encode, 9 * 1280 + 9 * 64), (network.to_map, 64 + 1)):
        tolerance = 4 / np.sqrt(2 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(np.sqrt(2 / neurons), rel=tolerance)
        assert not layer.bias.any()
    # Normal, not truncated: some weights lie beyond two deviations (4.6 %).
    z = network.encode.weight.abs() / network.encode.weight.std()
    assert (z > 2).float().mean().item() == pytest.approx(0.0455, abs=0.002)


def test_mlnet_pytorchs_initialisation(as_is):
    """PyTorch's default: weights and biases uniform within 1 / sqrt(inputs of a neuron)."""
    for layer, inputs in ((as_is.encode, 9 * 1280), (as_is.to_map, 64)):
        values, bound = layer.weight.detach(), 1 / np.sqrt(inputs)
        assert 0.9 * bound < values.abs().max() <= bound
        tolerance = 4 / np.sqrt(values.numel())
        assert values.std().item() == pytest.approx(bound / np.sqrt(3), rel=tolerance)
        assert 0 < layer.bias.abs().max() <= bound


# ---- A. prior ----------------------------------------------------------------------------------
def test_prior_is_6x8_and_neutral_at_the_start(network):
    assert torch.equal(network.prior, torch.zeros(1, 1, 6, 8))
    raw = random_maps(2, 1, 60, 80)
    with torch.inference_mode():
        assert torch.equal(network.apply_prior(raw), F.relu(raw))


@pytest.mark.parametrize(
    ("compat", "rows", "columns"),
    [
        ("", 10 * np.arange(6) + 4.5, 10 * np.arange(8) + 4.5),  # PyTorch's, without a shift
        ("theano", 10 * np.arange(6) + 4, 10 * np.arange(8) + 4),  # half a cell to the left
        ("mlnet-pytorch", np.linspace(0, 59, 6), np.linspace(0, 79, 8)),  # corners aligned
    ],
)
def test_prior_multiplies_bilinearly_upsampled(network, compat, rows, columns):
    w, raw = random_maps(6, 8), random_maps(1, 1, 60, 80).abs()
    up = np.stack([np.interp(np.arange(80), columns, line) for line in w.numpy()])
    up = np.stack([np.interp(np.arange(60), rows, line) for line in up.T], axis=1)
    with torch.no_grad():
        network.prior.copy_(w)
        network.compat = compat
        found = network.apply_prior(raw)
        network.compat = ""
        network.prior.zero_()
    expected = np.maximum(raw.numpy() * (1 + up), 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


# ---- A. input and output -----------------------------------------------------------------------
def test_letterbox_follows_the_authors_rule_at_any_size():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (2000, 2)).tolist():
        tall = height / 480 > width / 640
        size = (480, width * 480 // height) if tall else (height * 640 // width, 640)
        rows, columns = np.maximum(size, 1)
        box = Letterbox(height, width, 480, 640)
        assert (box.content_height, box.content_width) == (rows, columns)
        assert (box.top, box.left) == ((480 - rows) // 2, (640 - columns) // 2)


def test_the_resize_of_the_earlier_implementations():
    """OpenCV's INTER_LINEAR: two neighbours per axis around (i + 0.5) * scale - 0.5."""
    image = np.random.default_rng(0).uniform(0, 255, (75, 101))
    found = letterbox(torch.from_numpy(image)[None], 48, 64, antialias=False)[0].numpy()
    box, expected = Letterbox(75, 101, 48, 64), np.zeros((48, 64))
    inner = linear(image, box.content_height, box.content_width)
    expected[box.top : box.top + len(inner), box.left : box.left + inner.shape[1]] = inner
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert PAPER.antialias
    assert not INTENT.antialias
    assert not load_config("paper", compat="theano").antialias


@pytest.mark.parametrize(
    ("normalisation", "mean", "scale", "orange"),
    [
        ("caffe", (103.939, 116.779, 123.68), (1, 1, 1), (0, 128, 255)),  # blue, green, red
        ("imagenet", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), (255, 128, 0)),
    ],
    ids=["caffe", "imagenet"],
)
def test_padding_is_black_before_the_mean_is_subtracted(normalisation, mean, scale, orange):
    network = MLNet(load_config("paper", backbone_weights="none", normalisation=normalisation))
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.zeros(1, 3, 32, 40, dtype=torch.uint8)
    image[..., 5:] = torch.tensor([255, 128, 0]).reshape(3, 1, 1)  # orange
    with torch.inference_mode():
        network.extract(image)
    for column, colour in ((0, (0, 0, 0)), (9, orange)):
        expected = np.subtract(colour, mean) / scale
        np.testing.assert_allclose(seen[0][0, :, 0, column], expected, rtol=1e-5)


def test_maps_are_letterboxed_to_60x80():
    """A square photo fills the middle 60 of the 80 columns."""
    points = np.array([[0, 0], [99, 99], [50, 50]])
    density = density_on_grid(points, Letterbox(100, 100, 480, 640), PAPER.grid, sigma=3.0)
    assert density.shape == (60, 80)
    assert density.sum().item() == pytest.approx(1)
    assert density[:, :10].sum() == density[:, 70:].sum() == 0
    assert min(density[:, 10].sum(), density[:, 69].sum()) > 0


@pytest.mark.parametrize(
    ("size", "covering"),
    [
        ((480, 640), (480, 640)),
        ((333, 500), (375, 500)),  # 42 rows of padding are cut off, 21 above
        ((1001, 751), (1001, 1334)),  # 583 columns, 291 on the left
        ((37, 91), (68, 91)),
        ((60, 80), (60, 80)),
    ],
)
def test_authors_postprocess(size, covering):
    prediction = np.random.default_rng(0).random((60, 80))
    (top, left), (height, width) = (np.array(covering) - size) // 2, size
    expected = linear(prediction, *covering)[top : top + height, left : left + width]
    found = authors_postprocess(torch.from_numpy(prediction)[None], height, width)[0]
    np.testing.assert_allclose(found, expected / expected.max(), atol=1e-12)
    assert found.max() == 1


def test_our_inverse_equals_the_authors_without_padding():
    prediction = torch.rand(1, 60, 80, dtype=torch.float64)
    ours = unletterbox(prediction, Letterbox(600, 800, 480, 640))
    torch.testing.assert_close(ours / ours.max(), authors_postprocess(prediction, 600, 800))
    assert not authors_postprocess(torch.zeros(1, 60, 80), 333, 500).any()


# ---- A. loss -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "power"), [("mlnet", 1), ("mlnet-printed", 2)])
def test_loss_by_hand(name, power):
    """pred / max = [1, 1/2, 1/4, 0], y = [1/2, 1, 0, 1/4]: four terms by hand.

    The authors' code divides by alpha - y; their paper prints a square around the whole fraction.
    """
    prediction, density = maps([8, 4], [2, 0]), maps([0.2, 0.4], [0, 0.1])
    terms = [(0.5, 0.5), (0.5, 1), (0.25, 0), (0.25, 0.25)]  # difference, y
    expected = sum(difference**2 / (1.1 - y) ** power for difference, y in terms) / 4
    found = Objective(load_config("paper", loss=name)).per_image(prediction, density, density)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert (PAPER.alpha, PAPER.loss) == (1.1, "mlnet")


@pytest.mark.parametrize(
    ("config", "weight"),
    [(PAPER, 1 / 48), (INTENT, 1 / 12), (AS_IS, 1.0)],
    ids=["paper", "mlnet-pytorch", "mlnet-pytorch-asis"],
)
def test_weight_of_the_priors_penalty(config, weight):
    """Paper: lambda * ||1 - U||^2, lambda = 1 / number of cells; MLNet-Pytorch divides by 1."""
    u = 1 + random_maps(1, 1, *config.prior_cells)
    expected = weight * ((1 - u) ** 2).sum()
    torch.testing.assert_close(Objective(config).prior_penalty(u - 1), expected)


def test_the_validation_loss_has_no_penalty():
    """Keras 1 adds regularisers in the training phase only; the loss of an image has none."""
    prediction, density = random_maps(2, 2, 1, 6, 8).abs()
    heavy = Objective(load_config("paper", prior_penalty=1e6))
    found = heavy.per_image(prediction, density, density)
    assert torch.equal(found, mlnet_loss(prediction, density, density))


# ---- A. training -------------------------------------------------------------------------------
def test_the_papers_recipe():
    recipe = {
        **{"dataset": "salicon-2015", "height": 480, "width": 640, "precision": "fp32"},
        **{"backbone": "vgg16", "backbone_weights": "imagenet", "head": "paper"},
        **{"optimizer": "sgd", "lr": 1e-3, "schedule": "keras1", "lr_decay": 5e-4},
        **{"momentum": 0.9, "weight_decay": 0, "clip_norm": 0, "ema_decay": 0},
        **{"batch_size": 10, "epochs": 20, "patience": 5, "flip": 0, "test_flip": False},
        **{"dropout": 0.5, "dropout_channels": False, "dropout_at_test": False, "freeze": ()},
    }
    config = load_config("paper")
    assert {key: getattr(config, key) for key in recipe} == recipe


@pytest.mark.parametrize("update", [0, 1, 2, 999, 1000, 19_999])
def test_schedule_is_keras_1s_decay_per_update(update):
    expected = 1e-3 * (1 / (1 + 5e-4 * update))
    assert learning_rate(PAPER, update, 20_000) == pytest.approx(expected, rel=1e-15)


def keras1_sgd(gradients, rates, momentum=0.9):
    """Keras 1: v = m*v - lr*g; p += m*v - lr*g (Nesterov). Returns the displacement."""
    velocity, place = 0.0, 0.0
    for gradient, rate in zip(gradients, rates, strict=True):
        velocity = momentum * velocity - rate * gradient
        place += momentum * velocity - rate * gradient
    return place


@pytest.mark.parametrize(
    ("decay", "tolerance"), [(0.0, 1e-12), (5e-4, 5e-3)], ids=["constant rate", "decaying rate"]
)
def test_nesterov_momentum_is_kerass(network, decay, tolerance):
    """Equal at a constant rate. Keras keeps the rate inside the velocity, PyTorch does not.

    With the authors' decay, the velocity remembers rates that were larger, by 0.05 % a step:
    the way gone differs by 0.4 % in the first 300 updates, and by less later.
    """
    optimizer = make_optimizer(PAPER, network)
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)
    gradients = np.random.default_rng(0).standard_normal(300) + 0.5
    config, parameter = load_config("paper", lr_decay=decay), torch.zeros(1, dtype=torch.float64)
    rates = [learning_rate(config, t, 0) for t in range(300)]
    options = {key: optimizer.defaults[key] for key in ("momentum", "nesterov", "weight_decay")}
    plain = torch.optim.SGD([parameter], lr=1.0, **options)
    for gradient, rate in zip(gradients, rates, strict=True):
        plain.param_groups[0]["lr"] = rate
        parameter.grad = torch.full_like(parameter, gradient)
        plain.step()
    assert parameter.item() == pytest.approx(keras1_sgd(gradients, rates), rel=tolerance)


def test_photos_are_shuffled_anew_every_epoch():
    """And every photo is seen once; the order is a function of the seed and the epoch."""
    sampler = EpochSampler(95, batch_size=10, seed=0)
    orders = []
    for sampler.epoch in (0, 1, 0):
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [10] * 9 + [5]
        orders.append([index for batch in batches for _, index in batch])
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(95)) for order in orders)
    assert orders[0] != sorted(orders[0])


# ---- B. MLNet-Pytorch --------------------------------------------------------------------------
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of VGG-16's convolutions


class Theirs(nn.Module):
    """Its layers under its names, of one weight each."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 1, 1) if place in PLACES else nn.ReLU() for place in range(30)]
        self.features = nn.ModuleList(layers)
        self.int_conv = nn.Conv2d(1, 1, 1)
        self.prior = nn.Parameter(torch.ones(1))  # made last, and still the first


@pytest.fixture
def frozen(as_is):
    return {name for name, parameter in as_is.named_parameters() if not parameter.requires_grad}


def test_the_first_23_parameters_are_the_prior_and_eleven_convolutions(frozen):
    first_23 = [name for name, _ in Theirs().named_parameters()][:23]
    assert (first_23[0], first_23[-1]) == ("prior", "features.24.bias")  # conv5_1
    assert frozen == {name.replace("features", "backbone.features") for name in first_23}
    assert len(frozen) == 23


def test_the_intent_freezes_the_same_but_trains_the_prior(as_is, frozen):
    network = MLNet(INTENT)
    assert set(freeze(network, INTENT.freeze)) == frozen - {"prior"}
    assert network.prior.requires_grad
    for config, model, trains in ((INTENT, network, True), (AS_IS, as_is, False)):
        groups = make_optimizer(config, model).param_groups
        assert any(p is model.prior for group in groups for p in group["params"]) == trains


@pytest.mark.parametrize("config", [INTENT, AS_IS], ids=lambda config: config.preset)
def test_mlnet_pytorchs_recipe(config):
    recipe = {
        **{"dataset": "salicon-2017", "height": 240, "width": 320, "grid": (30, 40)},
        **{"prior_cells": (3, 4), "compat": "mlnet-pytorch", "loss": "mlnet", "alpha": 1.1},
        **{"optimizer": "adam", "lr": 1e-3, "schedule": "constant", "weight_decay": 1e-4},
        **{"batch_size": 16, "epochs": 10, "patience": 0, "flip": 0},
        **{"dropout": 0.5, "dropout_channels": True},
    }
    assert {key: getattr(config, key) for key in recipe} == recipe


def test_mlnet_pytorchs_weight_decay_is_adams_l2(as_is):
    """Not AdamW: the decay is added to the gradient."""
    optimizer = make_optimizer(AS_IS, as_is)
    assert type(optimizer) is torch.optim.Adam
    assert not optimizer.defaults.get("decoupled_weight_decay", False)
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


def test_mlnet_pytorchs_dropout_stays_on_at_test_time(as_is):
    """As it is: whole channels vanish at random, in eval mode too. As it was meant: not."""
    ones = torch.ones(1, 1280, 8, 10)
    assert not as_is.training
    dropped = as_is.dropout(ones)
    assert set(dropped.unique().tolist()) == {0, 2}
    assert torch.equal(dropped.amin((2, 3)), dropped.amax((2, 3))), "whole channels"
    assert not torch.equal(dropped, as_is.dropout(ones))
    assert torch.equal(MLNet(INTENT).eval().dropout(ones), ones)


# ---- the table ---------------------------------------------------------------------------------
def test_the_table_names_tests_that_exist():
    here = Path(__file__).parents[1]
    named = set(re.findall(r"`(test_\w+)`", (here.parent / "docs/fidelity.md").read_text("utf-8")))
    exist = set()
    for path in here.rglob("test_*.py"):
        exist |= {path.stem, *re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)}
    assert len(named) > 30
    assert named <= exist, named - exist
