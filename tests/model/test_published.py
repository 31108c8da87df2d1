"""Networks published as safetensors: what is kept, and what is refused."""

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from safetensors.torch import save_file

from mlnet_utils import runtime
from mlnet_utils.model.checkpoints import load_checkpoint, load_model, save_published
from mlnet_utils.predict.predictor import load

CARD = {"data": "none", "scores": {"CC": 0.5}}


@pytest.fixture
def published(tmp_path):
    source = tiny_checkpoint(tmp_path / "best.pt", head="density")
    save_published(tmp_path / "net.safetensors", source, CARD)
    return source, tmp_path / "net.safetensors"


def test_a_published_network_is_its_source_with_matrices_in_half_precision(published):
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    ours, theirs = (load(path).predict(photo) for path in published)
    assert np.abs(ours - theirs).max() < 2e-3 * ours.max()
    assert published[1].stat().st_size < published[0].stat().st_size
    (source, config, _), (model, kept, content) = map(load_model, published)
    assert (kept, content["card"]) == (config, CARD)
    for key, value in source.state_dict().items():
        assert value.ndim > 1 or torch.equal(value, model.state_dict()[key]), key


def test_the_default_is_the_package_s_own(published, monkeypatch):
    monkeypatch.setattr(runtime, "SHIPPED", published[1])
    assert load().config == load(published[0]).config


def test_other_safetensors_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")
