"""How many photos go through the network at once: chosen from the GPU's memory, before training.

The peak of an update is not guessed from a table but computed: forward and backward pass run on
the meta device, where tensors have shapes and no data, and every storage is counted while it
lives. That holds for any backbone, input size and checkpointing, and costs under a second.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlnet_utils.config import Config

# Of the GPU's memory. The rest is for what is not computed: the CUDA context, the convolutions'
# workspaces, gaps between blocks.
USABLE = 0.7
STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # numbers that the optimiser keeps per parameter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it, as long as they live; ``peak`` is the most.

    Args:
        known: tensors that are there already, and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.known = list(known)
        self.seen = {tensor.untyped_storage()._cdata for tensor in self.known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:  # a view, or written in place
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self.now -= size
            self.seen.remove(key)

        self.seen.add(key)
        weakref.finalize(storage, forget)


class Update(nn.Module):
    """Both passes as one call: checkpointing runs parts of the forward pass in the backward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> None:
        self.model(image).sum().backward()


def update_peak(model: nn.Module, config: Config, photos: int, half: bool) -> int:
    """Bytes at the peak of one update on ``photos`` photos: activations and gradients.

    Args:
        model: in training mode; only its structure is used, and nothing of it is changed.
        config: the input size.
        photos: of one forward and backward pass.
        half: whether activations have 16 bits.
    """

    def hollow(tensor: torch.Tensor) -> torch.Tensor:
        kind = torch.bfloat16 if half and tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device="meta", dtype=kind).requires_grad_(
            tensor.requires_grad
        )

    update = Update(model)
    state = {**dict(update.named_parameters()), **dict(update.named_buffers())}
    state = {name: hollow(tensor) for name, tensor in state.items()}
    image = torch.empty(photos, 3, config.height, config.width, dtype=torch.uint8, device="meta")
    with LiveBytes([*state.values(), image]) as live:
        torch.func.functional_call(update, state, image)
    return live.peak


def held_bytes(model: nn.Module, config: Config, half: bool) -> int:
    """Bytes that stay between updates: weights, their average and 16-bit copies, the optimiser."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    copies = 4 + 4 * (config.ema_decay > 0) + 2 * half
    return copies * everything + 4 * (1 + STATES[config.optimizer]) * trained


def fewest_pieces(share: int, needed: Callable[[int], int], usable: int) -> int:
    """Photos per forward pass: the share in as few and as even pieces as fit.

    Args:
        share: photos of a batch that this process has.
        needed: bytes that training on so many photos at once needs.
        usable: bytes of the device that may be used.

    Returns:
        At least 1, whether or not that fits.
    """
    sizes = (-(-share // pieces) for pieces in range(1, share + 1))
    return next((size for size in sizes if needed(size) <= usable), 1)


def gpu_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, all of it: what is free at the moment would differ at a resume."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def choose_micro_batch(config: Config, model: nn.Module, accelerator: Accelerator) -> int:
    """Photos per forward pass: the configured number, or with -1 what the GPU's memory allows.

    This process's whole share of a batch without a GPU, and where batch-norm normalises by the
    photos that pass together: there pieces would change what is learned.

    Args:
        config: of the training.
        model: as it will be trained; is put into training mode.
        accelerator: its device, precision and number of processes count.

    Warns:
        UserWarning: not even one photo fits by this computation.
    """
    share = -(-config.batch_size // accelerator.num_processes)
    if config.micro_batch >= 0:
        return config.micro_batch or share
    memory = gpu_bytes(accelerator.device)
    norm = nn.modules.batchnorm._BatchNorm
    if not memory or any(isinstance(m, norm) and m.training for m in model.train().modules()):
        return share
    half = accelerator.mixed_precision in ("bf16", "fp16")
    held, usable = held_bytes(model, config, half), int(USABLE * memory)

    def needed(photos: int) -> int:
        return held + update_peak(model, config, photos, half)

    chosen = fewest_pieces(share, needed, usable)
    if chosen == 1 and needed(1) > usable:
        warnings.warn(
            f"training on one photo needs {needed(1) / 1e9:.1f} GB of GPU memory, and "
            f"{usable / 1e9:.1f} of {memory / 1e9:.1f} GB may be used: it will probably fail; try "
            "checkpointing=true, precision='auto' or a smaller height and width",
            stacklevel=2,
        )
    if chosen < share and accelerator.is_main_process:
        print(f"{chosen} of the batch's {share} photos at once: GPU of {memory / 1e9:.0f} GB")
    return chosen
