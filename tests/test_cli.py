"""The command line: thin, with examples, clear errors and exit codes."""

import json
import zipfile

import pytest
import torch

from mlnet_utils import __main__ as cli
from mlnet_utils import checkpoints
from mlnet_utils.config import load_config
from mlnet_utils.model import MLNet

VERBS = next(
    action.choices for action in cli.parser()._actions if getattr(action, "choices", None)
)  # fmt: skip


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_shows_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"python -m mlnet_utils {verb}" in text


def test_overrides_are_typed_and_checked():
    assert cli.overrides(["lr=0.01", "levels=2", "loss=kl + cc", "flip=0.5"]) == {
        "lr": 0.01,
        "levels": 2,
        "loss": "kl + cc",
        "flip": 0.5,
    }
    with pytest.raises(ValueError, match="KEY=VALUE"):
        cli.overrides(["lr"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "nonsense"], "unknown preset 'nonsense'"),
        (["train", "--preset", "tiny", "--set", "colour=1"], "unknown configuration key colour"),
        (["prepare", "--preset", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_1(arguments, words, capsys, tmp_path):
    assert cli.main([*arguments, "--run-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error


def test_download_takes_archives_and_names_mistakes(tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    assert cli.main(["download", "osy", *root]) == 1
    assert "use one of salicon-2017" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "trainSet.zip", "w") as file:
        file.writestr("trainSet/Stimuli/x", b"")
    given = ["--from", str(tmp_path / "trainSet.zip")]
    assert cli.main(["download", "cat2000", *root, *given]) == 1
    assert "trainSet.zip is not trainSet.zip: its MD5 is" in capsys.readouterr().err


def test_debug_shows_where_it_happened(tmp_path):
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["--debug", "train", "--preset", "nonsense", "--run-dir", str(tmp_path)])


def test_prepare_check_train_and_evaluate(tmp_path, capsys):
    run = ["--preset", "tiny", "--run-dir", str(tmp_path)]
    assert cli.main(["prepare", *run]) == 0
    assert cli.main(["prepare", *run, "--check"]) == 0
    assert "36 photos are as prepared" in capsys.readouterr().out
    assert cli.main(["train", *run, "--set", "epochs=1"]) == 0
    assert "trained 1 epochs" in capsys.readouterr().out
    assert cli.main(["evaluate", *run]) == 0
    assert "| ML-Net |" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["photos"] == 12
    photo = next((tmp_path / "data" / "images").glob("*.png"))
    photo.write_bytes(b"changed")
    assert cli.main(["prepare", *run, "--check"]) == 1
    assert "has changed since preparation" in capsys.readouterr().out


def test_predict_ends_with_1_and_names_the_broken_photo(tmp_path, capsys):
    config = load_config("tiny")
    checkpoint = tmp_path / "best.pt"
    torch.manual_seed(0)
    checkpoints.save_checkpoint(checkpoint, config, MLNet(config).state_dict())
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    arguments = ["predict", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, str(tmp_path / "broken.jpg")]) == 1
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.out + captured.err
