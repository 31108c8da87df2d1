"""Losses against computations by hand, and finite gradients where divisions and logarithms lurk."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_config

from mlnet_utils.model.losses import TERMS, Objective, cc_loss, kl_loss, parse_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def maps(*values):
    """One 2x2 map."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 2, 2)


PREDICTION = maps(1, 2, 3, 4)
DENSITY = maps(0.1, 0.2, 0.2, 0.5)
FIXATIONS = maps(0, 1, 0, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", np.mean((np.array([0.25, 0.5, 0.75, 1]) - [0.2, 0.4, 0.4, 1]) ** 2)),
        ("kl", 0.2 * math.log(0.2 / 0.3) + 0.5 * math.log(0.5 / 0.4)),
        ("ce", -(math.log(0.2) + 3 * math.log(0.4)) / 4),
        ("cc", 1 - np.corrcoef([1, 2, 3, 4], [0.1, 0.2, 0.2, 0.5])[0, 1]),
        ("nss", -(-0.5 + 3 * 1.5) / math.sqrt(1.25) / 4),
        ("sim", 1 - (0.1 + 0.2 + 0.2 + 0.4)),
    ],
)
def test_the_other_terms_by_hand(name, expected):
    loss = TERMS[name](PREDICTION, DENSITY, FIXATIONS)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_every_image_has_its_own_loss_whatever_its_scale(name):
    prediction, density = torch.rand(2, 3, 1, 6, 8)
    density /= density.sum((1, 2, 3), keepdim=True)
    fixations = torch.randint(0, 3, (3, 1, 6, 8)).float()
    together = TERMS[name](prediction, density, fixations)
    for i, scale in enumerate((1.0, 1e-3, 1e3)):
        one = slice(i, i + 1)
        alone = TERMS[name](prediction[one] * scale, density[one], fixations[one])
        assert alone.item() == pytest.approx(together[i].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_the_truth_is_better_than_a_uniform_map(name):
    density = (3 * torch.randn(2, 1, 6, 8)).flatten(1).softmax(1).reshape(2, 1, 6, 8)
    fixations = (density * 1000).round()
    perfect = TERMS[name](density, density, fixations)
    assert (perfect < TERMS[name](torch.ones_like(density), density, fixations)).all()
    if name not in ("ce", "nss"):
        torch.testing.assert_close(perfect, torch.zeros(2), atol=1e-6, rtol=0)


ZERO, ONE_CELL = torch.zeros(2, 4, 5)
ONE_CELL[1, 2] = 1
EXTREME_PREDICTIONS = {
    "zero": ZERO, "constant": ZERO + 0.3, "tiny": ZERO + 1e-30,
    "one cell": ONE_CELL.roll((-1, -2), (0, 1)),
}  # fmt: skip
EXTREME_DENSITIES = {"no fixation": ZERO, "one cell": ONE_CELL, "uniform": ZERO + 1 / 20}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("prediction", EXTREME_PREDICTIONS)
@pytest.mark.parametrize("density", EXTREME_DENSITIES)
def test_losses_and_gradients_are_finite_at_extremes(name, prediction, density):
    """Where the density is exactly zero, xlogy(q, q / p) once had a NaN gradient."""
    p = EXTREME_PREDICTIONS[prediction][None, None].clone().requires_grad_()
    q = EXTREME_DENSITIES[density][None, None]
    loss = TERMS[name](p, q, (q * 20).round())
    assert loss.isfinite().all()
    loss.sum().backward()
    assert p.grad.isfinite().all()


def test_a_softmax_far_from_the_density_has_a_gradient_that_helps():
    logits, q = torch.zeros(1, 1, 4, 5), ONE_CELL[None, None]
    logits[..., 0, 0] = 20.0
    logits.requires_grad_()
    kl_loss(logits.flatten(1).softmax(1).reshape(logits.shape), q, q).sum().backward()
    assert logits.grad[0, 0, 1, 2] < 0 < logits.grad[0, 0, 0, 0]


def test_constant_maps_correlate_with_nothing():
    assert cc_loss(torch.ones(1, 1, 2, 2), DENSITY, FIXATIONS).item() == pytest.approx(1)
    assert TERMS["nss"](torch.ones(1, 1, 2, 2), DENSITY, FIXATIONS).item() == pytest.approx(0)


def test_expressions_are_sums_of_known_terms():
    assert parse_loss("mlnet") == [(1.0, "mlnet")]
    assert parse_loss(" kl+0.5 * cc + 2*nss ") == [(1.0, "kl"), (0.5, "cc"), (2.0, "nss")]
    assert parse_loss("mlnet-printed+cc") == [(1.0, "mlnet-printed"), (1.0, "cc")]


@pytest.mark.parametrize(
    "text", ["", "kl +", "klx", "kl - cc", "kl-cc", "cc*0.5", "-1*kl", "2**kl", "kl cc"]
)
def test_other_expressions_are_errors(text):
    with pytest.raises(ValueError, match=r"loss .* mlnet, mlnet-printed, mse, kl"):
        parse_loss(text)


def test_objective_is_the_weighted_sum():
    maps = (PREDICTION, DENSITY, FIXATIONS)
    total = Objective(tiny_config(loss="kl + 0.5*cc")).per_image(*maps)
    assert torch.equal(total, TERMS["kl"](*maps) + 0.5 * TERMS["cc"](*maps))
    for name in ("mlnet", "mlnet-printed"):
        narrow = Objective(tiny_config(loss=name, alpha=1.5))
        assert torch.equal(narrow.per_image(*maps), TERMS[name](*maps, alpha=1.5))
    assert Objective(tiny_config(prior_cells=())).prior_penalty(None) == 0
