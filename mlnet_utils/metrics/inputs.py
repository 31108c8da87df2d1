"""The maps of an image as the formulas take them: checked, flat, in float64, on the CPU."""

import functools
import math

import torch
from torch import Tensor


class Map:
    """One map of an image.

    Attributes:
        values: (P,) float64.
        low: lowest value.
        high: highest value.
        constant: the range is at most 8 eps of the number type times the largest magnitude. A
            standard deviation of 0 would miss maps that are 0.1 everywhere: their mean is inexact.
        looks_8bit: see :func:`looks_8bit`.

    Raises:
        ValueError: the map holds NaN or infinity; the message names the image.
    """

    def __init__(self, values: Tensor, kind: str, image: str):
        eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        self.is_uint8 = values.dtype == torch.uint8
        self.values = _flat(values).to(torch.float64)
        self.low, self.high = (bound.item() for bound in self.values.aminmax())
        if not (math.isfinite(self.low) and math.isfinite(self.high)):  # NaN passes aminmax
            raise ValueError(f"{image}: {kind} holds NaN or infinity")
        largest = max(self.high, -self.low)
        self.constant = self.high - self.low <= 8 * eps * largest
        if self.constant:
            self.values, self.low = torch.full_like(self.values, self.high), self.high
        if largest and not 1e-30 < largest < 1e30:
            # No metric depends on the scale, and squares must not over- or underflow.
            self.values = self.values / largest
            self.low, self.high = self.low / largest, self.high / largest

    @property
    def zero(self) -> bool:
        """True where every value is 0."""
        return self.low == self.high == 0

    @functools.cached_property
    def total(self) -> float:
        """Sum of the values."""
        return self.values.sum().item()

    @functools.cached_property
    def unit(self) -> Tensor:
        """(P,) the values scaled to 0..1; 0 where the map is constant."""
        return (self.values - self.low) / ((self.high - self.low) or 1.0)

    @functools.cached_property
    def density(self) -> Tensor:
        """(P,) of sum 1 by the rule of the MIT/Tuebingen benchmark.

        A map with negative values is shifted by its minimum; an all-zero map becomes uniform.
        """
        if self.low >= 0:
            lifted, total = self.values, self.total
        else:
            lifted = self.values - self.low
            total = lifted.sum().item()
        return lifted / total if total else torch.full_like(lifted, 1 / len(lifted))

    @functools.cached_property
    def share(self) -> Tensor:
        """(P,) of sum 1 by MIT's MATLAB code: nothing is shifted, an all-zero map stays zero."""
        return self.values / (self.total or 1.0)

    @functools.cached_property
    def stretched(self) -> Tensor:
        """(P,) scaled to 0..1, then divided by the sum: MIT's MATLAB code for SIM and IG."""
        return self.unit / self.unit.sum()

    @functools.cached_property
    def looks_8bit(self) -> bool:
        """True where the map was visibly stored with 8 bits.

        Its values are more than two, none negative, and uint8 or multiples of one step: max/255,
        or 1/255 (maximum between 1/255 and 1), or 1 (maximum between 1 and 255).
        """
        if self.constant or self.low < 0:
            return False
        steps = [self.high / 255]
        if 1 / 255 <= self.high <= 255:
            steps.append(1 / 255 if self.high <= 1 else 1.0)
        sample = self.values[:: max(1, len(self.values) // 16)]  # on which a float map fails
        found = self.is_uint8 or any(
            _multiples(sample, step) and _multiples(self.values, step) for step in steps
        )
        return found and bool(((self.values > self.low) & (self.values < self.high)).any())


class Image:
    """The maps of one image, and the pixels that several metrics look at.

    Args:
        name: as error messages call the image.
        prediction: (H, W), any number type, any range, finite.
        fixations: (H, W) counts of fixations per pixel, whole and not negative.
        density: (H, W) ground-truth density, finite and not negative, any scale.
        negatives: (H, W) counts of other images' fixations.
        baseline: (H, W) as the density, or its :class:`Map`.

    Attributes:
        fixated: (U,) fixated pixels, each once.
        fixations: (N,) fixated pixels, once per fixation.
        negatives: (M,) pixels that were fixated on other images.
        negative_counts: (M,) times that they were.

    Raises:
        ValueError: NaN or infinity in a map, a negative density, or fractional or negative counts;
            the message names the image.
    """

    def __init__(
        self,
        name: str,
        prediction: Tensor,
        fixations: Tensor | None = None,
        density: Tensor | None = None,
        negatives: Tensor | None = None,
        baseline: "Tensor | Map | None" = None,
    ):
        self.name = name
        self.shape = tuple(prediction.shape)
        self.prediction = Map(prediction, "prediction", name)
        if density is not None:
            self.density = density_map(density, "density", name)
        if isinstance(baseline, Tensor):
            baseline = density_map(baseline, "baseline", name)
        self.baseline = baseline
        if fixations is not None:
            self.fixated, counts = _counted(fixations, "fixations", name)
            self.fixations = self.fixated.repeat_interleave(counts)
        if negatives is not None:
            self.negatives, self.negative_counts = _counted(negatives, "negatives", name)

    def at(self, pixels: Tensor) -> Tensor:
        """The prediction's values at some pixels."""
        return self.prediction.values[pixels]

    @property
    def unfixated(self) -> Tensor:
        """The prediction's values at the pixels that were not fixated."""
        keep = torch.ones_like(self.prediction.values, dtype=torch.bool)
        keep[self.fixated] = False
        return self.prediction.values[keep]


def density_map(values: Tensor, kind: str, image: str) -> Map:
    """The :class:`Map` of a density.

    Raises:
        ValueError: NaN or infinity, or negative values; the message names the image.
    """
    checked = Map(values, kind, image)
    if checked.low < 0:
        raise ValueError(
            f"{image}: {kind} has negative values (lowest {checked.low:g}), so it is no density"
        )
    return checked


def _counted(counts: Tensor, kind: str, image: str) -> tuple[Tensor, Tensor]:
    """Flat indices of the pixels that have a count, and the counts."""
    flat = _flat(counts)
    pixels = flat.nonzero().squeeze(1)
    found = flat[pixels]
    whole = found.to(torch.int64)
    if (whole != found).any() or (whole < 0).any():
        raise ValueError(
            f"{image}: {kind} must be whole counts per pixel, not negative; a blurred map is a "
            "density, and metrics at fixations are wrong on it"
        )
    return pixels, whole


def _multiples(values: Tensor, step: float) -> bool:
    steps = values / step
    return bool(((steps - steps.round()).abs() < 1e-3).all())


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().reshape(-1)
