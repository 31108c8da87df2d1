"""The maps of one image as the formulas take them: checked, flat, in float64, on the CPU."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

MOST = 1 << 30  # fixations: each takes 8 bytes


class Map:
    """A prediction, a density or a baseline: (P,) float64 ``values``, and its normalisations.

    ``constant``: the range is at most 8 eps times the largest magnitude, eps being that of the
    number type, of shorter ones than float32 that of float32. A standard deviation of 0 would miss
    maps that are 0.1 everywhere: their mean is inexact.
    """

    def __init__(self, values: Tensor, kind: str, image: str):
        self.image, self.shape, self.dtype = image, tuple(values.shape), values.dtype
        self.values = _flat(values).to(torch.float64)
        self.low, self.high = (bound.item() for bound in self.values.aminmax())
        if not (math.isfinite(self.low) and math.isfinite(self.high)):  # NaN passes aminmax
            raise ValueError(f"{image}: {kind} holds NaN or infinity")
        if kind != "prediction" and self.low < 0:
            raise ValueError(f"{image}: {kind} has negative values, so it is no density")
        largest = max(self.high, -self.low)
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        eps = min(eps, torch.finfo(torch.float32).eps)  # neighbours in float8 are far apart
        self.constant = self.high - self.low <= 8 * eps * largest
        if self.constant:
            self.values, self.low = torch.full_like(self.values, self.high), self.high
        if largest and not 1e-30 < largest < 1e30:
            # No metric depends on the scale, and squares must not over- or underflow.
            self.values = self.values / largest
            self.low, self.high = self.low / largest, self.high / largest

    @property
    def empty(self) -> bool:
        """True where every value is 0."""
        return self.low == self.high == 0

    @functools.cached_property
    def share(self) -> Tensor:
        """(P,) of sum 1 by MIT's MATLAB code: nothing is shifted, an all-zero map stays zero."""
        return self.values / (self.values.sum().item() or 1.0)

    @functools.cached_property
    def density(self) -> Tensor:
        """(P,) of sum 1 by the MIT/Tuebingen benchmark.

        Negative values shift the map by its minimum; an all-zero map becomes uniform.
        """
        if self.low >= 0 and self.high > 0:
            return self.share
        lifted = self.values - self.low
        total = lifted.sum().item()
        return lifted / total if total else torch.full_like(lifted, 1 / len(lifted))

    @functools.cached_property
    def unit(self) -> Tensor:
        """(P,) the values scaled to 0..1; 0 where the map is constant."""
        return (self.values - self.low) / ((self.high - self.low) or 1.0)

    @functools.cached_property
    def stretched(self) -> Tensor:
        """(P,) 0..1, divided by the sum: MIT's MATLAB code. NaN where the map is constant."""
        return self.unit / self.unit.sum()

    @functools.cached_property
    def looks_8bit(self) -> bool:
        """True where the map was visibly stored with 8 bits: uint8, or multiples of one step.

        The step is max/255, 1/255 (maximum between 1/255 and 1) or 1 (maximum between 1 and 255);
        the values are more than two and none is negative.
        """
        if self.constant or self.low < 0:
            return False
        steps = [self.high / 255]
        if 1 / 255 <= self.high <= 255:
            steps.append(1 / 255 if self.high <= 1 else 1.0)
        sample = self.values[:: max(1, len(self.values) // 16)]  # on which a float map fails
        found = self.dtype == torch.uint8 or any(
            _multiples(sample, step) and _multiples(self.values, step) for step in steps
        )
        return found and bool(((self.values > self.low) & (self.values < self.high)).any())


class Points:
    """Counts per pixel: flat indices ``once`` (U,) of the fixated pixels, and ``counts`` (U,)."""

    def __init__(self, values: Tensor, kind: str, image: str):
        flat = _flat(values)
        if flat.is_floating_point():
            flat = flat.to(torch.float64)  # float8 has no comparisons
        # numpy's nonzero of booleans is many times faster than torch's of numbers
        self.once = torch.from_numpy(np.flatnonzero((flat != 0).numpy()))
        found = flat[self.once]
        self.counts = found.to(torch.int64)
        if (self.counts != found).any() or (self.counts < 0).any():
            problem = "must be whole counts per pixel, not negative; a blurred map is a density"
            raise ValueError(f"{image}: {kind} {problem}")
        if (total := self.counts.double().sum().item()) > MOST:
            problem = f"sums to {total:,.0f} fixations, more than {MOST:,}: give counts per pixel"
            raise ValueError(f"{image}: {kind} {problem}")

    @property
    def empty(self) -> bool:
        """True without any fixation."""
        return len(self.once) == 0

    @functools.cached_property
    def every(self) -> Tensor:
        """(N,) flat indices of every fixation's pixel."""
        return self.once.repeat_interleave(self.counts)


def _multiples(values: Tensor, step: float) -> bool:
    steps = values / step
    return bool(((steps - steps.round()).abs() < 1e-3).all())


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().reshape(-1)
