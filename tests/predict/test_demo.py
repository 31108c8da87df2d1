"""The page in docs/demo, in headless Chromium: the maps are PyTorch's, and nothing is uploaded."""

import hashlib
import importlib.util
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from miniatures import TURNED
from PIL import Image

from mlnet_utils.predict.export import export
from mlnet_utils.predict.predictor import load

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {
    "density": {"height": 96, "width": 128, "test_flip": True},
    "paper": {"height": 64, "width": 96, "head": "paper"},
    "authors": {
        **{"height": 120, "width": 80, "head": "paper", "compat": "theano"},
        **{"normalisation": "caffe", "prior_cells": (3, 2)},
    },
}
PHOTOS = ("astronaut.png", "turned.jpg", "transparent.png", "grey.png", "small.webp")
TOLERANCE = 1e-3  # of the map's maximum
SCRIPT = """\
const report = {};
for (const network of NETWORKS) {
  const page = await open(network, 400);
  const find = (id) => page.getElementById(id);
  const wide = () => page.documentElement.scrollWidth;
  const told = (report[network] = { empty: wide(), seconds: {}, sizes: {} });
  for (const photo of PHOTOS) {
    const { density, height, width, seconds } = await predict(page, `photos/${photo}`);
    await post(`${network}/${photo}`, density);
    Object.assign(told, { filled: wide(), status: find("status").textContent });
    told.seconds[photo] = seconds;
    told.sizes[photo] = [height, width];
  }
  told.overlay = find("overlay").getAttribute("aria-label");

  // The saved picture, at three opacities.
  page.defaultView.HTMLAnchorElement.prototype.click = function () { page.saved = this; };
  await predict(page, "photos/astronaut.png");
  for (const opacity of [0, 65, 100]) {
    find("opacity").value = opacity;
    find("opacity").dispatchEvent(new Event("input"));
    page.saved = null;
    find("save").click();
    await until(() => page.saved);
    told.name = page.saved.download;
    await post(`${network}/saved${opacity}`, await (await fetch(page.saved.href)).blob());
  }

  // Files that are no photos, and after them a photo that was chosen.
  for (const wrong of ["notes.txt", "icon.png"]) {
    await drop(page, `photos/${wrong}`);
    await until(() => !find("problem").hidden && find("problem").textContent.includes(wrong));
  }
  find("file").files = (await parcel("photos/turned.jpg")).files;
  const chosen = new Promise((go) => page.addEventListener("prediction", go, { once: true }));
  find("file").dispatchEvent(new Event("change"));
  await chosen;
  told.problem = find("problem").hidden;
}
const page = await open(NETWORKS[0], 1280);
report.desktop = page.documentElement.scrollWidth;
report.flipped = (await open("flipped", 400)).getElementById("problem").textContent;
await post("report", JSON.stringify(report));
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(demo, tmp_path_factory) -> Path:
    """A page for every network, and photos of every kind."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photos")
    if not demo.CHROMIUM:
        pytest.skip("needs Chromium on the PATH")
    if torch.__version__ < (2, 9):
        pytest.skip("exports need torch 2.9")
    site = tmp_path_factory.mktemp("site")
    try:
        runtime = demo.place_runtime(site)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs npm and its registry ({error})")

    (site / "photos").mkdir()
    astronaut, cat = Image.fromarray(data.astronaut()), Image.fromarray(data.chelsea())
    astronaut.save(site / "photos" / "astronaut.png")
    cat.save(site / "photos" / "turned.jpg", exif=TURNED, quality=90)
    cat.putalpha(Image.linear_gradient("L").resize(cat.size))
    cat.save(site / "photos" / "transparent.png")
    astronaut.convert("L").resize((333, 90)).save(site / "photos" / "grey.png")
    astronaut.resize((37, 50)).save(site / "photos" / "small.webp", lossless=True)
    astronaut.resize((20, 40)).save(site / "photos" / "icon.png")
    (site / "photos" / "notes.txt").write_text("no picture")

    for name, overrides in NETWORKS.items():
        page = demo.link_page(site / name, runtime)
        checkpoint = tiny_checkpoint(page / "best.pt", **overrides)
        export(checkpoint, page / "network.onnx", photos=[site / "photos" / "astronaut.png"])
    flipped = bytearray((page / "network.onnx").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (demo.link_page(site / "flipped", runtime) / "network.onnx").write_bytes(flipped)
    return site


@pytest.fixture(scope="module")
def visit(demo, site):
    lists = f"const NETWORKS = {list(NETWORKS)}; const PHOTOS = {list(PHOTOS)};"
    return demo.visit(site, lists + SCRIPT)


@pytest.fixture
def report(visit) -> dict:
    return json.loads(visit.posts["report"])


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_map_is_that_of_pytorch(network, photo, site, visit, report):
    expected = load(site / network / "best.pt", "cpu").predict(site / "photos" / photo)
    assert report[network]["sizes"][photo] == list(expected.shape)
    found = np.frombuffer(visit.posts[f"{network}/{photo}"], np.float32).reshape(expected.shape)
    assert expected.max() > 1.5 * expected.min()  # a map, not a plain
    assert np.abs(found - expected).max() <= TOLERANCE * expected.max()


def test_nothing_is_uploaded_and_the_console_stays_empty(visit):
    assert visit.console == []
    assert {status for _, _, status in visit.requests} <= {200, 304}
    own = {"/report", "/done", *(f"/{path}" for path in visit.posts)}  # the script's
    assert {path for method, path, _ in visit.requests if method != "GET"} <= own


@pytest.mark.parametrize("network", NETWORKS)
def test_the_page_says_its_time_and_what_is_damaged_and_fits_a_phone(network, report):
    told = report[network]
    assert re.search(r"\d\.\d\d s", told["status"])
    assert max(told["empty"], told["filled"]) <= 400
    assert report["desktop"] <= 1280
    assert "small.webp" in told["overlay"]
    assert told["problem"]  # hidden once a photo was chosen
    assert told["name"] == "astronaut_overlay.png"
    assert "network.onnx is damaged" in report["flipped"]  # by one bit


def test_the_saved_picture_shows_the_map_as_strongly_as_wanted(site, visit):
    def pixels(file):
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB")).astype(float)

    photo = pixels(site / "photos" / "astronaut.png")
    saved = [io.BytesIO(visit.posts[f"density/saved{opacity}"]) for opacity in (0, 65, 100)]
    changes = [np.abs(pixels(picture) - photo).mean() for picture in saved]
    assert changes[0] < 0.1
    assert changes[2] > changes[1] > 5


def test_another_runtime_is_fetched_anew_or_refused(demo, tmp_path, monkeypatch):
    def pack(command, cwd, **_):
        with tarfile.open(Path(cwd) / "x.tgz", "w:gz") as archive:
            for name, content in fetched.items():
                info = tarfile.TarInfo(f"package/dist/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    monkeypatch.setattr(demo.shutil, "which", str)
    monkeypatch.setattr(demo.subprocess, "run", pack)
    right = {name: name.encode() for name in demo.FILES}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in right.items()}
    monkeypatch.setattr(demo, "FILES", digests)
    name, fetched = next(iter(right)), right
    (demo.place_runtime(tmp_path) / name).write_bytes(b"flipped")
    fetched = {**right, name: b"another package"}
    with pytest.raises(ValueError, match=re.escape(name)):
        demo.place_runtime(tmp_path)
    fetched = right
    assert (demo.place_runtime(tmp_path) / name).read_bytes() == right[name]
