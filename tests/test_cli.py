"""The command line: thin, with examples, clear errors and exit codes."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from miniatures import save_photo

from mlnet_utils import __main__ as cli
from mlnet_utils.data import download
from mlnet_utils.predict import export, submission

VERBS = next(
    action.choices for action in cli.parser()._actions if getattr(action, "choices", None)
)  # fmt: skip


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_shows_its_docstring_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    summary, _, examples = text.partition("Examples:")
    assert getattr(cli, verb.replace("-", "_")).__doc__.splitlines()[0] in summary
    assert f"python -m mlnet_utils {verb}" in examples


def test_help_is_quick_and_needs_no_torch():
    code = (
        "import sys; from mlnet_utils import __main__ as cli\n"
        "try: cli.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(f"    {verb}" in result.stdout for verb in VERBS)
    assert time.monotonic() - started < 2 or os.getloadavg()[0] > 2


def test_overrides_are_typed_and_checked(capsys):
    call = ["train", "--set", "lr=0.01", "--set", "levels=2", "--set", "loss=kl + cc"]
    overrides = dict(cli.parser().parse_args(call).overrides)
    assert overrides == {"lr": 0.01, "levels": 2, "loss": "kl + cc"}
    with pytest.raises(SystemExit):
        cli.main(["train", "--set", "lr"])
    assert "'lr'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --preset nonsense", "'nonsense'"),
        ("train --preset tiny --set colour=1", "colour"),
        ("prepare --preset none.yaml", "none.yaml"),
        ("download osy --root .", "synthetic, osie"),
        ("download cat2000 --root . --from trainSet.zip", "trainSet.zip: its MD5"),
        ("check-submission x.zip --dataset list", "salicon-2017, salicon-2015"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_1(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("trainSet.zip", "w") as file:
        file.writestr("trainSet/Stimuli/x", b"")
    assert cli.main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize("verb", ["reproduce", "publish", "sweep"])
def test_verbs_that_execute_notebooks_name_their_extra(verb, capsys, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mlnet_utils.running")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "papermill", None)
    given = ["grid.yaml"] if verb == "sweep" else ["--run-dir", str(tmp_path)]
    assert cli.main([verb, *given]) == 1
    assert "'mlnet-utils[notebooks]'" in capsys.readouterr().err


def test_debug_shows_where_it_happened(tmp_path):
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["--debug", "train", "--preset", "nonsense", "--run-dir", str(tmp_path)])


@pytest.mark.parametrize(("said", "words"), [((), "stopped"), (("saved",), "saved")])
def test_ctrl_c_is_one_line_and_exit_code_130(said, words, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(cli, "load_config", interrupted)
    assert cli.main(["prepare"]) == 130
    assert capsys.readouterr().err == f"\n{words}\n"


@pytest.mark.slow
def test_prepare_check_train_and_evaluate(tmp_path, capsys):
    run = ["--preset", "tiny", "--run-dir", str(tmp_path)]
    assert cli.main(["prepare", *run]) == 0
    assert cli.main(["prepare", *run, "--check"]) == 0
    assert "36 photos are as prepared" in capsys.readouterr().out
    assert cli.main(["train", *run, "--set", "sigma=30.0"]) == 1
    assert "sigma=30.0 (prepared: 8.0)" in capsys.readouterr().err
    assert cli.main(["train", *run, "--set", "epochs=1"]) == 0
    assert "trained 1 epoch;" in capsys.readouterr().out
    assert cli.main(["evaluate", *run]) == 0
    assert "| ML-Net " in capsys.readouterr().out
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["photos"] == 12
    assert report["command"] == f"python -m mlnet_utils evaluate {shlex.join(run)}"
    photo = next((tmp_path / "data" / "images").glob("*.png"))
    photo.write_bytes(b"changed")
    assert cli.main(["prepare", *run, "--check"]) == 1
    assert f"{photo.name} has changed" in capsys.readouterr().out


@pytest.mark.slow
def test_export_writes_what_predict_takes(checkpoint, tmp_path, capsys):
    photos, out = str(save_photo(tmp_path / "a.jpg")), str(tmp_path / "network.pt2")
    call = ["export", "--checkpoint", str(checkpoint), "--out", out]
    assert cli.main([*call, photos]) == 1
    assert re.search(r"\.onnx.*network\.pt2", capsys.readouterr().err)
    call += ["--format", "torch-export"]
    assert cli.main(call) == 1
    assert "best.pt" in capsys.readouterr().err
    assert cli.main([*call, photos]) == 0
    assert "network.pt2: " in capsys.readouterr().out
    maps = str(tmp_path / "maps")
    assert cli.main(["predict", "--checkpoint", out, "--out", maps, photos]) == 0
    assert "1 done, 0 " in capsys.readouterr().out


def test_download_says_where_a_dataset_is_and_what_to_cite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "acquire", lambda name, root, archives: Path(root, name))
    assert cli.main(["download", "eyecrowd", "--root", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "eyecrowd is complete in" in told
    assert "Jiang, J. Xu, Q. Zhao. Saliency in Crowd" in told


def test_export_passes_its_options_on(monkeypatch, capsys):
    calls, report = [], SimpleNamespace(summary=lambda: "0.5 MB")
    monkeypatch.setattr(export, "export", lambda *call: calls.append(call) or report)
    assert cli.main(["export", "--checkpoint", "a.pt", "--out", "b.onnx", "--int8", "c"]) == 0
    assert calls == [(Path("a.pt"), Path("b.onnx"), "onnx", True, [Path("c")])]
    assert capsys.readouterr().out == "0.5 MB\n"


def test_submit_and_check(checkpoint, tmp_path, capsys, monkeypatch):
    small = replace(submission.BENCHMARKS["salicon-2017"], count=3)
    monkeypatch.setitem(submission.BENCHMARKS, "salicon-2017", small)
    photos = tmp_path / "salicon" / "images" / "val"
    for number in (7, 42, 523957):
        save_photo(photos / f"COCO_val2014_{number:012}.jpg")
    out, benchmark = tmp_path / "maps.zip", ["--dataset", "salicon-2017", "--split", "val"]
    call = ["submit", "--checkpoint", str(checkpoint), "--out", str(out), *benchmark]
    assert cli.main([*call, "--data-root", str(tmp_path)]) == 0
    assert "valid for salicon-2017, val" in capsys.readouterr().out
    call = ["check-submission", str(out), *benchmark, "--photos", str(photos)]
    assert cli.main(call) == 0
    assert re.search("valid: .* 3 photos", capsys.readouterr().out)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("readme.txt", "")
    assert cli.main(call) == 1
    assert "(1): readme.txt" in capsys.readouterr().out
