"""Every dataset in its own format: packed as at its source, served, acquired, and then read.

The layouts are written out here as ``data/README.md`` documents them, and not taken from the
readers' tables, which this checks.
"""

import ast
import contextlib
import inspect
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import files
from faulty_server import FaultyServer, Served
from miniatures import save_mat, save_osie, save_photo, save_recording, save_salicon, zipped
from PIL import Image

from mlnet_utils.data import download
from mlnet_utils.data.download import SOURCES
from mlnet_utils.data.readers import DATASETS

gdown = pytest.importorskip("gdown", reason="downloads need it")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("0[1-5]*.ipynb"))
RETRIES = "retries" in inspect.signature(gdown.download).parameters  # since gdown 6.3
STREET = "i05june05_static_street_boston_p1010764"  # the photo by which MIT1003 is recognised


def make_salicon(root, name):
    workers = [[(1, 1), (640, 480)], [(320, 240)]]
    save_salicon(root, name[-4:], workers, maps=name.endswith("2017"))


def make_osie(root, name):
    looked = {"1001.jpg": [([1.0], [1.0], [200])], "1002.jpg": [([9.0], [9.0], [100])]}
    save_osie(root, looked, *((1024, 768) if name == "eyecrowd" else (800, 600)))


def make_mit1003(root, _):
    for stem in (STREET, "i2"):
        save_photo(root / f"ALLSTIMULI/{stem}.jpeg", 200, 100)
        positions = np.repeat([[5.0, 5.0], [150.0, 50.0]], 100, axis=0)
        for observer in ("ajs", "hp"):
            save_recording(root / f"DATA/{observer}/{stem}.mat", positions)
        save_photo(root / f"ALLFIXATIONMAPS/{stem}_fixMap.jpg", 200, 100)
        marks = Image.fromarray(np.eye(100, 200, dtype=np.uint8) * 255)
        marks.save(root / f"ALLFIXATIONMAPS/{stem}_fixPts.jpg")


def make_cat2000(root, _):
    for category in ("Action", "Art"):
        save_photo(root / f"trainSet/Stimuli/{category}/001.jpg")
        save_photo(root / f"trainSet/FIXATIONMAPS/{category}/001.jpg")
        save_mat(root / f"trainSet/FIXATIONLOCS/{category}/001.mat", fixLocs=np.eye(48, 64))
        save_photo(root / f"testSet/Stimuli/{category}/001.jpg")


# The maker, the folder, and for each archive the part that it becomes and the place of that part in
# it. An archive is called as its part, or, where that is data, as the dataset.
_IMAGES = ("images", "images/")
FORMATS = {
    "salicon-2017": (make_salicon, "salicon", ("fixations-2017", ""), ("maps-2017", ""), _IMAGES),
    "salicon-2015": (make_salicon, "salicon", ("fixations-2015", ""), _IMAGES),
    "osie": (make_osie, "osie", ("data", "predicting-human-gaze-beyond-pixels-master/data/")),
    "eyecrowd": (make_osie, "eyecrowd", ("data", "saliency-in-crowd-master/data/")),
    "mit1003": (
        *(make_mit1003, "mit1003"),
        *((part, f"{part}/") for part in ("ALLSTIMULI", "DATA", "ALLFIXATIONMAPS")),
    ),
    "cat2000": (make_cat2000, "cat2000", ("trainSet", "trainSet/")),
    "mit300": (
        lambda root, _: save_photo(root / "BenchmarkIMAGES/i1.jpg"),
        *("mit300", ("BenchmarkIMAGES", "BenchmarkIMAGES/")),
    ),
    "cat2000-test": (make_cat2000, "cat2000", ("testSet", "testSet/")),
}


def packed(folder, top):
    """A zip of a folder below ``top``, with what packers add: the Mac's twins, CAT2000's Output."""
    content = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        parent, _, base = (top + path.relative_to(folder).as_posix()).rpartition("/")
        content[f"{parent}/{base}"] = path.read_bytes()
        content[f"__MACOSX/{parent}/._{base}"] = b"junk"
        content[f"{parent}/Output/{path.stem}_SaliencyMap.jpg"] = b"junk"
    return zipped(content)


@contextlib.contextmanager
def published(name, made, monkeypatch):
    """Serve the archives of a dataset made in ``made``; each is cut off once, for gdown's retry."""
    make, _, *parts = FORMATS[name]
    make(made, name)
    with FaultyServer() as server:
        served = []
        for archive, (part, top) in zip(SOURCES[name].archives, parts, strict=True):
            assert archive.name == f"{name if part == 'data' else part}.zip"
            place = archive.drive or archive.name
            content = packed(made / part, top)
            server.files[place] = Served(content, cuts=[len(content) // 2] * RETRIES)
            url = archive.url and server.url(place)
            served.append(replace(archive, url=url, md5="", known={}))  # those of the originals
        monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], archives=tuple(served)))
        monkeypatch.setattr(download, "DRIVE", server.url("{}"))
        monkeypatch.setattr("random.uniform", lambda *_: 0)  # how long gdown waits
        yield


@pytest.mark.parametrize("name", [name for name, spec in SOURCES.items() if spec.archives])
def test_a_format_is_acquired_and_read(name, tmp_path, monkeypatch):
    (_, folder, *parts), made = FORMATS[name], tmp_path / "made"
    with published(name, made, monkeypatch):
        acquired = download.acquire(name, tmp_path / "data")
    assert acquired == tmp_path / "data" / folder
    for part, _ in parts:
        assert files(acquired / part) == {".complete.json", *files(made / part)}
    assert sorted(p.name for p in acquired.iterdir()) == sorted(["archives", *dict(parts)])
    assert SOURCES[name].folder == folder
    if read := SOURCES[name].read:  # the others are photos for submissions
        found, expected = (
            [(photo.image, photo.density, photo.fixations.tolist()) for photo in read(root)]
            for root in (acquired, made)
        )
        assert found == expected
        assert any(points for *_, points in found)
        assert any(density for _, density, _ in found) == (name == "salicon-2017")


def make_json(root, _):
    save_photo(root / "images/train/a.jpg")
    images = [{"file_name": "a.jpg", "id": 7, "width": 64, "height": 48}]
    notes = [{"image_id": 7, "worker_id": 1, "fixations": [[1, 1]]}]
    (root / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": notes})
    (root / "annotations/fixations_train.json").write_text(content)


def make_maps(root, name):
    make_mit1003(root, name)
    shutil.rmtree(root / "DATA")


def make_own(root, _):
    save_photo(root / "images/a.jpg")
    save_mat(root / "fixation_maps/a.mat", marks=np.eye(48, 64))


READ = {name: (name, make) for name, (make, *_) in FORMATS.items() if SOURCES[name].read}
READ |= {"json": ("salicon-json", make_json), "own": ("folder", make_own)}
READ |= {"maps": ("mit1003", make_maps)}


@pytest.mark.parametrize("layout", READ)
def test_hidden_files_change_nothing(layout, tmp_path):
    """A Mac writes a file ``._a.jpg`` beside each a.jpg of a disk that is exFAT."""
    name, make = READ[layout]
    make(tmp_path, name)
    expected = [photo.image for photo in DATASETS[name].read(tmp_path)]
    for path in list(tmp_path.rglob("*")):
        if path.is_dir():
            save_photo(path / ".ipynb_checkpoints/x.jpg")
            for kind in (".jpg", ".jpeg", ".mat", ".png", "_fixPts.jpg"):
                (path / f"._x{kind}").write_bytes(b"junk")
        else:
            path.with_name(f"._{path.name}").write_bytes(b"junk")
    assert [photo.image for photo in DATASETS[name].read(tmp_path)] == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_parameter_download_of_a_notebook_fetches_the_dataset(path, tmp_path, monkeypatch):
    """In Colab each notebook has a machine of its own, without the photos."""
    pytest.importorskip("IPython", reason="needs the extra `notebooks`")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for text in code if "%pip" not in text for node in ast.parse(text).body]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    (wanted,) = (n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "DOWNLOAD")
    values = {"DOWNLOAD": True, "PRESET": "osie", "DATA_ROOT": str(tmp_path / "data")}
    with published("osie", tmp_path / "made", monkeypatch):
        exec(compile(ast.Module([*imports, wanted], []), str(path), "exec"), values)
    photos = sorted((tmp_path / "data/osie/data/stimuli").iterdir())
    assert [photo.name for photo in photos] == ["1001.jpg", "1002.jpg"]


def test_two_processes_that_unpack_into_one_folder_both_succeed(tmp_path, monkeypatch):
    make_osie(tmp_path / "made", "osie")
    archive = replace(SOURCES["osie"].archives[0], md5="", known={})
    given = tmp_path / archive.name
    given.write_bytes(packed(tmp_path / "made/data", "osie/data/"))
    monkeypatch.setitem(SOURCES, "osie", replace(SOURCES["osie"], archives=(archive,)))
    extract, begun = download._extract, threading.Barrier(2)

    def slow(*arguments):
        with contextlib.suppress(threading.BrokenBarrierError):
            begun.wait(timeout=0.2)  # where two unpack at a time, they meet
        return extract(*arguments)

    monkeypatch.setattr(download, "_extract", slow)
    with ThreadPoolExecutor(2) as pool:
        call = ("osie", tmp_path / "data", [given])
        calls = [pool.submit(download.acquire, *call) for _ in range(2)]
    assert {call.result() for call in calls} == {tmp_path / "data/osie"}
    assert files(tmp_path / "data/osie/data") == {".complete.json", *files(tmp_path / "made/data")}
