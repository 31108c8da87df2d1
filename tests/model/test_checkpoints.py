"""Checkpoints and published networks: damage is noticed and named, and what is kept."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint, tiny_config
from safetensors.torch import save_file

from mlnet_utils import runtime
from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint, load_latest, load_model, save_published
from mlnet_utils.model.tensorfiles import read_weights
from mlnet_utils.predict.predictor import load


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def same(a, b):
    """Nested tensors and plain values are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def old_checkpoint(path):
    """As written before files had a digest."""
    torch.save(load_checkpoint(tiny_checkpoint(path)), path)


MAKERS = {
    "new.pt": tiny_checkpoint,
    "old.pt": old_checkpoint,
    "net.safetensors": lambda path: save_published(path, tiny_checkpoint(path.parent / "x.pt"), {}),
}


def test_equal_checkpoints_are_equal_files(tmp_path):
    config, tensors = tiny_config(), {"weight": torch.arange(6.0)}
    for name in ("a.pt", "other.pt"):
        checkpoints.save_checkpoint(tmp_path / name, config, tensors)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


@pytest.mark.parametrize("name", MAKERS)
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, name):
    whole, path, rng = tmp_path / f"whole-{name}", tmp_path / name, np.random.default_rng(0)
    MAKERS[name](whole)
    expected, noticed = load_checkpoint(whole), 0
    for _ in range(40):
        shutil.copy(whole, path)
        flip_a_bit(path, rng)
        try:
            found = load_checkpoint(path)
        except ValueError:
            noticed += 1
        else:
            assert same(found, expected)
    assert noticed >= 28


def test_a_digest_covers_what_the_zip_s_checksums_do_not_know(tmp_path):
    content = torch.load(tiny_checkpoint(tmp_path / "x.pt"), weights_only=True)
    content["model"]["encode.weight"][0, 0, 0, 0] += 1
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.* again"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_of_others_are_checked_as_far_as_their_files_allow(tmp_path):
    weights = {"w": torch.arange(1000.0)}
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert same(read_weights(tmp_path / name), weights)
    damaged = (tmp_path / "w.pth").read_bytes()
    place = damaged.index(weights["w"].numpy().tobytes())
    (tmp_path / "w.pth").write_bytes(damaged[: place + 9] + b"\xff" + damaged[place + 10 :])
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")


def test_a_training_falls_back_to_the_checkpoint_before(tmp_path):
    content = load_checkpoint(tiny_checkpoint(tmp_path / "x.pt"))
    config = load_model(tmp_path / "x.pt")[1]
    for updates in (1, 2):
        state = {"data": "digest", "progress": {"updates": updates}}
        checkpoints.rotate_and_save(tmp_path, config, content["model"], **state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_latest(tmp_path, config, "digest")["progress"]["updates"] == 2
    raw = bytearray((tmp_path / "last.pt").read_bytes())
    raw[len(raw) // 2] ^= 1  # in a tensor, where torch notices nothing
    (tmp_path / "last.pt").write_bytes(raw)
    torch.load(tmp_path / "last.pt", weights_only=True)
    with pytest.warns(UserWarning, match=r"last\.pt.* continuing from previous\.pt"):
        assert load_latest(tmp_path, config, "digest")["progress"]["updates"] == 1


def rewritten(**changes):
    def write(path):
        torch.save({**load_checkpoint(tiny_checkpoint(path)), **changes}, path)

    return write


def without(key):
    def write(path):
        content = load_checkpoint(tiny_checkpoint(path))
        del content[key]
        torch.save(content, path)

    return write


def of_nan(path):
    content = load_checkpoint(tiny_checkpoint(path))
    content["model"] = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v
                        for k, v in content["model"].items()}  # fmt: skip
    torch.save(content, path)


@pytest.mark.parametrize(
    "write",
    [
        *(without(key) for key in ("config", "model", "format")),
        *(rewritten(config=value) for value in (None, [], {"lr": []}, {"height": 10**400}, {5: 1})),
        *(rewritten(model=value) for value in (None, [], {}, {"encode.weight": 1}, {1: 2})),
        of_nan,
        lambda path: torch.save([1], path),
        lambda path: path.mkdir(),
    ],
)
def test_what_is_no_checkpoint_is_named_with_the_remedy(tmp_path, write):
    write(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.* again"):
        load_model(tmp_path / "x.pt")


# ---- networks published as safetensors --------------------------------------------------------
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
