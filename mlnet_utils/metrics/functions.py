"""The metrics' formulas, for one image. The public functions in metrics.py say what they mean.

A formula takes a :class:`~mlnet_utils.metrics.inputs.ScoredImage`, follows its protocol, and
returns a float, NaN where undefined. What is added up over all pixels is a function of a block of
pixels, which ``image.pixel_sum`` adds up for all the wanted metrics in one pass over the maps.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlnet_utils.metrics import roc
from mlnet_utils.metrics.inputs import Block, ScoredImage, warn_if_8bit
from mlnet_utils.metrics.resize import resize

NAN = math.nan
EPS_MIT300 = 2.2204e-16  # as pysaliency and the benchmark's code write it
EPS_MATLAB = 2.0**-52


# ---- at fixations, by rank ---------------------------------------------------------------------
def auc(image: ScoredImage) -> float:
    """Fixated pixels against all pixels."""
    if image.protocol == "salicon":
        return auc_borji(image)
    count = len(image.fixated)
    if count == 0:
        return NAN
    if image.protocol == "mit300":
        below, _ = image.pixel_sum(rank_sums)
        return roc.area(below, count, image.prediction.pixels)
    if image.prediction.constant:
        return 0.5
    return roc.grid_area(_levels(image, image.fixated, roc.FINE), *image.pixel_sum(fine_levels))


def auc_unfixated(image: ScoredImage) -> float:
    """Fixated pixels against pixels that nobody fixated."""
    count, others = len(image.fixated), image.prediction.pixels - len(image.unique)
    if count == 0 or others == 0:
        return NAN
    below, _ = image.pixel_sum(rank_sums)
    below -= image.ranks(image.prediction.values[image.unique]).sum().item()
    return roc.area(below, count, others)


def auc_judd(image: ScoredImage) -> float:
    """Fixated pixels, each once, against unfixated pixels, with the published code's bias."""
    count, others = len(image.unique), image.prediction.pixels - len(image.unique)
    if count == 0 or others == 0:
        return NAN
    values, where = image.prediction.values, image.unique
    ranks = roc.Ranks(values[where], image.prediction.low, image.prediction.high)(values)
    below = ranks.sum().item() - ranks[where].sum().item()
    lowest = values[where].min()
    tied = (values[where] == lowest).sum().item()
    tied_others = (values == lowest).sum().item() - tied
    above = (values > lowest).sum().item() - (count - tied)
    return roc.area(below, count, others) + roc.judd_bias(count, others, above, tied, tied_others)


def auc_borji(image: ScoredImage) -> float:
    """Fixated pixels, each once, against all pixels, thresholds 0, 0.1 .. 1."""
    if len(image.unique) < 2 or image.prediction.constant:
        return NAN
    return roc.grid_area(_levels(image, image.unique, roc.COARSE), *image.pixel_sum(coarse_levels))


def auc_shuffled(image: ScoredImage) -> float:
    """Fixated pixels against other images' fixations."""
    count = len(image.fixated)
    if count == 0 or image.negative_count == 0:
        return NAN
    if image.protocol != "salicon2015":
        _, below = image.pixel_sum(rank_sums)
        return roc.area(below, count, image.negative_count)
    where, repeats = image.negatives
    keep = ~torch.isin(where, image.unique)
    negatives = where[keep].repeat_interleave(repeats[keep])
    if len(negatives) == 0:
        return NAN
    if image.prediction.constant:
        return 0.5
    hits, false_alarms = (_levels(image, one, roc.FINE) for one in (image.fixated, negatives))
    return roc.grid_area(hits, false_alarms)


def auc_shuffled_grid(image: ScoredImage) -> float:
    """Fixated pixels, each once, against other images' fixations, thresholds 0, 0.1 .. 1."""
    if len(image.unique) == 0 or image.negative_count == 0 or image.prediction.constant:
        return NAN
    where, repeats = image.negatives
    negatives = where.repeat_interleave(repeats)
    hits, false_alarms = (_levels(image, one, roc.COARSE) for one in (image.unique, negatives))
    return roc.grid_area(hits, false_alarms)


def rank_sums(image: ScoredImage, block: Block) -> tuple[int, int]:
    """Twice how many (fixation, pixel) and (fixation, negative) pairs have the fixation lower."""
    largest = 2 * len(image.fixated) * max(image.prediction.pixels, image.negative_count)
    integer = torch.int32 if largest < 2**31 else torch.int64  # 32 bits are three times as fast
    below = image.ranks(block.values).to(integer)
    over_pixels = below.sum(dtype=integer).item()
    if block.negatives is None:
        return over_pixels, 0
    if 64 * image.negative_count < image.prediction.pixels:  # so few that looking for them pays
        where = roc.at_least(1, block.negatives)
        weighted = below[where] * block.negatives[where]
    else:
        weighted = below.mul_(block.negatives)
    return over_pixels, weighted.sum(dtype=integer).item()


def coarse_levels(image: ScoredImage, block: Block) -> tuple[Tensor]:
    """Pixels per level at thresholds 0, 0.1 .. 1."""
    return (roc.levels(image.prediction.unit(block.prediction), roc.COARSE),)


def fine_levels(image: ScoredImage, block: Block) -> tuple[Tensor]:
    """Pixels per level at thresholds 0, 0.01 .. 0.99."""
    return (roc.levels(image.prediction.unit(block.prediction), roc.FINE),)


def _levels(image: ScoredImage, where: Tensor, thresholds: Sequence[float]) -> Tensor:
    return roc.levels(image.prediction.unit(image.prediction.at(where)), thresholds)


# ---- at fixations, by value --------------------------------------------------------------------
def nss(image: ScoredImage) -> float:
    """Mean z-score at fixations."""
    where, prediction = image.fixated, image.prediction
    if len(where) == 0:
        return NAN
    if prediction.constant:
        return NAN if image.protocol == "salicon" else 0.0
    squares, _, _ = _moments(image)
    deviation = math.sqrt(squares / (prediction.pixels - (image.protocol == "salicon")))
    return (prediction.at(where) - prediction.mean).mean().item() / deviation


def information_gain(image: ScoredImage) -> float:
    """Mean of log2 p - log2 b at fixations."""
    where, prediction, baseline = image.fixated, image.prediction, image.baseline
    if len(where) == 0:
        return NAN
    if image.protocol == "salicon" and (prediction.constant or baseline.constant):
        return NAN  # a constant map scaled to 0..1 is 0 / 0
    warn_if_8bit(image, "information gain")
    if image.protocol == "salicon":
        p = prediction.stretched(prediction.at(where)) + EPS_MATLAB
        b = baseline.stretched(baseline.at(where)) + EPS_MATLAB
    else:
        p = image.normalised(prediction.at(where))
        b = baseline.at(where) / baseline.total
        if not (b > 0).all():
            raise ValueError(
                f"{image.name}: the baseline is zero at a fixation, so the gain over it is not "
                "defined; mix it with a little of the uniform density"
            )
    return (p.log2() - b.log2()).mean().item()


# ---- against a density -------------------------------------------------------------------------
def cc(image: ScoredImage) -> float:
    """Pearson's correlation over the pixels."""
    if image.density.constant:
        return NAN
    if image.prediction.constant:
        return 0.0 if image.protocol == "mit300" else NAN
    predicted, both, true = _moments(image)
    return both / math.sqrt(predicted * true)


def kl_divergence(image: ScoredImage) -> float:
    """Sum of g ln(eps + g / (p + eps))."""
    if image.density.total == 0:
        return NAN
    warn_if_8bit(image, "KL divergence")
    (divergence,) = image.pixel_sum(divergence_sum)
    return divergence / image.density.total


def similarity(image: ScoredImage) -> float:
    """Sum of min(p, g)."""
    if image.density.total == 0:
        return NAN
    if image.protocol == "salicon":
        if image.prediction.constant and image.prediction.high == 0:
            return 0.0  # MATLAB's code leaves an all-zero map as it is
        if image.prediction.constant or image.density.constant:
            return NAN
    (common,) = image.pixel_sum(overlap_sum)
    return common


def emd(image: ScoredImage, downsize: int = 32) -> float:
    """Least work, mass times distance, that turns the one density into the other."""
    if image.density.total == 0 or (image.prediction.constant and image.prediction.high == 0):
        return NAN
    if image.prediction.low < 0 < image.prediction.high:
        raise ValueError(
            f"{image.name}: the prediction has values of both signs, so that dividing it by its "
            "sum makes no density; for the earth mover's distance subtract its minimum first"
        )
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "the earth mover's distance needs the package POT: pip install 'mlnet-utils[emd]'"
        ) from error
    size = [math.ceil(side / downsize) for side in image.shape]
    p, g = (
        resize(one.values.reshape(1, *image.shape).cpu(), *size, protocol="salicon").flatten()
        for one in (image.prediction, image.density)
    )
    # Mass that both have in a place need not move, so only the differences do. This also makes
    # sense of the slightly negative values that bicubic resizing gives.
    difference = p / p.sum() - g / g.sum()
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in size))
    surplus, lack = difference > 0, difference < 0
    moved = difference[surplus].sum()
    if moved <= 0:
        return 0.0
    work = ot.emd2(
        (difference[surplus] / moved).numpy(),
        (-difference[lack] / -difference[lack].sum()).numpy(),
        torch.cdist(
            places[surplus], places[lack], compute_mode="donot_use_mm_for_euclid_dist"
        ).numpy(),
        numItermax=1_000_000,
    )
    return float(work) * moved.item()


def _moments(image: ScoredImage) -> tuple[float, float, float]:
    """Sums of x x, x y and y y, with x and y prediction and density minus their means."""
    x, y = image.prediction, image.density or image.prediction
    xx, xy, yy = image.pixel_sum(products)
    mean_xx, mean_xy, mean_yy = (x.pixels * a.mean * b.mean for a, b in ((x, x), (x, y), (y, y)))
    # Subtracting the means from the sums is faster than from every pixel, but where a map hardly
    # varies around a large mean it costs digits.
    if mean_xx > 1e3 * (xx - mean_xx) or mean_yy > 1e3 * (yy - mean_yy):
        return image.pixel_sum(centred_products)
    return xx - mean_xx, xy - mean_xy, yy - mean_yy


def products(image: ScoredImage, block: Block) -> tuple[float, float, float]:
    """p p, p g and g g (g is p where no density was given)."""
    p, g = block.prediction, block.prediction if block.density is None else block.density
    return torch.dot(p, p).item(), torch.dot(p, g).item(), torch.dot(g, g).item()


def centred_products(image: ScoredImage, block: Block) -> tuple[float, float, float]:
    """The same of prediction and density minus their means."""
    p = block.prediction - image.prediction.mean
    g = None if block.density is None else block.density - image.density.mean
    return products(image, block._replace(prediction=p, density=g))


def divergence_sum(image: ScoredImage, block: Block) -> tuple[float]:
    """g ln(eps + g / (p + eps)), with both maps at the density's own scale."""
    total = image.density.total
    eps = EPS_MIT300 if image.protocol == "mit300" else EPS_MATLAB
    floor, eps = block.density.new_tensor([eps * total, eps])
    if image.protocol == "mit300":
        p = image.normalised(block.prediction, total, add=floor)
    else:  # MATLAB's code leaves an all-zero map as it is
        p = floor.add(block.prediction, alpha=total / (image.prediction.total or 1.0))
    ratio = torch.addcdiv(eps, block.density, p, out=p)  # in place, in one pass over the memory
    return (torch.dot(ratio.log_(), block.density).item(),)


def overlap_sum(image: ScoredImage, block: Block) -> tuple[float]:
    """min(p, g)."""
    if image.protocol == "salicon":
        p = image.prediction.stretched(block.prediction)
        return (torch.minimum(p, image.density.stretched(block.density), out=p).sum().item(),)
    p = image.normalised(block.prediction, image.density.total)
    return (torch.minimum(p, block.density, out=p).sum().item() / (image.density.total or 1.0),)


# ---- which metric is defined where -------------------------------------------------------------
class Metric(NamedTuple):
    """A formula and what it needs.

    Attributes:
        formula: the metric of one image.
        needs: maps besides the prediction.
        sums: by protocol that defines the metric, what it adds up over all pixels, or None.
    """

    formula: Callable[[ScoredImage], float]
    needs: tuple[str, ...]
    sums: dict[str, Callable | None]


def _everywhere(
    function: Callable | None, protocols: tuple[str, ...]
) -> dict[str, Callable | None]:
    return dict.fromkeys(protocols, function)


PROTOCOLS = ("mit300", "salicon", "salicon2015")
NOT_2015 = PROTOCOLS[:2]
FORMULAS = {
    "AUC": Metric(
        auc,
        ("fixations",),
        {"mit300": rank_sums, "salicon": coarse_levels, "salicon2015": fine_levels},
    ),
    "CC": Metric(cc, ("density",), _everywhere(products, PROTOCOLS)),
    "KL": Metric(kl_divergence, ("density",), _everywhere(divergence_sum, NOT_2015)),
    "sAUC": Metric(
        auc_shuffled,
        ("fixations", "negatives"),
        {"mit300": rank_sums, "salicon": rank_sums, "salicon2015": None},
    ),
    "IG": Metric(information_gain, ("fixations", "baseline"), _everywhere(None, NOT_2015)),
    "NSS": Metric(nss, ("fixations",), _everywhere(products, PROTOCOLS)),
    "SIM": Metric(similarity, ("density",), _everywhere(overlap_sum, NOT_2015)),
    "EMD": Metric(emd, ("density",), _everywhere(None, NOT_2015)),
    "AUC-unfixated": Metric(auc_unfixated, ("fixations",), _everywhere(rank_sums, ("mit300",))),
    "AUC-Judd": Metric(auc_judd, ("fixations",), _everywhere(None, NOT_2015)),
    "AUC-Borji": Metric(auc_borji, ("fixations",), _everywhere(coarse_levels, NOT_2015)),
    "sAUC-grid": Metric(
        auc_shuffled_grid, ("fixations", "negatives"), _everywhere(None, ("salicon",))
    ),
}
