"""The evaluators' definitions of the metrics: the inputs that each gives to the formulas.

``"mit300"``: today's MIT/Tuebingen benchmark and pysaliency. ``"salicon"``: the LSUN'17 SALICON
server, which used MIT's MATLAB code (cvzoya/saliency). ``"salicon2015"``: the first evaluator
(NUS-VIP/salicon-evaluation). docs/metrics.md has them side by side.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mlnet_utils.metrics import functions
from mlnet_utils.metrics.functions import exact_area, grid_area, judd_area
from mlnet_utils.metrics.inputs import Map, Points
from mlnet_utils.metrics.resize import resize

METRICS = ("AUC", "CC", "KL", "sAUC", "IG", "NSS", "SIM")  # the order of MLNet-Pytorch's table
INPUTS = {
    **dict.fromkeys(
        ("AUC", "AUC-unfixated", "AUC-Judd", "AUC-Borji", "NSS"), ("prediction", "fixations")
    ),
    **dict.fromkeys(("sAUC", "sAUC-grid"), ("prediction", "fixations", "negatives")),
    **dict.fromkeys(("CC", "KL", "SIM", "EMD"), ("prediction", "density")),
    "IG": ("prediction", "fixations", "baseline"),
}
# Multiplied in float64, as in the published code: 3 * 0.1 is not 0.3, and a map stored in tenths
# has values exactly on the thresholds.
COARSE = [*(i * 0.1 for i in range(11)), math.inf]  # MIT's AUC_Borji.m and AUC_shuffled.m
FINE = [*(i * 0.01 for i in range(100)), math.inf]  # the 2015 SALICON evaluator leaves out 1
EPS_MIT300, EPS_MATLAB = 2.2204e-16, 2.0**-52  # as the benchmark's code and MATLAB write it


# ---- definitions -------------------------------------------------------------------------------
# p, g, b: inputs.Map of prediction, density, baseline; f, n: inputs.Points of fixations, negatives.
def _auc_judd(p: Map, f: Points) -> float:
    return judd_area(p.values[f.once], _unfixated(p, f))


def _unfixated(p: Map, f: Points) -> Tensor:
    """The prediction's values at the pixels that were not fixated."""
    keep = torch.ones_like(p.values, dtype=torch.bool)
    keep[f.once] = False
    return p.values[keep]


def _auc_borji(p: Map, f: Points) -> float:
    """Borji et al. (IEEE TIP 2013; MIT's ``AUC_Borji.m``): coarse, which costs peaky maps 0.06."""
    if p.constant or len(f.once) < 2:
        return math.nan
    return grid_area(p.unit[f.once], p.unit, COARSE)


def _auc_shuffled_2015(p: Map, f: Points, n: Points) -> float:
    """Negatives, weighted by their number of images, that this image's fixations left."""
    others = n.every[~torch.isin(n.every, f.every)]
    return grid_area(p.unit[f.every], p.unit[others], FINE)


def _nss(p: Map, f: Points) -> float | Tensor:
    return 0.0 if p.constant else functions.nss(p.values, f.every)


def _gain(p: Map, f: Points, b: Map) -> Tensor:
    if not (b.share[f.once] > 0).all():
        undefined = "the baseline is zero at a fixation; mix it with a uniform density"
        raise ValueError(f"{p.image}: {undefined}")
    return functions.information_gain(p.density, b.share, f.every)


def _cc(p: Map, g: Map) -> float | Tensor:
    return math.nan if p.constant or g.constant else functions.cc(p.values, g.values)


def _emd(p: Map, g: Map, downsize: int = 32) -> float:
    """MIT's old ``EMD.m``: maps shrunk by MATLAB's ``imresize``."""
    if p.low < 0 < p.high:
        problem = "the prediction has values of both signs; subtract its minimum first"
        raise ValueError(f"{p.image}: {problem}")
    size = [math.ceil(side / downsize) for side in p.shape]
    small = (resize(one.values.reshape(1, *one.shape), *size, protocol="salicon") for one in (p, g))
    return functions.emd(*(one[0] for one in small))


_MIT = {"AUC-Judd": _auc_judd, "AUC-Borji": _auc_borji, "EMD": _emd}
# Values of degenerate maps: docs/metrics.md, "Degenerate input".
DEFINITIONS: dict[str, dict[str, Callable[..., float | Tensor]]] = {
    # Every fixation counts. A map with negative values is lifted, one of zeros is uniform.
    "mit300": {
        "AUC": lambda p, f: exact_area(p.values[f.every], p.values),
        "AUC-unfixated": lambda p, f: exact_area(p.values[f.every], _unfixated(p, f)),
        "sAUC": lambda p, f, n: exact_area(p.values[f.every], p.values[n.every]),
        "NSS": _nss,
        "IG": _gain,
        "CC": lambda p, g: 0.0 if p.constant and not g.constant else _cc(p, g),
        "KL": lambda p, g: functions.kl_divergence(p.density, g.share, EPS_MIT300),
        "SIM": lambda p, g: functions.similarity(p.density, g.share),
        **_MIT,
    },
    # Every fixated pixel counts once. Nothing is lifted; SIM and IG scale the maps to 0..1 first.
    "salicon": {
        "AUC": _auc_borji,
        "sAUC": lambda p, f, n: exact_area(p.values[f.once], p.values[n.every]),
        # MIT's AUC_shuffled.m, where each negative pixel counts once: pass ``negatives > 0``.
        "sAUC-grid": lambda p, f, n: (
            math.nan if p.constant else grid_area(p.unit[f.once], p.unit[n.every], COARSE)
        ),
        "NSS": lambda p, f: math.nan if p.constant else functions.nss(p.values, f.once, 1),
        "IG": lambda p, f, b: functions.information_gain(
            p.stretched, b.stretched, f.once, EPS_MATLAB
        ),
        "CC": _cc,
        "KL": lambda p, g: functions.kl_divergence(p.share, g.share, EPS_MATLAB),
        "SIM": lambda p, g: 0.0 if p.empty else functions.similarity(p.stretched, g.stretched),
        **_MIT,
    },
    "salicon2015": {
        "AUC": lambda p, f: grid_area(p.unit[f.every], p.unit, FINE),
        "sAUC": _auc_shuffled_2015,
        "NSS": _nss,
        "CC": _cc,
    },
}
PROTOCOLS = tuple(DEFINITIONS)
