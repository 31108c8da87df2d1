"""Submissions: complete, in the wanted form, and a validator that notices every mistake."""

import base64
import io
import json
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import filelock
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint, tiny_config
from miniatures import TURNED, save_photo, zipped
from PIL import Image
from test_runtime import abandon

from mlnet_utils.model.checkpoints import save_checkpoint
from mlnet_utils.model.network import MLNet
from mlnet_utils.predict import submission
from mlnet_utils.predict.predictor import load
from mlnet_utils.predict.submission import benchmark_photos, validate_submission, write_submission

NAMES = [f"COCO_test2014_{number:012d}" for number in (42, 7, 523957)]
SIZES = {f"{name}.jpg": (64, 48) for name in NAMES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of the paper's head, whose zeros are the harder case."""
    return tiny_checkpoint(tmp_path_factory.mktemp("network") / "best.pt", head="paper")


@pytest.fixture(autouse=True)
def small_benchmarks(monkeypatch):
    for name, benchmark in submission.BENCHMARKS.items():
        monkeypatch.setitem(submission.BENCHMARKS, name, replace(benchmark, count=3))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three photos where SALICON has its test photos; one with a rotation to be ignored."""
    folder = tmp_path / "data" / "salicon" / "images" / "test"
    turned, *_ = (save_photo(folder / f"{n}.jpg", seed=i) for i, n in enumerate(NAMES))
    with Image.open(turned) as image:
        image.save(turned, exif=TURNED)
    return folder


@pytest.fixture
def submit(checkpoint, tmp_path, photos):
    """Writes ``out.zip``, for SALICON's 2017 edition."""
    out = tmp_path / "out.zip"
    return partial(write_submission, checkpoint, "salicon-2017", out, photos=photos)


def png(size=(64, 48), mode="L", format="PNG", constant=False) -> bytes:
    values = np.zeros(size[::-1]) if constant else np.linspace(0, 255, size[0] * size[1])
    image = Image.fromarray(values.reshape(size[::-1]).astype(np.uint8)).convert(mode)
    content = io.BytesIO()
    image.save(content, format)
    return content.getvalue()


# ---- the photos of a benchmark -----------------------------------------------------------------
def test_photos_are_found_in_the_raw_data_or_where_one_says(photos, tmp_path, monkeypatch):
    assert benchmark_photos("salicon-2017", root=tmp_path / "data") == (photos, SIZES)
    assert benchmark_photos("salicon-2015", photos=photos) == (photos, SIZES)
    monkeypatch.setenv("MLNET_DATA", str(tmp_path / "data"))
    assert benchmark_photos("salicon-2017") == (photos, SIZES)
    with pytest.raises(ValueError, match=r"COCO_test2014_.*salicon-2017.* val .*COCO_val2014_"):
        benchmark_photos("salicon-2017", "val", photos)  # as many, of another split


def test_impossible_requests_are_errors_before_the_work(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "x.rar").touch()
    (photos / f"{NAMES[1]}.jpg").rename(photos / "holiday.jpg")  # it has no COCO id
    write, json_file = partial(write_submission, "no.pt", photos=photos), tmp_path / "out.json"
    for call, error, words in (
        (partial(benchmark_photos, "salicon"), ValueError, "'salicon'"),
        (partial(benchmark_photos, "salicon-2017", "train"), ValueError, "train"),
        (partial(benchmark_photos, "salicon-2017", "val", "", "data"), ValueError, "val holds 0"),
        (partial(write, "salicon-2015", json_file), ValueError, r"holiday\.jpg"),
        (partial(write, "cat2000", json_file), ValueError, r"\.hdf5, not out\.json"),
        (partial(write, "cat2000", tmp_path / "a.hdf5"), ImportError, r"h5py.*\[legacy\]"),
        (partial(validate_submission, tmp_path / "x.zip", SIZES), FileNotFoundError, r"x\.zip"),
        (partial(validate_submission, tmp_path / "x.rar", SIZES), ValueError, r"x\.rar"),
    ):
        with pytest.raises(error, match=words):
            call()


# ---- writing -----------------------------------------------------------------------------------
def test_salicon_2017(photos, checkpoint, tmp_path, submit):
    out = submit()
    assert validate_submission(out, SIZES) == []
    with zipfile.ZipFile(out) as archive:
        assert sorted(archive.namelist()) == sorted(f"{name}.png" for name in NAMES)
        with Image.open(io.BytesIO(archive.read(f"{NAMES[1]}.png"))) as image:
            assert (image.mode, image.size) == ("L", (64, 48))
            density = load(checkpoint).predict(photos / f"{NAMES[1]}.jpg")
            assert np.abs(np.asarray(image) - 255 * density / density.max()).max() <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out.zip"}
    submission.predict_folder(checkpoint, [photos], tmp_path / "again_maps", upright=False)
    again = write_submission(checkpoint, "salicon-2017", tmp_path / "again.zip", photos=photos)
    assert again.read_bytes() == out.read_bytes()
    assert len(list((tmp_path / "again_maps").glob("*.png"))) == 3  # the user's maps stay


def test_salicon_2015(photos, checkpoint, tmp_path):
    name = "fixations_test2014_mlnet_results.json"
    out = write_submission(checkpoint, "salicon-2015", tmp_path / name, photos=photos)
    assert validate_submission(out, SIZES) == []
    assert sorted(entry["image_id"] for entry in json.loads(out.read_text())) == [7, 42, 523957]


@pytest.fixture
def categories(photos, tmp_path) -> Path:
    """As CAT2000: the same file names in several folders."""
    folder = tmp_path / "Stimuli"
    for name in ("Action/001", "Action/002", "Pattern/001"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        next(photos.iterdir()).rename(folder / f"{name}.jpg")
    return folder


def test_log_densities_for_tuebingen(categories, checkpoint, tmp_path):
    pytest.importorskip("h5py")
    out = write_submission(checkpoint, "cat2000", tmp_path / "out.hdf5", photos=categories)
    _, sizes = benchmark_photos("cat2000", photos=categories)
    assert sorted(sizes) == ["Action/001.jpg", "Action/002.jpg", "Pattern/001.jpg"]
    assert validate_submission(out, sizes) == []  # finite, of the photo's size, sums to 1
    pysaliency = pytest.importorskip("pysaliency")
    files = sorted(str(path) for path in categories.rglob("*.jpg"))
    model = pysaliency.HDF5Model(pysaliency.FileStimuli(files), str(out))
    for file, stimulus in zip(files, model.parent_model.stimuli, strict=True):
        found = np.exp(model.log_density(stimulus).astype(float))
        with Image.open(file) as image:
            expected = load(checkpoint).predict(np.asarray(image.convert("RGB")))  # as stored
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-9)


def test_an_interrupted_submission_continues(submit, tmp_path):
    stopped = mock.patch.object(submission, "_pack", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        submit()
    maps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zip_maps").glob("*.png")}
    assert len(maps) == 3
    with mock.patch.object(submission.shutil, "rmtree"):
        submit()
    assert {path: path.stat().st_mtime_ns for path in maps} == maps


def test_what_a_killed_call_left_goes_and_another_call_waits(submit, tmp_path, monkeypatch):
    pack, left = submission._pack, abandon(tmp_path / "out.zip")

    def watched(*arguments):
        assert not left.exists()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".out.zip.lock").acquire(blocking=False)
        pack(*arguments)

    monkeypatch.setattr(submission, "_pack", watched)
    submit()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out.zip"}


def test_an_incomplete_submission_is_not_written(submit, photos, tmp_path):
    broken = photos / f"{NAMES[2]}.jpg"
    broken.write_bytes(broken.read_bytes()[:700])  # the size is still readable
    with pytest.raises(RuntimeError, match="523957"):
        submit()
    assert not (tmp_path / "out.zip").exists()


def test_a_submission_that_would_be_refused_is_not_written(photos, tmp_path):
    model = MLNet(tiny_config(head="paper"))
    torch.nn.init.constant_(model.to_map.bias, -1e6)
    save_checkpoint(tmp_path / "dead.pt", tiny_config(head="paper"), model.state_dict())
    refused = pytest.raises(RuntimeError, match=r"out\.zip")
    with pytest.warns(UserWarning, match="uniform map"), refused:
        write_submission(tmp_path / "dead.pt", "salicon-2017", tmp_path / "out.zip", photos=photos)
    assert not (tmp_path / "out.zip").exists()


# ---- the validator: zip ------------------------------------------------------------------------
GOOD = {f"{name}.png": png() for name in NAMES}
ONE = f"{NAMES[0]}.png"


def problems_of(path: Path, content: bytes, sizes=SIZES) -> list[str]:
    path.write_bytes(content)
    return validate_submission(path, sizes)


def assert_starts(problems, *starts):
    assert [p[: len(start)] for p, start in zip(problems, starts, strict=True)] == list(starts)


@pytest.mark.parametrize(("change", "expected"), [
    ({}, []),
    ({ONE: None}, ["missing (1): " + ONE]),
    ({"x.png": png()}, ["not asked for (1): x.png"]),
    ({"__MACOSX/._x": b""}, ["not asked for (1): __MACOSX/._x"]),
    ({ONE: None, f"maps/{ONE}": b""}, [f"missing (1): {ONE}", f"not asked for (1): maps/{ONE}"]),
    ({ONE: png((48, 64))}, [f"not of the photo's size (1): {ONE} (48x64 instead of 64x48)"]),
    ({ONE: png(mode="RGB")}, [f"not 8-bit greyscale (1): {ONE} (RGB)"]),
    ({ONE: png(mode="I;16")}, [f"not 8-bit greyscale (1): {ONE} (I;16)"]),
    ({ONE: png(format="JPEG")}, [f"not a PNG (1): {ONE} (JPEG)"]),
    ({ONE: png(constant=True)}, ["the same value everywhere, which no metric can score (1): "]),
    ({ONE: png()[:100]}, [f"not readable (1): {ONE} "]),
    ({ONE: b"text"}, [f"not readable (1): {ONE} "]),
    (dict.fromkeys(GOOD), [f"missing (3): {', '.join(GOOD)}"]),
])  # fmt: skip
def test_every_mistake_in_a_zip_is_noticed(tmp_path, change, expected):
    entries = {name: content for name, content in {**GOOD, **change}.items() if content is not None}
    assert_starts(problems_of(tmp_path / "x.zip", zipped(entries)), *expected)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_names_and_entries(tmp_path):
    path, sizes = tmp_path / "x.zip", {f"{number:02}.jpg": (64, 48) for number in range(12)}
    expected = "missing (12): 00.png, 01.png, 02.png, 03.png, 04.png ..."
    assert problems_of(path, zipped({}), sizes) == [expected]
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*GOOD, ONE):
            archive.writestr(name, GOOD[name])
    assert validate_submission(path, SIZES) == [f"more than once (1): {ONE}"]
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    problems = problems_of(path, content)
    assert_starts(problems, "more than once", f"not readable (1): {ONE} (Bad CRC-32")


# ---- the validator: JSON -----------------------------------------------------------------------
def entry(number: int, content: bytes | None = None) -> dict:
    encoded = base64.b64encode(content or png()).decode()
    return {"image_id": number, "saliency_map": encoded}


@pytest.mark.parametrize(("entries", "start"), [
    ([entry(42), entry(7)], "missing (1): 523957"),
    ([entry(42), entry(7), entry(523957), entry(1)], "not asked for (1): 1"),
    ([entry(42), entry(7), entry(523957), entry(7)], "more than once (1): 7"),
    ([entry(42), entry(7, png((9, 9))), entry(523957)], "not of the photo's size (1): 7 (9x9"),
    ([{**entry(42), "saliency_map": "?"}, entry(7), entry(523957)], "not readable (1): 42"),
    ([{"image_id": "42", "saliency_map": ""}], "not readable (1): "),
    ({"annotations": []}, "not readable (1): "),
])  # fmt: skip
def test_every_mistake_in_json_is_noticed(tmp_path, entries, start):
    assert_starts(problems_of(tmp_path / "x.json", json.dumps(entries).encode()), start)


def test_files_that_are_damaged(tmp_path):
    pytest.importorskip("h5py")
    for name in ("x.zip", "x.json", "x.h5"):
        (problem,) = problems_of(tmp_path / name, b'[{"image_id": 4')
        assert_starts([problem], "not readable (1): ")
        assert name in problem


# ---- the validator: HDF5 -----------------------------------------------------------------------
UNIFORM = np.full((48, 64), -np.log(48 * 64))


@pytest.mark.parametrize(("change", "start"), [
    ({"a.jpg": None}, "missing (1): a.jpg"),
    ({"c/a.jpg": UNIFORM}, "not asked for (1): c/a.jpg"),
    ({"a.jpg": UNIFORM.T}, "not of the photo's size (1): a.jpg ((64, 48) instead of"),
    ({"a.jpg": np.exp(UNIFORM)}, "not a log-density that sums to 1 (1): a.jpg"),
    ({"a.jpg": np.where(np.eye(48, 64) > 0, -np.inf, UNIFORM)}, "values that are not finite"),
])  # fmt: skip
def test_every_mistake_in_hdf5_is_noticed(tmp_path, change, start):
    h5py = pytest.importorskip("h5py")
    sizes = {"a.jpg": (64, 48), "b/a.jpg": (64, 48)}
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name, values in {**dict.fromkeys(sizes, UNIFORM), **change}.items():
            if values is not None:
                file[name] = values
    assert_starts(validate_submission(tmp_path / "x.hdf5", sizes), start)
