"""Scores of a whole split, over batches and processes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mlnet_utils.metrics.bootstrap import summary
from mlnet_utils.metrics.protocols import METRICS, score_all


class SaliencyMetrics(Metric):
    """Collects per-image scores of all the metrics, over batches and processes.

    Nothing is averaged until :meth:`compute`. Images are identified by their index in the split:
    distributed samplers repeat images to fill the last batch, and each counts once here, so the
    result does not depend on the number of processes or on the order of the batches.

    Args:
        protocol: which definitions (see :mod:`mlnet_utils.metrics`).
        metrics: which metrics; None = those that the protocol defines.
        resamples: of the bootstrap intervals.
        seed: of the bootstrap intervals.

    Example:
        >>> import torch
        >>> scores = SaliencyMetrics(metrics=["NSS"])
        >>> prediction = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> fixations = torch.tensor([[[0, 0], [0, 1]]])
        >>> scores.update(torch.tensor([0]), prediction, fixations)
        >>> round(scores.compute()["NSS"]["mean"], 4)
        1.3416
    """

    full_state_update = False
    higher_is_better = None  # differs between the metrics
    is_differentiable = False

    def __init__(
        self,
        protocol: str = "mit300",
        metrics: Sequence[str] | None = None,
        resamples: int = 2000,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.protocol = protocol
        self.metrics = metrics
        self.resamples = resamples
        self.seed = seed
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(
        self,
        index: Tensor,
        prediction: Tensor,
        fixations: Tensor,
        density: Tensor | None = None,
        negatives: Tensor | None = None,
        baseline: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Score a batch.

        Args:
            index: (B,) int64 position of each image in the split.
            prediction: (B, H, W), as all the other maps; see ``metrics.score_all``.
            fixations: counts of fixations per pixel.
            density: ground-truth density.
            negatives: counts of other images' fixations.
            baseline: density of a baseline.
            names: B image names for error messages.

        Raises:
            ValueError: not one index per image, or what ``metrics.score_all`` refuses.
        """
        if index.shape != prediction.shape[:1]:
            raise ValueError(
                f"index must hold one position per image, got shape {tuple(index.shape)} for "
                f"{len(prediction)} images"
            )
        scores = score_all(
            prediction,
            fixations,
            density,
            negatives,
            baseline,
            self.protocol,
            metrics=self.metrics,
            names=names,
        )
        undefined = torch.full(index.shape, math.nan, dtype=torch.float64)
        columns = [scores[name].cpu() if name in scores else undefined for name in self.columns]
        self.index.append(index.to(self.device, torch.int64))
        self.values.append(torch.stack(columns, dim=1).to(self.device))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of :meth:`per_image`'s columns."""
        return METRICS if self.metrics is None else tuple(self.metrics)

    def sync(self, *args, **kwargs) -> None:
        """Merge the scores of all processes; takes what :meth:`torchmetrics.Metric.sync` takes."""
        if isinstance(self.index, list) and not self.index:
            # Processes exchange tensors of equal types and dimensions only, also where one of
            # them has seen no batch.
            index, values = self.per_image()
            self.index.append(index.to(self.device))
            self.values.append(values.to(self.device))
        super().sync(*args, **kwargs)

    def per_image(self) -> tuple[Tensor, Tensor]:
        """(N,) int64 indices of the images so far, ascending, and (N, metrics) float64 scores."""
        if not len(self.index):
            nothing = torch.zeros(0, len(self.columns), dtype=torch.float64)
            return torch.zeros(0, dtype=torch.int64), nothing
        # After a merge the states are single tensors, before it lists of one per batch.
        index = torch.cat(list(self.index)) if isinstance(self.index, list) else self.index
        values = torch.cat(list(self.values)) if isinstance(self.values, list) else self.values
        index, order = index.cpu().sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return index[first], values.cpu()[order][first]

    def compute(self) -> dict[str, dict[str, float]]:
        """Per metric: mean and 95 % bootstrap interval over images, and what they leave out.

        Returns:
            {metric: {"mean", "low", "high", "n", "skipped", "infinite"}}; ``n`` finite values are
            averaged, ``skipped`` are NaN (undefined), ``infinite`` are information gains of -inf.
        """
        _, table = self.per_image()
        return {
            name: summary(values, self.seed, self.resamples)
            for name, values in zip(self.columns, table.unbind(1), strict=True)
        }
