"""The metrics as functions of batches: checks, undefined values and threads around the formulas.

Every function takes (B, H, W) tensors on any device and returns (B,) float64, NaN where a value is
undefined: without fixations, without negatives, or where the density is zero everywhere. Nothing is
averaged, resized, blurred or sampled. The arguments are:

* ``prediction``: any number type, any range and scale.
* ``fixations``: counts of fixations per pixel, never a blurred map.
* ``density``: blurred fixations, any scale.
* ``negatives``: counts of other images' fixations (``baselines.LeaveOneOut``).
* ``baseline``: density of a baseline, any scale, such as a centre bias of training data.
* ``protocol``: a key of ``protocols.DEFINITIONS``, the definition in use (docs/metrics.md).
* ``names``: B image names for error messages, which else name the index in the batch.

A ValueError names the image where a map holds NaN or infinity, has another shape than the
prediction, or is no density or no count map. A metric that the protocol lacks is a ValueError too.
"""

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mlnet_utils.metrics.inputs import Map, Points
from mlnet_utils.metrics.protocols import DEFINITIONS, INPUTS, METRICS

KINDS = {
    "prediction": Map, "fixations": Points, "density": Map, "negatives": Points, "baseline": Map
}  # fmt: skip
TRUTHS = {"fixations", "density", "negatives"}  # without any of them a score is undefined
SMALL_VALUES = ("KL", "IG")  # metrics that live on these, which 8 bits make zeros
Names = Sequence[str] | None


def auc(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Area under the ROC curve that separates fixated pixels from all pixels, 0..1, 0.5 = chance.

    mit300: every fixation, the exact area (Hanley & McNeil 1982). salicon: :func:`auc_borji`.
    salicon2015: every fixation, thresholds 0, 0.01 .. 0.99.
    """
    return _one("AUC", protocol, names, prediction=prediction, fixations=fixations)


def auc_judd(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """AUC-Judd (Judd et al. 2012; MIT's ``AUC_Judd.m``), 0..1: fixated against unfixated pixels.

    Fixated pixels count once; the published curve's bias is kept. NaN where every pixel is fixated.
    """
    return _one("AUC-Judd", protocol, names, prediction=prediction, fixations=fixations)


def auc_borji(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """AUC of Borji et al. (IEEE TIP 2013; MIT's ``AUC_Borji.m``), 0..1: thresholds 0, 0.1 .. 1.

    Fixated pixels, each once, against all pixels. NaN with fewer than two fixated pixels or a
    constant map.
    """
    return _one("AUC-Borji", protocol, names, prediction=prediction, fixations=fixations)


def auc_shuffled(
    prediction: Tensor,
    fixations: Tensor,
    negatives: Tensor,
    *,
    protocol: str = "mit300",
    grid: bool = False,
    names: Names = None,
) -> Tensor:
    """AUC of fixated pixels against places fixated on other images (Tatler et al. 2005), 0..1.

    Each negative counts as often as it was fixated. mit300: every fixation; salicon: every fixated
    pixel once. salicon2015: every fixation, thresholds 0, 0.01 .. 0.99, negatives weighted by the
    number of images and not on this image's fixated pixels. ``grid=True`` (with salicon, else a
    ValueError) takes the thresholds 0, 0.1 .. 1 of MIT's ``AUC_shuffled.m``, where each negative
    pixel counts once: pass ``negatives > 0``; a constant map gives NaN.
    """
    if grid and protocol in DEFINITIONS and protocol != "salicon":
        raise ValueError(f"grid=True needs protocol='salicon', got {protocol!r}")
    maps = {"prediction": prediction, "fixations": fixations, "negatives": negatives}
    return _one("sAUC-grid" if grid else "sAUC", protocol, names, **maps)


def nss(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Normalised scanpath saliency (Peters et al. 2005), in standard deviations, 0 = chance.

    mit300, salicon2015: every fixation, deviation with 1/P, 0 for a constant map. salicon: every
    fixated pixel once, deviation with 1/(P - 1), NaN for a constant map.
    """
    return _one("NSS", protocol, names, prediction=prediction, fixations=fixations)


def information_gain(
    prediction: Tensor,
    fixations: Tensor,
    baseline: Tensor,
    *,
    protocol: str = "mit300",
    names: Names = None,
) -> Tensor:
    """Information gain over a baseline, in bits per fixation (Kuemmerer et al., PNAS 2015).

    mit300: every fixation; both maps divided by their sums (a prediction with negative values is
    shifted first, an all-zero prediction is uniform); -inf where the prediction, a ValueError where
    the baseline is zero at a fixation. salicon: every fixated pixel once; both maps scaled to 0..1,
    then divided by their sums, eps = 2^-52; NaN where a map is constant. Warns of 8 bits.
    """
    maps = {"prediction": prediction, "fixations": fixations, "baseline": baseline}
    return _one("IG", protocol, names, **maps)


def cc(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Pearson's correlation of prediction and density over the pixels, -1..1.

    A constant density gives NaN, a constant prediction 0 in mit300 and NaN elsewhere.
    """
    return _one("CC", protocol, names, prediction=prediction, density=density)


def kl_divergence(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Divergence of the prediction from the density in nats, 0 = equal (MIT's ``KLdiv.m``).

    Both maps are divided by their sums. mit300: eps = 2.2204e-16; a prediction with negative values
    is shifted by its minimum, an all-zero prediction is uniform. salicon: eps = 2^-52, no shift, an
    all-zero prediction stays zero; NaN for values of both signs. Warns of 8 bits.
    """
    return _one("KL", protocol, names, prediction=prediction, density=density)


def similarity(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Intersection of the histograms of prediction and density, 0..1 (Judd et al. 2012).

    mit300: both divided by their sums (the prediction as in :func:`kl_divergence`). salicon: both
    scaled to 0..1 first; 0 for an all-zero prediction, NaN for another constant map.
    """
    return _one("SIM", protocol, names, prediction=prediction, density=density)


def emd(prediction: Tensor, density: Tensor, *, downsize: int = 32, names: Names = None) -> Tensor:
    """Earth mover's distance (Rubner et al. 2000; MIT's ``EMD.m``) in pixels, 0 = equal; slow.

    Maps are shrunk by the factor ``downsize`` with MATLAB's ``imresize`` and divided by their sums.
    NaN for an all-zero prediction. Raises ValueError: the prediction has values of both signs;
    ImportError: the extra ``emd`` is not installed.
    """
    maps = {"prediction": prediction, "density": density}
    return _score(["EMD"], maps, "mit300", names, downsize=downsize)["EMD"]


def score_all(
    prediction: Tensor,
    fixations: Tensor,
    density: Tensor | None = None,
    negatives: Tensor | None = None,
    baseline: Tensor | None = None,
    protocol: str = "mit300",
    *,
    metrics: Sequence[str] | None = None,
    names: Names = None,
) -> dict[str, Tensor]:
    """Several metrics in one pass, with shared checks and intermediate results.

    Args as in the module; CC, KL, SIM and EMD need ``density``, sAUC ``negatives``, IG
    ``baseline``. ``metrics`` are keys of ``DEFINITIONS[protocol]``; None = those of :data:`METRICS`
    that the protocol defines and that have their inputs. Returns {metric: (B,) float64}, equal to
    the single functions' results. Raises ValueError: a metric is unknown or lacks its input; see
    the module for the others.
    """
    maps = {"prediction": prediction, "fixations": fixations, "density": density}
    maps |= {"negatives": negatives, "baseline": baseline}
    maps = {kind: value for kind, value in maps.items() if value is not None}
    if metrics is None:
        defined = DEFINITIONS.get(protocol, {})
        metrics = [n for n in METRICS if n in defined and maps.keys() >= {*INPUTS[n]}]
    return _score(metrics, maps, protocol, names)


# ---- around the formulas -----------------------------------------------------------------------
def _one(metric: str, protocol: str, names: Names, **maps: Tensor) -> Tensor:
    return _score([metric], maps, protocol, names)[metric]


def _score(
    metrics: Sequence[str], maps: dict[str, Tensor], protocol: str, names: Names, **options: int
) -> dict[str, Tensor]:
    """Check the batch; apply formulas to its images, as many at a time as torch has threads.

    Each image has one thread, so the number of threads does not change a bit of the sums.
    """
    if protocol not in DEFINITIONS:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(DEFINITIONS)}")
    defined = DEFINITIONS[protocol]
    for name in metrics:
        if name not in defined:
            known = ", ".join(defined)
            raise ValueError(f"{name} is not defined in protocol {protocol!r}, only {known}")
        if missing := [kind for kind in INPUTS[name] if kind not in maps]:
            raise ValueError(f"{name} needs {', '.join(missing)} (B, H, W), got None")
    _check_shapes(maps, names)
    count, baseline, shared = len(maps["prediction"]), maps.get("baseline"), {}
    if baseline is not None and count > 1 and baseline.stride(0) == 0:
        # `expand` gave the same one to every image: it is checked once.
        shared["baseline"] = Map(baseline[0], "baseline", "every image of the batch")

    def values(index: int) -> list[float]:
        image = f"image {index} of the batch" if names is None else f"image {names[index]}"
        given = {k: shared.get(k) or KINDS[k](one[index], k, image) for k, one in maps.items()}
        return [value(name, given) for name in metrics]

    def value(name: str, given: dict[str, Map | Points]) -> float:
        taken = {kind: given[kind] for kind in INPUTS[name]}
        if any(taken[kind].empty for kind in TRUTHS & taken.keys()):
            return math.nan
        if name in SMALL_VALUES and given["prediction"].looks_8bit:
            problem = f"read back from an 8-bit file, which makes {name} meaningless"
            said = f"the prediction looks {problem}; score the float map instead"
            warnings.warn(f"{given['prediction'].image}: {said}", stacklevel=2)
        return float(defined[name](*taken.values(), **options))

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            rows = list(pool.map(values, range(count)))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also that of threads to come
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(metrics))
    if maps["prediction"].device.type != "mps":  # which has no float64
        table = table.to(maps["prediction"].device)
    return dict(zip(metrics, table.unbind(1), strict=True))


def _check_shapes(maps: dict[str, Tensor], names: Names) -> None:
    for kind, value in maps.items():
        odd = isinstance(value, Tensor) and (value.is_complex() or value.is_meta)
        if odd or getattr(value, "layout", torch.strided) != torch.strided:
            got = f"{value.dtype}, {value.layout} on {value.device}"
            raise ValueError(f"{kind} must be a dense tensor of real numbers, got {got}")
    shape = tuple(getattr(maps["prediction"], "shape", ()))
    for kind, value in maps.items():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if len(shape) != 3 or 0 in shape[1:]:
            raise ValueError(f"prediction must be a (B, H, W) tensor, got {got}")
        if got != f"shape {shape}":
            wanted = f"must have the prediction's shape {shape}"
            raise ValueError(f"{kind} {wanted}, got {got}: see mlnet_utils.metrics.resize")
    if names is not None and len(names) != shape[0]:
        raise ValueError(f"{len(names)} names for {shape[0]} images")
