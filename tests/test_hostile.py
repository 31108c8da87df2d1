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
from mlnet_utils.running.notebooks import parameters_of


class Harm:
    """Touches the file ``harmed`` where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def unpickle(path: Path):
    return pickle.loads(path.read_bytes())


def harmful_pt2(path: Path) -> None:
    """A real export, but for the sample inputs, which torch unpickles."""
    make_photo(Path("photos"), "a", "train", 0)
    report = export(tiny_checkpoint(Path("x.pt")), "real.pt2", "torch-export", photos=["photos"])
    with zipfile.ZipFile(report.path) as real, zipfile.ZipFile(path, "w") as fake:
        for name in real.namelist():
            inputs = name.endswith("sample_inputs/model.pt")
            fake.writestr(name, pickle.dumps(Harm()) if inputs else real.read(name))


def save(content):
    return lambda path: torch.save(content, path)


def write(text: str | bytes):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def read_prepared(path: Path) -> None:
    meta = {"dataset": "tiny", "title": "Tiny", "root": ".", "sigma_px": 1}
    path.with_name("meta.json").write_text(json.dumps(meta))
    path.with_name("index.jsonl").write_text("{}")
    Prepared.read(path.parent)


def notebook(path: Path) -> None:
    cell = nbformat.v4.new_code_cell(SCRIPT, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


SCRIPT = "HARM = __import__('os').system('touch harmed')"
PICKLE = write(pickle.dumps(Harm()))
YAML = write("cells: !!python/object/apply:os.system ['touch harmed']")
OBJECTS = np.array([Harm()], dtype=object)
CASES = {  # file -> how it is written, a reader that trusts it, our reader
    "x.pt": (save({"format": Harm()}), lambda p: torch.load(p, weights_only=False), load),
    "x.pth": (save({"w": Harm()}), lambda p: torch.load(p, weights_only=False), read_weights),
    "pickle.pt": (PICKLE, unpickle, load),
    "x.safetensors": (PICKLE, unpickle, load),
    "weights.safetensors": (PICKLE, unpickle, read_weights),
    "x.h5": (PICKLE, unpickle, lambda p: import_weights(p, "x.pt")),
    "x.npz": (
        lambda p: np.savez(p, density=OBJECTS),
        lambda p: np.load(p, allow_pickle=True)["density"],
        read_density,
    ),
    "x.npy": (
        lambda p: np.save(p, OBJECTS),
        lambda p: np.load(p, allow_pickle=True),
        lambda p: fixated_pixels(p, (1, 1)),
    ),
    "x.mat": (PICKLE, unpickle, lambda p: fixated_pixels(p, (1, 1))),
    "x.onnx": (PICKLE, unpickle, load),
    "x.yaml": (YAML, lambda p: yaml.unsafe_load(p.read_bytes()), load_config),
    "fixations.npz": (
        lambda p: np.savez(p, offsets=OBJECTS, points=OBJECTS),
        lambda p: np.load(p, allow_pickle=True)["offsets"],
        read_prepared,
    ),
    "x.ipynb": (notebook, lambda p: exec(SCRIPT), parameters_of),
    "grid.yaml": (YAML, lambda p: yaml.unsafe_load(p.read_bytes()), read_grid),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, harmed = tmp_path / name, tmp_path / "harmed"
    put, trusting, ours = CASES[name]
    put(path)
    trusting(path)
    assert harmed.exists()  # the file is harmful
    harmed.unlink()
    with pytest.raises(ValueError, match=name):
        ours(path)
    assert not harmed.exists()


@pytest.mark.slow
def test_an_exported_network_is_read_without_its_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    harmful_pt2(Path("x.pt2"))
    with pytest.raises(Exception):  # noqa: B017, PT011 - harm is done before
        torch.export.load("x.pt2")
    harmed = tmp_path / "harmed"
    assert harmed.exists()
    harmed.unlink()
    photo = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    expected = load("x.pt", "cpu").predict(photo)
    np.testing.assert_array_equal(load("x.pt2").predict(photo), expected)
    assert not harmed.exists()


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backbone", "hf-hub:timm/resnet18.a1_in1k"),
        ("backbone", "local-dir:."),
        ("backbone", "resnet18/../x"),
        ("backbone_args", {"checkpoint_path": "x.pth"}),
        ("backbone_args", {"pretrained_cfg": {"hf_hub_id": "timm/resnet18.a1_in1k"}}),
    ],
)
def test_a_checkpoint_leads_to_no_other_file_or_site(tmp_path, monkeypatch, key, value):
    content = load_checkpoint(tiny_checkpoint(tmp_path / "x.pt"))
    torch.save({**content, "config": {**content["config"], key: value}}, tmp_path / "x.pt")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(ValueError, match=f"{key}="):
        load(tmp_path / "x.pt")


@pytest.mark.parametrize("cell", ["..", ".", "", "/", " "])
def test_a_cell_writes_in_its_own_folder(cell):
    with pytest.raises(ValueError, match="cells="):
        Grid("x", "tiny", {cell: {}})


@pytest.mark.parametrize("preset", ["..", "a/b", "a\\b", ""])
def test_a_preset_is_the_name_of_a_folder(preset):
    with pytest.raises(ValueError, match="preset="):
        Config(preset=preset)
