"""The formulas of the metrics, on plain tensors of one image, to be read beside the papers.

All tensors are float64 on the CPU. A map is flat, (P,) pixels; fixations are flat indices of
pixels, (N,), a pixel as often as it counts. The functions check nothing: the module ``protocols``
checks the maps, turns them into what a formula takes, and knows the values of degenerate input.

Published code estimates some of the areas by random draws or jitter. The functions here return the
exact expectations, so pairs that tie count one half.
"""

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.runtime import require


# ---- areas under the ROC curve -----------------------------------------------------------------
def auc(positives: Tensor, negatives: Tensor, weights: Tensor | None = None) -> float:
    """AUC = P(positive > negative) + P(positive = negative) / 2 (Hanley & McNeil, Radiology 1982).

    The area of the curve with a point at every value: AUC of today's MIT/Tuebingen benchmark where
    the negatives are all pixels, shuffled AUC (Tatler et al., Vision Research 2005) where they are
    other images' fixations. Only the positives are sorted.

    Args:
        positives: (N,) predictions at fixations, any unit.
        negatives: (M,) predictions at the negatives.
        weights: (M,) whole numbers, how often each negative counts; None = once.

    Returns:
        0..1, 0.5 = chance.
    """
    # Twice the number of positives below a negative, a tie counting once: every positive is in the
    # list from itself on, and once more from the next larger number on.
    positives, negatives = positives.numpy(), negatives.numpy()
    ordered = np.sort(np.concatenate([positives, np.nextafter(positives, np.inf)]))
    rivals = negatives >= ordered[0]  # the rest lie below every positive
    below = np.searchsorted(ordered, negatives[rivals], side="right")
    count = len(negatives)
    if weights is not None:
        below, count = below * weights.numpy()[rivals], weights.sum().item()
    return 1 - below.sum().item() / (2 * len(positives) * count)


def auc_judd(positives: Tensor, negatives: Tensor) -> float:
    """AUC + FPR(lowest positive) / 2N: MIT's ``AUC_Judd.m``, in expectation over its jitter.

    The code of Judd et al. (2012) puts points on the curve at the N positives only, and the sloped
    lines between them add the second term. Where m positives and q negatives tie at the lowest
    value, jitter lifts q m / (m + 1) of the q above the lowest of the m.

    Args:
        positives: (N,) predictions at fixated pixels, each once.
        negatives: (M,) predictions at all other pixels.

    Returns:
        0..1.
    """
    lowest = positives.min()
    m, q = (positives == lowest).sum().item(), (negatives == lowest).sum().item()
    above = (negatives > lowest).sum().item() + q * m / (m + 1)
    return auc(positives, negatives) + above / (2 * len(positives) * len(negatives))


def auc_grid(positives: Tensor, negatives: Tensor, thresholds: Tensor) -> float:
    """Trapezoids between the ROC points at fixed thresholds, in expectation over drawn negatives.

    AUC of Borji et al. (IEEE TIP 2013; MIT's ``AUC_Borji.m`` and ``AUC_shuffled.m``) and of the
    2015 SALICON evaluator.

    Args:
        positives: (N,) predictions at fixations, of a map scaled to 0..1.
        negatives: (M,) predictions at the negatives.
        thresholds: (T,) ascending; the last is infinite, where the curve starts at (0, 0).

    Returns:
        0..1; NaN without positives or negatives.
    """
    rates = []
    for values in (positives, negatives):
        passed = torch.bucketize(values, thresholds, right=True)  # so many thresholds are reached
        counts = torch.bincount(passed, minlength=len(thresholds) + 1)
        rates.append(counts.flip(0).cumsum(0).to(torch.float64) / len(values))
    true_positives, false_positives = rates
    return torch.trapezoid(true_positives, false_positives).item()


# ---- values at fixations -----------------------------------------------------------------------
def nss(prediction: Tensor, fixations: Tensor, correction: int = 0) -> float:
    """NSS = mean over fixations f of (P(f) - mean P) / std P (Peters et al., Vision Research 2005).

    Args:
        prediction: (P,) any unit, not constant.
        fixations: (N,) pixels.
        correction: the deviation divides by P - correction.

    Returns:
        Standard deviations, 0 = chance.
    """
    deviation = prediction.std(correction=correction)
    return ((prediction[fixations] - prediction.mean()) / deviation).mean().item()


def information_gain(p: Tensor, b: Tensor, eps: float = 0.0) -> float:
    """IG = mean over fixations f of log2 p(f) - log2 b(f) (Kuemmerer et al., PNAS 2015).

    Args:
        p: (N,) predicted density at the fixations.
        b: (N,) baseline's density at the fixations.
        eps: added to both densities.

    Returns:
        Bits per fixation; -inf where p is 0 and eps too.
    """
    return ((p + eps).log2() - (b + eps).log2()).mean().item()


# ---- maps against a density --------------------------------------------------------------------
def cc(prediction: Tensor, density: Tensor) -> float:
    """CC = cov(P, G) / (std P std G), Pearson's correlation over the pixels.

    Args:
        prediction: (P,) any unit, not constant.
        density: (P,) any unit, not constant.

    Returns:
        -1..1.
    """
    x, y = prediction - prediction.mean(), density - density.mean()
    return (torch.dot(x, y) / (torch.dot(x, x) * torch.dot(y, y)).sqrt()).item()


def kl_divergence(p: Tensor, g: Tensor, eps: float) -> float:
    """KL = sum over pixels of g ln(eps + g / (p + eps)) (MIT's ``KLdiv.m``).

    Args:
        p: (P,) predicted density, of sum 1.
        g: (P,) ground-truth density, of sum 1.
        eps: keeps the logarithm finite.

    Returns:
        Nats, 0 = equal.
    """
    ratio = p + eps
    torch.div(g, ratio, out=ratio)  # in place: memory for new maps costs more than the sums
    return torch.dot(g, ratio.add_(eps).log_()).item()


def similarity(p: Tensor, g: Tensor) -> float:
    """SIM = sum over pixels of min(p, g), the intersection of histograms (Judd et al. 2012).

    Args:
        p: (P,) predicted density, of sum 1.
        g: (P,) ground-truth density, of sum 1.

    Returns:
        0..1, 1 = equal.
    """
    return torch.minimum(p, g).sum().item()


def emd(p: Tensor, g: Tensor) -> float:
    """Least work, mass times distance, that turns p into g (MIT's ``EMD.m``; Rubner et al. 2000).

    Args:
        p: (h, w) predicted density, of sum 1.
        g: (h, w) ground-truth density, of sum 1.

    Returns:
        Pixels, 0 = equal.

    Raises:
        ImportError: the package POT (extra ``emd``) is not installed.
    """
    ot = require("ot", "emd")
    # Mass that both have in a place need not move, so only the differences do. They make sense of
    # the slightly negative values that bicubic resizing gives, too.
    difference = (p - g).flatten()
    sides = (torch.arange(side, dtype=torch.float64) for side in p.shape)
    places = torch.cartesian_prod(*sides)
    surplus, lack = difference > 0, difference < 0
    moved = difference[surplus].sum()
    if moved <= 0:
        return 0.0
    distances = torch.cdist(
        places[surplus], places[lack], compute_mode="donot_use_mm_for_euclid_dist"
    )
    work = ot.emd2(
        (difference[surplus] / moved).numpy(),
        (difference[lack] / difference[lack].sum()).numpy(),
        distances.numpy(),
        numItermax=1_000_000,
    )
    return float(work) * moved.item()
