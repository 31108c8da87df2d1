"""The validation pass between epochs: loss, quick scores, and the alarm when training has died."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch.utils.data import DataLoader

from mlnet_utils.config import Config
from mlnet_utils.data.datasets import SaliencyDataset, make_loader
from mlnet_utils.model.losses import Objective, cc_loss, kl_loss, nss_loss
from mlnet_utils.model.network import MLNet, network_input
from mlnet_utils.runtime import keyed_seed

BATCH = 16


class TrainingDied(RuntimeError):
    """The network's output became constant, or the loss infinite: going on cannot help."""


def advice(config: Config) -> str:
    """What helps when training dies."""
    if config.head == "paper":
        return (
            "The paper's head ends in ReLUs, which stay at zero once all their inputs are "
            "negative. Use head='density', or train with loss='kl' first and put that checkpoint "
            "into start_from; or try a smaller lr "
            f"(now {config.lr:g}; the authors use SGD at 1e-3)."
        )
    return f"Try a smaller lr (now {config.lr:g}), clip_norm=1, or precision='fp32'."


def validation_loader(data: SaliencyDataset, workers: int, rank: int, world: int) -> DataLoader:
    """Whole batches, dealt to the processes in turn.

    Every number is then computed from the same batch, however many processes there are.
    """
    batches = [
        [(0, index) for index in range(start, min(start + BATCH, len(data)))]
        for start in range(0, len(data), BATCH)
    ]
    return make_loader(data, batches[rank::world], workers)


@torch.inference_mode()
def validate(
    network: MLNet,
    loader: DataLoader,
    config: Config,
    accelerator: Accelerator,
    epoch: int,
    between_batches: Callable[[], None],
) -> dict[str, float]:
    """Mean validation loss and quick scores on the network's own grid.

    Args:
        network: is put into eval mode.
        loader: this process's share, as :func:`validation_loader` makes it.
        config: names the loss.
        accelerator: gathers the processes' shares.
        epoch: counted from 0; keys what is random at test time (``dropout_at_test``).
        between_batches: called before every batch, and may raise.

    Raises:
        TrainingDied: every predicted map is constant, or the loss is not finite.
    """
    network.eval()
    objective = Objective(config)
    world = accelerator.num_processes
    if world > 1:  # batch-norm statistics are each process's own: those of the first one count
        broadcast(list(network.buffers()))
    rows = []
    for batch in loader:
        between_batches()
        torch.manual_seed(keyed_seed(config.seed, epoch, int(batch["index"][0])))
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        with accelerator.autocast():
            maps = network(**network_input(batch)).float()
        density, fixations = batch["density"], batch["fixations"]
        spread = maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))
        columns = (
            batch["index"],
            objective.per_image(maps, density, fixations),
            1 - cc_loss(maps, density, fixations),
            -nss_loss(maps, density, fixations).where(fixations.sum((1, 2, 3)) > 0, math.nan),
            kl_loss(maps, density, fixations),
            spread > 1e-6 * maps.amax((1, 2, 3)),
        )
        rows += torch.stack([column.float() for column in columns], 1).tolist()
    if world > 1:
        rows = gather_object(rows)
    rows.sort()  # by photo, so that the mean does not depend on the number of processes
    _, loss, cc, nss, kl, alive = zip(*rows, strict=True)
    if not any(alive):
        raise TrainingDied(
            f"after epoch {epoch + 1} the network predicts a constant map for every validation "
            f"photo: its output is dead. {advice(config)}"
        )
    columns = {"val_loss": loss, "val_cc": cc, "val_kl": kl}
    scores = {name: math.fsum(column) / len(column) for name, column in columns.items()}
    watched = [value for value in nss if not math.isnan(value)]  # on photos with fixations
    scores["val_nss"] = math.fsum(watched) / len(watched) if watched else math.nan
    if not math.isfinite(scores["val_loss"]):
        raise TrainingDied(
            f"after epoch {epoch + 1} the validation loss is {scores['val_loss']}. {advice(config)}"
        )
    return scores
