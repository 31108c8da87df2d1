"""Training on Hugging Face accelerate: one loop for a notebook, a cluster job, and a resume."""

import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, find_executable_batch_size, gather_object, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, default_collate

from mlnet_utils.config import Config
from mlnet_utils.data.loading import EpochSampler, SaliencyDataset, make_loader
from mlnet_utils.data.photos import Prepared
from mlnet_utils.data.preparation import check_points
from mlnet_utils.model import checkpoints
from mlnet_utils.model.losses import Objective, cc_loss, kl_loss, nss_loss
from mlnet_utils.model.network import Adaptation, MLNet, network_input
from mlnet_utils.runtime import (
    StopSignals,
    keep_freed_memory,
    keyed_seed,
    locked,
    native_precision,
    on_drive,
    pick_device,
    progress,
    remove_temporaries,
    set_determinism,
    write_text,
)
from mlnet_utils.training.features import cache_features

LOG_FIELDS = ("epoch", "updates", "lr", "train_loss", "val_loss", "val_cc", "val_nss", "val_kl")
TIME_FIELDS = ("epoch", "updates", "train_seconds", "validation_seconds", "images_per_second")
LINE = (
    "epoch {epoch:>3}/{epochs}  lr {lr:.1e}  train {train_loss:.4f}  val {val_loss:.4f}  "
    "CC {val_cc:.3f}  NSS {val_nss:.3f}  KL {val_kl:.3f}{best}"
)
UPDATES_BETWEEN_READS = 20  # reading the loss makes the CPU wait for the GPU
SECONDS_ON_DRIVE = 300  # between checkpoints on Google Drive, which uploads each of them
VALIDATION_BATCH = 16
# The part of a checkpoint that belongs to the loop itself, beside weights and optimiser.
PROGRESS = ("epoch", "batch", "updates", "loss_sum", "loss_count", "best_loss", "bad_epochs",
            "finished", "history", "times", "micro_batch")  # fmt: skip


class TrainingDied(RuntimeError):
    """The network's output became constant, or the loss infinite: going on cannot help."""


@dataclass
class FitResult:
    """The best checkpoint, one row of scores per epoch, and the seconds that this call took."""

    best: Path
    history: list[dict[str, float]]
    seconds: float


def fit(config: Config, run_dir: str | Path, accelerator: Accelerator | None = None) -> FitResult:
    """Train, or continue the training, of the run in ``run_dir``; None makes a new accelerator.

    Reads ``data/`` (notebook 01); writes ``log.csv``, ``times.csv`` and ``checkpoints/``
    (``best.pt`` for use, ``last.pt`` and ``previous.pt`` to resume from). Calling it again after
    an interruption continues at the last checkpoint; on a CPU the result is the same to the bit.
    Ctrl-C and SIGTERM save first. A finished run returns at once. While another process trains in
    ``run_dir``, this call waits.

    Raises:
        FileNotFoundError: the prepared data, or the checkpoint to start from, are missing.
        TrainingDied: the output died or the loss is not finite; the message has remedies.
        ValueError: the checkpoints belong to another configuration or cannot be read.
        OSError: a checkpoint cannot be written; the earlier file stays.
        RuntimeError: not even one photo fits into the GPU's memory, or another process died.
        KeyboardInterrupt: stopped by a signal; the same command continues.
    """
    accelerator = accelerator or make_accelerator(config)
    with locked(Path(run_dir) / "checkpoints"):
        accelerator.wait_for_everyone()
        return Trainer(config, Path(run_dir), accelerator).run()


class Trainer:
    """The state of one training: everything that a step changes and a checkpoint holds."""

    def __init__(self, config: Config, run_dir: Path, accelerator: Accelerator):
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self.config = config = checkpoints.with_start(config, self.folder)
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.world = rank, world = accelerator.process_index, accelerator.num_processes
        set_determinism(config.deterministic)
        if self.device.type == "cpu":
            keep_freed_memory()

        # Batches depend on the seed and the epoch, not on the number of processes: of a training
        # batch each process takes its share, of the validation batches every world-th.
        prepared = Prepared.read(run_dir / "data")
        self.data_digest = prepared.digest
        check_points(config, prepared.photos)
        train = SaliencyDataset(prepared, "train", config, augment=True)
        val = SaliencyDataset(prepared, "val", config)
        self.data = {"train": train, "val": val}
        self.sampler = EpochSampler(len(train), config.batch_size, config.seed, rank, world)
        self.train_loader = make_loader(train, self.sampler, config.workers)
        batches = list(BatchSampler([(0, i) for i in range(len(val))], VALIDATION_BATCH, False))
        self.val_loader = make_loader(val, batches[rank::world], config.workers)

        set_seed(config.seed)
        with accelerator.local_main_process_first():  # one process downloads, the rest read
            self.model = MLNet(config)
        self.objective = Objective(config)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.model.to(self.device)
        optimizer = make_optimizer(config, self.model)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        self.average, self.judged = None, self.model  # the judged network is validated and kept
        if config.ema_decay:
            self.average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
            self.judged = self.average.module
        scaler = accelerator.scaler  # None, unless the precision is fp16
        self.stateful = {"optimizer": self.optimizer, "average": self.average, "scaler": scaler}

        self.total_updates = len(self.sampler) * config.epochs
        self.share = -(-config.batch_size // world)  # this process's photos of a batch
        self.micro_batch = max(config.micro_batch, 0)  # photos per forward pass; 0 = the share
        self.epoch = self.batch = self.updates = 0
        self.loss_sum, self.loss_count = 0.0, 0
        self.best_loss, self.bad_epochs, self.finished = math.inf, 0, False
        self.history: list[dict[str, float]] = []
        self.times: list[dict[str, float]] = []  # apart: the log is the same to the bit
        self.saved = -math.inf  # when this process wrote its last step checkpoint
        self.unread: list[Tensor] = []  # (loss, stop) of updates that were not read yet
        self.signals = StopSignals()

    # ---- the loop ------------------------------------------------------------------------------
    def run(self) -> FitResult:
        """Resume, and train epoch after epoch until finished or told to stop."""
        started = time.monotonic()
        self.resume()
        if not self.finished:  # now that the weights are loaded
            if self.config.cache_features:
                cache_features(self.model, self.config, self.accelerator, self.data.values())
            self.fit_into_memory()  # after it: features need less than photos
        with self.signals:
            while not self.finished:
                begun, updates = time.monotonic(), self.updates
                self.train_epoch()
                trained = time.monotonic()
                scores = self.validate()
                self.note_time(trained - begun, time.monotonic() - trained, self.updates - updates)
                self.end_epoch(scores)
        return FitResult(self.folder / "best.pt", self.history, time.monotonic() - started)

    def train_epoch(self) -> None:
        """Train the rest of the current epoch, from batch ``self.batch`` on."""
        if self.config.optimizer == "lbfgs":
            self.adapt()
            return
        self.wrapped.train()
        self.sampler.epoch, self.sampler.first_batch = self.epoch, self.batch
        batches = self.train_loader
        if self.accelerator.is_main_process:
            name = f"epoch {self.epoch + 1}/{self.config.epochs}"
            batches = progress(batches, name, len(self.sampler), unit="batch")
        for batch in batches:
            self.step(batch)
            due = self.updates % self.config.checkpoint_every == 0
            if due or self.device.type == "cpu" or self.updates % UPDATES_BETWEEN_READS == 0:
                self.read_losses()
            if due:
                self.save_unless_recent()
        self.read_losses()

    def step(self, batch: dict[str, Tensor]) -> None:
        """Make one update on one global batch, in micro-batches, over all processes.

        The loss of the update is the mean over the global batch, whatever the number of
        micro-batches and processes, because every image's loss is normalised by itself.
        """
        own, total = self.sampler.batch_sizes(self.batch)
        rate = learning_rate(self.config, self.updates, self.total_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        micro = self.micro_batch or self.share
        starts = range(0, len(batch["index"]), micro)
        loss_sum = torch.zeros((), device=self.device)
        for start in starts:
            # Dropout is drawn anew from this key: a resumed run draws the same.
            torch.manual_seed(keyed_seed(self.config.seed, self.updates, self.rank, start))
            last = start == starts[-1]
            piece = {key: value[start : start + micro] for key, value in batch.items()}
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                per_image = self.losses(piece) * (own > 0)
                # DDP averages gradients over processes: undo that, then average over photos.
                loss = per_image.sum() * self.world / total
                if last:
                    loss = loss + self.objective.prior_penalty(self.model.prior)
                self.accelerator.backward(loss)
            loss_sum += per_image.detach().sum()
        if self.config.clip_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        # Processes must stop at the same update, though the signal may reach only one.
        stop = torch.full_like(loss_sum, bool(self.signals.received))
        self.unread.append(self.accelerator.reduce(torch.stack([loss_sum, stop]), "sum"))
        self.loss_count += total
        self.updates += 1
        self.batch += 1

    def losses(self, batch: dict[str, Tensor], network: nn.Module | None = None) -> Tensor:
        """(B,) training loss of each photo; by default of the network that processes share."""
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        seen = network_input(batch)
        if self.config.channels_last:
            seen = {k: v.contiguous(memory_format=torch.channels_last) for k, v in seen.items()}
        prediction = (network or self.forward)(**seen).float()
        return self.objective.per_image(prediction, batch["density"], batch["fixations"])

    @torch.no_grad()
    def adapt(self) -> None:
        """Fit the adaptation to all training photos at once; every process does the same.

        All else is frozen, so that every photo passes through the network once. The log's epoch 0
        is the network as it was.
        """
        if self.batch:  # stopped in the validation that follows
            return
        model, data, scores = self.model.eval(), self.data["train"], self.validate()
        batches = BatchSampler([(0, i) for i in range(len(data))], VALIDATION_BATCH, False)
        loader, found = make_loader(data, list(batches), self.config.workers), []
        for batch in progress(loader, f"predicting {len(data)} photos", unit="batch"):
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with self.accelerator.autocast():
                raw = model.raw_map(**network_input(batch))
            found.append((model.apply_prior(raw), batch["density"], batch["fixations"]))
        maps, *truth = (torch.cat(parts) for parts in zip(*found, strict=True))
        optimizer = self.optimizer.optimizer  # without accelerate's cover
        before, after = fit_adaptation(model.adaptation, optimizer, self.objective, maps, truth)
        if self.average is not None:
            self.average.update_parameters(model)
        row = {"epoch": 0, "updates": 0, "lr": self.config.lr, "train_loss": before, **scores}
        if not self.history:
            self.history.append(row)
        self.loss_sum, self.loss_count = after * len(data), len(data)
        self.updates = self.batch = 1

    def read_losses(self) -> None:
        """Add losses since the last call; TrainingDied: not finite; KeyboardInterrupt: signal."""
        if not self.unread:
            return
        rows = torch.stack(self.unread).tolist()  # waits for the device
        self.unread.clear()
        self.loss_sum = sum((row[0] for row in rows), self.loss_sum)
        if not math.isfinite(self.loss_sum):
            where = f"update {self.updates} (epoch {self.epoch + 1})"
            raise TrainingDied(f"the loss became {self.loss_sum} by {where}. {advice(self.config)}")
        if any(row[1] for row in rows):
            self.stop()

    def stop(self) -> None:
        """Save and raise KeyboardInterrupt, in all processes."""
        self.save()
        self.accelerator.wait_for_everyone()
        where = f"stopped at epoch {self.epoch + 1}, update {self.updates}; saved in {self.folder}"
        raise KeyboardInterrupt(f"{where}: run the same command again to continue")

    def fit_into_memory(self) -> None:
        """With ``micro_batch=-1``, halve the photos per forward pass until they fit into a GPU.

        It begins with this process's share of a batch, after a resume with the checkpoint's size.
        All processes take the smallest size found. Where batch-norm normalises by the photos that
        pass together, pieces would change the result: the share stays. Raises a RuntimeError where
        a single photo does not fit.
        """
        norms = [m for m in self.model.train().modules() if isinstance(m, nn.BatchNorm2d)]
        chosen = self.config.micro_batch >= 0 or any(norm.training for norm in norms)
        if chosen or not has_own_memory(self.device):
            return
        size = min(self.micro_batch or self.share, self.share)
        # The optimiser's numbers, which its first step makes, and the gradients' copies of DDP.
        copies = 1 if self.optimizer.state else 3
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        reserve = [torch.empty_like(parameter) for parameter in trained for _ in range(copies)]

        def halve() -> int:
            nonlocal size
            size //= 2
            return size

        def update(photos: int) -> None:
            self.optimizer.zero_grad(set_to_none=True)
            batch = default_collate([self.data["train"][0]] * photos)
            self.losses(batch, self.model).sum().backward()

        # As a decorator, accelerate before 1.15 forgets reduce_batch_size_fn.
        find = {"starting_batch_size": size, "reduce_batch_size_fn": halve}
        try:
            find_executable_batch_size(update, **find)()
        except RuntimeError:
            if size:
                raise
        self.optimizer.zero_grad(set_to_none=True)
        del reserve
        size = min(gather_object([size]))
        if not size:
            advice = "set checkpointing=true, precision='auto' or a smaller height and width"
            raise RuntimeError(f"one photo needs more memory than the GPU has: {advice}")
        if size < self.share:
            self.micro_batch = size
            self.accelerator.print(f"{size} of {self.share} photos at once fit into the GPU")

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Mean loss and quick scores of the judged network on its grid, over the validation photos.

        Raises TrainingDied: every map is constant, or the loss is not finite. KeyboardInterrupt: a
        signal, in a single process.
        """
        network, config = self.judged.eval(), self.config
        if self.world > 1:  # batch-norm statistics of the first process count
            broadcast(list(network.buffers()))
        rows = []
        for batch in self.val_loader:
            if self.signals.received and self.world == 1:
                self.stop()
            torch.manual_seed(keyed_seed(config.seed, self.epoch, int(batch["index"][0])))
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with self.accelerator.autocast():
                maps = network(**network_input(batch)).float()
            truth = batch["density"], batch["fixations"]
            watched = batch["fixations"].sum((1, 2, 3)) > 0
            lowest, highest = maps.amin((1, 2, 3)), maps.amax((1, 2, 3))
            columns = (
                batch["index"],
                self.objective.per_image(maps, *truth),
                1 - cc_loss(maps, *truth),
                -nss_loss(maps, *truth).where(watched, math.nan),
                kl_loss(maps, *truth),
                highest - lowest > 1e-6 * highest,
            )
            rows += torch.stack([column.float() for column in columns], 1).tolist()
        rows = gather_object(rows)
        rows.sort()  # by photo, so that the mean does not depend on the number of processes
        _, loss, cc, nss, kl, alive = zip(*rows, strict=True)
        if not any(alive):
            raise TrainingDied(f"every map of epoch {self.epoch + 1} is constant. {advice(config)}")
        nss = [value for value in nss if not math.isnan(value)]  # of photos with fixations
        columns = {"val_loss": loss, "val_cc": cc, "val_nss": nss or [math.nan], "val_kl": kl}
        scores = {name: math.fsum(column) / len(column) for name, column in columns.items()}
        if not math.isfinite(scores["val_loss"]):
            raise TrainingDied(f"the validation loss is {scores['val_loss']}. {advice(config)}")
        return scores

    # ---- bookkeeping ---------------------------------------------------------------------------
    def end_epoch(self, scores: dict[str, float]) -> None:
        """Log, keep the best, decide whether to go on; the checkpoint comes last.

        A run that is killed in here validates again when resumed, and writes the same files.
        """
        config = self.config
        row = {
            "epoch": self.epoch + 1,
            "updates": self.updates,
            "lr": learning_rate(config, self.updates - 1, self.total_updates),
            "train_loss": self.loss_sum / self.loss_count,
            **scores,
        }
        self.history.append(row)
        self.loss_sum, self.loss_count = 0.0, 0
        improved = scores["val_loss"] < self.best_loss
        self.best_loss = min(self.best_loss, scores["val_loss"])
        self.bad_epochs = 0 if improved else self.bad_epochs + 1
        self.epoch, self.batch = self.epoch + 1, 0
        self.finished = self.epoch >= config.epochs or 0 < config.patience <= self.bad_epochs
        if self.accelerator.is_main_process:
            self.write_tables()
            if improved:
                best, state = self.folder / "best.pt", self.judged.state_dict()
                sha256 = self.model.backbone.sha256
                about = {"backbone_sha256": sha256, "data": self.data_digest}
                checkpoints.save_checkpoint(best, config, state, scores=row, **about)
            print(LINE.format(epochs=config.epochs, best="  best" * improved, **row), flush=True)
        self.save_unless_recent()

    def note_time(self, trained: float, validated: float, updates: int) -> None:
        """Add a row of ``times.csv``; of an interrupted epoch, for the part after the resume."""
        # The last batch of an epoch may be shorter.
        photos = min(updates * self.config.batch_size, len(self.data["train"]))
        speed = photos / max(trained, 1e-9)
        seconds = (round(value, 2) for value in (trained, validated, speed))
        self.times.append(dict(zip(TIME_FIELDS, (self.epoch + 1, updates, *seconds), strict=True)))

    def write_tables(self) -> None:
        """Write the rows there are: ``log.csv``, and ``times.csv``, which early versions lack."""
        tables = {"log.csv": (LOG_FIELDS, self.history), "times.csv": (TIME_FIELDS, self.times)}
        for name, (fields, rows) in tables.items():
            if rows:
                write_text(self.run_dir / name, format_rows(fields, rows))

    def save_unless_recent(self) -> None:
        """Write a step checkpoint; on Google Drive only if the last is minutes old."""
        recent = time.monotonic() - self.saved < SECONDS_ON_DRIVE
        if self.finished or not (recent and on_drive(self.run_dir)):
            self.save()

    def save(self) -> None:
        """Write a step checkpoint (main process only)."""
        self.saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        checkpoints.rotate_and_save(
            self.folder,
            self.config,
            self.model.state_dict(),
            data=self.data_digest,
            backbone_sha256=self.model.backbone.sha256,
            precision=self.accelerator.mixed_precision,
            progress={name: getattr(self, name) for name in PROGRESS},
            **{name: part.state_dict() if part else {} for name, part in self.stateful.items()},
        )

    def resume(self) -> None:
        """Continue from the newest checkpoint, if any.

        A ValueError where the checkpoint is of another run, its best epoch was deleted, or the
        processes found different checkpoints.
        """
        content = checkpoints.load_latest(self.folder, self.config, self.data_digest)
        if content is not None:
            self.restore(content)
        else:
            checkpoints.load_start(self.model, self.config)
        if len(set(gather_object([self.updates]))) > 1:
            found = f"the processes found different checkpoints in {self.folder}"
            raise ValueError(f"{found}: use a run folder on storage that all machines share")
        if not self.accelerator.is_main_process:
            return
        tables = (self.run_dir / "log.csv", self.run_dir / "times.csv")
        remove_temporaries((self.folder / "next.pt", self.folder / "best.pt", *tables))
        if content is None:
            return
        self.write_tables()
        where = f"resuming at epoch {self.epoch + 1}, batch {self.batch + 1}"
        print("this training has finished before" if self.finished else where, flush=True)

    def restore(self, content: dict[str, Any]) -> None:
        """Restore all that a step changes; a ValueError where ``best.pt`` is lost or damaged."""
        for name, value in content["progress"].items():
            setattr(self, name, value)
        best = self.folder / "best.pt"
        if self.epoch and not best.is_file():
            missing = f"{best} is missing, but its training is at epoch {self.epoch + 1}"
            raise ValueError(f"{missing}: put it back, or delete the folder to train anew")
        if self.epoch:
            checkpoints.load_checkpoint(best)  # or an error, where it is damaged
        before, now = content["precision"], self.accelerator.mixed_precision
        if before != now:
            other = "the result differs from a training on one machine"
            warnings.warn(f"trained in {before!r} so far, now in {now!r}: {other}", stacklevel=2)
        self.model.load_state_dict(content["model"])
        self.model.backbone.sha256 = content.get("backbone_sha256", "")
        for name, part in self.stateful.items():
            if part and content[name]:
                part.load_state_dict(content[name])


# ---- schedule, optimiser, precision ------------------------------------------------------------
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
    """The optimiser over what trains; its groups' ``lr_scale`` multiplies the schedule's rate.

    A ValueError where everything is frozen, or L-BFGS has more to train than an adaptation.
    """
    if config.optimizer == "lbfgs":
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained or not all(name.startswith("adaptation.") for name in trained):
            wanted = "set adapt to true and freeze to ['[!a]*'], as preset `adapt` does"
            raise ValueError(f"config: optimizer='lbfgs' is for an adaptation alone: {wanted}")
        search = {"line_search_fn": "strong_wolfe", "max_iter": 200}
        return torch.optim.LBFGS(trained.values(), lr=config.lr, **search)
    backbone, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.") else others).append(parameter)
    scaled = ((backbone, config.backbone_lr_scale), (others, 1.0))
    parameters = [{"params": group, "lr_scale": scale} for group, scale in scaled if group]
    if not parameters:
        raise ValueError(f"config: freeze={config.freeze} leaves no parameter to train")
    # One kernel updates all parameters, on a CPU too.
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        shared |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[config.optimizer](parameters, **shared)


def fit_adaptation(
    adaptation: Adaptation,
    optimizer: torch.optim.LBFGS,
    objective: Objective,
    maps: Tensor,
    truth: Sequence[Tensor],
) -> tuple[float, float]:
    """Fit an adaptation to densities of a network, all (B, 1, h, w).

    ``truth`` are the density and the fixation counts. Returns the mean losses before and after.
    """

    def loss() -> Tensor:
        return objective.per_image(adaptation(maps), *truth).mean()

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss() + objective.prior_penalty(adaptation.bias)
        total.backward()
        return total

    with torch.no_grad():
        before = loss().item()
        adaptation.blur.fill_(0.0)  # one cell: at 0.1 it has no gradient
        optimizer.step(closure)
        return before, loss().item()


def choose_precision(config: Config) -> str:
    """Accelerate's name of the precision; ``auto`` is :func:`runtime.native_precision`'s."""
    if config.precision != "auto":
        return {"fp32": "no"}.get(config.precision, config.precision)
    return native_precision(pick_device())


def make_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the device, the processes and the precision.

    Its state, which refuses another precision, is renewed; connections of processes are kept.
    """
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=choose_precision(config))


def has_own_memory(device: torch.device) -> bool:
    """True for a GPU: running out of its memory is an error, and not the end of the process."""
    return device.type != "cpu"


def advice(config: Config) -> str:
    """The remedy for a training that died, by the head."""
    if config.head == "paper":
        remedy = "set centre=true, standardise=true, head='density' or loss='mlnet-printed'"
        return f"The paper's head ends in ReLUs, which can stay at zero: {remedy}, or a smaller lr."
    return f"Try a smaller lr (now {config.lr:g}), clip_norm=1, or precision='fp32'."


def format_rows(fields: Sequence[str], rows: list[dict[str, float]]) -> str:
    """A table as CSV with full precision."""
    lines = [fields, *([row[name] for name in fields] for row in rows)]
    return "".join(",".join(map(str, line)) + "\n" for line in lines)
