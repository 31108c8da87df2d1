"""Training on Hugging Face accelerate: one loop for a notebook cell, a cluster job, and a resume."""

import contextlib
import csv
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mlnet_utils import checkpoints
from mlnet_utils.config import Config
from mlnet_utils.datasets import EpochSampler, SaliencyDataset, make_loader, photo_root
from mlnet_utils.losses import Objective, cc_loss, kl_loss, nss_loss
from mlnet_utils.model import MLNet
from mlnet_utils.photos import read_prepared
from mlnet_utils.runtime import progress, seed_everything, write_text

LOG_FIELDS = ("epoch", "updates", "lr", "train_loss", "val_loss", "val_cc", "val_nss", "val_kl")
BATCH_OF_VALIDATION = 16


class TrainingDied(RuntimeError):
    """The network's output became constant, or the loss infinite: going on cannot help."""


@dataclass
class FitResult:
    """What a finished training left behind."""

    best: Path
    history: list[dict[str, float]]
    seconds: float


def fit(config: Config, run_dir: str | Path, accelerator: Accelerator | None = None) -> FitResult:
    """Train, or continue the training, of the run in ``run_dir``.

    Reads ``data/`` (notebook 01); writes ``log.csv``, ``times.csv`` and ``checkpoints/``
    (``best.pt`` for use, ``last.pt`` and ``previous.pt`` to resume from). Calling it again after
    an interruption continues at the last step checkpoint; on a CPU the result is the same to the
    bit. A finished run returns at once.

    Raises:
        FileNotFoundError: the prepared data are missing.
        TrainingDied: the output died or the loss is not finite; the message says what to try.
        ValueError: the checkpoints belong to another configuration or cannot be read.
    """
    return Trainer(config, Path(run_dir), accelerator).run()


def learning_rate(config: Config, update: int, total: int) -> float:
    """Learning rate of one update, counted from 0, out of ``total``: a closed form per schedule.

    ``keras1`` is Keras 1's decay per update, lr / (1 + decay * t) (authors' code); ``onecycle``
    warms up linearly and follows a half cosine down to zero (Smith 2018).
    """
    if config.schedule == "keras1":
        return config.lr / (1 + config.lr_decay * update)
    if config.schedule == "constant":
        return config.lr
    warm = config.warmup * total
    if update < warm:
        return config.lr * (update + 1) / (warm + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(total - warm, 1)))


def make_optimizer(config: Config, model: MLNet) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters, the backbone with its own learning rate."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    if not groups[True] and not groups[False]:
        raise ValueError("config: freeze leaves no parameter to train")
    parameters = [
        {"params": group, "lr_scale": config.backbone_lr_scale if backbone else 1.0}
        for backbone, group in groups.items()
        if group
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def choose_precision(config: Config) -> str:
    """Accelerate's name of the mixed precision: bf16 where the hardware has it, else fp16 or none."""
    if config.precision != "auto":
        return {"fp32": "no"}.get(config.precision, config.precision)
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"


class Trainer:
    """The state of one training: what a step changes and what a checkpoint holds."""

    def __init__(self, config: Config, run_dir: Path, accelerator: Accelerator | None = None):
        self.config, self.run_dir = config, run_dir
        self.folder = run_dir / "checkpoints"
        self.accelerator = accelerator or Accelerator(mixed_precision=choose_precision(config))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        seed_everything(config.seed)
        torch.use_deterministic_algorithms(config.deterministic)

        photos, meta = read_prepared(run_dir / "data")
        root = photo_root(run_dir / "data", meta)
        splits = {split: [p for p in photos if p.split == split] for split in ("train", "val")}
        for split, members in splits.items():
            if not members:
                raise ValueError(f"the prepared data of {run_dir} have no {split} photos")
        data = {
            split: SaliencyDataset(members, root, config, meta["sigma_px"], split == "train")
            for split, members in splits.items()
        }
        self.sampler = EpochSampler(
            len(data["train"]), config.batch_size, config.seed, True, rank, world
        )
        validation = EpochSampler(
            len(data["val"]), BATCH_OF_VALIDATION, 0, False, rank, world
        )
        self.validation_sampler = validation
        self.train_loader = make_loader(data["train"], self.sampler, config.workers)
        self.val_loader = make_loader(data["val"], validation, config.workers)

        self.model = MLNet(config)
        self.objective = Objective(config)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.to(self.accelerator.device)
        optimizer = make_optimizer(config, self.model)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.average = (
            AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
            if config.ema_decay
            else None
        )
        self.epoch = self.batch = self.updates = 0
        self.loss_sum, self.loss_count = 0.0, 0
        self.best_loss, self.bad_epochs, self.finished = math.inf, 0, False
        self.history: list[dict[str, float]] = []

    # ---- the loop ------------------------------------------------------------------------------
    def run(self) -> FitResult:
        started = time.monotonic()
        self.resume()
        try:
            while not self.finished:
                begun = time.monotonic()
                self.train_epoch()
                self.end_epoch()
                self.note_time(time.monotonic() - begun)
        except KeyboardInterrupt:
            self.save()
            raise KeyboardInterrupt(
                f"stopped at epoch {self.epoch + 1}, update {self.updates}; saved in {self.folder}: "
                "run the same command again to continue"
            ) from None
        return FitResult(self.folder / "best.pt", self.history, time.monotonic() - started)

    def train_epoch(self) -> None:
        """The rest of the current epoch, from batch ``self.batch`` on."""
        self.wrapped.train()
        self.sampler.epoch, self.sampler.first_batch = self.epoch, self.batch
        description = f"epoch {self.epoch + 1}/{self.config.epochs}"
        batches = progress(self.train_loader, description, len(self.sampler), unit="batch")
        for batch in batches:
            self.step(batch)
            self.batch += 1
            if self.updates % self.config.checkpoint_every == 0:
                self.save()

    def step(self, batch: dict[str, Tensor]) -> None:
        """One update on one global batch, in micro-batches, over all processes.

        The loss of the update is the mean over the global batch, whatever the number of
        micro-batches and processes, because every image's loss is normalised by itself.
        """
        own, total = self.sampler.batch_sizes(self.batch)
        rate = learning_rate(self.config, self.updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        micro = self.config.micro_batch or len(batch["image"])
        pieces = range(0, len(batch["image"]), micro)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for start in pieces:
            last = start == pieces[-1]
            piece = {key: value[start : start + micro] for key, value in batch.items()}
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                per_image = self.losses(piece) * (own > 0)
                # DDP averages gradients over processes: undo that, then average over photos.
                loss = per_image.sum() * self.accelerator.num_processes / total
                if last:
                    loss = loss + self.objective.prior_penalty(self.model.prior)
                self.accelerator.backward(loss)
            loss_sum += per_image.detach().double().sum()
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        value = float(self.accelerator.reduce(loss_sum, "sum"))
        if not math.isfinite(value):
            raise TrainingDied(
                f"the loss became {value} at update {self.updates} (epoch {self.epoch + 1}). "
                + self.advice()
            )
        self.loss_sum += value
        self.loss_count += total
        self.updates += 1

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) training loss of each photo."""
        device = self.accelerator.device
        image = batch["image"].to(device, non_blocking=True)
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        prediction = self.forward(image)
        density = batch["density"].to(device, non_blocking=True)
        fixations = batch["fixations"].to(device, non_blocking=True)
        return self.objective.per_image(prediction.float(), density, fixations)

    @property
    def total_updates(self) -> int:
        return -(-self.sampler.n // self.config.batch_size) * self.config.epochs

    # ---- validation ----------------------------------------------------------------------------
    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Mean validation loss and quick scores on the network's own grid.

        Raises:
            TrainingDied: every predicted map is constant.
        """
        network = self.average.module if self.average is not None else self.wrapped
        network.eval()
        rows = []
        for number, batch in enumerate(self.val_loader):
            own, _ = self.validation_sampler.batch_sizes(number)
            if not own:
                continue
            batch = {key: value.to(self.accelerator.device) for key, value in batch.items()}
            with self.accelerator.autocast():
                maps = network(batch["image"])
            maps, density, fixations = maps.float(), batch["density"], batch["fixations"]
            spread = maps.amax((1, 2, 3)) - maps.amin((1, 2, 3))
            columns = (
                batch["index"],
                self.objective.per_image(maps, density, fixations),
                1 - cc_loss(maps, density, fixations),
                -nss_loss(maps, density, fixations),
                kl_loss(maps, density, fixations),
                spread > 1e-6 * maps.amax((1, 2, 3)),
            )
            rows += torch.stack([column.double() for column in columns], 1).tolist()
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        rows.sort()  # by photo, so that the mean does not depend on the number of processes
        if not any(row[-1] for row in rows):
            raise TrainingDied(
                f"after epoch {self.epoch + 1} the network predicts a constant map for every "
                f"validation photo: its output is dead. {self.advice()}"
            )
        columns = list(zip(*rows, strict=True))[1:-1]
        names = ("val_loss", "val_cc", "val_nss", "val_kl")
        return {
            name: math.fsum(column) / len(column)
            for name, column in zip(names, columns, strict=True)
        }

    def advice(self) -> str:
        """What helps when training dies."""
        if self.config.head == "paper":
            return (
                "The paper's head ends in ReLUs, which stay at zero once all their inputs are "
                f"negative. Try a smaller lr (now {self.config.lr:g}; the authors use SGD at 1e-3), "
                "optimizer='sgd', clip_norm=1, or head='density'."
            )
        return f"Try a smaller lr (now {self.config.lr:g}), clip_norm=1, or precision='fp32'."

    # ---- bookkeeping ---------------------------------------------------------------------------
    def end_epoch(self) -> None:
        """Validate, log, keep the best, decide whether to go on, checkpoint."""
        scores = self.validate()
        row = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "lr": learning_rate(self.config, self.updates - 1, self.total_updates),
            "train_loss": self.loss_sum / self.loss_count,
            **scores,
        }
        self.history.append(row)
        self.loss_sum, self.loss_count = 0.0, 0
        improved = scores["val_loss"] < self.best_loss
        self.best_loss = min(self.best_loss, scores["val_loss"])
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        self.epoch, self.batch = self.epoch + 1, 0
        self.finished = self.epoch >= self.config.epochs or (
            self.config.patience > 0 and self.bad_epochs >= self.config.patience
        )
        if improved and self.accelerator.is_main_process:
            source = self.average.module if self.average is not None else self.model
            checkpoints.save_checkpoint(
                self.folder / "best.pt", self.config, source.state_dict(), scores=row
            )
        self.save()
        if self.accelerator.is_main_process:
            write_text(self.run_dir / "log.csv", format_log(self.history))
            print(
                f"epoch {row['epoch']:>3}/{self.config.epochs}  lr {row['lr']:.1e}  "
                f"train {row['train_loss']:.4f}  val {row['val_loss']:.4f}  "
                f"CC {row['val_cc']:.3f}  NSS {row['val_nss']:.3f}  KL {row['val_kl']:.3f}"
                + ("  best" if improved else ""),
                flush=True,
            )

    def note_time(self, seconds: float) -> None:
        """Append an epoch's duration, apart from the log so that the log can be bit-identical."""
        if self.accelerator.is_main_process:
            with open(self.run_dir / "times.csv", "a", encoding="utf-8") as file:
                file.write(f"{self.epoch},{seconds:.2f},{len(self.history)}\n")

    def save(self) -> None:
        """Write a step checkpoint (main process only)."""
        if not self.accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "rng": rng_state(),
            "progress": {
                name: getattr(self, name)
                for name in (
                    "epoch", "batch", "updates", "loss_sum", "loss_count", "best_loss",
                    "bad_epochs", "finished", "history",
                )
            },
        }  # fmt: skip
        checkpoints.rotate_and_save(self.folder, self.config, self.model.state_dict(), **state)

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        content = checkpoints.load_latest(self.folder, self.config)
        if content is None:
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        if self.accelerator.scaler and content["scaler"]:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        for name, value in content["progress"].items():
            setattr(self, name, value)
        set_rng_state(content["rng"])
        if self.accelerator.is_main_process and not self.finished:
            print(f"resuming at epoch {self.epoch + 1}, batch {self.batch + 1}", flush=True)


def rng_state() -> dict[str, Any]:
    """State of torch's generators (nothing else is random in a step: augmentation is keyed)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore :func:`rng_state`; GPU states only where the number of GPUs is the same."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def format_log(history: list[dict[str, float]]) -> str:
    """The training log as CSV with full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def trainable(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    counts = [(p.numel() * p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)
