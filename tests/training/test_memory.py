"""Photos per forward pass from a GPU's memory: computed without a GPU, on faked sizes."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from torch.testing import assert_close

from mlnet_utils.config import PRESETS, load_config
from mlnet_utils.model import checkpoints
from mlnet_utils.model.network import MLNet
from mlnet_utils.training import memory
from mlnet_utils.training.trainer import fit

GB = 10**9
STILL = {"dropout": 0.0, "freeze_norm": True, "optimizer": "sgd", "lr": 0.02}


def vgg(**changes):
    """The paper's network on a small photo: its configuration, and itself in training mode."""
    small = {"height": 160, "width": 160, "prior_cells": (2, 2), "backbone_weights": "none"}
    config = load_config("paper", **{**small, **changes})
    return config, MLNet(config).train()


# ---- the computation ---------------------------------------------------------------------------
def test_bytes_count_while_they_live():
    with memory.LiveBytes() as live:
        first = torch.empty(10, 10, device="meta")
        assert (live.now, live.peak) == (400, 400)
        view = first[:5]
        view.add_(1)
        assert live.now == 400
        second = first + 1
        del first
        assert (live.now, live.peak) == (800, 800)  # the view keeps its storage
        del view
        assert (live.now, live.peak) == (400, 800)
        del second
    assert (live.now, live.peak) == (0, 800)


def test_a_real_update_needs_what_is_computed():
    """The same count while the network really runs, on the CPU."""
    config, model = vgg(height=80, width=80, prior_cells=(1, 1))
    image = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
    computed = memory.update_peak(model, config, 2, half=False)
    with memory.LiveBytes([*model.parameters(), *model.buffers(), image]) as live:
        model(image).sum().backward()
    assert computed == pytest.approx(live.peak, rel=0.05)


def test_what_saves_memory_is_seen_to_save_it():
    config, model = vgg()
    plain = memory.update_peak(model, config, 10, half=False)
    assert 0.4 * plain < memory.update_peak(model, config, 10, half=True) < 0.7 * plain
    changed, frugal = vgg(checkpointing=True)
    assert memory.update_peak(frugal, changed, 10, half=False) < 0.8 * plain
    changed, frozen = vgg(freeze=("backbone.*",))
    assert memory.update_peak(frozen, changed, 10, half=False) < 0.5 * plain


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_computing_leaves_the_network_alone(preset):
    small = {"height": 160, "width": 160, "prior_cells": (2, 2)}
    config = load_config(preset, backbone_weights="none", start_from="", **small)
    model = MLNet(config).train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert memory.update_peak(model, config, 2, half=True) > 0
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_bytes_between_updates():
    config, model = vgg()  # SGD with momentum: weights, gradients, momentum
    count = sum(p.numel() for p in model.parameters())
    assert memory.held_bytes(model, config, half=False) == 12 * count
    assert memory.held_bytes(model, config, half=True) == 14 * count
    averaged = load_config("salicon")  # Adam's two, and the average
    assert memory.held_bytes(model, averaged, half=False) == 20 * count


# ---- the rule ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share", "fitting", "expected"),
    [(10, 99, 10), (10, 10, 10), (10, 9, 5), (10, 5, 5), (10, 4, 4), (10, 3, 3), (10, 2, 2),
     (10, 1, 1), (10, 0, 1), (7, 6, 4), (1, 9, 1)],
)  # fmt: skip
def test_few_and_even_pieces(share, fitting, expected):
    """Where 9 of 10 photos fit, 5 + 5 need as many passes as 9 + 1, and less memory."""
    assert memory.fewest_pieces(share, lambda photos: 7 * photos, 7 * fitting) == expected


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the device has so many bytes."""

    def pretend(size: float) -> None:
        monkeypatch.setattr(memory, "gpu_bytes", lambda device: int(size))

    return pretend


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        (80 * GB, {}, 10),
        (15.6 * GB, {}, 10),  # Colab's T4
        (8 * GB, {}, 5),
        (4 * GB, {}, 4),
        (4 * GB, {"precision": "bf16"}, 5),
        (2 * GB, {}, 2),
        (2 * GB, {"checkpointing": True}, 3),
        (2 * GB, {"micro_batch": 0}, 10),
        (80 * GB, {"micro_batch": 3}, 3),
    ],
)
def test_the_papers_recipe_fits_small_gpus(gpu, capsys, size, changes, expected):
    gpu(size)
    config = load_config("paper", backbone_weights="none", **changes)
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(mixed_precision=precision)
    assert memory.choose_micro_batch(config, MLNet(config), accelerator) == expected
    chosen_below_10 = expected < 10 and "micro_batch" not in changes
    said = f"{expected} of the batch's 10 photos at once: GPU of {size / GB:.0f} GB\n"
    assert capsys.readouterr().out == (said if chosen_below_10 else "")


def test_batch_norm_that_learns_sees_the_whole_batch(gpu):
    gpu(1e6)
    config = load_config("sample", batch_size=16)
    assert memory.choose_micro_batch(config, MLNet(config), Accelerator()) == 16


def test_a_hopeless_gpu_is_warned_of(gpu):
    gpu(0.3 * GB)
    config, model = vgg(height=480, width=640, prior_cells=(6, 8))
    with pytest.warns(UserWarning, match=r"one photo needs 0.8 GB of GPU memory, and 0.2 of 0.3"):
        assert memory.choose_micro_batch(config, model, Accelerator()) == 1


def test_without_a_gpu_the_whole_batch_passes():
    assert memory.gpu_bytes(torch.device("cpu")) == 0
    config, model = vgg()
    assert memory.choose_micro_batch(config, model, Accelerator()) == 10


def test_a_small_gpu_learns_what_a_large_one_does(gpu, run_folder, capsys):
    weights = {}
    for size in (1e12, 10.3e6):
        gpu(size)
        config = tiny_config(**STILL)
        fit(config, run_folder)
        content = checkpoints.load_checkpoint(run_folder / "checkpoints" / "last.pt")
        weights[size] = content["model"]
        for path in (run_folder / "checkpoints").iterdir():
            path.unlink()
    assert "2 of the batch's 4 photos at once" in capsys.readouterr().out
    assert_close(weights[1e12], weights[10.3e6], rtol=1e-3, atol=2e-5)
    assert not torch.equal(weights[1e12]["encode.weight"], weights[10.3e6]["encode.weight"])
