"""The metrics of batches, as each benchmark defines them: every score exact and named.

``protocol`` chooses between the definitions in use (docs/metrics.md compares them):

* ``"mit300"``: today's MIT/Tuebingen benchmark and pysaliency.
* ``"salicon"``: the LSUN'17 SALICON server, which used MIT's MATLAB code (cvzoya/saliency); its
  random draws are replaced by their exact expectations.
* ``"salicon2015"``: the first SALICON evaluator (github.com/NUS-VIP/salicon-evaluation).

Every metric takes (B, H, W) tensors on any device, works on the CPU, and returns (B,) float64,
NaN where a value is undefined: without fixations, without negatives, or where the density is zero
everywhere. Nothing is averaged, resized, blurred or sampled. The arguments are:

* ``prediction``: any number type, any range and scale.
* ``fixations``: counts of fixations per pixel, never a blurred map.
* ``density``: blurred fixations, any scale.
* ``negatives``: counts of other images' fixations (``baselines.LeaveOneOut``).
* ``baseline``: density of a baseline, any scale, such as a centre bias of training data.
* ``names``: B image names for error messages, which else name the index in the batch.

Every metric raises a ValueError that names the image where a map holds NaN or infinity, has another
shape than the prediction, or is no density or no count map, and where the protocol does not define
the metric.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mlnet_utils.metrics import functions
from mlnet_utils.metrics.inputs import Image, density_map
from mlnet_utils.metrics.resize import resize

METRICS = ("AUC", "CC", "KL", "sAUC", "IG", "NSS", "SIM")  # the order of MLNet-Pytorch's table
NEEDS = {
    **dict.fromkeys(("AUC", "AUC-unfixated", "AUC-Judd", "AUC-Borji", "NSS"), ("fixations",)),
    **dict.fromkeys(("sAUC", "sAUC-grid"), ("fixations", "negatives")),
    **dict.fromkeys(("CC", "KL", "SIM", "EMD"), ("density",)),
    "IG": ("fixations", "baseline"),
}
EPS_MIT300 = 2.2204e-16  # as pysaliency and the benchmark's code write it
EPS_MATLAB = 2.0**-52
# Multiplied in float64, as in the published code: 3 * 0.1 is not 0.3, and a map stored in tenths
# has values exactly on the thresholds.
COARSE = [*(i * 0.1 for i in range(11)), math.inf]  # MIT's AUC_Borji.m and AUC_shuffled.m
FINE = [*(i * 0.01 for i in range(100)), math.inf]  # the 2015 SALICON evaluator leaves out 1


# ---- definitions -------------------------------------------------------------------------------
def _grid(image: Image, positives: Tensor, negatives: Tensor, thresholds: list[float]) -> float:
    """:func:`functions.auc_grid` of pixels, on the map scaled to 0..1."""
    unit = image.prediction.unit
    return functions.auc_grid(unit[positives], unit[negatives], unit.new_tensor(thresholds))


def _auc_borji(image: Image) -> float:
    return _grid(image, image.fixated, slice(None), COARSE)


def _auc_shuffled_2015(image: Image) -> float:
    others = ~torch.isin(image.negatives, image.fixated)
    negatives = image.negatives[others].repeat_interleave(image.negative_counts[others])
    return _grid(image, image.fixations, negatives, FINE)


def _auc_shuffled_grid(image: Image) -> float:
    negatives = image.negatives.repeat_interleave(image.negative_counts)
    return _grid(image, image.fixated, negatives, COARSE)


def _information_gain(image: Image) -> float:
    baseline = image.baseline.share[image.fixations]
    if not (baseline > 0).all():
        raise ValueError(
            f"{image.name}: the baseline is zero at a fixation, where no gain is defined; mix "
            "it with a little of the uniform density"
        )
    return functions.information_gain(image.prediction.density[image.fixations], baseline)


def _emd(image: Image, downsize: int = 32) -> float:
    if image.prediction.low < 0 < image.prediction.high:
        raise ValueError(
            f"{image.name}: the prediction has values of both signs, so that dividing it by its "
            "sum makes no density; for the earth mover's distance subtract its minimum first"
        )
    size = [math.ceil(side / downsize) for side in image.shape]
    small = (
        resize(one.values.reshape(1, *image.shape), *size, protocol="salicon")[0]
        for one in (image.prediction, image.density)
    )
    return functions.emd(*(one / one.sum() for one in small))


_OF_BOTH = {
    "AUC-Judd": lambda i: functions.auc_judd(i.at(i.fixated), i.unfixated),
    "AUC-Borji": _auc_borji,
    "EMD": _emd,
}
DEFINITIONS: dict[str, dict[str, Callable[[Image], float]]] = {
    "mit300": {
        "AUC": lambda i: functions.auc(i.at(i.fixations), i.prediction.values),
        "CC": lambda i: functions.cc(i.prediction.values, i.density.values),
        "KL": lambda i: functions.kl_divergence(i.prediction.density, i.density.share, EPS_MIT300),
        "sAUC": lambda i: functions.auc(i.at(i.fixations), i.at(i.negatives), i.negative_counts),
        "IG": _information_gain,
        "NSS": lambda i: functions.nss(i.prediction.values, i.fixations),
        "SIM": lambda i: functions.similarity(i.prediction.density, i.density.share),
        "AUC-unfixated": lambda i: functions.auc(i.at(i.fixations), i.unfixated),
        **_OF_BOTH,
    },
    "salicon": {
        "AUC": _auc_borji,
        "CC": lambda i: functions.cc(i.prediction.values, i.density.values),
        "KL": lambda i: functions.kl_divergence(i.prediction.share, i.density.share, EPS_MATLAB),
        "sAUC": lambda i: functions.auc(i.at(i.fixated), i.at(i.negatives), i.negative_counts),
        "IG": lambda i: functions.information_gain(
            i.prediction.stretched[i.fixated], i.baseline.stretched[i.fixated], EPS_MATLAB
        ),
        "NSS": lambda i: functions.nss(i.prediction.values, i.fixated, correction=1),
        "SIM": lambda i: functions.similarity(i.prediction.stretched, i.density.stretched),
        "sAUC-grid": _auc_shuffled_grid,
        **_OF_BOTH,
    },
    "salicon2015": {
        "AUC": lambda i: _grid(i, i.fixations, slice(None), FINE),
        "CC": lambda i: functions.cc(i.prediction.values, i.density.values),
        "sAUC": _auc_shuffled_2015,
        "NSS": lambda i: functions.nss(i.prediction.values, i.fixations),
    },
}
PROTOCOLS = tuple(DEFINITIONS)
# Metrics of a constant prediction. The formulas give the value of those that are missing here.
CONSTANT = {
    "mit300": {"AUC-Borji": math.nan, "NSS": 0.0, "CC": 0.0},
    "salicon": dict.fromkeys(("AUC", "AUC-Borji", "sAUC-grid", "NSS", "CC", "SIM", "IG"), math.nan),
    "salicon2015": {"NSS": 0.0, "CC": math.nan},
}


def _degenerate(name: str, protocol: str, image: Image) -> float | None:
    """A metric's value where its formula has none (docs/metrics.md, "Degenerate input")."""
    needs, matlab = NEEDS[name], protocol == "salicon"
    borji = name == "AUC-Borji" or (name == "AUC" and matlab)
    undefined = (
        ("fixations" in needs and len(image.fixated) < (2 if borji else 1))
        or ("negatives" in needs and len(image.negatives) == 0)
        or ("density" in needs and image.density.zero)
        or (name in ("AUC-Judd", "AUC-unfixated") and len(image.fixated) == math.prod(image.shape))
        or (name == "CC" and image.density.constant)
        or (name == "IG" and matlab and image.baseline.constant)
        or (name == "EMD" and image.prediction.zero)
    )
    if undefined:
        return math.nan
    if name == "SIM" and matlab and image.prediction.zero:
        return 0.0  # MATLAB's code leaves an all-zero map as it is
    if name == "SIM" and matlab and image.density.constant:
        return math.nan
    return CONSTANT[protocol].get(name) if image.prediction.constant else None


def _value(name: str, protocol: str, image: Image, **options: int) -> float:
    """One metric of one image."""
    known = _degenerate(name, protocol, image)
    if known is not None:
        return known
    if name in ("KL", "IG") and image.prediction.looks_8bit:
        warnings.warn(
            f"{image.name}: the prediction looks read back from an 8-bit file, which makes {name} "
            "meaningless (small values became zeros); score the float map instead",
            stacklevel=2,
        )
    return DEFINITIONS[protocol][name](image, **options)


# ---- one metric of a batch ---------------------------------------------------------------------
Names = Sequence[str] | None


def auc(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Area under the ROC curve that separates fixated pixels from all pixels, 0..1, 0.5 = chance.

    mit300: the exact area over all fixations, :func:`functions.auc`. salicon: :func:`auc_borji`.
    salicon2015: all fixations, thresholds 0, 0.01 .. 0.99.
    """
    return _score(["AUC"], protocol, prediction, names, fixations=fixations)["AUC"]


def auc_judd(prediction: Tensor, fixations: Tensor, *, names: Names = None) -> Tensor:
    """AUC as published by Judd et al., 0..1: :func:`functions.auc_judd`.

    Fixated pixels, each once, against all unfixated ones; NaN where there are none. The bias of
    the published code is kept, so that published numbers are comparable.
    """
    return _score(["AUC-Judd"], "mit300", prediction, names, fixations=fixations)["AUC-Judd"]


def auc_borji(prediction: Tensor, fixations: Tensor, *, names: Names = None) -> Tensor:
    """AUC as published by Borji et al., 0..1: :func:`functions.auc_grid`.

    Fixated pixels, each once, against all pixels, thresholds 0, 0.1 .. 1, which cost peaky maps up
    to 0.06. NaN with fewer than two fixated pixels or a constant map.
    """
    return _score(["AUC-Borji"], "salicon", prediction, names, fixations=fixations)["AUC-Borji"]


def auc_shuffled(
    prediction: Tensor,
    fixations: Tensor,
    negatives: Tensor,
    *,
    protocol: str = "mit300",
    grid: bool = False,
    names: Names = None,
) -> Tensor:
    """Shuffled AUC: fixated pixels against where people look on other images, 0..1.

    The exact area, :func:`functions.auc`, each negative as often as it was fixated: all fixations
    (mit300) or each fixated pixel once (salicon). ``grid=True`` with salicon takes the thresholds
    0, 0.1 .. 1 of MIT's ``AUC_shuffled.m``, where each negative pixel counts once: pass
    ``negatives > 0``. salicon2015: thresholds 0, 0.01 .. 0.99, all fixations, negatives weighted
    by the number of images and not on this image's fixated pixels.

    Raises:
        ValueError: ``grid`` with another protocol than salicon; see the module for the others.
    """
    if grid and protocol != "salicon":
        raise ValueError(f"grid=True is a choice of protocol='salicon' only, not of {protocol!r}")
    name = "sAUC-grid" if grid else "sAUC"
    maps = {"fixations": fixations, "negatives": negatives}
    return _score([name], protocol, prediction, names, **maps)[name]


def nss(
    prediction: Tensor, fixations: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Normalised scanpath saliency, in standard deviations, 0 = chance: :func:`functions.nss`.

    mit300, salicon2015: every fixation, deviation with 1/P, 0 for a constant map. salicon: every
    fixated pixel once, deviation with 1/(P - 1), NaN for a constant map.
    """
    return _score(["NSS"], protocol, prediction, names, fixations=fixations)["NSS"]


def information_gain(
    prediction: Tensor,
    fixations: Tensor,
    baseline: Tensor,
    *,
    protocol: str = "mit300",
    names: Names = None,
) -> Tensor:
    """Information gain over a baseline, in bits per fixation: :func:`functions.information_gain`.

    mit300: all fixations; both maps divided by their sums (a prediction with negative values is
    shifted first, an all-zero one is uniform); -inf where the prediction is zero at a fixation.
    salicon: each fixated pixel once; both maps scaled to 0..1, then divided by their sums, eps =
    2^-52; NaN where a map is constant. Warns where a prediction looks read back from 8 bits.

    Raises:
        ValueError: the baseline is zero at a fixation (mit300); see the module for the others.
    """
    maps = {"fixations": fixations, "baseline": baseline}
    return _score(["IG"], protocol, prediction, names, **maps)["IG"]


def cc(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Pearson's correlation of prediction and density, -1..1: :func:`functions.cc`.

    A constant density gives NaN, a constant prediction 0 in mit300 and NaN elsewhere.
    """
    return _score(["CC"], protocol, prediction, names, density=density)["CC"]


def kl_divergence(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Divergence of the prediction from the density, in nats: :func:`functions.kl_divergence`.

    mit300: eps = 2.2204e-16; a prediction with negative values is shifted by its minimum, an
    all-zero one is uniform. salicon: eps = 2^-52, no shift, an all-zero prediction stays zero; NaN
    for values of both signs. Warns where a prediction looks read back from 8 bits.
    """
    return _score(["KL"], protocol, prediction, names, density=density)["KL"]


def similarity(
    prediction: Tensor, density: Tensor, *, protocol: str = "mit300", names: Names = None
) -> Tensor:
    """Intersection of prediction and density, 0..1, 1 = equal: :func:`functions.similarity`.

    mit300: both divided by their sums (the prediction as in :func:`kl_divergence`). salicon: both
    scaled to 0..1 first; 0 for an all-zero prediction, NaN for another constant map.
    """
    return _score(["SIM"], protocol, prediction, names, density=density)["SIM"]


def emd(prediction: Tensor, density: Tensor, *, downsize: int = 32, names: Names = None) -> Tensor:
    """Earth mover's distance of the old MIT benchmark, in pixels of small maps: slow.

    Both maps are shrunk by the factor ``downsize`` with MATLAB's ``imresize`` and divided by their
    sums: :func:`functions.emd`. NaN for an all-zero map.

    Raises:
        ImportError: the package POT (extra ``emd``) is not installed.
        ValueError: a prediction has positive and negative values; see the module for the others.
    """
    found = _score(["EMD"], "mit300", prediction, names, {"downsize": downsize}, density=density)
    return found["EMD"]


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
    names: Names = None,
) -> dict[str, Tensor]:
    """Several metrics in one pass, with shared checks and intermediate results.

    Args as in the module; CC, KL, SIM and EMD need ``density``, sAUC ``negatives``, IG
    ``baseline``. ``metrics`` are keys of ``DEFINITIONS[protocol]``; None = those of :data:`METRICS`
    that the protocol defines and that have their inputs.

    Returns:
        {metric: (B,) float64}, equal to the single functions' results.

    Raises:
        ValueError: a metric is unknown or lacks its input; see the module for the others.
    """
    maps = {
        "fixations": fixations, "density": density, "negatives": negatives, "baseline": baseline
    }  # fmt: skip
    if metrics is None:
        given = {kind for kind, value in maps.items() if value is not None}
        defined = DEFINITIONS.get(protocol, ())
        metrics = [name for name in METRICS if name in defined and given.issuperset(NEEDS[name])]
    return _score(metrics, protocol, prediction, names, **maps)


def _score(
    metrics: Sequence[str],
    protocol: str,
    prediction: Tensor,
    names: Names,
    options: dict[str, int] | None = None,
    **maps: Tensor | None,
) -> dict[str, Tensor]:
    """Check the batch; apply definitions to each of its images."""
    if protocol not in DEFINITIONS:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    for name in metrics:
        if name not in NEEDS:
            raise ValueError(f"metric {name!r} is not one of {', '.join(NEEDS)}")
        if name not in DEFINITIONS[protocol]:
            raise ValueError(f"{name} is not defined in protocol {protocol!r}")
        for kind in NEEDS[name]:
            if maps.get(kind) is None:
                raise ValueError(f"{name} needs {kind} (B, H, W), got None")
    maps = {kind: value for kind, value in maps.items() if value is not None}
    _check_shapes(prediction, names, maps)
    shared, baseline = {}, maps.get("baseline")
    if baseline is not None and len(baseline) > 1 and baseline.stride(0) == 0:
        # `expand` gave the same one to every image: it is checked once.
        shared["baseline"] = density_map(baseline[0], "baseline", "every image of the batch")

    def scores(index: int) -> list[float]:
        name = f"image {index} of the batch" if names is None else f"image {names[index]}"
        image = Image(name, prediction[index], **{k: v[index] for k, v in maps.items()} | shared)
        return [_value(metric, protocol, image, **(options or {})) for metric in metrics]

    rows = _apply(scores, len(prediction))
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(metrics))
    if prediction.device.type != "mps":  # which has no float64
        table = table.to(prediction.device)
    return dict(zip(metrics, table.unbind(1), strict=True))


def _check_shapes(prediction: Tensor, names: Names, maps: dict[str, Tensor]) -> None:
    if not isinstance(prediction, Tensor) or prediction.ndim != 3 or 0 in prediction.shape[1:]:
        raise ValueError(f"prediction must be a (B, H, W) tensor, got {_describe(prediction)}")
    for kind, value in maps.items():
        if not isinstance(value, Tensor) or value.shape != prediction.shape:
            raise ValueError(
                f"{kind} must have the prediction's shape {tuple(prediction.shape)}, got "
                f"{_describe(value)}; nothing is resized silently (see mlnet_utils.metrics.resize)"
            )
    if names is not None and len(names) != len(prediction):
        raise ValueError(f"{len(names)} names for {len(prediction)} images")


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _apply(function: Callable[[int], list[float]], count: int) -> list[list[float]]:
    """The function of 0 .. count - 1, each by one thread, as many at a time as torch has.

    So the number of threads does not change a bit of the sums.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(index) for index in range(count)]
    one_thread = functools.partial(torch.set_num_threads, 1)
    try:
        with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
            return list(pool.map(function, range(count)))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also that of threads to come
