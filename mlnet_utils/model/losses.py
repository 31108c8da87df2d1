"""The paper's loss (section 3.4) and the alternatives, each per image, and weighted sums of them.

Every term takes ``(prediction, density, fixations)``, all (B, 1, h, w): a non-negative saliency
map of any scale, the fixation density that sums to 1, and fixation counts on the same grid; and
returns (B,), smaller is better. Losses are per image, so that gradient accumulation and several
processes can weight images exactly.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from mlnet_utils.config import Config

# Guards divisions and logarithms: far below any value that matters on a grid of < 1e5 cells.
EPS = 1e-12


def mlnet_loss(
    prediction: Tensor, density: Tensor, fixations: Tensor, alpha: float = 1.1
) -> Tensor:
    """The authors' code: mean of ((pred / max pred) - y)^2 / (alpha - y), y in 0..1.

    Equation 2 of the paper is :func:`printed_loss`, which the authors call a mistake of the print
    (mlnet issue 8). The ground truth y is the density scaled to a maximum of 1, as the 8-bit maps
    that the authors divide by 255. ``EPS`` keeps a map that is zero everywhere from becoming
    0/0 = NaN (the released code's failure on other data, mlnet issue 21).
    """
    y = _at_most_1(density)
    return ((_at_most_1(prediction) - y) ** 2 / (alpha - y)).mean((1, 2, 3))


def printed_loss(
    prediction: Tensor, density: Tensor, fixations: Tensor, alpha: float = 1.1
) -> Tensor:
    """Paper, equation 2 as printed: mean of (((pred / max pred) - y) / (alpha - y))^2."""
    y = _at_most_1(density)
    return (((_at_most_1(prediction) - y) / (alpha - y)) ** 2).mean((1, 2, 3))


def mse_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """Plain squared error between the maps scaled to a maximum of 1 (the paper's comparison)."""
    return ((_at_most_1(prediction) - _at_most_1(density)) ** 2).mean((1, 2, 3))


def kl_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the prediction from the density, in nats."""
    p, q = _as_density(prediction), _as_density(density)
    # Not xlogy(q, q / p): its gradient is 0/0 where the density is exactly zero.
    return (torch.special.xlogy(q, q) - q * p.clamp_min(EPS).log()).sum((1, 2, 3))


def ce_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """Cross-entropy: negative mean log-likelihood of the fixations, in nats per fixation."""
    p = _as_density(prediction)
    n = fixations.sum((1, 2, 3)).clamp_min(1)
    return -(fixations * p.clamp_min(EPS).log()).sum((1, 2, 3)) / n


def cc_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """1 - Pearson's correlation of prediction and density.

    Its slope, like that of NSS, has no bound where the prediction is constant, as a new density
    head's is. AdamW remembers that slope for hundreds of updates: set ``clip_norm``.
    """
    p, q = _centred(prediction), _centred(density)
    norm = (p.square().sum((1, 2, 3)) * q.square().sum((1, 2, 3)) + EPS).sqrt()
    return 1 - (p * q).sum((1, 2, 3)) / norm


def nss_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """Negative normalised scanpath saliency on the fixations (not on the blurred map)."""
    p = _centred(prediction)
    p = p / (p.square().mean((1, 2, 3), keepdim=True) + EPS).sqrt()
    n = fixations.sum((1, 2, 3)).clamp_min(1)
    return -(p * fixations).sum((1, 2, 3)) / n


def sim_loss(prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
    """1 - histogram intersection of the two densities."""
    return 1 - torch.minimum(_as_density(prediction), _as_density(density)).sum((1, 2, 3))


def _as_density(maps: Tensor) -> Tensor:
    return maps / maps.sum((1, 2, 3), keepdim=True).clamp_min(EPS)


def _at_most_1(maps: Tensor) -> Tensor:
    return maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(EPS)


def _centred(maps: Tensor) -> Tensor:
    """Maps divided by their means, so that any scale becomes of order 1, and then less 1."""
    maps = maps / maps.mean((1, 2, 3), keepdim=True).clamp_min(EPS)
    return maps - maps.mean((1, 2, 3), keepdim=True)


TERMS: dict[str, Callable[..., Tensor]] = {
    "mlnet": mlnet_loss,
    "mlnet-printed": printed_loss,
    "mse": mse_loss,
    "kl": kl_loss,
    "ce": ce_loss,
    "cc": cc_loss,
    "nss": nss_loss,
    "sim": sim_loss,
}


def parse_loss(expression: str) -> list[tuple[float, str]]:
    """``"kl + 0.5*cc"`` -> ``[(1.0, "kl"), (0.5, "cc")]``.

    Raises ValueError: anything that is not a sum of known terms with positive weights.
    """
    terms = []
    for part in expression.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d*)?)\s*\*\s*)?([a-z-]+)\s*", part)
        if not match or match[2] not in TERMS:
            known = ", ".join(TERMS)
            raise ValueError(f"config: loss {expression!r} is no sum like 'kl + 0.5*cc' of {known}")
        terms.append((float(match[1] or 1), match[2]))
    return terms


class Objective:
    """The weighted sum that a configuration names, plus the penalty on the prior."""

    def __init__(self, config: Config):
        self.terms = parse_loss(config.loss)
        self.alpha = config.alpha
        cells = config.prior_cells
        # Paper, equation 2: lambda = 1 / (number of cells of the prior).
        neutral = 1 / (cells[0] * cells[1]) if cells else 0.0
        self.penalty = neutral if config.prior_penalty < 0 else config.prior_penalty

    def per_image(self, prediction: Tensor, density: Tensor, fixations: Tensor) -> Tensor:
        """(B,) loss of each image, without the penalty, which belongs to no image."""
        total = prediction.new_zeros(len(prediction))
        for weight, name in self.terms:
            options = {"alpha": self.alpha} if name.startswith("mlnet") else {}
            total = total + weight * TERMS[name](prediction, density, fixations, **options)
        return total

    def prior_penalty(self, prior: Tensor | None) -> Tensor | float:
        """lambda * ||W||^2 (paper: ||1 - U||^2 with U = 1 + W); 0 without a prior."""
        return 0.0 if prior is None else self.penalty * prior.square().sum()
