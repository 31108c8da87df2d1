"""Areas under ROC curves for one image's values: exact, as Judd's code, and on a threshold grid.

Published code estimates these areas by drawing pixels at random or by adding noise to break ties.
All of those have exact expectations, so nothing is drawn here: pairs that tie count one half.
"""

import torch
from torch import Tensor

TABLE = 1 << 16  # bins of the look-up table in `below`
NAN = float("nan")


def below(values: Tensor, fixated: Tensor) -> Tensor:
    """For each value, how many fixated values lie below it; equal ones count one half.

    Placing every pixel by binary search costs most of a scoring run. Instead the range of values
    is cut into bins. Where a bin holds no fixated value, all its pixels have the same answer,
    which is read from a table; only the few pixels that share a bin with a fixated value are
    placed by search. The result is exact because binning never swaps the order of two values.

    Args:
        values: (P,) float64.
        fixated: (N,) float64, N > 0, any order.

    Returns:
        (P,) float64, multiples of one half between 0 and N.
    """
    fixated = fixated.sort().values
    if len(values) < TABLE:
        return _search(values, fixated)
    low, high = values.aminmax()
    low, high = torch.minimum(low, fixated[0]), torch.maximum(high, fixated[-1])
    if low == high:
        return _search(values, fixated)
    bins = _bins(values, low, high)
    held = torch.bincount(_bins(fixated, low, high), minlength=TABLE)
    table = (held.cumsum(0) - held).to(torch.float64)
    table[held > 0] = -1
    answer = table.index_select(0, bins)
    shared = (answer < 0).nonzero().squeeze(1)
    answer[shared] = _search(values[shared], fixated)
    return answer


def _bins(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # The square root gives the crowded low values of a peaky map more bins than the few high ones.
    scaled = (values - low).div_(high - low).sqrt_()
    return scaled.mul_(TABLE - 1).to(torch.int32)


def _search(values: Tensor, fixated: Tensor) -> Tensor:
    left = torch.searchsorted(fixated, values)
    return (left + torch.searchsorted(fixated, values, right=True)).to(torch.float64) / 2


def exact(ranks: Tensor, count: int, weights: Tensor | None = None) -> float:
    """P(fixated value > other value) + P(equal) / 2.

    Args:
        ranks: (M,) from :func:`below` for the negatives.
        count: number of fixated values.
        weights: (M,) how often each negative counts, or None for once each.
    """
    if weights is None:
        return 1 - ranks.mean().item() / count
    return 1 - (ranks * weights).sum().item() / (count * weights.sum().item())


def judd(values: Tensor, ranks: Tensor, where: Tensor) -> float:
    """The expected result of MIT's ``AUC_Judd.m`` over its random jitter.

    The published code puts a point on the ROC curve only at fixated values and joins the points
    by sloped lines, so its area exceeds the exact one by FPR(lowest fixated value) / 2N. Where m
    fixated and q other pixels tie at that lowest value, the jitter puts q m / (m + 1) of the
    others above it on average.

    Args:
        values: (P,) the map.
        ranks: (P,) from :func:`below` with the values at ``where``.
        where: (N,) fixated pixels, each once; the negatives are all other pixels.
    """
    count, others = len(where), len(values) - len(where)
    if others == 0:
        return NAN
    lowest = values[where].min()
    area = 1 - (ranks.sum() - ranks[where].sum()).item() / (count * others)
    fixated_ties = (values[where] == lowest).sum().item()
    other_ties = (values == lowest).sum().item() - fixated_ties
    above = (values > lowest).sum().item() - (count - fixated_ties)
    above += other_ties * fixated_ties / (fixated_ties + 1)
    return area + above / (2 * count * others)


def grid(positives: Tensor, negatives: Tensor, step: float, count: int) -> float:
    """Area by trapezoids through the ROC points at thresholds 0, step, ..., (count - 1) step.

    Args:
        positives: (N,) values at fixations, of a map scaled to 0..1.
        negatives: (M,) values at negatives, repeated as often as they count.
        step: distance of the thresholds.
        count: how many thresholds.
    """
    # i * step in float64, as in the published code: 3 * 0.1 is not 0.3, and a map stored in
    # tenths has values exactly on the thresholds.
    thresholds = torch.arange(count, dtype=torch.float64, device=positives.device) * step
    rates = []
    for values in (positives, negatives):
        level = torch.searchsorted(thresholds, values, right=True)  # thresholds at or below
        at_level = torch.bincount(level, minlength=count + 1).cpu()
        reached = at_level.flip(0).cumsum(0).to(torch.float64)  # strictest threshold first
        rates.append(torch.cat([reached.new_zeros(1), reached / len(values)]))
    return torch.trapezoid(rates[0], rates[1]).item()
