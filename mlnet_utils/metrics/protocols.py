"""From formulas on one image to metrics of batches: checks, undefined values and threads."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from mlnet_utils.metrics.inputs import Map, Points

PROTOCOLS = ("mit300", "salicon", "salicon2015")
METRICS = ("AUC", "CC", "KL", "sAUC", "IG", "NSS", "SIM")  # the order of MLNet-Pytorch's table
DEFINITIONS: dict[str, dict[str, Callable[..., float]]] = {name: {} for name in PROTOCOLS}
MAPS = {
    "prediction": Map, "fixations": Points, "density": Map, "negatives": Points, "baseline": Map
}  # fmt: skip


def metric(name: str, *protocols: str) -> Callable[[Callable], Callable[..., Tensor]]:
    """Make the formula of one image a metric of batches, defined in these protocols.

    The formula's parameters name the maps that it takes (:data:`MAPS`), and options. The batch
    function takes (B, H, W) tensors for the maps, and ``names``; the formula stays its
    ``__wrapped__``, and becomes ``DEFINITIONS[protocol][name]``.
    """

    def decorate(formula: Callable[..., float]) -> Callable[..., Tensor]:
        for protocol in protocols:
            DEFINITIONS[protocol][name] = formula
        signature = inspect.signature(formula)

        @functools.wraps(formula)
        def of_batch(*args: object, names: Sequence[str] | None = None, **kwargs: object) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            maps = {kind: given.pop(kind) for kind in MAPS if kind in given}
            return score([name], maps, names, **given)[name]

        parameters = [
            one.replace(annotation=Tensor) if one.name in MAPS else one
            for one in signature.parameters.values()
        ]
        last = inspect.Parameter("names", inspect.Parameter.KEYWORD_ONLY, default=None)
        of_batch.__signature__ = inspect.Signature([*parameters, last], return_annotation=Tensor)
        return of_batch

    return decorate


def needs(formula: Callable[..., float]) -> list[str]:
    """The maps that a formula takes."""
    return [kind for kind in inspect.signature(formula).parameters if kind in MAPS]


def score(
    metrics: Sequence[str],
    maps: dict[str, Tensor],
    names: Sequence[str] | None,
    protocol: str = "mit300",
    **options: object,
) -> dict[str, Tensor]:
    """Check the batch; apply formulas to its images, as many at a time as torch has threads.

    Each image has one thread, so the number of threads does not change a bit of the sums.
    ``metrics`` are keys of ``DEFINITIONS[protocol]``, ``maps`` (B, H, W) tensors under keys of
    :data:`MAPS`, ``options`` those of the formulas. Returns {metric: (B,) float64}. Raises
    ValueError: a metric or protocol is unknown, an input is missing or refused.
    """
    if protocol not in DEFINITIONS:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    defined = DEFINITIONS[protocol]
    for name in metrics:
        if name not in defined:
            known = ", ".join(defined)
            raise ValueError(f"{name} is not defined in protocol {protocol!r}, only {known}")
        if missing := set(needs(defined[name])) - maps.keys():
            raise ValueError(f"{name} needs {', '.join(missing)} (B, H, W), got None")
    _check_shapes(maps, names)
    count, baseline, shared = len(maps["prediction"]), maps.get("baseline"), {}
    if baseline is not None and count > 1 and baseline.stride(0) == 0:
        # `expand` gave the same one to every image: it is checked once.
        shared["baseline"] = Map(baseline[0], "baseline", "every image of the batch")

    def values(index: int) -> list[float]:
        image = f"image {index} of the batch" if names is None else f"image {names[index]}"
        own = maps.keys() - shared.keys()
        given = {kind: MAPS[kind](m[index], kind, image) for kind, m in maps.items() if kind in own}
        given |= shared | options | {"protocol": protocol}
        return [_value(defined[name], given) for name in metrics]

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


def _value(formula: Callable[..., float], given: dict[str, object]) -> float:
    """The formula's value; NaN without fixations, negatives or density."""
    taken = {name: given[name] for name in inspect.signature(formula).parameters if name in given}
    truths = taken.keys() & {"fixations", "negatives", "density"}
    return math.nan if any(taken[kind].empty for kind in truths) else float(formula(**taken))


def _check_shapes(maps: dict[str, Tensor], names: Sequence[str] | None) -> None:
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
