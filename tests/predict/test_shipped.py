"""The network that comes with the package, on photos that anybody has: scikit-image's."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from scipy.ndimage import maximum_filter

from mlnet_utils import __main__ as cli
from mlnet_utils import load
from mlnet_utils.model.checkpoints import load_checkpoint
from mlnet_utils.runtime import SHIPPED, sha256_file

ROOT = Path(__file__).resolve().parents[2]
FACE = [(180, 65, 265, 190)]  # left, top, right, bottom in the astronaut's photo
EYES_AND_NOSE = [(132, 80, 212, 152), (286, 103, 350, 167), (226, 205, 298, 275)]  # the cat's


@pytest.fixture(scope="module")
def network():
    return load(device="cpu")


def within(place, boxes):
    x, y = place
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def peaks(density, count):
    """x and y of the highest local maxima, 20 pixels apart at least."""
    y, x = np.nonzero(maximum_filter(density, 41) == density)
    order = np.argsort(-density[y, x])[:count]
    return list(zip(x[order], y[order], strict=True))


@pytest.mark.parametrize(
    ("photo", "count", "boxes"), [("astronaut", 1, FACE), ("chelsea", 2, EYES_AND_NOSE)]
)
def test_the_highest_peaks_lie_on_a_face_or_on_an_eye_and_the_nose(network, photo, count, boxes):
    places = peaks(network.predict(getattr(skimage.data, photo)()), count)
    assert len(places) == count
    assert all(within(place, boxes) for place in places), places


def test_the_file_is_small_and_described():
    assert SHIPPED.stat().st_size <= 12_000_000
    card = load_checkpoint()["card"]
    assert {"command", "commit", "validation", "backbone_sha256", "versions"} <= set(card)
    assert sha256_file(SHIPPED) in (SHIPPED.parent / "README.md").read_text("utf-8")


def test_predict_needs_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = Path(skimage.data.__file__).parent / "chelsea.png"
    assert cli.main(["predict", "--npy", str(photo)]) == 0
    density = np.load(tmp_path / "saliency" / "chelsea.npy")
    assert density.sum() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_onnx_agrees(tmp_path, network):
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    out = tmp_path / "network.onnx"
    assert cli.main(["export", "--out", str(out)]) == 0
    photo = skimage.data.astronaut()
    ours, theirs = network.predict(photo), load(out).predict(photo)
    assert np.abs(ours - theirs).max() < 1e-3 * ours.max()


@pytest.mark.slow
@pytest.mark.parametrize("source", [str(ROOT), f"git+{ROOT.as_uri()}"], ids=["folder", "git"])
def test_a_wheel_holds_the_network_and_the_presets(source, tmp_path):
    if source.startswith("git") and not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mlnet_utils/weights/{name}" for name in (SHIPPED.name, "README.md")} <= names
    assert "mlnet_utils/presets/paper.yaml" in names
