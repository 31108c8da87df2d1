"""Learning-rate schedules, the optimiser over a model's parts, and the numeric precision."""

import math

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mlnet_utils.config import Config
from mlnet_utils.model.network import MLNet


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
    """The optimiser over the trainable parameters, the backbone with its own learning rate.

    Every group carries ``lr_scale``, by which the schedule's rate is multiplied.

    Raises:
        ValueError: everything is frozen.
    """
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    parameters = [
        {"params": group, "lr_scale": config.backbone_lr_scale if backbone else 1.0}
        for backbone, group in groups.items()
        if group
    ]
    if not parameters:
        raise ValueError(f"config: freeze={config.freeze} leaves no parameter to train")
    # One kernel updates all parameters, on a CPU too.
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=nesterov, **shared)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, **shared)


def choose_precision(config: Config) -> str:
    """Accelerate's name of the precision: ``"bf16"`` where the hardware computes in it.

    ``auto`` is bf16 on GPUs that have it and fp16 (with loss scaling) on older ones; on CPUs
    bf16 only with native instructions (AVX512-BF16 or AMX; measured: twice as fast as fp32 for
    VGG-16), because emulated it is slower than fp32; fp32 on Apple GPUs.
    """
    if config.precision != "auto":
        return {"fp32": "no"}.get(config.precision, config.precision)
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if torch.backends.mps.is_available():
        return "no"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "no"


def make_accelerator(config: Config) -> Accelerator:
    """accelerate's view of the device, the processes and the precision.

    Its state is one per process and refuses another precision; a notebook that trains twice
    needs a new one. The processes' connections are kept.
    """
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=choose_precision(config))
