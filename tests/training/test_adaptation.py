"""Adapting to a dataset: 14 numbers are found again, all else stays as it was to the bit."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_photo, prepare_run, tiny_checkpoint
from PIL import Image

from mlnet_utils import __main__ as cli
from mlnet_utils.config import load_config
from mlnet_utils.data import preparation
from mlnet_utils.data.images import read_image
from mlnet_utils.data.photos import Prepared
from mlnet_utils.model import checkpoints
from mlnet_utils.model.network import Adaptation, MLNet, trainable
from mlnet_utils.predict.predictor import load
from mlnet_utils.runtime import sha256_file
from mlnet_utils.training.trainer import Trainer, fit

SIZE = {"height": 96, "width": 128}
FIXATIONS = 4000  # on each photo


@pytest.fixture
def start(tmp_path):
    """A network with a prior of its own, whose maps have peaks."""
    return tiny_checkpoint(tmp_path / "start.pt", head="density", **SIZE)


def shift():
    """What differs in another dataset: flatter, blurred, and looked at further down and left."""
    there = Adaptation()
    with torch.no_grad():
        there.temperature.fill_(0.4)
        there.blur.fill_(0.5)
        there.bias += torch.linspace(-0.5, 0.5, 3)[:, None] + torch.linspace(1, -1, 4)
    return there


@pytest.fixture
def shifted(start, tmp_path):
    """A run on photos whose fixations are drawn from the network's maps, after :func:`shift`."""
    network, rng, photos = checkpoints.load_model(start)[0], np.random.default_rng(0), []
    for number in range(12):
        photo = make_photo(tmp_path, f"p{number}", "train" if number < 10 else "val", number)
        noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((128, 96)).save(tmp_path / photo.image)
        with torch.inference_mode():
            image = read_image(tmp_path / photo.image)[None]
            density = shift()(network(image)).double().flatten().numpy()
        cells = rng.choice(density.size, FIXATIONS, p=density / density.sum())
        points = 8 * np.stack([cells % 16, cells // 16], 1).astype(np.float32) + 3
        looked = {"fixations": points, "observers": np.zeros(FIXATIONS, np.int16)}
        looked |= {"durations": None, "sha256": sha256_file(tmp_path / photo.image)}
        photos.append(replace(photo, width=128, height=96, **looked))
    return prepare_run(tmp_path / "run", photos, tmp_path)


def adapt(start, **changes):
    return load_config("adapt", start_from=start, sigma=6.0, **changes)


def weights(path):
    return checkpoints.load_checkpoint(path)["model"]


def prepare_copy(run, name="copy"):
    prepared = Prepared.read(run / "data")
    return prepare_run(run.with_name(name), prepared.photos, prepared.root)


def test_a_new_adaptation_changes_nothing():
    torch.manual_seed(0)
    density = torch.rand(2, 1, 12, 16)
    density /= density.sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(Adaptation()(density), density)
    assert sum(parameter.numel() for parameter in Adaptation().parameters()) == 14


def test_blurring_keeps_the_mass_and_spreads_it_as_far_as_it_says():
    one = torch.zeros(1, 1, 41, 41)
    one[..., 20, 20] = 1
    there = Adaptation()
    with torch.no_grad():
        there.blur.fill_(np.log(3))
    rows = there(one)[0, 0].sum(1)
    assert rows.sum().item() == pytest.approx(1, abs=1e-4)
    assert (rows * (torch.arange(41) - 20) ** 2).sum().item() == pytest.approx(9, rel=0.01)


def test_the_numbers_of_a_shift_are_found_again_and_all_other_weights_stay(start, shifted):
    best = fit(adapt(start, prior_penalty=0), shifted).best  # many fixations need no penalty
    found, true = checkpoints.load_model(best)[0].adaptation, shift()
    assert found.temperature.item() == pytest.approx(true.temperature.item(), abs=0.1)
    assert found.blur.item() == pytest.approx(true.blur.item(), abs=0.15)
    bias = (found.bias - found.bias.mean()).detach()
    assert torch.allclose(bias, true.bias - true.bias.mean(), atol=0.15)
    log = pd.read_csv(shifted / "log.csv", index_col="epoch")[["train_loss", "val_loss"]]
    assert list(log.index) == [0, 1]
    assert (log.loc[1] < log.loc[0]).all()
    before, after = weights(start), weights(best)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {key.partition(".")[0] for key in after.keys() - before.keys()} == {"adaptation"}
    assert trainable(MLNet(checkpoints.load_model(best)[1]))[0] == 14


def test_a_finished_adaptation_is_not_done_again(start, shifted):
    first = fit(adapt(start, epochs=2), shifted)
    assert [row["epoch"] for row in first.history] == [0, 1, 2]
    written = first.best.stat().st_mtime_ns
    assert fit(adapt(start, epochs=2), shifted).history == first.history
    assert first.best.stat().st_mtime_ns == written


def test_the_network_as_it_was_is_no_epoch(start, shifted, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text(f"preset: adapt\nsigma: 6\nstart_from: {start}\n")
    monkeypatch.setattr(preparation, "ensure", lambda *_: Prepared.read(shifted / "data"))
    command = ["train", "--preset", str(tmp_path / "mine.yaml"), "--run-dir", str(shifted)]
    assert cli.main(command) == 0
    assert "trained 1 epoch;" in capsys.readouterr().out


def test_an_adapted_network_predicts_and_can_be_trained_on(start, shifted, tmp_path):
    best = fit(adapt(start), shifted).best
    photo = Prepared.read(shifted / "data").split("val")[0]
    original, adapted = (load(path).predict(tmp_path / photo.image) for path in (start, best))
    assert adapted.sum() == pytest.approx(1, abs=1e-4)
    assert np.abs(adapted / original - 1).max() > 0.1
    assert load(best).explain(tmp_path / photo.image)["saliency"].shape == adapted.shape
    for preset in ("finetune", "adapt"):
        config = load_config(preset, start_from=best, epochs=1, precision="fp32")
        assert load(fit(config, prepare_copy(shifted, preset)).best).config.adapt


def test_more_fixations_are_needed_for_a_bias_that_costs(start, shifted):
    free, dear = (
        checkpoints.load_model(fit(adapt(start, prior_penalty=cost), run).best)[0].adaptation.bias
        for cost, run in ((0.0, shifted), (10.0, prepare_copy(shifted)))
    )
    assert dear.abs().max() < 0.1 * free.abs().max()


def test_one_that_was_stopped_while_it_is_validated_goes_on(start, shifted, monkeypatch):
    whole = fit(adapt(start), prepare_copy(shifted))
    real, calls = Trainer.validate, itertools.count()

    def stopped(trainer):
        if next(calls) == 1:  # the first is of the network as it was
            trainer.signals.received = "SIGINT"
        return real(trainer)

    monkeypatch.setattr(Trainer, "validate", stopped)
    with pytest.raises(KeyboardInterrupt, match=f"saved in {shifted}"):
        fit(adapt(start), shifted)
    found = fit(adapt(start), shifted)
    assert found.history == whole.history
    first, second = (weights(result.best) for result in (whole, found))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_cached_features_give_the_same(start, shifted, tmp_path, monkeypatch):
    monkeypatch.setenv("MLNET_RUNS", str(tmp_path / "runs"))
    frozen = {"freeze_norm": True, "flip": 0}
    plain = fit(adapt(start, **frozen), prepare_copy(shifted)).history[-1]
    cached = fit(adapt(start, **frozen, cache_features=True), shifted).history[-1]
    assert cached["train_loss"] == pytest.approx(plain["train_loss"], abs=0.01)


@pytest.mark.parametrize(("head", "changes", "message"), [
    ("density", {"freeze": []}, r"optimizer='lbfgs' .* adapt to true"),
    ("density", {"adapt": False}, r"optimizer='lbfgs' .* adapt to true"),  # nothing
    ("paper", {}, r"adapt .*head='density', .*head='paper'"),
])  # fmt: skip
def test_what_an_adaptation_is_not_is_refused(tmp_path, run_folder, head, changes, message):
    start = tiny_checkpoint(tmp_path / "start.pt", head=head)
    with pytest.raises(ValueError, match=message):
        fit(adapt(start, **changes), run_folder)
