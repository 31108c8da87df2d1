"""Exported networks compute what PyTorch computes, and say what they are."""

import copy
import functools
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_photo, tiny_checkpoint
from PIL import Image
from torch.torch_version import TorchVersion

from mlnet_utils.data.images import read_image
from mlnet_utils.predict import export as export_module
from mlnet_utils.predict.export import CHECKED, FEWEST_CALIBRATED, export, load_exported
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.predict.predictor import Predictor, load
from mlnet_utils.runtime import display_path, sha256_file

if torch.__version__ < (2, 9):
    pytest.skip("exports need torch 2.9", allow_module_level=True)

EXTRA = ("onnx", "onnxscript", "onnxruntime")
SCORES = {"epoch": 3, "val_cc": 0.5}
save_network = functools.partial(tiny_checkpoint, scores=SCORES)
EXPORTS = {"float.onnx": {}, "x.pt2": {"format": "torch-export"}, "int8.onnx": {"int8": True}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(CHECKED + FEWEST_CALIBRATED):
        make_photo(folder, f"{number:02}", "train", number)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "best.pt"
    return save_network(path, test_scales=(1.0, 1.5))  # exported networks see photos in one size


def in_one_size(checkpoint) -> Predictor:
    ours = load(checkpoint, "cpu")
    return Predictor(ours.model, replace(ours.config, test_scales=(1.0,)))


@pytest.fixture(scope="module")
def trace():
    """``torch.onnx.export`` for those who export ``checkpoint``: its seconds are spent once."""
    convert, made = torch.onnx.export, []

    def once(*arguments, **options):
        made[:] = made or [convert(*arguments, **options).model_proto]
        return SimpleNamespace(model_proto=copy.deepcopy(made[0]))

    return once


@pytest.fixture(scope="module")
def exported(checkpoint, photos, trace):
    """The report of the export of a name in EXPORTS, which is made once."""

    @functools.cache
    def once(name):
        for package in EXTRA[1:] if name.endswith(".onnx") else ():
            pytest.importorskip(package)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.onnx, "export", trace)
            return export(checkpoint, checkpoint.with_name(name), photos=[photos], **EXPORTS[name])

    return once


# ---- the same predictions ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", ["float.onnx", "x.pt2"])
def test_predictions_equal_those_of_pytorch(name, checkpoint, exported):
    assert exported(name).deviation < 1e-5
    assert exported(name).correlation == pytest.approx(1)
    ours, theirs = in_one_size(checkpoint), load_exported(exported(name).path)
    assert theirs.config == ours.config
    rng = np.random.default_rng(5)
    batch = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 90), (77, 33), (64, 64))]
    for photo, density in zip(batch, theirs.predict_batch(batch), strict=True):
        assert density.shape == photo.shape[:2]
        np.testing.assert_allclose(density, ours.predict(photo), rtol=1e-3)


@pytest.mark.slow
def test_8_bits_are_close_and_small(checkpoint, exported, photos):
    whole, small = exported("float.onnx"), exported("int8.onnx")
    assert 0.95 < small.correlation < 1
    assert small.deviation > whole.deviation
    assert small.path.stat().st_size < 0.5 * whole.path.stat().st_size
    networks = (in_one_size(checkpoint), load_exported(small.path))
    pair = [network.predict(next(photos.iterdir())).ravel() for network in networks]
    assert np.corrcoef(pair)[0, 1] > 0.95
    assert small.summary().startswith(f"{display_path(small.path)}: 0.")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_the_file_says_what_it_is(name, checkpoint, exported):
    report, extra = exported(name), {"metadata.json": ""}
    if name == "x.pt2":
        torch.export.load(report.path, extra_files=extra)
        found = json.loads(extra["metadata.json"])
    else:
        found = load_exported(report.path).model.metadata
    assert found == report.metadata
    assert found["input"].startswith("image: (batch, 3, 32, 40) uint8 RGB")
    assert found["output"] == "saliency: (batch, 1, 4, 5) float32, probability density"
    assert found["precision"] == ("int8" if name == "int8.onnx" else "float32")
    assert json.loads(found["scores"]) == {"validation": SCORES}
    assert found["checkpoint_sha256"] == sha256_file(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"compat": "theano", "normalisation": "caffe", "prior_cells": (2, 5)},
    {"compat": "mlnet-pytorch", "dropout_channels": True},
], ids=["authors", "MLNet-Pytorch"])  # fmt: skip
def test_networks_of_the_earlier_implementations(tmp_path, photos, options):
    """VGG-16 with its padded pools, BGR input, both other kinds of upsampling, ReLU head."""
    pytest.importorskip("onnxscript")
    path = save_network(tmp_path / "x.pt", head="paper", backbone="vgg16", **options)
    report = export(path, tmp_path / "x.onnx", photos=[photos])
    assert report.deviation < 1e-4
    assert report.metadata["output"].endswith("non-negative, unnormalised")


@pytest.mark.slow
def test_the_run_gives_photos_and_scores_of_this_network(run_folder, tmp_path):
    path = save_network(run_folder / "checkpoints" / "best.pt")
    report = {
        "checkpoint_sha256": sha256_file(path), "dataset": "tiny", "split": "test", "photos": 4,
        "protocol": "mit300",
        "rows": [{"model": "uniform", "metrics": {"CC": {"mean": 0.0}}},
                 {"model": "ML-Net", "metrics": {"CC": {"mean": 0.25}, "IG": {"mean": None}}}],
    }  # fmt: skip
    (run_folder / "metrics.json").write_text(json.dumps(report))
    scores = json.loads(export(path, tmp_path / "x.pt2", "torch-export").metadata["scores"])
    expected = {key: report[key] for key in ("dataset", "split", "photos", "protocol")}
    assert scores == {"validation": SCORES, "test": {**expected, "CC": 0.25, "IG": None}}
    other = {**report, "checkpoint": display_path(path), "checkpoint_sha256": "another"}
    (run_folder / "metrics.json").write_text(json.dumps(other))
    os.utime(path, (0, 0))
    assert export_module._scores(path, {"scores": SCORES}) == {"validation": SCORES}


# ---- guards ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_exported_files_run_on_the_cpu_only_and_need_no_extra(
    exported, photos, tmp_path, monkeypatch
):
    path = exported("x.pt2").path
    with pytest.raises(ValueError, match=r"x\.pt2 .*cuda"):
        predict_folder(path, [photos], tmp_path / "out", device="cuda")
    for name in EXTRA:
        monkeypatch.setitem(sys.modules, name, None)
    network = load(path)
    assert network.device == "cpu"
    assert network.predict(Image.new("RGB", (50, 40))).shape == (40, 50)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("x.onnx", {"format": "tflite"}, "'tflite'"),
    ("x.onnx", {"format": "torch-export"}, r"\.pt2"),
    ("x.onnx", {"int8": True, "photos": ["one.png"]}, "found 1 .* at least 24"),
    ("x.pt2", {"int8": True}, "onnx"),
    ("x.pt2", {"photos": ()}, "checkpoints/"),
    ("x.pt2", {"photos": ["empty"]}, "found 0 .* at least 1"),
    ("x.pt2", {"photos": ["gone.jpg"]}, r"gone\.jpg"),
    ("x.pt2", {"photos": ["icon.png"]}, r"icon\.png.*20x10"),
    ("x.pt2", {"checkpoint": "gone.pt"}, r"gone\.pt"),
    ("x.pt2", {"checkpoint": "random.pt"}, "dropout_at_test"),
], ids=str)  # fmt: skip
def test_wrong_requests_are_errors(checkpoint, photos, tmp_path, monkeypatch, name, options, words):
    kind = "onnx" if name == "x.onnx" else "torch-export"
    options = {"checkpoint": checkpoint, "photos": [photos], "format": kind, **options}
    if options["format"] == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Image.new("RGB", (50, 40)).save("one.png")
    Image.new("RGB", (20, 10)).save("icon.png")
    save_network(Path("random.pt"), dropout_at_test=True)
    error = FileNotFoundError if "gone" in words else ValueError
    with pytest.raises(error, match=words):
        export(out=name, **options)
    assert not Path(name).exists()


def test_an_old_torch_is_an_error_before_the_work(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    with pytest.raises(ImportError, match=r"2\.9.*2\.8\.0"):
        export(checkpoint, tmp_path / "x.pt2", "torch-export", photos=[photos])


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_a_file_that_differs_is_not_written(checkpoint, photos, tmp_path, monkeypatch, trace, int8):
    pytest.importorskip("onnxscript")
    if int8:
        monkeypatch.setattr(torch.onnx, "export", trace)
    other = load(save_network(tmp_path / "other.pt", seed=1), "cpu").model
    write = export_module._write_int8 if int8 else export_module._write_float

    def sabotaged(first, images, *rest):  # in 8 bits: calibrated for photos that are all black
        return write(first, images * 0, *rest) if int8 else write(other, images, *rest)

    monkeypatch.setattr(export_module, write.__name__, sabotaged)
    with pytest.raises(RuntimeError, match="differs from PyTorch"):
        export(checkpoint, tmp_path / "x.onnx", int8=int8, photos=[photos])
    assert {path.name for path in tmp_path.iterdir()} == {"other.pt"}


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_maps_of_nan_or_of_one_value_are_no_export(checkpoint, photos, monkeypatch, value):
    found = torch.full((CHECKED, 1, 4, 5), value)
    monkeypatch.setattr(export_module, "OnnxNetwork", lambda path: lambda part: found[: len(part)])
    predictor = load(checkpoint, "cpu")
    images = torch.stack([predictor.prepare(read_image(p))[0] for p in sorted(photos.iterdir())])
    for int8 in (False, True):
        with pytest.raises(RuntimeError, match="differs from PyTorch"):
            export_module._compare(predictor, Path("x.onnx"), images[:CHECKED], int8)


@pytest.mark.parametrize(("format", "suffix"), export_module.FORMATS.items())
def test_a_full_disk_is_an_error_that_names_the_file(
    checkpoint, photos, tmp_path, monkeypatch, format, suffix
):
    """torch's own writer ended the process."""
    resource = pytest.importorskip("resource")  # not on Windows
    if format == "onnx":  # whatever network the file holds
        onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
        large = onnx.helper.make_model(onnx.helper.make_graph([], "x" * 20_000, [], []))
        monkeypatch.setattr(
            torch.onnx, "export", lambda *_, **__: SimpleNamespace(model_proto=large)
        )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=rf"x\{suffix}' could not be written"):
            export(checkpoint, tmp_path / f"x{suffix}", format, photos=[photos])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_for_long(checkpoint, photos, tmp_path, monkeypatch):
    """The next one takes the place of its files, and of those that other packages write."""
    made = []

    def killed(*arguments):
        made[:] = [Path(tempfile.mkdtemp()) / "augmented.onnx", arguments[-1]]
        raise SystemExit

    monkeypatch.setattr(export_module, "_write_float", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):
            export(checkpoint, tmp_path / "x.pt2", "torch-export", photos=[photos])
        assert list(tmp_path.iterdir()) == []
        made[0].parent.mkdir(parents=True)  # as kills leave them
        for path in made:
            path.touch()


@pytest.mark.parametrize("missing", EXTRA)
def test_a_missing_extra_is_an_error_before_the_work(checkpoint, tmp_path, monkeypatch, missing):
    pytest.importorskip("onnx", reason="needs the extra `export`")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*\[export\]"):
        export(checkpoint, tmp_path / "x.onnx", photos=[])
    if missing == "onnxruntime":
        (tmp_path / "x.onnx").touch()
        with pytest.raises(ImportError, match=r"onnxruntime.*\[export\]"):
            load(tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_files_that_do_not_exist_are_errors(tmp_path, name):
    pytest.importorskip("onnxruntime")
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path / name)


@pytest.mark.slow
def test_a_flipped_bit_is_noticed(exported, tmp_path):
    content = exported("float.onnx").path.read_bytes()
    for place in [0, *np.random.default_rng(0).integers(len(content), size=40), len(content) - 70]:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (tmp_path / "x.onnx").write_bytes(changed)
        with pytest.raises(ValueError, match="SHA-256"):
            load(tmp_path / "x.onnx")
