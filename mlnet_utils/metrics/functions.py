"""The metrics' formulas, each to be read beside its paper, on plain tensors of one image.

``p``, ``g`` and ``b`` are the (P,) float64 values of prediction, ground truth and baseline, one for
each pixel; ``f`` (N,) are flat indices of fixated pixels. The evaluators differ in their inputs
(every fixation, or every fixated pixel once; the maps' normalisation; a constant against zeros) and
in their values for constant maps: ``protocols.DEFINITIONS`` is that table. For batches (B, H, W)
call ``mlnet_utils.metrics.nss`` and its kin, which check their arguments.

The papers' titles stand in docs/metrics.md. Published code estimates some areas by random draws or
jitter; here are the exact expectations: pairs that tie count one half.
"""

import math

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.runtime import require


# ---- areas under the ROC curve -----------------------------------------------------------------
def exact_area(positives: Tensor, negatives: Tensor) -> float:
    """P(positive > negative) + P(positive = negative) / 2 (Hanley & McNeil, Radiology 1982).

    The area of the curve with a point at every value, 0..1, 0.5 = chance. Takes the (N,) and (M,)
    values of a map at fixations and elsewhere, in any unit. NaN without negatives.
    """
    if not len(negatives):
        return math.nan
    ordered = np.sort(negatives.numpy())
    below, up_to = (np.searchsorted(ordered, positives.numpy(), side) for side in ("left", "right"))
    # Negatives below a positive, and half of those that tie: (below + up_to) / 2.
    return (below + up_to).mean() / (2 * len(ordered))


def grid_area(positives: Tensor, negatives: Tensor, thresholds: list[float]) -> float:
    """Trapezoids between the ROC points at thresholds, in expectation over drawn negatives.

    Takes (N,) and (M,) values, of a map scaled to 0..1, and ascending thresholds, of which the last
    is infinite: there the curve starts at (0, 0). NaN without negatives.
    """
    limits, rates = positives.new_tensor(thresholds), []
    for values in (positives, negatives):
        passed = torch.bucketize(values, limits, right=True)  # so many thresholds are reached
        counts = torch.bincount(passed, minlength=len(limits) + 1)
        rates.append(counts.flip(0).cumsum(0).to(torch.float64) / len(values))
    true_positives, false_positives = rates
    return torch.trapezoid(true_positives, false_positives).item()


def judd_area(positives: Tensor, negatives: Tensor) -> float:
    """Area + FPR(lowest positive) / 2N of Judd et al. (2012; MIT's ``AUC_Judd.m``), 0..1.

    The published curve has points at the N positives only, which adds the second term: that bias is
    kept. Where m positives and q negatives tie at the lowest value, its jitter lifts q m / (m + 1)
    of the q. Takes (N,) and (M,) values; NaN without negatives.
    """
    if not len(negatives):
        return math.nan
    lowest = positives.min()
    m, q = (positives == lowest).sum().item(), (negatives == lowest).sum().item()
    above = (negatives > lowest).sum().item() + q * m / (m + 1)
    return exact_area(positives, negatives) + above / (2 * len(positives) * len(negatives))


# ---- values at fixations -----------------------------------------------------------------------
def nss(p: Tensor, f: Tensor, correction: int = 0) -> Tensor:
    """NSS = mean over fixations f of (P(f) - mean P) / std P (Peters et al., Vision Research 2005).

    Normalised scanpath saliency, in standard deviations, 0 = chance; undefined where P is constant.
    The squares are divided by their number less ``correction``.
    """
    centred = p - p.mean()
    return centred[f].mean() / (centred.square().sum() / (len(p) - correction)).sqrt()


def information_gain(p: Tensor, b: Tensor, f: Tensor, eps: float = 0.0) -> Tensor:
    """IG = mean over fixations f of log2 p(f) - log2 b(f), in bits (Kuemmerer et al., PNAS 2015).

    ``eps`` is added to both; without it IG is minus infinity where p is zero at a fixation.
    """
    return ((p[f] + eps).log2() - (b[f] + eps).log2()).mean()


# ---- maps against a density --------------------------------------------------------------------
def cc(p: Tensor, g: Tensor) -> Tensor:
    """CC = cov(P, G) / (std P std G), Pearson's correlation over the pixels, -1..1.

    Undefined where a map is constant.
    """
    p, g = p - p.mean(), g - g.mean()
    return torch.dot(p, g) / (torch.dot(p, p) * torch.dot(g, g)).sqrt()


def kl_divergence(p: Tensor, g: Tensor, eps: float) -> Tensor:
    """KL = sum over pixels of g ln(eps + g / (p + eps)), in nats, 0 = equal (MIT's ``KLdiv.m``)."""
    return torch.dot(g, (eps + g / (p + eps)).log())


def similarity(p: Tensor, g: Tensor) -> Tensor:
    """SIM = sum over pixels of min(p, g), 0..1: intersection of histograms (Judd et al. 2012)."""
    return torch.minimum(p, g).sum()


def emd(p: Tensor, g: Tensor) -> float:
    """Earth mover's distance: least mass times distance that turns p into g (Rubner et al. 2000).

    Takes two (h, w) maps, which are divided by their sums; in pixels, 0 = equal. Slow: a few
    hundred pixels. NaN where p is zero everywhere. Raises ImportError: the extra ``emd`` is not
    installed.
    """
    ot = require("ot", "emd")
    if not p.any():
        return math.nan
    # Mass that both have in a place need not move, so only the differences do. They make sense of
    # the slightly negative values that bicubic resizing gives, too.
    difference = (p / p.sum() - g / g.sum()).flatten()
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in p.shape))
    surplus, lack = difference > 0, difference < 0
    moved = difference[surplus].sum()
    if moved <= 0:
        return 0.0
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(places[surplus], places[lack], compute_mode=exact).numpy()
    p, g = (difference[surplus] / moved).numpy(), difference[lack]
    return ot.emd2(p, (g / g.sum()).numpy(), distances, numItermax=1_000_000) * moved
