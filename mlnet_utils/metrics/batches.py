"""The metrics as functions of batches: checks, undefined values and threads around the formulas.

Every function takes (B, H, W) tensors on any device and returns (B,) float64, NaN where a value is
undefined: without fixations, without negatives, or where the density is zero everywhere. Nothing is
averaged, resized, blurred or sampled. The arguments are:

* ``prediction``: any number type, any range and scale.
* ``fixations``: counts of fixations per pixel, never a blurred map.
* ``density``: blurred fixations, any scale.
* ``negatives``: counts of other images' fixations (``baselines.LeaveOneOut``).
* ``baseline``: density of a baseline, any scale, such as a centre bias of training data.
* ``protocol``: a key of ``protocols.DEFINITIONS``, the definition in use.
* ``names``: B image names for error messages, which else name the index in the batch.

A ValueError names the image where a map holds NaN or infinity, has another shape than the
prediction, or is no density or no count map, and where the protocol does not define the metric.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from mlnet_utils.metrics.inputs import Map, Points
from mlnet_utils.metrics.protocols import DEFINITIONS, INPUTS, METRICS

KINDS = {
    "prediction": Map, "fixations": Points, "density": Map, "negatives": Points, "baseline": Map
}  # fmt: skip
SMALL_VALUES = ("KL", "IG")  # metrics that live on these, which 8 bits make zeros
Names = Sequence[str] | None


def _batch(name: str, metric: str, about: str) -> Callable[..., Tensor]:
    """A metric as a function of batches; ``protocol`` and ``names`` go by keyword."""
    maps = [Parameter(kind, Parameter.POSITIONAL_OR_KEYWORD) for kind in INPUTS[metric]]
    defaults = {"protocol": "mit300", "names": None}
    options = [Parameter(k, Parameter.KEYWORD_ONLY, default=v) for k, v in defaults.items()]
    signature = Signature([*maps, *options])

    def of_batch(*args: Tensor, **kwargs: Any) -> Tensor:
        given = defaults | signature.bind(*args, **kwargs).arguments
        how = {key: given.pop(key) for key in defaults}
        return _score([metric], given, **how)[metric]

    shapes = "(B, H, W) tensors to (B,) float64; arguments and errors: metrics.batches."
    of_batch.__name__, of_batch.__doc__ = name, f"{about}\n\n{shapes}"
    of_batch.__signature__ = signature
    return of_batch


_AREA = "Area under the ROC curve, 0..1, 0.5 = chance: "
auc = _batch("auc", "AUC", f"{_AREA}fixations against all pixels (Borji's in `salicon`).")
auc_judd = _batch("auc_judd", "AUC-Judd", f"{_AREA}AUC-Judd, with its bias (Judd et al. 2012).")
auc_borji = _batch("auc_borji", "AUC-Borji", f"{_AREA}thresholds 0, 0.1 .. 1 (Borji et al. 2013).")
nss = _batch("nss", "NSS", "Standard deviations above the mean, 0 = chance (Peters et al. 2005).")
information_gain = _batch(
    "information_gain", "IG", "Bits per fixation over a baseline (Kuemmerer et al. 2015)."
)
cc = _batch("cc", "CC", "Pearson's correlation of prediction and density, -1..1.")
kl_divergence = _batch(
    "kl_divergence", "KL", "Divergence of the prediction from the density in nats, 0 = equal."
)
similarity = _batch("similarity", "SIM", "Intersection of histograms, 0..1 (Judd et al. 2012).")


def auc_shuffled(
    prediction: Tensor,
    fixations: Tensor,
    negatives: Tensor,
    *,
    protocol: str = "mit300",
    grid: bool = False,
    names: Names = None,
) -> Tensor:
    """AUC of fixations against places fixated on other images (Tatler et al. 2005), 0..1.

    ``grid=True`` takes the thresholds 0, 0.1 .. 1 of MIT's ``AUC_shuffled.m``, where each negative
    pixel counts once: pass ``negatives > 0``. Raises ValueError: ``grid`` without ``"salicon"``.
    """
    if grid and protocol != "salicon":
        raise ValueError(f"grid=True needs protocol='salicon', got {protocol!r}")
    maps = {"prediction": prediction, "fixations": fixations, "negatives": negatives}
    metric = "sAUC-grid" if grid else "sAUC"
    return _score([metric], maps, protocol, names)[metric]


def emd(prediction: Tensor, density: Tensor, *, downsize: int = 32, names: Names = None) -> Tensor:
    """Earth mover's distance in pixels of maps that are shrunk by ``downsize``; slow.

    Raises ValueError: the prediction has values of both signs.
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
        return [_value(name, [given[k] for k in INPUTS[name]]) for name in metrics]

    def _value(name: str, given: list[Map | Points]) -> float:
        truths = given[1:-1] if name == "IG" else given[1:]  # its baseline is a prediction too
        if any(truth.empty for truth in truths):
            return math.nan
        if name in SMALL_VALUES and given[0].looks_8bit:
            problem = f"read back from an 8-bit file, which makes {name} meaningless"
            advice = "score the float map instead"
            warnings.warn(
                f"{given[0].image}: the prediction looks {problem}; {advice}", stacklevel=2
            )
        return float(defined[name](*given, **options))

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
