"""Shared fixtures: a tiny dataset made on the spot, and the conditions for the special markers."""

import os
import sys
from dataclasses import replace
from pathlib import Path

# Before torch is imported, for this process and those that tests start: the networks are tiny, and
# a fixed number of threads is part of what makes a CPU's results the same to the bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from mlnet_utils.config import Config, load_config
from mlnet_utils.data.photos import Photo, Prepared
from mlnet_utils.runtime import sha256_file

SPLIT_SIZES = {"train": 10, "val": 5, "test": 4}
SIGMA = 6.0
# Packages of the extras, and others that the training does without. A GPU's machine may lack them.
OPTIONAL = (
    *("av", "gdown", "h5py", "hypothesis", "jupyter_client", "nbclient", "nbconvert", "nbformat"),
    *("packaging", "papermill", "pydantic", "skimage"),
)


class Module(pytest.Module):
    """A file of tests; skipped, with a reason, where an optional package that it imports lacks."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            missing = str(getattr(error.__cause__, "name", "")).partition(".")[0]
            if missing in OPTIONAL:
                pytest.skip(f"needs the package {missing}", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    """Skip, with a reason, what this machine cannot run."""
    no_data = pytest.mark.skip(reason="needs real data: set MLNET_DATA to the folder that has it")
    no_gpu = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "realdata" in item.keywords and not os.environ.get("MLNET_DATA"):
            item.add_marker(no_data)
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(no_gpu)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """Tests run on the CPU, whose results are the same to the bit, unless marked ``gpu``."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false" if "gpu" in request.keywords else "true")
    if state := sys.modules.get("accelerate.state"):  # one per process, and it keeps its device
        state.AcceleratorState._reset_state()
        state.PartialState._reset_state()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the raw datasets; for tests that are marked ``realdata``."""
    return Path(os.environ["MLNET_DATA"])


def make_photo(folder: Path, stem: str, split: str, number: int) -> Photo:
    """A textured photo with one bright disc, and three observers who looked at it."""
    rng = np.random.default_rng(number)
    height, width = (60, 80) if number % 2 else (75, 61)  # both letterbox cases, odd sizes
    centre = rng.uniform((15, 15), (width - 15, height - 15))
    y, x = np.mgrid[:height, :width]
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 64
    pixels = rng.integers(60, 120, (height, width, 3))
    pixels[disc] += np.array([120, 40, 0])
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{stem}.png")
    sha256 = sha256_file(folder / f"{stem}.png")
    points = (centre + rng.normal(0, 3, (12, 2))).clip(0, (width - 1, height - 1))
    return Photo(
        stem=stem,
        image=f"{stem}.png",
        width=width,
        height=height,
        split=split,
        fixations=points.astype(np.float32),
        observers=np.repeat(np.arange(3, dtype=np.int16), 4),
        durations=np.full(12, 200, np.float32),
        sha256=sha256,
    )


@pytest.fixture(scope="session")
def tiny_photos(tmp_path_factory) -> tuple[list[Photo], Path]:
    """19 photos with known fixations, and the folder that holds them."""
    root = tmp_path_factory.mktemp("photos")
    photos = [
        make_photo(root, f"{split}{i}", split, 100 * number + i)
        for number, (split, size) in enumerate(SPLIT_SIZES.items())
        for i in range(size)
    ]
    return photos, root


def prepare_run(folder: Path, photos: list[Photo], root: Path) -> Path:
    """A run folder whose ``data/`` is prepared, as notebook 01 leaves it."""
    meta = {
        "dataset": "tiny",
        "title": "Tiny test photos",
        "root": str(root),
        "sigma_px": SIGMA,
        "px_per_degree": None,
        "fold": -1,
        "photos": SPLIT_SIZES,
        "fixations": sum(len(photo.fixations) for photo in photos),
        "dropped_outside": 0,
    }
    Prepared(folder / "data", photos, meta).write()
    return folder


@pytest.fixture
def run_folder(tmp_path, tiny_photos) -> Path:
    """A fresh run folder on the tiny dataset."""
    return prepare_run(tmp_path / "run", *tiny_photos)


def unseen(photo: Photo, **changes) -> Photo:
    """The photo without its fixations."""
    return replace(photo.only(slice(0)), **changes)


def tiny_config(**overrides) -> Config:
    """The smallest configuration that trains: milliseconds per update."""
    small = {"height": 32, "width": 40, "prior_cells": (2, 2), "limit": 0}
    return load_config("tiny", **{**small, **overrides})


def tiny_checkpoint(path: Path, seed: int = 0, scores: dict | None = None, **overrides) -> Path:
    """A checkpoint of a random network; its maps vary over a photo and from photo to photo."""
    import torch

    from mlnet_utils.model.checkpoints import save_checkpoint
    from mlnet_utils.model.network import MLNet

    config = tiny_config(**overrides)
    torch.manual_seed(seed)
    model = MLNet(config)
    with torch.no_grad():
        model.to_map.weight.mul_(20)
        model.to_map.bias.fill_(0.5)  # keeps the paper's head alive
        if model.prior is not None:
            model.prior.normal_(0, 0.3)
    save_checkpoint(path, config, model.state_dict(), scores=scores or {})
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random network for all who only read it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("network") / "best.pt")


def files(folder: Path) -> set[str]:
    """The files below a folder, relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bilinear resize: two neighbours per axis, centres aligned, the border repeated."""
    for axis, size in enumerate((height, width)):
        at = (np.arange(size) + 0.5) * image.shape[axis] / size - 0.5
        image = np.apply_along_axis(
            lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, image
        )
    return image
