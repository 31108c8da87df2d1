"""What the metrics are given: checked, one image at a time, in float64.

A batch is scored image by image: a 600 x 800 map in float64 is 3.8 MB, so the working set of one
image stays in the processor's cache while that of a batch does not, and images have different
numbers of fixations. Quantities that several metrics need are computed once per image and kept.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mlnet_utils import roc

PROTOCOLS = ("mit300", "salicon", "salicon2015")


class ScoredImage:
    """One image's maps, flat and in float64, and what several metrics share.

    Args:
        name: how error messages call the image.
        prediction: (H, W), any number type, any range, finite.
        fixations: (H, W) counts of fixations per pixel, whole and not negative, or None.
        density: (H, W) ground-truth density, finite and not negative, any scale, or None.
        negatives: (H, W) counts of other images' fixations, or None.
        baseline: (H, W) baseline density, finite and not negative, any scale, or None.

    Raises:
        ValueError: NaN or infinity in a map, negative values where none can be, or a count map
            that holds fractions; the message names the image.
    """

    def __init__(
        self,
        name: str,
        prediction: Tensor,
        fixations: Tensor | None = None,
        density: Tensor | None = None,
        negatives: Tensor | None = None,
        baseline: Tensor | None = None,
    ):
        self.name = name
        self.dtype = prediction.dtype
        self.prediction, self.low, self.high = _finite(prediction, "prediction", name)
        # `std == 0` misses constant maps: the mean of a map that is 0.1 everywhere is not 0.1.
        precision = torch.finfo(self.dtype).eps if self.dtype.is_floating_point else 0.0
        self.constant = self.high - self.low <= 8 * precision * max(abs(self.high), abs(self.low))
        if self.constant:
            self.prediction = torch.full_like(self.prediction, self.high)
        self.density = _density(density, "density", name)
        self.baseline = _density(baseline, "baseline", name)
        self._fixations = _pixels(fixations, "fixations", name)
        self._negatives = _pixels(negatives, "negatives", name)
        self._ranks: dict[int, Tensor] = {}

    # ---- the prediction -----------------------------------------------------------------------
    @functools.cached_property
    def centred(self) -> Tensor:
        """(P,) prediction minus its mean."""
        return self.prediction - self.prediction.mean()

    @functools.cached_property
    def squares(self) -> float:
        """Sum of squares of the centred prediction."""
        return self.centred.square().sum().item()

    @functools.cached_property
    def unit(self) -> Tensor:
        """(P,) prediction scaled to 0..1; undefined for a constant one."""
        return (self.prediction - self.low) / (self.high - self.low)

    @functools.cached_property
    def normalised(self) -> Tensor:
        """(P,) prediction that sums to 1: shifted if negative, uniform if nothing is left.

        This is how today's MIT/Tuebingen benchmark turns any map into a density.
        """
        lifted = self.prediction - self.low if self.low < 0 else self.prediction
        total = lifted.sum().item()
        return lifted / total if total > 0 else torch.full_like(lifted, 1 / len(lifted))

    # ---- what it is compared with ---------------------------------------------------------------
    @functools.cached_property
    def truth(self) -> Tensor | None:
        """(P,) ground-truth density that sums to 1, or None where nobody looked (all zeros)."""
        total = self.density.sum().item()
        return self.density / total if total > 0 else None

    @property
    def unique(self) -> Tensor:
        """(U,) fixated pixels, each once."""
        return self._fixations[0]

    @functools.cached_property
    def repeated(self) -> Tensor:
        """(N,) fixated pixels, one entry per fixation."""
        return self.unique.repeat_interleave(self._fixations[1])

    def fixated(self, protocol: str) -> Tensor:
        """Pixels of the fixations: MATLAB's code counts each pixel once, the others each fixation."""
        return self.unique if protocol == "salicon" else self.repeated

    def ranks(self, where: Tensor) -> Tensor:
        """(P,) for each pixel, how many of the fixations at ``where`` lie below it (see roc)."""
        if len(where) not in self._ranks:  # unique and repeated pixels are the same if as many
            self._ranks[len(where)] = roc.below(self.prediction, self.prediction[where])
        return self._ranks[len(where)]

    def ranks_at(self, pixels: Tensor, where: Tensor) -> Tensor:
        """:meth:`ranks` at some pixels only, without placing all the others."""
        if len(where) in self._ranks:
            return self._ranks[len(where)][pixels]
        return roc.below(self.prediction[pixels], self.prediction[where])

    @property
    def negatives(self) -> tuple[Tensor, Tensor]:
        """(M,) pixels that were fixated on other images, and how often."""
        return self._negatives


def images(
    prediction: Tensor, names: Sequence[str] | None, **maps: Tensor | None
) -> Iterator[ScoredImage]:
    """Check the shapes of a batch and yield its images.

    Args:
        prediction: (B, H, W).
        names: B names for error messages; None names images by their index in the batch.
        **maps: (B, H, W) each, or None.

    Raises:
        ValueError: something is not a (B, H, W) tensor of the prediction's shape.
    """
    if not isinstance(prediction, Tensor) or prediction.ndim != 3 or 0 in prediction.shape[1:]:
        raise ValueError(f"prediction must be a (B, H, W) tensor, got {_describe(prediction)}")
    for kind, value in maps.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != prediction.shape:
            raise ValueError(
                f"{kind} must have the prediction's shape {tuple(prediction.shape)}, got "
                f"{_describe(value)}; nothing is resized silently (see mlnet_utils.resize)"
            )
    if names is not None and len(names) != len(prediction):
        raise ValueError(f"{len(names)} names for {len(prediction)} images")
    for index in range(len(prediction)):
        name = f"image {index} of the batch" if names is None else f"image {names[index]}"
        rows = {kind: None if value is None else value[index] for kind, value in maps.items()}
        yield ScoredImage(name, prediction[index], **rows)


def per_image(
    formula: Callable[[ScoredImage, str], float],
    protocol: str,
    prediction: Tensor,
    names: Sequence[str] | None,
    **maps: Tensor,
) -> Tensor:
    """Apply a metric's formula to every image of a batch: (B,) float64 on the batch's device."""
    check_protocol(protocol)
    values = [formula(image, protocol) for image in images(prediction, names, **maps)]
    return result(values, prediction)


def result(values: list[float], prediction: Tensor) -> Tensor:
    """(B,) float64 on the prediction's device (the CPU for MPS, which has no float64)."""
    device = "cpu" if prediction.device.type == "mps" else prediction.device
    return torch.tensor(values, dtype=torch.float64, device=device)


def check_protocol(protocol: str) -> None:
    """Raise ValueError unless the protocol is one of :data:`PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")


def warn_if_8bit(image: ScoredImage, metric: str) -> None:
    """Warn when a prediction was visibly stored with 8 bits, which changes KL and IG grossly.

    Rounding to 255 steps turns small probabilities into zeros: KL of a peaky map grew from 0.59
    to 1.57 in this way. The rule: the map is uint8, or it is not constant and all its values are
    whole multiples of max/255, or of 1/255 (maximum at most 1), or whole numbers up to 255 with
    something strictly between the lowest and the highest value.
    """
    if image.constant or image.low < 0:
        return
    eight_bit = image.dtype == torch.uint8
    units = [image.high / 255]
    if image.high <= 1:
        units.append(1 / 255)
    elif image.high <= 255:
        units.append(1.0)
    sample = image.prediction[:: max(1, len(image.prediction) // 512)]
    for unit in units:
        # A float map fails on the sample, so that the whole map is hardly ever read.
        eight_bit = eight_bit or (_multiples(sample, unit) and _multiples(image.prediction, unit))
    if eight_bit and ((image.prediction > image.low) & (image.prediction < image.high)).any():
        warnings.warn(
            f"{image.name}: the prediction looks read back from an 8-bit file, which makes "
            f"{metric} meaningless (small values became zeros); score the float map instead",
            stacklevel=2,
        )


def _multiples(values: Tensor, unit: float) -> bool:
    steps = values / unit
    return bool(((steps - steps.round()).abs() < 1e-3).all())


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _wide(values: Tensor) -> Tensor:
    values = values.detach().reshape(-1)
    if values.device.type == "mps":  # no float64 there
        values = values.cpu()
    return values.to(torch.float64)


def _finite(values: Tensor, kind: str, name: str) -> tuple[Tensor, float, float]:
    """The map flat in float64, its lowest and its highest value."""
    values = _wide(values)
    low, high = (bound.item() for bound in values.aminmax())  # NaN passes through aminmax
    if not -float("inf") < low <= high < float("inf"):
        raise ValueError(f"{name}: {kind} holds NaN or infinity")
    largest = max(high, -low)
    if largest and not 1e-100 < largest < 1e100:
        # Every metric ignores the scale; this keeps squares and ranges from over- or underflowing.
        values, low, high = values / largest, low / largest, high / largest
    return values, low, high


def _density(values: Tensor | None, kind: str, name: str) -> Tensor | None:
    if values is None:
        return None
    values, low, _ = _finite(values, kind, name)
    if low < 0:
        raise ValueError(f"{name}: {kind} has negative values (lowest {low:g}), so it is no density")
    return values


def _pixels(counts: Tensor | None, kind: str, name: str) -> tuple[Tensor, Tensor] | None:
    """Flat indices of the pixels with a count, and the counts, from a (H, W) count map."""
    if counts is None:
        return None
    counts = counts.detach().reshape(-1)
    if counts.device.type == "mps":
        counts = counts.cpu()
    where = counts.nonzero().squeeze(1)
    found = counts[where]
    whole = found.to(torch.int64)
    if not bool(((whole == found) & (whole > 0)).all()):
        raise ValueError(
            f"{name}: {kind} must be whole counts per pixel, not negative; a blurred map is a "
            "density, and metrics at fixations are wrong on it"
        )
    return where, whole
