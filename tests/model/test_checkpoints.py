"""Checkpoints and published networks: damage is noticed and named, and what is kept."""

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint, tiny_config
from safetensors.torch import save_file

from mlnet_utils.model import checkpoints
from mlnet_utils.model.checkpoints import load_checkpoint, load_model, save_published
from mlnet_utils.model.tensorfiles import read_weights
from mlnet_utils.predict.predictor import load


def same(a, b):
    """Nested tensors and plain values are equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def changed(change=lambda content: content):
    """Writes a checkpoint of changed content, as before files had a digest."""
    return lambda path: torch.save(change(load_checkpoint(tiny_checkpoint(path))), path)


MAKERS = {
    "new.pt": tiny_checkpoint,
    "old.pt": changed(),
    "net.safetensors": lambda path: save_published(path, tiny_checkpoint(path.parent / "x.pt"), {}),
}


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("a.pt", "other.pt"):
        checkpoints.save_checkpoint(tmp_path / name, tiny_config(), {"weight": torch.arange(6.0)})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


@pytest.mark.parametrize("name", MAKERS)
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, name):
    path, rng, noticed = tmp_path / name, np.random.default_rng(0), 0
    MAKERS[name](path)
    whole, expected = path.read_bytes(), load_checkpoint(path)
    for _ in range(40):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            assert same(load_checkpoint(path), expected)
        except ValueError:
            noticed += 1
    assert noticed >= 28


def test_a_digest_covers_what_the_zip_s_checksums_do_not_know(tmp_path):
    content = torch.load(tiny_checkpoint(tmp_path / "x.pt"), weights_only=True)
    content["model"]["encode.weight"][0, 0, 0, 0] += 1
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.* again"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_of_others_are_checked_as_far_as_their_files_allow(tmp_path):
    path, weights = tmp_path / "w.pth", {"w": torch.arange(1000.0)}
    torch.save(weights, path)
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert same(read_weights(tmp_path / name), weights)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(weights["w"].numpy().tobytes()) + 9] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"w\.pth"):
        read_weights(path)


def test_a_training_falls_back_to_the_checkpoint_before(tmp_path):
    weights = {"w": torch.ones(1000)}
    for updates in (1, 2):
        checkpoints.rotate_and_save(
            tmp_path, tiny_config(), weights, data="digest", progress=updates
        )
    assert checkpoints.load_latest(tmp_path, tiny_config(), "digest")["progress"] == 2
    raw = bytearray((tmp_path / "last.pt").read_bytes())
    raw[raw.index(weights["w"].numpy().tobytes()) + 9] ^= 1  # where torch notices nothing
    (tmp_path / "last.pt").write_bytes(raw)
    torch.load(tmp_path / "last.pt", weights_only=True)
    with pytest.warns(UserWarning, match=r"last\.pt.* previous\.pt"):
        assert checkpoints.load_latest(tmp_path, tiny_config(), "digest")["progress"] == 1


def without(key):
    return changed(lambda content: {k: v for k, v in content.items() if k != key})


def with_another(key, value):
    return changed(lambda content: {**content, key: value})


@changed
def of_nan(content):
    numbers = {k: v for k, v in content["model"].items() if v.is_floating_point()}
    return {**content, "model": content["model"] | {k: v * torch.nan for k, v in numbers.items()}}


@pytest.mark.parametrize(
    "write",
    [
        *map(without, ("config", "model", "format")),
        *(with_another("config", v) for v in (None, [], {"lr": []}, {"height": 10**400}, {5: 1})),
        *(with_another("model", v) for v in (None, [], {}, {"encode.weight": 1}, {1: 2})),
        of_nan,
        lambda path: torch.save([1], path),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"text"),
        lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256))),
    ],
)
def test_what_is_no_checkpoint_is_named_with_the_remedy(tmp_path, write):
    write(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.* again") as error:
        load_model(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)  # no advice to let files run code


# ---- networks published as safetensors --------------------------------------------------------
def test_a_published_network_is_its_source_with_matrices_in_half_precision(tmp_path):
    files = [tiny_checkpoint(tmp_path / "best.pt", head="density"), tmp_path / "net.safetensors"]
    card = {"data": "none", "scores": {"CC": 0.5}}
    save_published(files[1], files[0], card)
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    ours, theirs = (load(path).predict(photo) for path in files)
    assert np.abs(ours - theirs).max() < 2e-3 * ours.max()
    assert files[1].stat().st_size < files[0].stat().st_size
    (source, config, _), (model, kept, content) = map(load_model, files)
    assert (kept, content["card"]) == (config, card)
    for key, value in source.state_dict().items():
        assert value.ndim > 1 or torch.equal(value, model.state_dict()[key]), key


def test_other_safetensors_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load_checkpoint(tmp_path / "x.safetensors")
