"""Presets, overrides, YAML files, and the errors that catch mistakes in them."""

import dataclasses
import re
from importlib import resources
from itertools import pairwise

import pytest
import yaml

from mlnet_utils.config import (
    ENGINE_FIELDS,
    KEYS,
    PRESETS,
    Config,
    backbone_file,
    choices,
    describe,
    from_dict,
    load_config,
    preset_names,
)

NAMES = [
    *("adapt", "finetune", "mlnet-pytorch", "mlnet-pytorch-asis", "osie", "osie-eyecrowd"),
    *("paper", "salicon", "sample", "tiny"),
]


@pytest.fixture
def mine(tmp_path):
    return tmp_path / "mine.yaml"


# ---- the files of the package ------------------------------------------------------------------
def test_the_presets_are_files_of_the_package():
    folder = resources.files("mlnet_utils") / "presets"
    assert preset_names() == NAMES == sorted(path.name[:-5] for path in folder.iterdir())


def test_the_defaults_are_the_paper_s_preset():
    paper = yaml.safe_load((PRESETS / "paper.yaml").read_text("utf-8"))
    written = from_dict(paper).to_dict()
    assert {key: written[key] for key in paper} == {key: Config().to_dict()[key] for key in paper}
    assert load_config("paper") == Config()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_valid_may_be_copied_and_has_a_reason_for_every_line(name, mine):
    config = load_config(name)
    assert config.preset == name
    assert from_dict(config.to_dict()) == config
    assert from_dict({**config.to_dict(), "crop": 0.1}) == config  # of an earlier checkpoint
    mine.write_text(text := (PRESETS / f"{name}.yaml").read_text("utf-8"), "utf-8")
    assert load_config(mine) == dataclasses.replace(config, preset="mine")
    for above, line in pairwise(["", *text.splitlines()]):
        assert "#" in line or not re.match(r"[a-z_]+:", line) or above.startswith("#"), line


# ---- overrides ---------------------------------------------------------------------------------
def test_overrides_change_one_key_and_none_keeps_the_preset():
    config = load_config("tiny", epochs=7, batch_size=None, freeze=["backbone.*"], lr="1e-2")
    assert (config.epochs, config.batch_size, config.lr) == (7, 4, 0.01)
    assert config.freeze == ("backbone.*",)


def test_unknown_presets_files_and_keys_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'smaple'.*sample"):
        load_config("smaple")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match=r"crop, epoch, learning_rate"):
        load_config("tiny", epoch=1, learning_rate=None, crop=0.1)
    for unknown in ("momentun", "given"):
        with pytest.raises(ValueError, match=unknown):
            from_dict({**Config().to_dict(), unknown: 1})


WRONG = [
    ("epochs", 2.5, "int"), ("epochs", True, "int"), ("cache", 1, "bool"), ("lr", "fast", "float"),
    ("freeze", "backbone.*", "tuple"), ("freeze", (1,), "str"), ("backbone_drop", (None,), "str"),
    ("prior_cells", (6, 8.5), "int"), ("prior_cells", (6,), "rows, columns"),
    ("test_scales", ("wide",), "float"), ("test_scales", (1, 40), "at most 4"),
    ("optimizer", "lion", "sgd, adam, adamw"), ("output_stride", 4, "8, 16, 32"),
    ("height", 100, "multiple of 8"), ("dropout", 1.0, "below 1"), ("alpha", 1.0, "above 1"),
    ("prior_penalty", -5, "at least 0, except for -1"), ("lr", float("nan"), "finite"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "fact"), WRONG)
def test_wrong_values_are_errors_that_name_key_and_limit(key, value, fact):
    with pytest.raises(ValueError, match=f"^config: {key}=.*{fact}"):
        load_config("tiny", **{key: value})


OUTSIDE = yaml.safe_load("""
- {head: softmax, compat: keras, normalisation: none, schedule: cosine, precision: half}
- {protocol: mit, width: 16, limit: -1, train_limit: -1, sigma: -1, fold: -2, levels: 0}
- {channels: 0, prior_cells: [0, 8], prior_penalty: .nan, lr: -1e-3, lr_decay: -1, momentum: -1}
- {backbone_lr_scale: -1, warmup: -0.1, weight_decay: .inf, clip_norm: -1, batch_size: 0}
- {epochs: 0, patience: -1, ema_decay: 1.0, flip: 1.5, micro_batch: -2, workers: -2, seed: -1}
- {checkpoint_every: 0, bootstrap: 0, test_scales: []}
- {test_scales: [0]}
""")


@pytest.mark.parametrize(("key", "value"), [pair for line in OUTSIDE for pair in line.items()])
def test_values_outside_the_limits_are_errors_that_name_the_key(key, value):
    with pytest.raises(ValueError, match=f"^config: {key}="):
        load_config("tiny", **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("flip", 1), ("prior_penalty", -1), ("prior_cells", ()), ("test_scales", (1, 0.5))],
)
def test_values_at_the_limits_are_taken(key, value):
    assert getattr(load_config("tiny", **{key: value}), key) == value


# ---- files of users ----------------------------------------------------------------------------
def test_yaml_starts_from_a_preset(mine):
    mine.write_text("preset: tiny\nepochs: 9\nlr: 1e-3\nprior_cells: [2, 3]\n")
    config = load_config(mine, batch_size=3)
    tiny = load_config("tiny", epochs=9, lr=1e-3, prior_cells=(2, 3), batch_size=3)
    assert config == dataclasses.replace(tiny, preset="mine")
    mine.write_text("")
    assert load_config(mine) == dataclasses.replace(Config(), preset="mine")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("epochs: [", "line 1"),
        ("- epochs", "mapping"),
        ("preset: smaple", "'smaple'.*sample"),
        ("epoch: 3", "epoch"),
        ("sigma: 6\nepochs: 2.5", "epochs=2.5"),
        ("epochs: 3\nlr: 1\nepochs: 4", "'epochs'.*line 3"),
        ("backbone_args: {pad_type: same, pad_type: ''}", "'pad_type'.*line 1"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(mine, text, fact):
    mine.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)mine\.yaml.*{fact}"):
        load_config(mine)


# ---- starting from a checkpoint, which nothing here opens --------------------------------------
def test_the_keys_that_were_set_are_remembered_and_not_stored(mine):
    mine.write_text("preset: finetune\nlevels: 3\n")
    config = load_config(mine, head="paper", start_from="gone.pt")
    assert {"levels", "head", "start_from", "lr"} <= config.given
    assert "channels" not in config.given
    assert "given" not in config.to_dict()
    assert config == dataclasses.replace(config, given=frozenset())
    assert load_config("paper", epochs=3).given == {"epochs"}


def test_a_start_leaves_nothing_to_download():
    assert load_config("paper", start_from="gone.pt").backbone_weights == "none"
    assert load_config("finetune", start_from="").backbone_weights == "imagenet"
    with pytest.raises(ValueError, match=r"backbone_weights='w\.pth' .*start_from"):
        load_config("finetune", backbone_weights="w.pth")


# ---- the rest ----------------------------------------------------------------------------------
def test_describe_says_what_differs_from_the_paper():
    shown, folded = describe(load_config("paper", epochs=3, backbone="a<b")).split("<details>")
    differing = re.findall(r"<th>(\w+)</th><td>(.*?)</td><td>(.*?)</td>", shown)
    assert differing == [("backbone", "a&lt;b", "vgg16"), ("epochs", "3", "20")]
    assert "overflow-wrap" not in shown
    assert "overflow-wrap" in describe(load_config("paper", start_from="x" * 41))
    same = set(re.findall(r"<th>(\w+)</th>", folded.split("</thead>")[1]))
    assert same == KEYS - {"backbone", "epochs"}


def test_backbone_weights_variable_replaces_a_download_only(monkeypatch):
    monkeypatch.setenv("BACKBONE_WEIGHTS", "/weights/file.safetensors")
    assert backbone_file(load_config("paper")) == "/weights/file.safetensors"
    assert backbone_file(load_config("tiny")) == ""
    assert backbone_file(load_config("paper", backbone_weights="mine.pth")) == "mine.pth"
    monkeypatch.delenv("BACKBONE_WEIGHTS")
    assert backbone_file(load_config("paper")) == ""


def test_choices_and_engine_fields_exist():
    assert choices("protocol")[0] == Config().protocol
    assert set(ENGINE_FIELDS) <= KEYS
