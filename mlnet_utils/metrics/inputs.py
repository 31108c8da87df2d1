"""What the metrics are given: checked, one image at a time, added up in float64.

A batch is scored image by image, because images have different numbers of fixations, and an image
block by block: every metric's share of a block is computed while the block is in the processor's
cache, the maps are read only once, and no map-sized intermediate result is made, for which the
operating system would have to find memory each time. On a CPU one thread scores an image, and as
many images are scored at a time as there are threads: threads that share a block wait for each
other at every step, which on a busy machine takes far longer than the work.
"""

import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mlnet_utils.metrics import roc

BLOCK = 1 << 16  # pixels per block: 512 KB in float64; on a GPU a map is one block


Result = TypeVar("Result")


class Block(NamedTuple):
    """The same (b,) pixels of an image's maps."""

    values: Tensor  # the prediction, in float32 or float64
    prediction: Tensor  # the prediction, in float64
    density: Tensor | None  # float64
    negatives: Tensor | None  # whole counts


class ScoredImage:
    """One image's maps, flat, and what several metrics share.

    Args:
        name: how error messages call the image.
        protocol: whose definitions the formulas follow.
        prediction: (H, W), any number type, any range, finite.
        fixations: (H, W) counts of fixations per pixel, whole and not negative, or None.
        density: (H, W) ground-truth density, finite and not negative, any scale, or None.
        negatives: (H, W) counts of other images' fixations, or None.
        baseline: (H, W) baseline density, finite and not negative, any scale, or None; or the
            :class:`FlatMap` of one that several images share.
        sums: the functions that :meth:`pixel_sum` will be asked for, so that the first request
            adds all of them up in one pass.

    Raises:
        ValueError: NaN or infinity in a map, negative values where none can be, or a count map
            that holds fractions; the message names the image.
    """

    def __init__(
        self,
        name: str,
        protocol: str,
        prediction: Tensor,
        fixations: Tensor | None = None,
        density: Tensor | None = None,
        negatives: Tensor | None = None,
        baseline: "Tensor | FlatMap | None" = None,
        sums: Sequence[Callable] = (),
    ):
        self.name = name
        self.protocol = protocol
        self.shape = tuple(prediction.shape)
        self.prediction = FlatMap(prediction, "prediction", name)
        self.density = None if density is None else FlatMap(density, "density", name)
        if isinstance(baseline, Tensor):
            baseline = FlatMap(baseline, "baseline", name)
        self.baseline = baseline
        for values in (self.density, self.baseline):
            if values is not None and values.low < 0:
                raise ValueError(
                    f"{name}: {values.kind} has negative values (lowest {values.low:g}), so it "
                    "is no density"
                )
        self._fixations = None if fixations is None else CountMap(fixations, "fixations", name)
        self._negatives = None if negatives is None else CountMap(negatives, "negatives", name)
        self._wanted = sums
        self._sums: dict[Callable, tuple] = {}

    # ---- fixations ----------------------------------------------------------------------------
    @functools.cached_property
    def unique(self) -> Tensor:
        """(U,) fixated pixels, each once."""
        return roc.at_least(1, self._fixations.values)

    @functools.cached_property
    def repeated(self) -> Tensor:
        """(N,) fixated pixels, one entry per fixation."""
        if self._fixations.high <= 1:
            return self.unique
        return self.unique.repeat_interleave(self._fixations.values[self.unique])

    @property
    def fixated(self) -> Tensor:
        """Fixated pixels: each once in MATLAB's code, once per fixation elsewhere."""
        return self.unique if self.protocol == "salicon" else self.repeated

    @functools.cached_property
    def negatives(self) -> tuple[Tensor, Tensor]:
        """(M,) pixels that were fixated on other images, and how often."""
        where = self._negatives.values.nonzero().squeeze(1)
        return where, self._negatives.values[where]

    @property
    def negative_count(self) -> int:
        """How many negatives there are, repeats included; 0 if none were given."""
        return 0 if self._negatives is None else self._negatives.total

    @functools.cached_property
    def ranks(self) -> roc.Ranks:
        """Ranks of values among the predictions at :attr:`fixated`."""
        values = self.prediction
        return roc.Ranks(values.values[self.fixated], values.low, values.high)

    # ---- sums over the pixels -------------------------------------------------------------------
    def pixel_sum(self, function: Callable[["ScoredImage", Block], tuple]) -> tuple:
        """Sums over all pixels of what ``function`` returns for a block: a tuple of numbers."""
        if function not in self._sums:
            functions = {function, *self._wanted} - self._sums.keys()
            for block in self._blocks():
                for one in functions:
                    parts = one(self, block)
                    so_far = self._sums.get(one)
                    self._sums[one] = tuple(map(operator.add, so_far, parts)) if so_far else parts
        return self._sums[function]

    def _blocks(self) -> Iterator[Block]:
        values = self.prediction.values
        size = BLOCK if values.device.type == "cpu" else len(values)
        for start in range(0, len(values), size):
            part = slice(start, start + size)
            yield Block(
                values[part],
                values[part].to(torch.float64),
                None if self.density is None else self.density.values[part].to(torch.float64),
                None if self._negatives is None else self._negatives.values[part],
            )

    # ---- the prediction as a density ------------------------------------------------------------
    @functools.cached_property
    def lift(self) -> tuple[float, float]:
        """(shift, total) that make the prediction a density: (values - shift) / total.

        This is how today's MIT/Tuebingen benchmark turns any map into a density: it is shifted if
        it has negative values. A total of 0 stands for the uniform density.
        """
        if self.prediction.low >= 0:
            return 0.0, self.prediction.total
        low = self.prediction.low
        return low, (self.prediction.values - low).sum(dtype=torch.float64).item()

    def normalised(self, values: Tensor, total: float = 1.0, add: Tensor | None = None) -> Tensor:
        """Some of the prediction's values, as those of a density that sums to ``total``.

        The number ``add`` is added to all of them.
        """
        shift, given = self.lift
        add = values.new_zeros(()) if add is None else add
        if given == 0:
            return torch.full_like(values, total / self.prediction.pixels) + add
        return add.add(values - shift if shift else values, alpha=total / given)


class FlatMap:
    """One map of an image: its values, flat, and their range and sum.

    Attributes:
        kind: what the map is, for error messages.
        dtype: number type in which the map was given.
        values: (P,), float32 or float64.
        pixels: P.
        low: lowest value.
        high: highest value.
        total: sum of the values.
        constant: the range is at most 8 eps of the number type times the largest magnitude. A
            standard deviation of 0 would miss maps whose mean is inexact, such as 0.1 everywhere.
    """

    def __init__(self, values: Tensor, kind: str, name: str):
        self.kind = kind
        self.dtype = values.dtype
        self.values = _flat(values)
        if self.dtype not in (torch.float32, torch.float64):
            self.values = self.values.to(torch.float64)
        self.pixels = len(self.values)
        self.low, self.high = (bound.item() for bound in self.values.aminmax())
        if not -float("inf") < self.low <= self.high < float("inf"):  # NaN passes aminmax
            raise ValueError(f"{name}: {kind} holds NaN or infinity")
        precision = torch.finfo(self.dtype).eps if self.dtype.is_floating_point else 0.0
        largest = max(self.high, -self.low)
        self.constant = self.high - self.low <= 8 * precision * largest
        if self.constant:
            self.values, self.low = torch.full_like(self.values, self.high), self.high
        if largest > 0 and not 1e-30 < largest < 1e30:
            # Every metric ignores the scale; this keeps sums, squares and ranges from over- or
            # underflowing.
            self.values = self.values.to(torch.float64) / largest
            self.low, self.high = self.low / largest, self.high / largest
        self.total = self.values.sum(dtype=torch.float64).item()

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return self.total / self.pixels

    @functools.cached_property
    def looks_8bit(self) -> bool:
        """More than two distinct values, none negative, and uint8 or all multiples of one step.

        The step is max/255, or 1/255 (maximum between 1/255 and 1), or 1 (maximum up to 255).
        """
        if self.constant or self.low < 0:
            return False
        steps = [self.high / 255]
        if 1 / 255 <= self.high <= 255:
            steps.append(1 / 255 if self.high <= 1 else 1.0)
        # A float map fails on a sample, so that the whole map is hardly ever read.
        sample = self.values[:: max(1, self.pixels // 16)].tolist()
        found = self.dtype == torch.uint8 or any(
            all(abs(v / step - round(v / step)) < 1e-3 for v in sample)
            and _multiples(self.values, step)
            for step in steps
        )
        return found and bool(((self.values > self.low) & (self.values < self.high)).any())

    def at(self, where: Tensor) -> Tensor:
        """(N,) float64 values at flat indices."""
        return self.values[where].to(torch.float64)

    def unit(self, values: Tensor) -> Tensor:
        """Some of the map's values scaled so that the map spans 0..1."""
        return (values - self.low) / (self.high - self.low)

    def stretched(self, values: Tensor) -> Tensor:
        """Some of the map's values, after the map was scaled to 0..1 and divided by its sum."""
        return (values - self.low) / (self.total - self.low * self.pixels)


class CountMap:
    """One count map of an image, flat and checked.

    Attributes:
        values: (P,) int32 or int64.
        high: the largest count.
    """

    def __init__(self, counts: Tensor, kind: str, name: str):
        counts = _flat(counts)
        keep = counts.dtype in (torch.int32, torch.int64)
        self.values = counts if keep else counts.to(torch.int32)
        lossy = counts.is_floating_point() and not torch.equal(self.values, counts)
        low, self.high = (bound.item() for bound in self.values.aminmax())
        if lossy or low < 0:
            raise ValueError(
                f"{name}: {kind} must be whole counts per pixel, not negative; a blurred map is a "
                "density, and metrics at fixations are wrong on it"
            )

    @functools.cached_property
    def total(self) -> int:
        """Sum of the counts."""
        small = self.high * len(self.values) < 2**31  # 32-bit sums are three times as fast
        return self.values.sum(dtype=torch.int32 if small else torch.int64).item()


def for_each_image(
    function: Callable[[ScoredImage], Result],
    prediction: Tensor,
    protocol: str,
    sums: Sequence[Callable],
    names: Sequence[str] | None,
    **maps: Tensor | None,
) -> list[Result]:
    """Check the shapes of a batch and apply a function to each of its images.

    Args:
        function: of one image.
        prediction: (B, H, W).
        protocol: whose definitions the formulas follow.
        sums: what :meth:`ScoredImage.pixel_sum` will be asked for.
        names: B names for error messages; None names images by their index in the batch.
        **maps: (B, H, W) each, or None.

    Returns:
        What the function returned, in the order of the images.

    Raises:
        ValueError: something is not a (B, H, W) tensor of the prediction's shape, or what
            :class:`ScoredImage` refuses.
    """
    if not isinstance(prediction, Tensor) or prediction.ndim != 3 or 0 in prediction.shape[1:]:
        raise ValueError(f"prediction must be a (B, H, W) tensor, got {_describe(prediction)}")
    for kind, value in maps.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != prediction.shape:
            raise ValueError(
                f"{kind} must have the prediction's shape {tuple(prediction.shape)}, got "
                f"{_describe(value)}; nothing is resized silently (see mlnet_utils.metrics.resize)"
            )
    if names is not None and len(names) != len(prediction):
        raise ValueError(f"{len(names)} names for {len(prediction)} images")

    @functools.cache
    def shared_baseline() -> FlatMap:
        return FlatMap(maps["baseline"][0], "baseline", "every image of the batch")

    baseline = maps.get("baseline")
    # One baseline for all, given as `expand` makes it, is read once.
    shared = baseline is not None and len(baseline) > 1 and baseline.stride(0) == 0

    def scored(index: int) -> Result:
        name = f"image {index} of the batch" if names is None else f"image {names[index]}"
        rows = {kind: None if value is None else value[index] for kind, value in maps.items()}
        if shared:
            rows["baseline"] = shared_baseline()
        return function(ScoredImage(name, protocol, prediction[index], **rows, sums=sums))

    return _apply(scored, len(prediction), prediction.device)


def _apply(function: Callable[[int], Result], count: int, device: torch.device) -> list[Result]:
    """``function`` of 0 .. count - 1; on a CPU each by one thread, so that the number of threads
    does not change a bit of the results."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [function(index) for index in range(count)]
    try:
        if count <= 1:
            torch.set_num_threads(1)
            return [function(index) for index in range(count)]
        workers = min(threads, count)
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, range(count)))
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also that of threads to come


def warn_if_8bit(image: ScoredImage, metric: str) -> None:
    """Warn when a prediction was visibly stored with 8 bits, which changes KL and IG grossly.

    Rounding to 255 steps turns small probabilities into zeros: KL of a peaky map grew from 0.59
    to 1.57 in this way. :attr:`FlatMap.looks_8bit` is the rule.
    """
    if image.prediction.looks_8bit:
        warnings.warn(
            f"{image.name}: the prediction looks read back from an 8-bit file, which makes "
            f"{metric} meaningless (small values became zeros); score the float map instead",
            stacklevel=2,
        )


def _multiples(values: Tensor, unit: float) -> bool:
    steps = values.to(torch.float64) / unit
    return bool(((steps - steps.round()).abs() < 1e-3).all())


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _flat(values: Tensor) -> Tensor:
    values = values.detach().reshape(-1)
    if values.device.type == "mps":  # which has no float64
        return values.cpu()
    # Sums of products differ in the last bit with the alignment in memory, hence with the place
    # of an image in its batch: a copy is always aligned.
    return values.clone() if values.data_ptr() % 64 else values
