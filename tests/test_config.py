"""Presets, overrides, YAML files, and the errors that catch mistakes in them."""

import dataclasses

import pytest

from mlnet_utils.config import (
    ENGINE_FIELDS,
    FIELDS,
    PRESETS,
    Config,
    backbone_file,
    describe,
    from_dict,
    load_config,
)


def test_the_defaults_are_the_authors_recipe():
    paper = load_config("paper")
    assert paper == Config()
    assert (paper.height, paper.width, paper.grid) == (480, 640, (60, 80))
    assert (paper.backbone, paper.levels, paper.channels, paper.prior_cells) == (
        "vgg16", 3, 64, (6, 8),
    )  # fmt: skip
    assert (paper.optimizer, paper.lr, paper.lr_decay, paper.momentum) == ("sgd", 1e-3, 5e-4, 0.9)
    assert (paper.batch_size, paper.epochs, paper.patience, paper.alpha) == (10, 20, 5, 1.1)
    assert paper.freeze == ()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_a_round_trip(name):
    config = load_config(name)
    assert config.preset == name
    assert from_dict(config.to_dict()) == config
    assert from_dict({**config.to_dict(), "crop": 0.1}) == config  # of an earlier checkpoint


def test_overrides_change_one_key_and_none_keeps_the_preset():
    config = load_config("tiny", epochs=7, batch_size=None, freeze=["backbone.*"], lr="1e-2")
    assert (config.epochs, config.batch_size) == (7, PRESETS["tiny"]["batch_size"])
    assert config.freeze == ("backbone.*",)
    assert config.lr == 0.01


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config("tiny").lr = 1.0


def test_unknown_preset_and_unknown_keys_are_errors():
    with pytest.raises(ValueError, match=r"unknown preset 'smaple': use one of .*sample"):
        load_config("smaple")
    with pytest.raises(ValueError, match=r"unknown configuration key epoch, learning_rate; known:"):
        load_config("tiny", epoch=1, learning_rate=1)
    with pytest.raises(ValueError, match="unknown configuration key epoch"):
        load_config("tiny", epoch=None)
    with pytest.raises(ValueError, match="unknown configuration key momentun"):
        from_dict({**Config().to_dict(), "momentun": 1})
    with pytest.raises(ValueError, match="crop"):
        load_config("paper", crop=0.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 2.5, "epochs=2.5 should be int, not float"),
        ("epochs", True, "epochs=True should be int, not bool"),
        ("cache", 1, "cache=1 should be bool, not int"),
        ("lr", "fast", "lr='fast' should be float, not str"),
        ("freeze", "backbone.*", r"freeze='backbone.\*' should be tuple, not str"),
        ("head", "softmax", "head='softmax' is not one of paper, density"),
        ("precision", "half", "precision='half' is not one of auto, fp32, bf16, fp16"),
        ("height", 100, "height=100 must be a multiple of 8"),
        ("width", 16, "width=16 must be a multiple of 8, at least 32"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("dropout", 1.0, r"dropout=1.0 must be in \[0, 1\)"),
        ("flip", 1.5, r"flip=1.5 must be in \[0, 1\)"),
        ("warmup", -0.1, r"warmup=-0.1 must be in \[0, 1\)"),
        ("lr", -1e-3, "lr=-0.001 must be finite, 0 or more"),
        ("lr", float("nan"), "lr=nan must be finite, 0 or more"),
        ("weight_decay", float("inf"), "weight_decay=inf must be finite, 0 or more"),
        ("seed", -1, "seed=-1 must be finite, 0 or more"),
        ("micro_batch", -2, "micro_batch=-2 must be at least -1"),
        ("workers", -2, "workers=-2 must be at least -1"),
        ("fold", -2, "fold=-2 must be at least -1"),
        ("prior_penalty", -5, "prior_penalty=-5.0 must be -1, 0 or more"),
        ("prior_penalty", float("nan"), "prior_penalty=nan must be -1"),
        ("freeze", (1,), r"freeze=\(1,\) must hold names only"),
        ("alpha", 1.0, "alpha=1.0 must be above 1"),
        ("prior_cells", (6,), r"prior_cells=\(6,\) must be \(rows, columns\) or \(\)"),
        ("prior_cells", (0, 8), r"prior_cells=\(0, 8\) must be"),
        ("test_scales", (), r"test_scales=\(\) must be numbers from 0.1 to 4"),
        ("test_scales", (1, 40), r"test_scales=\(1, 40\) must be"),
    ],
)
def test_wrong_values_are_errors_that_name_the_key(key, value, message):
    with pytest.raises(ValueError, match=f"^config: {message}"):
        load_config("tiny", **{key: value})


def test_yaml_starts_from_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: tiny\nepochs: 9\nlr: 1e-3\nprior_cells: [2, 3]\n")
    config = load_config(path, batch_size=3)
    tiny = load_config("tiny", epochs=9, lr=1e-3, prior_cells=(2, 3), batch_size=3)
    assert config == dataclasses.replace(tiny, preset="mine")
    path.write_text("")
    assert load_config(path) == dataclasses.replace(Config(), preset="mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: [", "mine.yaml is not valid YAML"),
        ("- epochs", "mine.yaml must hold a mapping"),
        ("preset: smaple", "preset 'smaple' is not one of"),
        ("epoch: 3", "unknown configuration key epoch"),
    ],
)
def test_broken_yaml_is_an_error(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_yaml_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.yaml does not exist"):
        load_config(tmp_path / "gone.yaml")


def test_describe_says_what_differs_from_the_paper():
    rows = {key: difference for key, _, difference in describe(load_config("paper", epochs=3))}
    assert set(rows) == FIELDS
    assert rows["epochs"] == "paper: 20"
    assert [key for key, difference in rows.items() if difference] == ["epochs"]


def test_backbone_weights_variable_replaces_a_download_only(monkeypatch):
    monkeypatch.setenv("BACKBONE_WEIGHTS", "/weights/file.safetensors")
    assert backbone_file(load_config("osie")) == "/weights/file.safetensors"
    assert backbone_file(load_config("tiny")) == ""
    assert backbone_file(load_config("osie", backbone_weights="mine.pth")) == "mine.pth"
    monkeypatch.delenv("BACKBONE_WEIGHTS")
    assert backbone_file(load_config("osie")) == ""


def test_engine_fields_exist():
    assert set(ENGINE_FIELDS) <= FIELDS
