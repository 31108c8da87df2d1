"""Saliency metrics: every definition exact, deterministic and named.

Each function scores a batch of maps and returns one float64 value per image, NaN where the value
is undefined; nothing is averaged, resized, blurred or sampled here. ``protocol`` chooses between
the definitions that are in use (docs/metrics.md compares them):

* ``"mit300"``: today's MIT/Tuebingen benchmark and pysaliency.
* ``"salicon"``: the LSUN'17 SALICON server, which used MIT's MATLAB code; its random draws are
  replaced by their exact expectations.
* ``"salicon2015"``: the first SALICON evaluator (github.com/NUS-VIP/salicon-evaluation).

Shapes and checks are the same everywhere. Maps are (B, H, W) on any device; a NaN or an infinity,
another shape, a negative density or a count map with fractions is a ValueError that names the
image (``names``, else its index). Images without fixations give NaN in every metric that needs
fixations, images with an all-zero density in every metric that needs a density. A prediction is
*constant* if its range is at most 8 eps of its number type times its largest magnitude.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlnet_utils.metrics import functions as formulas
from mlnet_utils.metrics.functions import FORMULAS, PROTOCOLS
from mlnet_utils.metrics.inputs import ScoredImage, for_each_image

METRICS = ("AUC", "CC", "KL", "sAUC", "IG", "NSS", "SIM")  # the order of MLNet-Pytorch's table


# ---- at fixations, by rank ---------------------------------------------------------------------
def auc(
    prediction: Tensor,
    fixations: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Area under the ROC curve that separates fixated pixels from all pixels.

    mit300: the exact area, P(fixation > pixel) + P(equal) / 2 over all fixations and all pixels.
    salicon: :func:`auc_borji`. salicon2015: trapezoids at thresholds 0, 0.01 .. 0.99 on the map
    scaled to 0..1, all fixations and all pixels; 0.5 for a constant map.

    Args:
        prediction: (B, H, W), any range.
        fixations: (B, H, W) counts of fixations per pixel.
        protocol: which definition.
        names: B image names for error messages.

    Returns:
        (B,) float64 in 0..1, 0.5 = chance; NaN without fixations.
    """
    return _score(["AUC"], protocol, prediction, names, {"fixations": fixations})["AUC"]


def auc_judd(
    prediction: Tensor, fixations: Tensor, *, names: Sequence[str] | None = None
) -> Tensor:
    """AUC as published by Judd et al. (MIT's ``AUC_Judd.m``), in expectation over its jitter.

    Fixated pixels, each once, against all unfixated pixels. The code's ROC curve has points only
    at fixated values, which adds FPR(lowest fixated value) / 2N to the exact area; that bias is
    kept, so that published numbers are comparable. Scale-free, unlike the code's jitter of 1e-7.

    Args:
        prediction: (B, H, W), any range.
        fixations: (B, H, W) counts of fixations per pixel.
        names: B image names for error messages.

    Returns:
        (B,) float64 in 0..1; NaN without fixations, and where every pixel is fixated, which
        leaves no negatives.
    """
    return _score(["AUC-Judd"], "mit300", prediction, names, {"fixations": fixations})["AUC-Judd"]


def auc_borji(
    prediction: Tensor,
    fixations: Tensor,
    *,
    names: Sequence[str] | None = None,
) -> Tensor:
    """AUC as published by Borji et al. (MIT's ``AUC_Borji.m``), in expectation over its draws.

    Fixated pixels, each once, against all pixels; trapezoids at thresholds 0, 0.1 .. 1 on the map
    scaled to 0..1. Peaky maps lose up to 0.06 by the coarse thresholds.

    Args:
        prediction: (B, H, W), any range.
        fixations: (B, H, W) counts of fixations per pixel.
        names: B image names for error messages.

    Returns:
        (B,) float64 in 0..1; NaN with fewer than two fixated pixels or a constant map.
    """
    return _score(["AUC-Borji"], "salicon", prediction, names, {"fixations": fixations})[
        "AUC-Borji"
    ]


def auc_shuffled(
    prediction: Tensor,
    fixations: Tensor,
    negatives: Tensor,
    *,
    protocol: str = "mit300",
    grid: bool = False,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Shuffled AUC: fixated pixels against where people look on other images.

    The exact area, each negative counting as often as it was fixated: with all fixations
    (mit300) or each fixated pixel once (salicon). ``grid=True`` with salicon takes the trapezoids
    of MIT's ``AUC_shuffled.m`` at thresholds 0, 0.1 .. 1, in expectation over its draws; there
    each negative pixel counts once, so pass ``negatives > 0``. salicon2015: trapezoids at 0, 0.01
    .. 0.99, all fixations, pixels fixated on this image taken out of the negatives.

    Args:
        prediction: (B, H, W), any range.
        fixations: (B, H, W) counts of fixations per pixel.
        negatives: (B, H, W) counts of other images' fixations (mit300, salicon), or of how many
            other images were fixated there (salicon2015); see ``baselines.LeaveOneOut``.
        protocol: which definition.
        grid: MATLAB's coarse thresholds (salicon only).
        names: B image names for error messages.

    Returns:
        (B,) float64 in 0..1, 0.5 = as good as the average image; NaN without fixations or
        negatives, and for a constant map on a grid under salicon.

    Raises:
        ValueError: ``grid`` with another protocol than salicon.
    """
    if grid and protocol != "salicon":
        raise ValueError(f"grid=True is a choice of protocol='salicon' only, not of {protocol!r}")
    name = "sAUC-grid" if grid else "sAUC"
    maps = {"fixations": fixations, "negatives": negatives}
    return _score([name], protocol, prediction, names, maps)[name]


def keep_repeats(fixations: Tensor) -> Tensor:
    """The 2015 SALICON evaluator's default filter: a pixel fixated k times counts k - 1 times."""
    return (fixations - 1).clamp(min=0)


# ---- at fixations, by value --------------------------------------------------------------------
def nss(
    prediction: Tensor,
    fixations: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Normalised scanpath saliency: mean z-score of the prediction at fixations.

    mit300, salicon2015: every fixation, deviation with 1/N, 0 for a constant map. salicon: every
    fixated pixel once, deviation with 1/(N - 1), NaN for a constant map.

    Args:
        prediction: (B, H, W), any range.
        fixations: (B, H, W) counts of fixations per pixel (never a blurred map).
        protocol: which definition.
        names: B image names for error messages.

    Returns:
        (B,) float64 in standard deviations, 0 = chance; NaN without fixations.
    """
    return _score(["NSS"], protocol, prediction, names, {"fixations": fixations})["NSS"]


def information_gain(
    prediction: Tensor,
    fixations: Tensor,
    baseline: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Information gain over a baseline, in bits per fixation (Kuemmerer et al., PNAS 2015).

    mit300: mean over all fixations of log2 p - log2 b, with both maps divided by their sums (a
    prediction with negative values is shifted first, an all-zero one becomes uniform); -inf where
    the prediction is zero at a fixation. salicon: both maps scaled to 0..1, then divided by their
    sums, eps = 2^-52 added inside the logarithms, each pixel once; NaN where the prediction or
    the baseline is constant.

    Warns when a prediction looks read back from 8 bits (see ``metric_inputs.warn_if_8bit``).

    Args:
        prediction: (B, H, W) density, any scale.
        fixations: (B, H, W) counts of fixations per pixel.
        baseline: (B, H, W) density of a baseline, such as a centre bias fitted on training data.
        protocol: which definition; salicon2015 has none.
        names: B image names for error messages.

    Returns:
        (B,) float64 bits per fixation; NaN without fixations.

    Raises:
        ValueError: mit300, and the baseline is zero at a fixation.
    """
    maps = {"fixations": fixations, "baseline": baseline}
    return _score(["IG"], protocol, prediction, names, maps)["IG"]


# ---- against a density -------------------------------------------------------------------------
def cc(
    prediction: Tensor,
    density: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Pearson's linear correlation between prediction and density over the pixels.

    The protocols differ in how the density is made (docs/metrics.md), and for a constant
    prediction: 0 in mit300, NaN otherwise. A constant density gives NaN.

    Args:
        prediction: (B, H, W), any range.
        density: (B, H, W) blurred fixations, any scale.
        protocol: which definition.
        names: B image names for error messages.

    Returns:
        (B,) float64 in -1..1.
    """
    return _score(["CC"], protocol, prediction, names, {"density": density})["CC"]


def kl_divergence(
    prediction: Tensor,
    density: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the prediction p from the density g, in nats.

    sum g ln(eps + g / (p + eps)) with both maps divided by their sums. mit300: eps = 2.2204e-16,
    a prediction with negative values is shifted by its minimum, an all-zero one is uniform.
    salicon: eps = 2^-52, no shift, an all-zero prediction stays zero; NaN for mixed signs.

    Warns when a prediction looks read back from 8 bits (see ``metric_inputs.warn_if_8bit``).

    Args:
        prediction: (B, H, W) density, any scale.
        density: (B, H, W) blurred fixations, any scale.
        protocol: which definition; salicon2015 has none.
        names: B image names for error messages.

    Returns:
        (B,) float64 nats, 0 = equal.
    """
    return _score(["KL"], protocol, prediction, names, {"density": density})["KL"]


def similarity(
    prediction: Tensor,
    density: Tensor,
    *,
    protocol: str = "mit300",
    names: Sequence[str] | None = None,
) -> Tensor:
    """Histogram intersection: sum of the pixelwise minimum of prediction and density.

    mit300: both maps divided by their sums (prediction shifted or uniform as in
    :func:`kl_divergence`). salicon: both scaled to 0..1 first; 0 for an all-zero prediction, NaN
    for any other constant one.

    Args:
        prediction: (B, H, W) density, any scale.
        density: (B, H, W) blurred fixations, any scale.
        protocol: which definition; salicon2015 has none.
        names: B image names for error messages.

    Returns:
        (B,) float64 in 0..1, 1 = equal.
    """
    return _score(["SIM"], protocol, prediction, names, {"density": density})["SIM"]


def emd(
    prediction: Tensor, density: Tensor, *, downsize: int = 32, names: Sequence[str] | None = None
) -> Tensor:
    """Earth mover's distance as in the old MIT benchmark (MIT's ``EMD.m``); slow.

    Both maps are shrunk with MATLAB's ``imresize``, divided by their sums, and compared with
    Euclidean ground distance. Solved exactly by the package POT (extra ``emd``).

    Args:
        prediction: (B, H, W) density, any scale; all values of one sign (nothing is shifted, as
            in MIT's code).
        density: (B, H, W) blurred fixations, any scale.
        downsize: factor by which the maps are shrunk.
        names: B image names for error messages.

    Returns:
        (B,) float64 in pixels of the small maps, 0 = equal; NaN for an all-zero map.

    Raises:
        ImportError: POT is not installed.
        ValueError: a prediction has positive and negative values.
    """
    found = for_each_image(
        lambda image: formulas.emd(image, downsize),
        *(prediction, "mit300", (), names),
        density=density,
    )
    return torch.tensor(found, dtype=torch.float64)


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
    """Every metric of the table in one pass, sharing what they have in common.

    Args:
        prediction: (B, H, W).
        fixations: (B, H, W) counts of fixations per pixel.
        density: (B, H, W) blurred fixations; needed by CC, KL and SIM.
        negatives: (B, H, W) counts of other images' fixations; needed by sAUC.
        baseline: (B, H, W) density of a baseline; needed by IG.
        protocol: which definitions.
        metrics: keys of ``metric_formulas.FORMULAS``; None = those of :data:`METRICS` that the
            protocol defines and whose inputs are given.
        names: B image names for error messages.

    Returns:
        {metric: (B,) float64}, equal to what the single functions return.

    Raises:
        ValueError: a metric is unknown, undefined in the protocol, or lacks its input.
    """
    maps = {
        "fixations": fixations, "density": density, "negatives": negatives, "baseline": baseline
    }  # fmt: skip
    if metrics is None:
        given = {kind for kind, value in maps.items() if value is not None}
        metrics = [
            name
            for name in METRICS
            if protocol in FORMULAS[name].sums and given.issuperset(FORMULAS[name].needs)
        ]
    return _score(metrics, protocol, prediction, names, maps)


def _score(
    metrics: Sequence[str],
    protocol: str,
    prediction: Tensor,
    names: Sequence[str] | None,
    maps: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """Apply formulas to every image of a batch."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    for name in metrics:
        if name not in FORMULAS:
            raise ValueError(f"metric {name!r} is not one of {', '.join(FORMULAS)}")
        if protocol not in FORMULAS[name].sums:
            raise ValueError(f"{name} is not defined in protocol {protocol!r}")
        for kind in FORMULAS[name].needs:
            if maps.get(kind) is None:
                raise ValueError(f"{name} needs {kind} (B, H, W), got None")
    sums = [one for name in metrics if (one := FORMULAS[name].sums[protocol]) is not None]

    def scores(image: ScoredImage) -> list[float]:
        return [FORMULAS[name].formula(image) for name in metrics]

    table = for_each_image(scores, prediction, protocol, sums, names, **maps)
    device = "cpu" if prediction.device.type == "mps" else prediction.device  # MPS has no float64
    return {
        name: torch.tensor([row[place] for row in table], dtype=torch.float64, device=device)
        for place, name in enumerate(metrics)
    }
