"""The metrics, each a function to be read beside its paper: every score exact and named.

Every metric takes (B, H, W) tensors on any device and returns (B,) float64, NaN where a value is
undefined: without fixations, without negatives, or where the density is zero everywhere. Nothing is
averaged, resized, blurred or sampled. The arguments are:

* ``prediction``: any number type, any range and scale.
* ``fixations``: counts of fixations per pixel, never a blurred map.
* ``density``: blurred fixations, any scale.
* ``negatives``: counts of other images' fixations (``baselines.LeaveOneOut``).
* ``baseline``: density of a baseline, any scale, such as a centre bias of training data.
* ``names``: B image names for error messages, which else name the index in the batch.
* ``protocol``: the definition in use (docs/metrics.md). ``"mit300"``: today's MIT/Tuebingen
  benchmark and pysaliency. ``"salicon"``: the LSUN'17 SALICON server, which used MIT's MATLAB code
  (cvzoya/saliency). ``"salicon2015"``: the first evaluator (NUS-VIP/salicon-evaluation).

A ValueError names the image where a map holds NaN or infinity, has another shape than the
prediction, or is no density or no count map, and where the protocol does not define the metric.

The decorator :func:`protocols.metric` does the checks, so the bodies see one image: flat maps
(``inputs.Map``) and flat indices of pixels (``inputs.Points``). Published code estimates some areas
by random draws or jitter; here are the exact expectations: pairs that tie count one half.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlnet_utils.metrics.inputs import Map, Points
from mlnet_utils.metrics.protocols import DEFINITIONS, METRICS, PROTOCOLS, metric, needs, score
from mlnet_utils.metrics.resize import resize
from mlnet_utils.runtime import require

MIT = ("mit300", "salicon")
EPS = {"mit300": 2.2204e-16, "salicon": 2.0**-52}  # as the benchmark's code and MATLAB write it
# Multiplied in float64, as in the published code: 3 * 0.1 is not 0.3, and a map stored in tenths
# has values exactly on the thresholds.
COARSE = [*(i * 0.1 for i in range(11)), math.inf]  # MIT's AUC_Borji.m and AUC_shuffled.m
FINE = [*(i * 0.01 for i in range(100)), math.inf]  # the 2015 SALICON evaluator leaves out 1


# ---- areas under the ROC curve -----------------------------------------------------------------
def exact_area(positives: Tensor, negatives: Tensor) -> float:
    """P(positive > negative) + P(positive = negative) / 2 (Hanley & McNeil, Radiology 1982).

    The area of the curve with a point at every value. Takes (N,) and (M,) predictions, any unit.
    """
    ordered = np.sort(negatives.numpy())
    below, up_to = (np.searchsorted(ordered, positives.numpy(), side) for side in ("left", "right"))
    return (below + up_to).mean() / (2 * len(ordered))


def grid_area(positives: Tensor, negatives: Tensor, thresholds: list[float]) -> float:
    """Trapezoids between the ROC points at thresholds, in expectation over drawn negatives.

    Takes (N,) and (M,) predictions, of a map scaled to 0..1, and ascending thresholds, of which
    the last is infinite: there the curve starts at (0, 0). NaN without negatives.
    """
    limits, rates = positives.new_tensor(thresholds), []
    for values in (positives, negatives):
        passed = torch.bucketize(values, limits, right=True)  # so many thresholds are reached
        counts = torch.bincount(passed, minlength=len(limits) + 1)
        rates.append(counts.flip(0).cumsum(0).to(torch.float64) / len(values))
    true_positives, false_positives = rates
    return torch.trapezoid(true_positives, false_positives).item()


@metric("AUC-Borji", *MIT)
def auc_borji(prediction: Map, fixations: Points) -> float:
    """AUC of Borji et al. (IEEE TIP 2013; MIT's ``AUC_Borji.m``), 0..1: :func:`grid_area`.

    Fixated pixels, each once, against all pixels, thresholds 0, 0.1 .. 1, which cost peaky maps up
    to 0.06. NaN with fewer than two fixated pixels or a constant map.
    """
    if prediction.constant or len(fixations.pixels) < 2:
        return math.nan
    return grid_area(prediction.unit[fixations.pixels], prediction.unit, COARSE)


@metric("AUC", *PROTOCOLS)
def auc(prediction: Map, fixations: Points, *, protocol: str = "mit300") -> float:
    """Area under the ROC curve that separates fixated pixels from all pixels, 0..1, 0.5 = chance.

    mit300: all fixations, :func:`exact_area`. salicon: :func:`auc_borji`. salicon2015: all
    fixations, :func:`grid_area` with thresholds 0, 0.01 .. 0.99.
    """
    if protocol == "salicon":
        return auc_borji.__wrapped__(prediction, fixations)
    if protocol == "salicon2015":
        return grid_area(prediction.unit[fixations.each], prediction.unit, FINE)
    return exact_area(prediction.values[fixations.each], prediction.values)


def unfixated(prediction: Map, fixations: Points) -> Tensor:
    """The prediction's values at the pixels that were not fixated."""
    keep = torch.ones_like(prediction.values, dtype=torch.bool)
    keep[fixations.pixels] = False
    return prediction.values[keep]


@metric("AUC-unfixated", "mit300")
def auc_unfixated(prediction: Map, fixations: Points) -> float:
    """AUC of all fixations against all unfixated pixels, 0..1: :func:`exact_area`; NaN if none."""
    negatives = unfixated(prediction, fixations)
    return exact_area(prediction.values[fixations.each], negatives) if len(negatives) else math.nan


@metric("AUC-Judd", *MIT)
def auc_judd(prediction: Map, fixations: Points) -> float:
    """AUC + FPR(lowest positive) / 2N of Judd et al. (2012; MIT's ``AUC_Judd.m``), 0..1.

    Fixated pixels, each once, against all unfixated ones; NaN where there are none. The published
    curve has points at the N positives only, which adds the second term: that bias is kept. Where m
    positives and q negatives tie at the lowest value, its jitter lifts q m / (m + 1) of the q.
    """
    positives, negatives = prediction.values[fixations.pixels], unfixated(prediction, fixations)
    if not len(negatives):
        return math.nan
    lowest = positives.min()
    m, q = (positives == lowest).sum().item(), (negatives == lowest).sum().item()
    above = (negatives > lowest).sum().item() + q * m / (m + 1)
    return exact_area(positives, negatives) + above / (2 * len(positives) * len(negatives))


@metric("sAUC", *PROTOCOLS)
def auc_shuffled(
    prediction: Map,
    fixations: Points,
    negatives: Points,
    *,
    protocol: str = "mit300",
    grid: bool = False,
) -> float:
    """AUC of fixated pixels against places fixated on other images (Tatler et al. 2005), 0..1.

    :func:`exact_area`, each negative as often as it was fixated: all fixations (mit300) or each
    fixated pixel once (salicon). ``grid=True`` (with salicon, else a ValueError) takes thresholds
    0, 0.1 .. 1 of MIT's ``AUC_shuffled.m``, where each negative pixel counts once: pass
    ``negatives > 0``; a constant map gives NaN. salicon2015: thresholds 0, 0.01 .. 0.99, all
    fixations, negatives weighted by the number of images and not on this image's fixated pixels.
    """
    positives = fixations.pixels if protocol == "salicon" else fixations.each
    others = negatives.each
    if grid:
        if protocol != "salicon":
            raise ValueError(f"grid=True needs protocol='salicon', got {protocol!r}")
        if prediction.constant:
            return math.nan
    if protocol == "salicon2015":
        others = others[~torch.isin(others, positives)]
    if grid or protocol == "salicon2015":
        unit, thresholds = prediction.unit, COARSE if grid else FINE
        return grid_area(unit[positives], unit[others], thresholds)
    return exact_area(prediction.values[positives], prediction.values[others])


DEFINITIONS["salicon"]["sAUC-grid"] = functools.partial(auc_shuffled.__wrapped__, grid=True)


# ---- values at fixations -----------------------------------------------------------------------
@metric("NSS", *PROTOCOLS)
def nss(prediction: Map, fixations: Points, *, protocol: str = "mit300") -> float:
    """NSS = mean over fixations f of (P(f) - mean P) / std P (Peters et al., Vision Research 2005).

    Normalised scanpath saliency, in standard deviations, 0 = chance. mit300, salicon2015: every
    fixation, deviation with 1/P, 0 for a constant map. salicon: every fixated pixel once,
    deviation with 1/(P - 1), NaN for a constant map.
    """
    matlab = protocol == "salicon"
    if prediction.constant:
        return math.nan if matlab else 0.0
    f = fixations.pixels if matlab else fixations.each
    variance = prediction.square / (len(prediction.values) - matlab)
    return prediction.centred[f].mean() / math.sqrt(variance)


@metric("IG", *MIT)
def information_gain(
    prediction: Map, fixations: Points, baseline: Map, *, protocol: str = "mit300"
) -> float:
    """IG = mean over fixations f of log2 p(f) - log2 b(f), in bits (Kuemmerer et al., PNAS 2015).

    mit300: all fixations; both maps divided by their sums (a prediction with negative values is
    shifted first, an all-zero one is uniform); -inf where the prediction, a ValueError where the
    baseline is zero at a fixation. salicon: each fixated pixel once; both maps scaled to 0..1, then
    divided by their sums, eps = 2^-52; NaN where a map is constant. Warns of 8-bit predictions.
    """
    if protocol == "salicon":
        f, eps = fixations.pixels, EPS[protocol]
        p, b = prediction.stretched[f] + eps, baseline.stretched[f] + eps
    else:
        f = fixations.each
        p, b = prediction.density[f], baseline.share[f]
        if not (b > 0).all():
            undefined = "the baseline is zero at a fixation; mix it with a uniform density"
            raise ValueError(f"{prediction.image}: {undefined}")
    warn_of_8_bits(prediction, "IG")
    return (p.log2() - b.log2()).mean()


# ---- maps against a density --------------------------------------------------------------------
@metric("CC", *PROTOCOLS)
def cc(prediction: Map, density: Map, *, protocol: str = "mit300") -> float:
    """CC = cov(P, G) / (std P std G), Pearson's correlation over the pixels, -1..1.

    A constant density gives NaN, a constant prediction 0 in mit300 and NaN elsewhere.
    """
    if prediction.constant or density.constant:
        return 0.0 if protocol == "mit300" and not density.constant else math.nan
    covariance = torch.dot(prediction.centred, density.centred)
    return covariance / math.sqrt(prediction.square * density.square)


@metric("KL", *MIT)
def kl_divergence(prediction: Map, density: Map, *, protocol: str = "mit300") -> float:
    """KL = sum over pixels of g ln(eps + g / (p + eps)), in nats, 0 = equal (MIT's ``KLdiv.m``).

    Both maps are divided by their sums. mit300: eps = 2.2204e-16; a prediction with negative
    values is shifted by its minimum, an all-zero one is uniform. salicon: eps = 2^-52, no shift,
    an all-zero prediction stays zero; NaN for values of both signs. Warns of 8-bit predictions.
    """
    warn_of_8_bits(prediction, "KL")
    p, g, eps = prediction.density, density.share, EPS[protocol]
    if protocol == "salicon":
        p = prediction.share
    ratio = p + eps
    torch.div(g, ratio, out=ratio)  # in place: memory for new maps costs more than the sums
    return torch.dot(g, ratio.add_(eps).log_())


def warn_of_8_bits(prediction: Map, name: str) -> None:
    """Warn where small values of the prediction became zeros."""
    if prediction.looks_8bit:
        problem = f"read back from an 8-bit file, which makes {name} meaningless"
        advice = "score the float map instead"
        warnings.warn(f"{prediction.image}: the prediction looks {problem}; {advice}", stacklevel=2)


@metric("SIM", *MIT)
def similarity(prediction: Map, density: Map, *, protocol: str = "mit300") -> float:
    """SIM = sum over pixels of min(p, g), the intersection of histograms, 0..1 (Judd et al. 2012).

    mit300: both divided by their sums (the prediction as in :func:`kl_divergence`). salicon: both
    scaled to 0..1 first; 0 for an all-zero prediction, NaN for another constant map.
    """
    if protocol == "mit300":
        return torch.minimum(prediction.density, density.share).sum()
    return 0.0 if prediction.empty else torch.minimum(prediction.stretched, density.stretched).sum()


@metric("EMD", *MIT)
def emd(prediction: Map, density: Map, *, downsize: int = 32) -> float:
    """Earth mover's distance: least mass times distance that turns p into g (Rubner et al. 2000).

    The old MIT benchmark's ``EMD.m``, in pixels of small maps, 0 = equal: slow. Both maps are
    shrunk by the factor ``downsize`` with MATLAB's ``imresize`` and divided by their sums. NaN for
    an all-zero prediction, a ValueError for one of both signs; needs POT (extra ``emd``).
    """
    ot = require("ot", "emd")
    if prediction.empty:
        return math.nan
    if prediction.low < 0 < prediction.high:
        problem = "the prediction has values of both signs; subtract its minimum first"
        raise ValueError(f"{prediction.image}: {problem}")
    size = [math.ceil(side / downsize) for side in prediction.shape]
    shapes = ((one.values.reshape(1, *one.shape)) for one in (prediction, density))
    p, g = (resize(one, *size, protocol="salicon").flatten() for one in shapes)
    # Mass that both have in a place need not move, so only the differences do. They make sense of
    # the slightly negative values that bicubic resizing gives, too.
    difference = p / p.sum() - g / g.sum()
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in size))
    surplus, lack = difference > 0, difference < 0
    moved = difference[surplus].sum()
    if moved <= 0:
        return 0.0
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(places[surplus], places[lack], compute_mode=exact).numpy()
    p, g = (difference[surplus] / moved).numpy(), difference[lack]
    return ot.emd2(p, (g / g.sum()).numpy(), distances, numItermax=1_000_000) * moved


# ---- all at once -------------------------------------------------------------------------------
def score_all(
    prediction: Tensor,
    fixations: Tensor,
    density: Tensor | None = None,
    negatives: Tensor | None = None,
    baseline: Tensor | None = None,
    protocol: str = "mit300",
    *,
    metrics: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Several metrics in one pass, with shared checks and intermediate results.

    Args as in the module; CC, KL, SIM and EMD need ``density``, sAUC ``negatives``, IG
    ``baseline``. ``metrics`` are keys of ``DEFINITIONS[protocol]``; None = those of :data:`METRICS`
    that the protocol defines and that have their inputs. Returns {metric: (B,) float64}, equal to
    the single functions' results. Raises ValueError: a metric is unknown or lacks its input; see
    the module for the others.
    """
    maps = {
        "prediction": prediction, "fixations": fixations, "density": density,
        "negatives": negatives, "baseline": baseline,
    }  # fmt: skip
    maps = {kind: value for kind, value in maps.items() if value is not None}
    if metrics is None:
        defined = DEFINITIONS.get(protocol, {})
        metrics = [n for n in METRICS if n in defined and maps.keys() >= set(needs(defined[n]))]
    return score(metrics, maps, names, protocol)
