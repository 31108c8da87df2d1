"""Imported weights compute what the earlier implementations compute.

Neither can be run here (Keras 1.1 on Theano 0.9 on Python 2.7; a notebook), so each is written a
second time below from its definition: ML-Net in NumPy, with true convolutions (checked against
SciPy's), shifted pools and an interpolated prior; MLNet-Pytorch as plain functions. Weights are
random, at a scale (He et al. 2015) at which activations neither vanish nor explode, in files of the
original layout.
"""

import functools
import sys
from itertools import pairwise

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import files, linear
from miniatures import truncate
from scipy.signal import convolve2d
from test_runtime import abandon

import mlnet_utils
from mlnet_utils.__main__ import main
from mlnet_utils.model import legacy
from mlnet_utils.model.checkpoints import load_checkpoint, load_model
from mlnet_utils.model.legacy import import_weights, recognise
from mlnet_utils.model.network import MLNet
from mlnet_utils.model.tensorfiles import read_weights

BLOCKS = (2, 2, 3, 3, 3)  # VGG-16's convolutions
CHANNELS = [3] + [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
SHAPES = [(o, i, 3, 3) for i, o in pairwise(CHANNELS)] + [(64, 1280, 3, 3), (1, 64, 1, 1)]
TORCH_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
KERAS_VGG_LAYERS = tuple(place + 1 for place in TORCH_PLACES)  # layer 0 pads the input


@functools.cache
def random_weights():
    """Kernel and bias of the 15 convolutions, and a prior (6, 8)."""
    rng, layers = np.random.default_rng(1), []
    for shape in SHAPES:
        kernel = rng.standard_normal(shape, dtype=np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        layers.append((kernel.astype(np.float32), rng.normal(0, 1, shape[0]).astype(np.float32)))
    return tuple(layers), rng.uniform(-0.5, 0.5, (6, 8)).astype(np.float32)


def relative_difference(a, b):
    """Largest difference, relative to the largest value of the reference ``b``."""
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


# ---- files in the original layouts -------------------------------------------------------------
def write_keras_mlnet(path, layers, prior, text=False, whole_model=False):
    """As Keras 1's save_weights: groups in network order, some of them without weights."""
    encode = str if text else str.encode
    groups = {"input_1": {}}
    for number, (kernel, bias) in enumerate(layers, 1):
        # The counter starts anywhere: it counts the layers that the process ever made.
        name = f"convolution2d_{number + 26}"
        groups |= {name: {f"{name}_W": kernel, f"{name}_b": bias}, f"maxpooling2d_{number}": {}}
    if prior is not None:
        groups["eltwiseproduct_1"] = {"param_0": prior}
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if whole_model else file
        root.attrs["layer_names"] = [encode(name) for name in groups]
        for name, weights in groups.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [encode(weight) for weight in weights]
            for weight, array in weights.items():
                write(group, weight, array)


def write_keras_vgg(path, layers):
    with h5py.File(path, "w") as file:
        for number in range(37):
            group = file.create_group(f"layer_{number}")
            group.attrs["nb_params"] = 2 if number in KERAS_VGG_LAYERS else 0
        for number, arrays in zip(KERAS_VGG_LAYERS, layers, strict=False):
            for i, array in enumerate(arrays):
                write(file[f"layer_{number}"], f"param_{i}", array)
        # The classifier, which ML-Net leaves out.
        write(file["layer_32"], "param_0", np.zeros((4, 4), np.float32))


def write(group, name, array):
    """A dataset; a shape in place of an array makes one that reads as zeros and takes no room."""
    what = {"shape": array, "dtype": "f4"} if isinstance(array, tuple) else {"data": array}
    group.create_dataset(name, **what)


EMPTY = [(shape, shape[:1]) for shape in SHAPES]


# ---- the authors' network, from its definition, in NumPy ---------------------------------------
def correlate(x, kernel, bias):
    """Border 'same': (C, H, W) and (O, C, k, k) -> (O, H, W)."""
    x, kernel, bias = (torch.from_numpy(array.astype(x.dtype)) for array in (x, kernel, bias))
    return F.conv2d(x[None], kernel, bias, padding=kernel.shape[-1] // 2)[0].numpy()


def convolve(x, kernel, bias):
    return correlate(x, kernel[:, :, ::-1, ::-1], bias)


def shifted_pool(x, stride, look=-1):
    """out[i] = max(x[stride*i - 1], x[stride*i]) along both axes; nothing lies before x[0]."""
    for axis in (1, 2):
        here = np.arange(0, x.shape[axis], stride)
        beside = (here + look).clip(0, x.shape[axis] - 1)
        x = np.maximum(x.take(here, axis), x.take(beside, axis))
    return x


def upsampled(prior, size, centre):
    """Linear interpolation along each axis; sample s stands at ratio * s + centre(ratio)."""
    for axis in (0, 1):
        ratio = size[axis] // prior.shape[axis]
        places = ratio * np.arange(prior.shape[axis]) + centre(ratio)
        prior = np.apply_along_axis(
            lambda line, n=size[axis], at=places: np.interp(np.arange(n), at, line), axis, prior
        )
    return prior


def theano_centre(ratio):
    return (ratio - 1) // 2


def keras_mlnet(
    image, layers, prior, conv=convolve, pool=shifted_pool, centre=theano_centre, order=(2, 1, 0)
):
    """The saliency map (H/8, W/8) of an RGB image (3, H, W) in 0..255."""
    mean = np.array([103.939, 116.779, 123.68], dtype=image.dtype)
    x = image[list(order)] - mean[:, None, None]
    layers, levels = iter(layers), []
    for number, block in enumerate(BLOCKS, 1):
        for _ in range(block):
            x = np.maximum(conv(x, *next(layers)), 0)
        if number < 5:
            x = pool(x, 2 if number < 4 else 1)
        if number >= 3:
            levels.append(x)
    x = np.concatenate(levels)
    x = np.maximum(conv(x, *next(layers)), 0)
    x = np.maximum(conv(x, *next(layers)), 0)[0]
    return np.maximum(x * (1 + upsampled(prior, x.shape, centre)), 0)


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    """Random weights, the checkpoint imported from their file, and its configuration."""
    folder = tmp_path_factory.mktemp("keras")
    layers, prior = random_weights()
    # The last map is rectified: make it positive in places, and only in places.
    layers = [*layers[:-1], (np.abs(layers[-1][0]), np.array([-600], np.float32))]
    write_keras_mlnet(folder / "mlnet_salicon_weights.pkl", layers, prior)
    out = folder / "mlnet.pt"
    return layers, prior, out, import_weights(folder / "mlnet_salicon_weights.pkl", out)


def random_photo(height, width):
    """Smooth noise and edges, as a photo has: (3, height, width) in 0..255."""
    rng = np.random.default_rng(5)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, height // 8, width // 8)))
    fine = rng.uniform(-40, 40, (3, height, width))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")[0].numpy()
    return (smooth + fine).clip(0, 255).round()


def predict(model, image):
    with torch.inference_mode():
        return model(torch.from_numpy(image).float()[None])[0, 0].numpy()


def test_the_reference_convolves_pools_and_interpolates():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.random((2, 7, 9)), rng.random((3, 2, 3, 3)), rng.random(3)
    pairs = [[convolve2d(*pair, mode="same") for pair in zip(x, k, strict=True)] for k in kernel]
    expected = np.sum(pairs, axis=1) + bias[:, None, None]
    np.testing.assert_allclose(convolve(x, kernel, bias), expected, rtol=1e-12)
    line = np.array([5.0, 1, 2, 9, 3, 4]).reshape(1, 1, 6)
    assert shifted_pool(line, 2).ravel().tolist() == [5, 2, 9]
    assert shifted_pool(line, 1).ravel().tolist() == [5, 5, 2, 9, 9, 4]
    wide = upsampled(np.array([[0.0, 1.0]]), (1, 20), theano_centre)[0]
    # Sample 0 at 4 and sample 1 at 14; the border repeats.
    np.testing.assert_allclose(wide, [0] * 5 + [i / 10 for i in range(1, 10)] + [1] * 6)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((96, 128), float), pytest.param((480, 640), np.float32, marks=pytest.mark.slow)],
    ids=str,
)
def test_authors_network_is_reproduced(keras, size, dtype):
    layers, prior, out, _ = keras
    image = random_photo(*size).astype(dtype)
    expected = keras_mlnet(image, layers, prior)
    assert 0.2 < (expected > 0).mean() < 0.95, "the map should be rectified, but alive"
    assert relative_difference(predict(load_model(out)[0], image), expected) < 1e-4


@pytest.mark.parametrize(
    "detail",
    [
        {"conv": correlate},
        {"pool": functools.partial(shifted_pool, look=1)},  # torchvision's
        {"centre": lambda ratio: (ratio - 1) / 2},  # PyTorch's
        {"order": (0, 1, 2)},
    ],
    ids=["rotated kernels", "shifted pools", "upsampling of the prior", "BGR"],
)
def test_each_detail_is_needed(keras, detail):
    """The agreement would not survive the loss of any of them."""
    layers, prior, *_ = keras
    ours, other = (keras_mlnet(random_photo(96, 128), layers, prior, **d) for d in ({}, detail))
    assert relative_difference(other, ours) > 0.01


def test_imported_checkpoint_says_what_it_is(keras):
    _, prior, out, config = keras
    content = load_checkpoint(out)
    assert config == load_model(out)[1]
    assert (config.height, config.width, config.prior_cells) == (480, 640, (6, 8))
    assert (config.compat, config.normalisation, config.head) == ("theano", "caffe", "paper")
    assert len(content["source"].pop("sha256")) == 64
    assert content["source"] == {"kind": "keras-mlnet", "file": "mlnet_salicon_weights.pkl"}
    np.testing.assert_array_equal(content["model"]["prior"][0, 0].numpy(), prior)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"text": True}, {"whole_model": True}])
def test_other_layouts_of_keras(keras, tmp_path, layout):
    """Names stored as text; a whole model, as the authors' ModelCheckpoint writes it."""
    layers, prior, out, config = keras
    write_keras_mlnet(tmp_path / "weights.03-0.1.pkl", layers, prior, **layout)
    assert import_weights(tmp_path / "weights.03-0.1.pkl", tmp_path / "out.pt") == config
    a, b = (load_checkpoint(path)["model"] for path in (out, tmp_path / "out.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_input_size_follows_from_the_prior(tmp_path):
    write_keras_mlnet(tmp_path / "w.h5", EMPTY, (3, 5))
    abandon(tmp_path / "out.pt")
    config = import_weights(tmp_path / "w.h5", tmp_path / "out.pt")
    assert (config.height, config.width, config.prior_cells) == (240, 400, (3, 5))
    assert files(tmp_path) == {"w.h5", "out.pt"}


def opencv(image, height, width):
    """OpenCV's own resize: of 8 bits in whole numbers, up to a grey level from ``linear``."""
    cv2 = pytest.importorskip("cv2", reason="needs the extra `study`")
    return cv2.resize(image, (width, height))


@pytest.mark.slow
@pytest.mark.parametrize(("resize", "tolerance"), [(linear, 1e-3), (opencv, 1e-2)])
def test_from_photo_to_photo(keras, tmp_path, resize, tolerance):
    """Imported on the command line, loaded and asked: the authors' steps from end to end."""
    layers, prior = keras[0], np.array([[0.5, -0.25], [0.0, -0.5]], np.float32)
    out = tmp_path / "authors.pt"
    write_keras_mlnet(tmp_path / "w.pkl", layers, prior)
    assert main(["import-weights", str(tmp_path / "w.pkl"), "--out", str(out)]) == 0
    photo = np.random.default_rng(6).integers(0, 256, (123, 209, 3)).astype(np.uint8)
    density = mlnet_utils.load(out, device="cpu").predict(photo)
    # 123 x 209 into 160 x 160: resized to 94 x 160, 33 black rows above and below.
    image = np.zeros((160, 160, 3))
    image[33:127] = resize(photo, 94, 160).round()
    saliency = keras_mlnet(image.transpose(2, 0, 1), layers, prior)
    # Back: resized until it covers the photo, 43 rows cut off above and below.
    expected = resize(saliency, 209, 209)[43:166]
    assert expected.max() > 0
    assert relative_difference(density, expected / expected.sum()) < tolerance


# ---- the authors' VGG-16 -----------------------------------------------------------------------
def test_authors_vgg16_becomes_a_backbone(tmp_path):
    layers, _ = random_weights()
    source, out = tmp_path / "vgg16_weights.h5", tmp_path / "vgg16.safetensors"
    write_keras_vgg(source, layers)
    abandon(out)
    config = import_weights(source, out)
    assert files(tmp_path) == {source.name, out.name}
    assert config.normalisation == "caffe"
    assert config.compat == "", "the paper's own training, from these weights"
    model, image = MLNet(config).eval(), random_photo(32, 40)
    expected = image[::-1] - np.array([103.939, 116.779, 123.68])[:, None, None]
    for layer in layers[:2]:
        expected = np.maximum(convolve(expected, *layer), 0)
    with torch.inference_mode():
        x = (torch.from_numpy(image).float()[None] - model.mean) / model.std
        found = model.backbone.features[:4](x.flip(1))[0].numpy()
    assert relative_difference(found, expected) < 1e-5
    state = read_weights(out)
    for place, (kernel, bias) in zip(TORCH_PLACES, layers, strict=False):
        np.testing.assert_array_equal(state[f"features.{place}.weight"], kernel[..., ::-1, ::-1])
        np.testing.assert_array_equal(state[f"features.{place}.bias"], bias)


# ---- MLNet-Pytorch -----------------------------------------------------------------------------
def torch_state(prior=(3, 4)):
    layers, _ = random_weights()
    names = [*(f"features.{place}" for place in TORCH_PLACES), "int_conv", "pre_final_conv"]
    state = {"prior": torch.rand(1, 1, *prior, generator=torch.Generator().manual_seed(0)) + 0.5}
    for name, (kernel, bias) in zip(names, layers, strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = map(torch.from_numpy, (kernel, bias))
    # Without ReLUs in between, the last bias moves the map: to where half of it is positive.
    state["pre_final_conv.bias"] = torch.tensor([11.0])
    return state


def mlnet_pytorch(image, state, ratio=10):
    """Its forward pass without dropout: RGB (B, 3, H, W) in 0..255 -> (B, 1, H/8, W/8).

    The map has ``ratio`` rows for each of the prior: ten with its photos of 240x320.
    """

    def conv(x, name, padding=1):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    x = (image / 255 - mean) / std
    places, levels = iter(TORCH_PLACES), []
    for number, block in enumerate(BLOCKS, 1):
        for _ in range(block):
            x = F.relu(conv(x, f"features.{next(places)}"))
        if number < 4:
            x = F.max_pool2d(x, 2, 2)
        if number == 4:
            x = F.max_pool2d(x, 5, stride=1, padding=2)
        if number >= 3:
            levels.append(x)
    x = conv(conv(torch.cat(levels, 1), "int_conv"), "pre_final_conv", padding=0)
    prior = F.interpolate(state["prior"], scale_factor=ratio, mode="bilinear", align_corners=True)
    return F.relu(x * prior)


def test_mlnet_pytorch_is_reproduced(tmp_path):
    """From a file in 2018's format, which is no zip."""
    state, path = torch_state(), tmp_path / "2018-10-04_25_epochs_v3.model"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    config = import_weights(path, tmp_path / "out.pt")
    assert (config.preset, config.compat) == ("mlnet-pytorch", "mlnet-pytorch")
    assert (config.height, config.width, config.prior_cells) == (240, 320, (3, 4))
    model, _, content = load_model(tmp_path / "out.pt")
    assert content["source"]["kind"] == "mlnet-pytorch"
    image = random_photo(96, 128)
    with torch.inference_mode():
        expected = mlnet_pytorch(torch.from_numpy(image).float()[None], state, ratio=4)[
            0, 0
        ].numpy()
    assert 0.2 < (expected > 0).mean() < 0.95, "the map should be rectified, but alive"
    assert relative_difference(predict(model, image), expected) < 1e-4
    model.compat = ""  # the paper's ReLUs and corners
    assert relative_difference(predict(model, image), expected) > 0.01


# ---- guards ------------------------------------------------------------------------------------
def keras_with(path, number=0, layer=None, edit=None, **changes):
    """A file of zeros, one of its layers replaced, then edited."""
    layers = [*EMPTY[:number], layer or EMPTY[number], *EMPTY[number + 1 :]]
    write_keras_mlnet(path, **{"layers": layers, "prior": (6, 8), **changes})
    if edit:
        with h5py.File(path, "a") as file:
            edit(file)


def torch_with(path, drop="", **added):
    state = {name: value for name, value in torch_state().items() if name != drop}
    torch.save({**state, **added}, path)


def cut(make):
    return lambda w: (make(w), truncate(w))


def of_three(file):
    file["eltwiseproduct_1"].attrs["weight_names"] = [b"param_0"] * 3


def without_a_kernel(file):
    del file["convolution2d_30/convolution2d_30_W"]


NAN, INTEGERS = ((np.full((64, 3, 3, 3), value), (64,)) for value in (np.nan, 1))
WIDE = ((256, 128, 5, 5), (256,))
SHORT = [(np.zeros(shape, np.float32), shape[:1]) for shape in SHAPES[:3]]
GUARDS = {
    "text": (lambda w: w.write_text("hello"), "neither HDF5 nor PyTorch"),
    "empty": (lambda w: w.write_bytes(b""), "neither HDF5 nor PyTorch"),
    "web page": (lambda w: w.write_text("\n<!DOCTYPE html><html>"), "web page"),
    "truncated Keras": (cut(lambda w: write_keras_mlnet(w, SHORT, None)), "cannot be read"),
    "other HDF5": (lambda w: h5py.File(w, "w").create_group("maps").file.close(), "maps"),
    "missing layer": (lambda w: keras_with(w, layers=EMPTY[:-1]), "14 convolutions"),
    "missing prior": (lambda w: keras_with(w, prior=None), "0 layers with a single weight"),
    "three weights": (lambda w: keras_with(w, edit=of_three), "eltwiseproduct_1 holds 3"),
    "missing weight": (lambda w: keras_with(w, edit=without_a_kernel), "convolution2d_30_W"),
    "wrong shape": (
        lambda w: keras_with(w, 4, WIDE),
        r"backbone\.features\.10\.weight.*256, 128, 5, 5.*256, 128, 3, 3",
    ),
    "not finite": (lambda w: keras_with(w, 0, NAN), "convolution2d_27_W"),
    "integers": (lambda w: keras_with(w, 0, INTEGERS), "convolution2d_27_W"),
    "wrong prior": (lambda w: keras_with(w, prior=(6,)), r"\(1, 1, 6\)"),
    "missing VGG layer": (lambda w: write_keras_vgg(w, EMPTY[:12]), "param_0"),
    "truncated PyTorch": (cut(torch_with), "cannot be read"),
    "other PyTorch": (lambda w: torch.save({"a": torch.zeros(1)}, w), "with a in it"),
    "own checkpoint": (lambda w: torch.save({"format": "x"}, w), "tensors by name"),
    "missing tensor": (
        lambda w: torch_with(w, "features.24.bias"), r"backbone\.features\.24\.bias"
    ),
    "missing prior tensor": (lambda w: torch_with(w, "prior"), "lacks prior"),
    "wrong prior tensor": (lambda w: torch_with(w, prior=torch.ones(3, 4)), r"\(3, 4\)"),
    "unknown tensor": (lambda w: torch_with(w, extra=torch.ones(1)), "extra"),
}  # fmt: skip


@pytest.mark.parametrize("name", GUARDS)
def test_wrong_files_are_refused(tmp_path, name):
    make, fact = GUARDS[name]
    make(tmp_path / "w")
    out = tmp_path / ("out.safetensors" if "VGG" in name else "out.pt")
    with pytest.raises(ValueError, match=fact):
        import_weights(tmp_path / "w", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "out", "fact"),
    [
        (lambda w: write_keras_vgg(w, EMPTY), "out.pt", r"keras-vgg16.*\.safetensors"),
        (keras_with, "out.safetensors", r"keras-mlnet.*\.pt"),
        (keras_with, "./w", "elsewhere"),
    ],
)
def test_the_result_s_name_must_fit_and_be_another(tmp_path, make, out, fact):
    make(tmp_path / "w")
    before = (tmp_path / "w").read_bytes()
    with pytest.raises(ValueError, match=fact):
        import_weights(tmp_path / "w", tmp_path / out)
    assert (tmp_path / "w").read_bytes() == before


def test_recognition_ignores_the_name(tmp_path, monkeypatch):
    keras_with(tmp_path / "a.pth")
    write_keras_vgg(tmp_path / "b", EMPTY)
    torch.save({"int_conv.weight": torch.zeros(1)}, tmp_path / "c")
    assert [recognise(tmp_path / name) for name in ("a.pth", "b", "c")] == list(legacy.KINDS)
    with pytest.raises(FileNotFoundError, match="gone"):
        import_weights(tmp_path / "gone", tmp_path / "out.pt")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"mlnet-utils\[legacy\]"):
        recognise(tmp_path / "a.pth")
