"""Trained networks for other runtimes: ONNX, ``torch.export``, and ONNX in 8 bits.

The exported network takes the letterboxed photo as it is (uint8 RGB) and returns the map on its
own grid. The metadata hold the configuration, with which :func:`load_exported` does the rest.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from mlnet_utils import runtime
from mlnet_utils.config import from_dict
from mlnet_utils.data.images import read_image, visible_files
from mlnet_utils.data.photos import Prepared
from mlnet_utils.data.preparation import hash_order
from mlnet_utils.model.checkpoints import load_model
from mlnet_utils.model.network import MLNet
from mlnet_utils.model.tensorfiles import load_strictly
from mlnet_utils.predict.predictor import EXPORTED, MODEL, Predictor

FORMATS = dict(zip(("onnx", "torch-export"), EXPORTED, strict=True))
TOLERANCE = 1e-4  # largest difference from PyTorch, as a share of the map's maximum
LOWEST_CORRELATION = 0.9  # of an 8-bit network's maps with the 32-bit ones
CHECKED, CALIBRATED, FEWEST_CALIBRATED = 8, 64, 16  # photos
OPSET = 18
IN_8_BITS = ("Conv", "Relu", "Clip", "Concat", "Add", "AveragePool", "MaxPool")


@dataclass(frozen=True)
class ExportReport:
    """The written file, and its distance from PyTorch on photos."""

    path: Path
    metadata: dict[str, str]
    deviation: float  # largest difference of a map's cell, as a share of the map's maximum
    correlation: float  # lowest correlation of a map with PyTorch's

    def summary(self) -> str:
        """A sentence with size, precision, and the distance from PyTorch."""
        size, precision = self.path.stat().st_size / 1e6, self.metadata["precision"]
        against = f"deviation {self.deviation:.1e} of the maximum, CC {self.correlation:.4f}"
        file = f"{runtime.display_path(self.path)}: {size:.1f} MB, {precision}"
        return f"{file}; against PyTorch: {against}"


def export(
    checkpoint: str | Path,
    out: str | Path,
    format: str = "onnx",
    int8: bool = False,
    photos: Sequence[str | Path] = (),
) -> ExportReport:
    """Write a trained or imported network for another runtime, verified against PyTorch on photos.

    The format is ``"onnx"`` or ``"torch-export"``, the file ``.onnx`` or ``.pt2``; the batch is
    dynamic in both. ``int8`` (ONNX only) stores weights and activations in 8 bits, calibrated on
    photos. ``photos`` are photos and folders; default: the training photos of the checkpoint's run,
    or scikit-image's for the network that comes with the package.

    Raises:
        ImportError: the extra ``export`` is not installed, or torch is older than 2.9.
        FileNotFoundError: the checkpoint or a photo does not exist.
        ValueError: a wrong format or suffix, too few photos, or a network that is random.
        RuntimeError: the result differs too much from PyTorch; nothing is written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if out.suffix != FORMATS[format]:
        raise ValueError(f"{format} is written to a file ending in {FORMATS[format]}, not {out}")
    if int8 and format != "onnx":
        raise ValueError("8 bits are made by onnxruntime: use the format onnx")
    for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        runtime.require(name, "export")
    if torch.__version__ < (2, 9):  # older versions fail, or write another layout
        raise ImportError(f"export needs torch 2.9 or newer, not {torch.__version__}")
    model, config, content = load_model(checkpoint)
    if config.dropout_at_test:
        raise ValueError("dropout_at_test makes the network random: import or train it without")
    config = replace(config, test_scales=(1.0,))  # exported networks take photos of one size
    predictor = Predictor(model, config)
    files = _photo_files(checkpoint, photos, int8)
    images = torch.stack([_input(predictor, file) for file in files])
    scale = "probability density" if config.head == "density" else "non-negative, unnormalised"
    metadata = {
        "title": "ML-Net, a deep multi-level network for saliency prediction",
        "input": f"image: (batch, 3, {config.height}, {config.width}) uint8 RGB, the photo resized "
        "with its aspect ratio kept and centred on black",
        "output": "saliency: (batch, 1, {}, {}) float32, {}".format(*config.grid, scale),
        "input_height": str(config.height),
        "input_width": str(config.width),
        "backbone": config.backbone,
        "dataset": config.dataset,
        "precision": "int8" if int8 else "float32",
        "scores": json.dumps(_scores(checkpoint, content)),
        "scores_measured_with": "PyTorch, float32",
        "config": json.dumps(config.to_dict()),
        "versions": json.dumps(runtime.versions()),
        "checkpoint_sha256": runtime.sha256_file(checkpoint),
    }
    with runtime.locked(out), _work_folder(out), runtime.atomic_path(out) as temporary:
        _write_float(model, images, metadata, temporary)
        if int8:
            _compare(predictor, temporary, images[:CHECKED])
            _write_int8(temporary, images[CHECKED:], metadata)
        deviation, correlation = _compare(predictor, temporary, images[:CHECKED], int8)
    return ExportReport(out, metadata, deviation, correlation)


def load_exported(path: str | Path) -> Predictor:
    """An exported file as a predictor on the CPU: the same pre- and postprocessing as ever.

    Raises:
        ImportError: the extra ``export`` is not installed.
        FileNotFoundError, ValueError: no such file, or a file that :func:`export` did not write.
    """
    path = Path(path)
    with runtime.reading(path, "a network that `mlnet_utils export` wrote", "export it again"):
        if path.suffix == ".onnx":
            network = OnnxNetwork(path)
            metadata = network.metadata
        else:
            network, metadata = _read_pt2(path)
        return Predictor(network, from_dict(json.loads(metadata["config"])))


def _read_pt2(path: Path) -> tuple[MLNet, dict[str, str]]:
    """The network of a ``.pt2`` file and its metadata; nothing in the file is executed.

    ``torch.export.load`` unpickles objects and evaluates expressions of the graph. Here the
    configuration builds the network, and only the weights are read, which are plain numbers.
    """
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        folder = f"{root}/data/weights"
        metadata = json.loads(archive.read(f"{root}/extra/metadata.json"))
        entries = json.loads(archive.read(f"{folder}/model_weights_config.json"))["config"]
        config = json.loads(metadata["config"]) | {"backbone_weights": "none"}
        model, weights = MLNet(from_dict(config)).eval(), {}
        kinds = {name: value.dtype for name, value in model.state_dict().items()}
        for name, entry in entries.items():
            content = bytearray(archive.read(f"{folder}/{entry['path_name']}"))
            layout = entry["tensor_meta"]
            size, stride = ([n["as_int"] for n in layout[key]] for key in ("sizes", "strides"))
            values = torch.frombuffer(content, dtype=kinds[name])
            weights[name] = values.as_strided(size, stride, layout["storage_offset"]["as_int"])
        load_strictly(model, weights, "it")
    return model, metadata


class OnnxNetwork(nn.Module):
    """An ONNX file in the place of :class:`MLNet`, run by onnxruntime."""

    def __init__(self, path: Path):
        super().__init__()
        engine = runtime.require("onnxruntime", "export")
        content = path.read_bytes()
        seal = _seal(content[: -len(_seal(b""))])
        if not content.endswith(seal):
            raise ValueError("its end is not its SHA-256: damaged, or of another version")
        self.session = engine.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.metadata.pop("sha256")  # of the file, see _seal()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 1, H/8, W/8) float32."""
        return torch.from_numpy(self.session.run(None, {"image": image.numpy()})[0])


# ---- photos and scores -------------------------------------------------------------------------
def _input(predictor: Predictor, file: Path) -> Tensor:
    with runtime.reading(file, "a photo to verify the export with", "name others"):
        return predictor.prepare(read_image(file))[0]


def _photo_files(checkpoint: Path, photos: Sequence[str | Path], int8: bool) -> list[Path]:
    """Photos to verify with, and after them photos to calibrate with."""
    run = checkpoint.absolute().parent.parent
    if photos:
        nested = [visible_files(p) if p.is_dir() else [p] for p in map(Path, photos)]
        files = [file for inner in nested for file in inner]
    elif (run / "data" / "meta.json").is_file():
        prepared = Prepared.read(run / "data")
        files = [prepared.root / photo.image for photo in hash_order(prepared.split("train"))]
    elif checkpoint == runtime.SHIPPED:
        folder = Path(runtime.require("skimage.data", "export").__file__).parent
        files = [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png")]
    else:
        missing = "does not lie in the checkpoints/ of a run with prepared data"
        raise ValueError(f"{checkpoint} {missing}: name photos to verify the export with")
    fewest = CHECKED + FEWEST_CALIBRATED if int8 else 1
    if len(files) < fewest:
        raise ValueError(f"found {len(files)} photos; this export needs at least {fewest}")
    return files[: CHECKED + CALIBRATED] if int8 else files[:CHECKED]


def _scores(checkpoint: Path, content: dict) -> dict:
    """The validation scores in the checkpoint, and the run's test scores if they are of it."""
    scores = {"validation": content.get("scores", {})}
    path = checkpoint.absolute().parent.parent / "metrics.json"
    if path.is_file():
        report = runtime.read_json(path, "`evaluate`")
        if report.get("checkpoint_sha256") == runtime.sha256_file(checkpoint):
            found = {key: report[key] for key in ("dataset", "split", "photos", "protocol")}
            for row in report["rows"]:
                if row["model"] == MODEL:
                    found |= {name: value["mean"] for name, value in row["metrics"].items()}
            scores[report["split"]] = found
    return scores


# ---- files -------------------------------------------------------------------------------------
@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[None]:
    """A place beside ``out`` for temporary files, onnxruntime's too.

    Leftovers of a killed call are deleted: call it in ``locked``.
    """
    folder, before = out.with_name(f".{out.name}.work"), tempfile.tempdir
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def _write_float(model: nn.Module, images: Tensor, metadata: dict, path: Path) -> None:
    example = (images[:1].repeat(2, 1, 1, 1),)  # a batch of 1 would be taken for a constant
    shapes = {"image": {0: torch.export.Dim("batch")}}
    if path.suffix == FORMATS["torch-export"]:
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
        content = io.BytesIO()  # writing a file itself, torch ends the process on a full disk
        torch.export.save(program, content, extra_files={"metadata.json": json.dumps(metadata)})
        path.write_bytes(content.getvalue())
        return
    names = {"input_names": ["image"], "output_names": ["saliency"]}
    options = {"dynamo": True, "dynamic_shapes": shapes, "opset_version": OPSET, "verbose": False}
    _save_onnx(torch.onnx.export(model, example, **names, **options).model_proto, metadata, path)


def _save_onnx(proto, metadata: dict, path: Path) -> None:
    import onnx

    onnx.helper.set_model_props(proto, metadata)
    content = proto.SerializeToString()
    path.write_bytes(content + _seal(content))


def _seal(content: bytes) -> bytes:
    """The end of an ONNX file: a last entry of its metadata, the SHA-256 of all before it."""
    return b"r\x4a\n\x06sha256\x12@" + hashlib.sha256(content).hexdigest().encode()


def _write_int8(path: Path, images: Tensor, metadata: dict) -> None:
    """Quantise a float ONNX file in place: 8-bit weights per channel, 8-bit activations."""
    import onnx
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feed = ({"image": image[None].numpy()} for image in images)
    with tempfile.TemporaryDirectory() as folder:
        prepared, result = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        # In float: the last convolution, which gives the map itself, and pools of -infinity.
        padded = {output for node in nodes if node.op_type == "Pad" for output in node.output}
        pools = [n.name for n in nodes if n.op_type == "MaxPool" and padded & set(n.input)]
        last = [n.name for n in nodes if n.op_type == "Conv"][-1]
        # Ranges are also computed of the -infinity that pools pad with, though pools stay in float.
        with np.errstate(invalid="ignore"):
            tools.quantize_static(
                prepared,
                result,
                SimpleNamespace(get_next=lambda: next(feed, None)),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                # 7-bit weights: processors without VNNI instructions overflow with 8.
                reduce_range=True,
                op_types_to_quantize=list(IN_8_BITS),
                nodes_to_exclude=[last, *pools],
            )
        _save_onnx(onnx.load(result), metadata, path)


@torch.inference_mode()
def _compare(
    predictor: Predictor, path: Path, images: Tensor, int8: bool = False
) -> tuple[float, float]:
    """(largest deviation, lowest correlation) of an exported file's maps, alone and in a batch."""
    expected = predictor.model(images).flatten(1).double()
    # This process has just written the file, so that torch may trust it.
    onnx = path.suffix == ".onnx"
    network = OnnxNetwork(path) if onnx else torch.export.load(path).module()
    deviations, correlations = [], []
    for batch in ([images], images.split(1)):
        found = torch.cat([network(part) for part in batch]).flatten(1).double()
        difference = (found - expected).abs().amax(1) / expected.amax(1).clamp_min(1e-12)
        deviations.append(difference.max())
        pairs = torch.stack([found, expected], dim=1)
        correlations += [torch.corrcoef(pair)[0, 1] for pair in pairs]
    # NaN, of a broken or a constant map, passes through torch's max and min.
    deviation = torch.stack(deviations).max().item()
    correlation = torch.stack(correlations).min().item()
    if not (correlation >= LOWEST_CORRELATION if int8 else deviation <= TOLERANCE):
        found = f"{deviation:.1e} of the map's maximum (correlation {correlation:.3f})"
        raise RuntimeError(f"the export differs from PyTorch by {found}: nothing was written")
    return deviation, correlation
