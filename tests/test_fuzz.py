"""Files of any content: every reader reads them or says which file, what it expected, what to do.

Each reader is given 200 changed copies of a file that it reads. Bytes are changed in all of them,
in structured files (JSON, YAML, arrays, checkpoints) single values too.
"""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_photo, prepare_run, tiny_checkpoint, tiny_config
from miniatures import save_mat, save_osie, save_photo, save_recording, save_salicon_mat, zipped
from PIL import Image
from safetensors.torch import save_file

from mlnet_utils.config import load_config
from mlnet_utils.data.download import ArchiveError, check_unpacked, unpack
from mlnet_utils.data.images import read_density, read_image
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.data.readers import files, mit1003, osie, own, salicon
from mlnet_utils.experiments.scoring import MapFiles
from mlnet_utils.experiments.sweep import read_grid
from mlnet_utils.metrics.summary import score_table
from mlnet_utils.model import legacy
from mlnet_utils.model.checkpoints import load_checkpoint, save_published
from mlnet_utils.model.legacy import import_weights
from mlnet_utils.model.network import MLNet
from mlnet_utils.model.tensorfiles import read_weights
from mlnet_utils.predict.export import _save_onnx, _seal, load_exported
from mlnet_utils.predict.submission import validate_submission
from mlnet_utils.running import notebooks, pipeline
from mlnet_utils.runtime import read_json, write_json
from mlnet_utils.training.features import FeatureCache

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TRIALS = 200
SIZE = (16, 12)
ODD = (None, True, "", "x", -1, 0, 10**400, 1e308, [], {}, [[]], {"a": 1}, "../x", "\udcff")
ARRAYS = (np.zeros(0), np.ones((2, 2)), np.array("x"), np.full(5, np.nan), np.full(3, 2**62), 1j)


# ---- changes -----------------------------------------------------------------------------------
def with_other_bytes(content: bytes, rng) -> bytes:
    changed = bytearray(content)
    start, stop = sorted(rng.integers(len(changed) + 1, size=2))
    match rng.integers(5):
        case 0:
            del changed[start:]
        case 1:
            del changed[start : min(stop, start + 64)]
        case 2:
            changed[start:start] = changed[start:stop]
        case 3:
            changed[start : start + 8] = rng.choice([b"\0", b"\xff", b"9", b"[", b"\xd8"]) * 8
        case _:
            for place in rng.integers(len(changed), size=rng.integers(1, 9)):
                changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def with_another_value(value, rng):
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copy = keys[rng.integers(len(keys))], value.copy()
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = with_another_value(copy[key], rng)
        return copy
    odd = ARRAYS if isinstance(value, np.ndarray) else ODD
    return odd[rng.integers(len(odd))]


def structured(path: Path, content: bytes, rng) -> bytes:
    """The file with one value changed; with other bytes where it has no known structure."""
    buffer = io.BytesIO()
    match path.suffix:
        case ".json" | ".ipynb":
            return json.dumps(with_another_value(json.loads(content), rng)).encode()
        case ".jsonl":
            return json.dumps(with_another_value(json.loads(content.splitlines()[0]), rng)).encode()
        case ".yaml":
            return yaml.safe_dump(with_another_value(yaml.safe_load(content), rng)).encode()
        case ".npz":
            with np.load(io.BytesIO(content)) as arrays:
                changed = with_another_value(dict(arrays), rng)
            np.savez(buffer, **changed if isinstance(changed, dict) else {})
            return buffer.getvalue()
        case ".pt":
            value = torch.load(io.BytesIO(content), weights_only=True)
            value.pop("digest", None)
            torch.save(with_another_value(value, rng), buffer)
            return buffer.getvalue()
        case ".onnx":
            network = with_other_bytes(content[: -len(_seal(b""))], rng)
            return network + _seal(network)
        case ".mat":  # below the compression, whose checksum would tell
            size = int.from_bytes(content[132:136], "little")
            variable = with_other_bytes(zlib.decompress(content[136 : 136 + size]), rng)
            packed = zlib.compress(variable)
            length = len(packed).to_bytes(4, "little")
            return content[:132] + length + packed + content[136 + size :]
    return with_other_bytes(content, rng)


# ---- files -------------------------------------------------------------------------------------
def picture(path):
    return save_photo(path, *SIZE)


def matrix(path):
    np.save(path, np.eye(*SIZE[::-1]))


def mat_map(path):
    save_mat(path, I=np.eye(*SIZE[::-1]))


def checkpoint(path):
    """Of one small tensor, so that it is read in no time."""
    content = load_checkpoint(tiny_checkpoint(path))
    torch.save({**content, "model": {"w": torch.zeros(3)}}, path)


def published(path):
    checkpoint(path.with_suffix(".pt"))
    save_published(path, path.with_suffix(".pt"), {"a": 1})


def weights(path):
    (torch.save if path.suffix == ".pth" else save_file)({"w": torch.zeros(3)}, path)


def pt2(path):
    """What :func:`export` writes, as far as it is read, without its minute of work."""
    config, entries = tiny_config(), {}
    parts = {"x/extra/metadata.json": json.dumps({"config": json.dumps(config.to_dict())})}
    for number, (name, value) in enumerate(MLNet(config).state_dict().items()):
        sizes = [{"as_int": n} for n in value.shape]
        strides = [{"as_int": n} for n in value.stride()]
        layout = {"sizes": sizes, "strides": strides, "storage_offset": {"as_int": 0}}
        entries[name] = {"path_name": f"w{number}", "tensor_meta": layout}
        parts[f"x/data/weights/w{number}"] = value.contiguous().numpy().tobytes()
    parts["x/data/weights/model_weights_config.json"] = json.dumps({"config": entries})
    path.write_bytes(zipped(parts))


def onnx_network(path):
    helper = pytest.importorskip("onnx").helper
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in ("image", "saliency")]
    node = helper.make_node("Identity", ["image"], ["saliency"])
    graph = helper.make_graph([node], "x", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 18)]
    network = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    _save_onnx(network, {"config": json.dumps(tiny_config().to_dict())}, path)


def keras(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        group = file.create_group("convolution2d_1")
        group.attrs["weight_names"] = [b"w", b"b"]
        group["w"], group["b"] = np.zeros((2, 3, 3, 3)), np.zeros(2)
        file.attrs["layer_names"] = [b"convolution2d_1"]


def keras_vgg(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        for number in range(1, 30):
            layer = file.create_group(f"layer_{number}")
            layer.attrs["nb_params"] = 2
            layer["param_0"], layer["param_1"] = np.zeros((2, 3, 3, 3)), np.zeros(2)


def mlnet_pytorch(path):
    torch.save({"int_conv.weight": torch.zeros(3), "prior": torch.zeros(1, 1, 2, 2)}, path)


def hdf5_maps(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.create_dataset("photos/a.jpg", data=np.eye(*SIZE[::-1]), compression=9)


def read_maps(path):
    place = path if path.suffix == ".hdf5" else path.parent
    photo = Photo("a", "a.jpg", *SIZE)
    return MapFiles(place, [photo]).read(photo)


REPORT = ("rows", "fixations", "dataset", "split")


def report(path):
    found = {"mean": 0.5, "low": 0.4, "high": 0.6, "skipped": 0, "infinite": 0}
    rows = [{"model": "a", "metrics": {"CC": found}}]
    write_json(path, dict(zip(REPORT, (rows, 3, "x", "test"), strict=True)), sealed=True)


PHOTO = "COCO_test2014_000000000042.jpg"


def submission(path):
    buffer = io.BytesIO()
    pixels = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE[::-1])
    Image.fromarray(pixels).save(buffer, "png")
    grey = buffer.getvalue()
    if path.suffix == ".zip":
        path.write_bytes(zipped({PHOTO.replace("jpg", "png"): grey}))
    elif path.suffix == ".json":
        content = [{"image_id": 42, "saliency_map": base64.b64encode(grey).decode()}]
        path.write_text(json.dumps(content))
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file[PHOTO] = np.full(SIZE[::-1], -np.log(SIZE[0] * SIZE[1]), np.float32)


def validated(path):
    if problems := validate_submission(path, {PHOTO: SIZE}):
        raise ValueError(f"{path.name}: {problems}")


def notebook(path):
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [],
            "execution_count": None, "source": "LIMIT = 3\nNAME = 'x'"}  # fmt: skip
    content = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(content))


def text(content):
    return lambda path: path.write_text(content)


def prepared(path):
    """A prepared folder whose hashes are not known: its content is looked at."""
    root, meta = path.parent.parent, path.parent / "meta.json"
    prepare_run(root, [make_photo(root, "a", "train", 0)], root)
    content = {**json.loads(meta.read_text()), "files": {}, "content_sha256": None}
    meta.write_text(json.dumps(content))


def read_prepared(path):
    data = Prepared.read(path.parent)
    return data.digest, data.root, [data.density(photo) for photo in data.photos]


def read_notebook(path):
    return notebooks.parameters_of(path), notebooks.machine_paths(path)


def features(path):
    cache = object.__new__(FeatureCache)
    cache.shape, cache.first_used, cache.path = (2, 3, 4), 1, lambda *_: path
    return cache(None, False)


def unpacked(path):
    unpack(path, path.with_name(f"{np.random.default_rng().integers(1 << 60)}"), ["a"])


GAZE = "image,x,y,observer,duration\n" + "a,1,2,3,4\n" * 5 + "b,1,2,3,4\n"
SALICON = """{"images": [{"id": 1, "file_name": "a.jpg", "width": 16, "height": 12}],
 "annotations": [{"image_id": 1, "worker_id": 2, "fixations": [[1, 2], [3, 4]]}]}"""
PRESET = (
    "preset: tiny\nlr: 0.1\nprior_cells: [3, 4]\nbackbone_args: {a: {b: [1]}}\n"
    "freeze: [a, b]\nstandardise: true\nloss: kl\nheight: 64\n"
)
GRID = (
    "preset: tiny\nseeds: [0, 1]\nsplit: val\ncommon: {lr: 0.1}\n"
    "cells: {a: {}, b: {start_from: a}}\n"
)
STATE = '{"01_data_preparation": {"inputs": {"a": 1}, "outputs": {"b": "c"}, "seconds": 1}}'
PREDICTION = '{"checkpoint": "x", "sha256": "0", "versions": {"a": "1"}}'
COMPLETE = '{"files": {"a": [1, "0"], "b": [2, "1"]}}'
PREPARED = ("meta.json", "index.jsonl", "fixations.npz", "sources.json")
CASES = {  # file -> how it is written, its reader
    **{f"x.{kind}": (picture, read_image) for kind in ("jpg", "png", "tif", "webp", "gif", "bmp")},
    "size.jpg": (picture, files.photo_size),
    "density.npz": (lambda p: np.savez(p, density=np.ones((3, 4))), read_density),
    "density.png": (picture, read_density),
    "map.npy": (matrix, lambda p: files.fixated_pixels(p, SIZE)),
    "map.mat": (mat_map, lambda p: files.fixated_pixels(p, SIZE)),
    "data/eye/fixations.mat": (
        lambda p: save_osie(p.parents[2], {"1.jpg": [([1.0], [2.0], [3])] * 2}, *SIZE),
        lambda p: osie._records(p, "osie"),
    ),
    "salicon.mat": (
        lambda p: save_salicon_mat(p, [[(3, 4)]] * 2, "2017", SIZE[::-1]),
        lambda p: salicon._workers(p, "2017", "fixations", SIZE),
    ),
    "i1.mat": (lambda p: save_recording(p, np.ones((9, 2))), mit1003._eye_positions),
    "salicon.json": (text(SALICON), salicon._read_annotations),
    "fixations.csv": (text(GAZE), lambda p: own._read_lists(p, p.parent, {"a", "b"})),
    **{f"data/{name}": (prepared, read_prepared) for name in PREPARED},
    "features.npz": (lambda p: np.savez(p, features=np.ones((2, 3, 4))), features),
    "x.pt": (checkpoint, load_checkpoint),
    "published.safetensors": (published, load_checkpoint),
    "x.pth": (weights, read_weights),
    "weights.safetensors": (weights, read_weights),
    "x.h5": (keras, lambda p: import_weights(p, p.with_name("out.pt"))),
    "x.pt2": (pt2, load_exported),
    "x.onnx": (onnx_network, load_exported),
    "preset.yaml": (text(PRESET), load_config),
    "grid.yaml": (text(GRID), read_grid),
    "vgg.h5": (keras_vgg, legacy._keras_vgg16),
    "x.pkl": (mlnet_pytorch, legacy._mlnet_pytorch),
    "maps.hdf5": (hdf5_maps, read_maps),
    "maps/a.mat": (mat_map, read_maps),
    "maps/a.npy": (matrix, read_maps),
    "metrics.json": (report, lambda p: score_table(read_json(p, "evaluate", *REPORT))),
    "prediction.json": (text(PREDICTION), lambda p: read_json(p, "predict", "sha256")),
    "pipeline.json": (text(STATE), lambda p: pipeline._read_state(p.parent)),
    "set/.complete.json": (text(COMPLETE), lambda p: check_unpacked(p.parent)),
    "x.ipynb": (notebook, read_notebook),
    **{f"submission{kind}": (submission, validated) for kind in (".zip", ".json", ".hdf5")},
    "archive.zip": (lambda p: p.write_bytes(zipped({"a": b"1" * 99, "b/c": b"2"})), unpacked),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_any_content_is_read_or_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    monkeypatch.chdir(tmp_path)
    (make, read), path = CASES[name], tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for trial in range(TRIALS):
        change = structured if trial % 2 else lambda _, *rest: with_other_bytes(*rest)
        path.write_bytes(change(path, content, rng))
        try:
            read(path)
        except (ValueError, ArchiveError) as error:
            refused += 1
            if path.name not in str(error) and str(path.parent) not in str(error):
                raise AssertionError(f"trial {trial}: no name in the error") from error
    assert refused
