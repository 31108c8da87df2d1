"""Training speed: images per second of this engine and of MLNet-Pytorch's own loop, in one run.

    python benchmarks/training.py                 # 240x320, batch 16, as MLNet-Pytorch
    python benchmarks/training.py --smoke         # seconds, to see that it works

All weights are random: they do not change the speed. Photos are in memory: loading has a
benchmark of its own. The forward pass is compared with that of the bare VGG-16 trunk.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from mlnet_utils.config import Config, load_config
from mlnet_utils.model.network import MLNet
from mlnet_utils.runtime import set_determinism
from mlnet_utils.training.features import cache_features
from mlnet_utils.training.trainer import choose_precision

# What MLNet-Pytorch freezes: the first 23 entries of its model.parameters(), which are its prior
# and the first eleven convolutions. The prior is left trainable here, in both.
FROZEN = tuple(f"backbone.features.{i}.*" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class MLNetPytorch(nn.Module):
    """MLNet-Pytorch's network, written from a description of its notebook."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.features = make_layers(cfgs["D"])[:-1]
        self.features[23] = nn.MaxPool2d(5, stride=1, padding=2)
        self.dropout = nn.Dropout2d(0.5)
        self.int_conv = nn.Conv2d(1280, 64, 3, padding=1)
        self.pre_final_conv = nn.Conv2d(64, 1, 1)
        self.prior = nn.Parameter(torch.ones(1, 1, height // 80, width // 80))
        self.upsample = nn.UpsamplingBilinear2d(scale_factor=10)
        for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24):
            self.features[i].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (16, 23, 29):
                levels.append(x)
        x = self.dropout(torch.cat(levels, 1))
        x = self.pre_final_conv(self.int_conv(x))
        return F.relu(x * self.upsample(self.prior))


def its_update(height: int, width: int, batch: int) -> Callable[[], None]:
    """One update of MLNet-Pytorch's loop: fp32, Adam, batch after batch."""
    model = MLNetPytorch(height, width).to(DEVICE).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-4)
    image = torch.rand(batch, 3, height, width, device=DEVICE)
    truth = torch.rand(batch, 1, height // 8, width // 8, device=DEVICE)

    def update() -> None:
        optimizer.zero_grad()
        output = model(image)
        peak = output.amax((1, 2, 3), keepdim=True)
        loss = ((output / peak - truth) ** 2 / (1 - truth + 0.1)).mean()
        loss = loss + ((1 - model.prior) ** 2).sum() / (model.prior.shape[0] * model.prior.shape[1])
        loss.backward()
        optimizer.step()
        loss.item()

    return update


def our_config(size: tuple[int, int], batch: int, **changes) -> Config:
    """The paper's network at the benchmark's size, in the engine's own precision."""
    return load_config(
        "paper",
        height=size[0],
        width=size[1],
        prior_cells=(size[0] // 80, size[1] // 80),
        batch_size=batch,
        backbone_weights="none",
        **{"precision": "auto", "workers": 0, **changes},
    )


def switched(update: Callable[[], None], deterministic: bool) -> Callable[[], None]:
    """The update with the determinism that its training asked for: the switch is the process's."""

    def call() -> None:
        set_determinism(deterministic)
        update()
        set_determinism(False)

    return call


def training(size: tuple[int, int], batch: int, rounds: int, clock: str) -> list[dict]:
    """Images per second of every variant."""
    ours = {
        "this engine": {"freeze": FROZEN},
        "this engine, fp32": {"freeze": FROZEN, "precision": "fp32"},
        "this engine, fp32, NCHW": {
            "freeze": FROZEN,
            "precision": "fp32",
            "channels_last": False,
        },
        "this engine, fp32, deterministic": {
            "freeze": FROZEN,
            "precision": "fp32",
            "deterministic": True,
        },
        "this engine, nothing frozen": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        updates = {"MLNet-Pytorch's loop": its_update(*size, batch)}
        for number, (name, changes) in enumerate(ours.items()):
            config = our_config(size, batch, **changes)
            trainer = measure.make_trainer(config, Path(folder) / str(number))
            updates[name] = switched(measure.one_update(trainer), config.deterministic)
        times = measure.seconds(updates, rounds, clock)
    speeds = {name: batch / measure.median(values) for name, values in times.items()}
    reference = speeds["MLNet-Pytorch's loop"]
    return [
        {
            "training": name,
            "images/s": speed,
            "ratio": speed / reference,
            "seconds per update": [round(value, 4) for value in times[name]],
        }
        for name, speed in speeds.items()
    ]


def forward(size: tuple[int, int], batch: int, rounds: int, clock: str) -> list[dict]:
    """Images per second of the whole network and of its trunk alone, as for prediction."""
    config = our_config(size, batch)
    model = MLNet(config).to(DEVICE, memory_format=torch.channels_last).eval()
    image = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=DEVICE)
    image = image.contiguous(memory_format=torch.channels_last)
    floats = image.float().contiguous(memory_format=torch.channels_last)
    precision = choose_precision(config)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)

    def run(network: nn.Module, x: Tensor) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), torch.autocast(DEVICE, kind, enabled=precision != "no"):
                network(x)

        return call

    calls = {"VGG-16 trunk": run(model.backbone, floats), "ML-Net": run(model, image)}
    times = measure.seconds(calls, rounds, clock)
    speeds = {name: batch / measure.median(values) for name, values in times.items()}
    return [
        {
            "forward": name,
            "images/s": speed,
            "time / trunk's": speeds["VGG-16 trunk"] / speed,
        }
        for name, speed in speeds.items()
    ]


def head_only(size: tuple[int, int], batch: int, rounds: int, clock: str) -> list[dict]:
    """Images per second of training on a frozen backbone, with its features computed or cached.

    Loading is part of it, since reading the features from disk is what the cache costs.
    """
    frozen = {"freeze": ("backbone.*",)}
    kinds = {"head only": frozen, "head only, cached": {**frozen, "cache_features": True}}
    updates = {}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MLNET_RUNS=folder):
        for number, (name, changes) in enumerate(kinds.items()):
            config = our_config(size, batch, **changes)
            trainer = measure.make_trainer(config, Path(folder) / str(number))
            if config.cache_features:
                cache_features(trainer.model, config, trainer.accelerator, trainer.data.values())
            updates[name] = lambda t=trainer: measure.one_update(t)()
        times = measure.seconds(updates, rounds, clock)
    speeds = {name: batch / measure.median(values) for name, values in times.items()}
    return [
        {"training": name, "images/s": speed, "ratio": speed / speeds["head only"]}
        for name, speed in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock", choices=measure.CLOCKS, default="wall",
        help="cpu: CPU time of the process, on a machine that does other things",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="small and short, nothing saved")
    parser.add_argument("--out", type=Path, help="default: results/benchmarks/training.json")
    options = parser.parse_args()
    if options.smoke:
        options.size, options.batch, options.rounds = (80, 80), 2, 1
    size, batch, rounds = tuple(options.size), options.batch, options.rounds
    content = {"size": size, "batch": batch, "device": DEVICE, "clock": options.clock}
    content["training"] = training(size, batch, rounds, options.clock)
    content["forward"] = forward(size, batch, rounds, options.clock)
    content["head_only"] = head_only(size, batch, rounds, options.clock)
    for part in ("training", "forward", "head_only"):
        print()
        measure.print_table(
            [{k: v for k, v in row.items() if "seconds" not in k} for row in content[part]]
        )
    if not options.smoke:
        measure.save("training", content, options.out)


if __name__ == "__main__":
    main()
