"""Files from strangers: whatever a reader is given, nothing in it is executed."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import yaml
from conftest import make_photo, tiny_checkpoint
from miniatures import zipped

from mlnet_utils.config import Config, load_config
from mlnet_utils.data.images import read_density, read_image
from mlnet_utils.data.photos import Prepared
from mlnet_utils.data.readers.files import fixated_pixels, photo_size
from mlnet_utils.experiments.sweep import Grid, read_grid
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.model.legacy import import_weights
from mlnet_utils.model.tensorfiles import read_weights
from mlnet_utils.predict.export import export
from mlnet_utils.predict.predictor import load
from mlnet_utils.predict.submission import validate_submission
from mlnet_utils.running.notebooks import parameters_of


class Harm:
    """Touches the file ``harmed`` where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def unpickle(path: Path):
    return pickle.loads(path.read_bytes())


def unpickle_arrays(path: Path):
    return dict(np.load(path, allow_pickle=True))


def read_prepared(path: Path) -> None:
    meta = {"dataset": "tiny", "title": "Tiny", "root": ".", "sigma_px": 1}
    path.with_name("meta.json").write_text(json.dumps(meta))
    path.with_name("index.jsonl").write_text("{}")
    Prepared.read(path.parent)


def notebook(path: Path) -> None:
    cell = nbformat.v4.new_code_cell(SCRIPT, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


def load_all(path: Path):
    return torch.load(path, weights_only=False)


def write(content: bytes):
    return lambda path: path.write_bytes(content)


SCRIPT = "HARM = __import__('os').system('touch harmed')"
PICKLE = write(pickle.dumps(Harm()))
YAML = write(b"cells: !!python/object/apply:os.system ['touch harmed']")
OBJECTS = {name: np.array([Harm()], dtype=object) for name in ("density", "offsets", "points")}
CASES = {  # file -> how it is written, a reader that trusts it, our reader
    "x.pt": (lambda p: torch.save({"format": Harm()}, p), load_all, load),
    "x.pth": (lambda p: torch.save({"w": Harm()}, p), load_all, read_weights),
    "pickle.pt": (PICKLE, unpickle, load),
    "x.safetensors": (PICKLE, unpickle, load),
    "weights.safetensors": (PICKLE, unpickle, read_weights),
    "x.h5": (PICKLE, unpickle, lambda p: import_weights(p, "x.pt")),
    "x.npz": (lambda p: np.savez(p, **OBJECTS), unpickle_arrays, read_density),
    "fixations.npz": (lambda p: np.savez(p, **OBJECTS), unpickle_arrays, read_prepared),
    "x.npy": (
        lambda p: np.save(p, OBJECTS["points"]),
        lambda p: np.load(p, allow_pickle=True),
        lambda p: fixated_pixels(p, (1, 1)),
    ),
    "x.mat": (PICKLE, unpickle, lambda p: fixated_pixels(p, (1, 1))),
    "x.onnx": (PICKLE, unpickle, load),
    "x.yaml": (YAML, lambda p: yaml.unsafe_load(p.read_bytes()), load_config),
    "grid.yaml": (YAML, lambda p: yaml.unsafe_load(p.read_bytes()), read_grid),
    "x.ipynb": (notebook, lambda p: exec(SCRIPT), parameters_of),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, harmed = tmp_path / name, tmp_path / "harmed"
    put, trusting, ours = CASES[name]
    put(path)
    trusting(path)
    harmed.unlink()  # the file is harmful
    with pytest.raises(ValueError, match=name):
        ours(path)
    assert not harmed.exists()


@pytest.mark.slow
def test_an_exported_network_is_read_without_its_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    make_photo(Path("photos"), "a", "train", 0)
    report = export(tiny_checkpoint(Path("x.pt")), "real.pt2", "torch-export", photos=["photos"])
    with zipfile.ZipFile(report.path) as real, zipfile.ZipFile("x.pt2", "w") as fake:
        for name in real.namelist():  # a real export, but for the inputs, which torch unpickles
            inputs = name.endswith("sample_inputs/model.pt")
            fake.writestr(name, pickle.dumps(Harm()) if inputs else real.read(name))
    with pytest.raises(Exception):  # noqa: B017, PT011 - harm is done before
        torch.export.load("x.pt2")
    Path("harmed").unlink()
    photo = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    expected = load("x.pt", "cpu").predict(photo)
    np.testing.assert_array_equal(load("x.pt2").predict(photo), expected)
    assert not Path("harmed").exists()


@pytest.mark.parametrize("read", [read_image, read_density, photo_size])
def test_a_photo_starts_no_other_program(tmp_path, monkeypatch, read):
    """A .jpg of PostScript: Pillow would start Ghostscript on it."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\n/usr/bin/touch {tmp_path / 'started'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for anew
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 50\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"x\.jpg"):
        read(path)
    assert not (tmp_path / "started").exists()


ELSEWHERE = [
    ("backbone", "hf-hub:timm/resnet18.a1_in1k"),
    ("backbone", "local-dir:."),
    ("backbone", "resnet18/../x"),
    ("backbone_args", {"checkpoint_path": "x.pth"}),
    ("backbone_args", {"pretrained_cfg": {"hf_hub_id": "timm/resnet18.a1_in1k"}}),
]


@pytest.mark.parametrize(("key", "value"), ELSEWHERE)
def test_a_checkpoint_leads_to_no_other_file_or_site(tmp_path, monkeypatch, key, value):
    content = load_checkpoint(tiny_checkpoint(tmp_path / "x.pt"))
    torch.save({**content, "config": {**content["config"], key: value}}, tmp_path / "x.pt")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(ValueError, match=f"{key}="):
        load(tmp_path / "x.pt")


def test_a_map_that_announces_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mlnet_utils.predict.submission.LARGEST", 5)
    (tmp_path / "x.zip").write_bytes(zipped({"a.png": b"123456"}))
    problems = validate_submission(tmp_path / "x.zip", {"a.jpg": (16, 12)})
    assert "a.png (6 bytes" in str(problems)


@pytest.mark.parametrize("name", ["..", ".", "", "/", " "])
def test_cells_and_presets_are_names_of_folders(name):
    with pytest.raises(ValueError, match="cells="):
        Grid("x", "tiny", {name: {}})
    for preset in (name, f"a{name}/b", f"a{name}\\b"):
        with pytest.raises(ValueError, match="preset="):
            Config(preset=preset)
