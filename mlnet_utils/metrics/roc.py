"""Areas under ROC curves, in whole numbers: exact, as Judd's code, and on a threshold grid.

Published code estimates these areas by drawing pixels at random or by adding noise to break ties.
All of those have exact expectations, so nothing is drawn here: pairs that tie count one half. The
counts are integers up to the final division, so the result does not depend on the device, the
number of threads or the order of the pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TABLE = 1 << 14  # bins of the look-up table in `Ranks`
FRACTION_BITS = 10  # bins per factor of two: 2^10, so the table spans 16 factors of two
UNDECIDED = 1 << 30
# Multiplied in float64, as in the published code: 3 * 0.1 is not 0.3, and a map stored in tenths
# has values exactly on the thresholds.
COARSE = [i * 0.1 for i in range(11)]  # MIT's AUC_Borji.m and AUC_shuffled.m
FINE = [i * 0.01 for i in range(100)]  # the 2015 SALICON evaluator, which leaves out 1


class Ranks:
    """How many fixated values lie below a value, equal ones counting one half.

    Placing every pixel by binary search costs most of a scoring run. Instead the range of values
    is cut into bins. Where a bin holds no fixated value, all its pixels have the same answer,
    which is read from a table; only the few pixels that share a bin with a fixated value are
    placed by search. This is exact because binning never swaps the order of two values.

    Args:
        fixated: (N,) values at fixations, any order; N below 2^29.
        low: lowest value of the map.
        high: highest value of the map.
    """

    def __init__(self, fixated: Tensor, low: float, high: float):
        # As many of these are at or below a value as twice the fixated values below it: each
        # fixated value counts once from itself on, and once more from the next number on.
        after = torch.nextafter(fixated, torch.full_like(fixated, torch.inf))
        self.steps = torch.cat([fixated, after]).sort().values
        low, high = torch.tensor([low, high], dtype=torch.float32)
        self.low = low.item()
        self.first = ((high - low).view(torch.int32).item() >> (23 - FRACTION_BITS)) - TABLE + 1
        held = torch.bincount(self._bins(fixated), minlength=TABLE)
        table = torch.where(held > 0, UNDECIDED, 2 * (held.cumsum(0) - held))
        self.table = table.to(torch.int32)

    def __call__(self, values: Tensor) -> Tensor:
        """(M,) int32, twice the number of fixated values below each of (M,) values."""
        answer = self.table.index_select(0, self._bins(values))
        open_cases = at_least(UNDECIDED, answer)
        close = values[open_cases]
        answer[open_cases] = torch.searchsorted(self.steps, close, right=True, out_int32=True)
        return answer

    def _bins(self, values: Tensor) -> Tensor:
        # The bit pattern of a positive float, read as an integer, orders like the float, and its
        # leading bits are its exponent and the start of its fraction: logarithmic bins, fine
        # where the many low values of a peaky map are. Rounding to float32 keeps the order.
        bits = values.to(torch.float32, copy=True).sub_(self.low).view(torch.int32)
        return (bits >> (23 - FRACTION_BITS)).sub_(self.first).clamp_(min=0)


def at_least(bound: int, values: Tensor) -> Tensor:
    """(K,) indices of those of (M,) whole numbers that are at least ``bound``.

    Looks for rows of 64 with such a maximum first: ``nonzero`` alone takes 1 ns per value, ten
    times what the maximum takes, and what is looked for is rare or lies together.
    """
    whole = len(values) - len(values) % 64
    rows = values[:whole].view(-1, 64)
    some = (rows.amax(1) >= bound).nonzero().squeeze(1)
    row, column = (rows.index_select(0, some) >= bound).nonzero().unbind(1)
    rest = (values[whole:] >= bound).nonzero().squeeze(1) + whole
    return torch.cat([some[row] * 64 + column, rest])


def area(twice_below: int, positives: int, negatives: int) -> float:
    """P(positive > negative) + P(equal) / 2, from the sum of :class:`Ranks` over negatives."""
    return 1 - twice_below / (2 * positives * negatives)


def judd_bias(
    positives: int, negatives: int, above: int, positive_ties: int, negative_ties: int
) -> float:
    """What MIT's ``AUC_Judd.m`` adds to the exact area, in expectation over its random jitter.

    The published code puts a point on the ROC curve only at fixated values and joins the points
    by sloped lines, so its area exceeds the exact one by FPR(lowest fixated value) / 2N. Where m
    fixated and q other pixels tie at that value, jitter puts q m / (m + 1) of the q above the
    lowest of the m on average.

    Args:
        positives: fixated pixels, N.
        negatives: all other pixels.
        above: negatives above the lowest fixated value.
        positive_ties: fixated pixels with the lowest fixated value, m.
        negative_ties: negatives with that value, q.
    """
    expected = above + negative_ties * positive_ties / (positive_ties + 1)
    return expected / (2 * positives * negatives)


def levels(values: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(len(thresholds) + 1,) int64: how many values reach exactly k of the thresholds.

    Args:
        values: (M,) float64, of a map scaled to 0..1.
        thresholds: :data:`COARSE` or :data:`FINE`.
    """
    edges = torch.tensor(thresholds, dtype=torch.float64, device=values.device)
    reached = torch.searchsorted(edges, values, right=True)
    return torch.bincount(reached, minlength=len(thresholds) + 1)


def grid_area(positives: Tensor, negatives: Tensor) -> float:
    """Area by trapezoids through the ROC points at the thresholds of :func:`levels`.

    Args:
        positives: from :func:`levels` for the values at fixations.
        negatives: from :func:`levels` for the negatives.
    """
    rates = []
    for at_level in (positives.cpu(), negatives.cpu()):
        reached = at_level.flip(0).cumsum(0).to(torch.float64)  # strictest threshold first
        rates.append(torch.cat([reached.new_zeros(1), reached / reached[-1]]))
    hits, false_alarms = rates
    return torch.trapezoid(hits, false_alarms).item()
