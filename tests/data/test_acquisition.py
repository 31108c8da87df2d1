"""Every dataset in its own format: packed as at its source, served, acquired, and then read.

The layouts are written out here as ``data/README.md`` documents them, and not taken from the
readers' tables, which this checks.
"""

from dataclasses import replace

import numpy as np
import pytest
from faulty_server import FaultyServer, Served
from miniatures import save_mat, save_osie, save_photo, save_recording, save_salicon_mat, zipped

from mlnet_utils.data import download
from mlnet_utils.data.download import SOURCES

STREET = "i05june05_static_street_boston_p1010764"  # the photo by which MIT1003 is recognised


def make_salicon(root, edition):
    for number, split in enumerate(("train", "val", "test")):
        stem = f"COCO_{split}2014_{number:012d}"
        save_photo(root / f"images/{split}/{stem}.jpg", 640, 480)
        if split != "test":
            workers = [[(1, 1), (640, 480)], [(320, 240)]]
            save_salicon_mat(root / f"fixations-{edition}/{split}/{stem}.mat", workers, edition)
            if edition == "2017":
                save_photo(root / f"maps-2017/{split}/{stem}.png", 640, 480)


def make_osie(root, *size):
    looked = {"1001.jpg": [([1.0], [1.0], [200])], "1002.jpg": [([9.0], [9.0], [100])]}
    save_osie(root, looked, *size)


def make_mit1003(root):
    for stem in (STREET, "i2"):
        save_photo(root / f"ALLSTIMULI/{stem}.jpeg", 200, 100)
        for observer in ("ajs", "hp"):
            positions = np.repeat([[5.0, 5.0], [150.0, 50.0]], 100, axis=0)
            save_recording(root / f"DATA/{observer}/{stem}.mat", positions)
        for kind in ("fixPts", "fixMap"):
            save_photo(root / f"ALLFIXATIONMAPS/{stem}_{kind}.jpg", 200, 100)


def make_cat2000(root):
    for category in ("Action", "Art"):
        save_photo(root / f"trainSet/Stimuli/{category}/001.jpg")
        save_photo(root / f"trainSet/FIXATIONMAPS/{category}/001.jpg")
        save_mat(root / f"trainSet/FIXATIONLOCS/{category}/001.mat", fixLocs=np.eye(48, 64))


def make_test_photos(root, *names):
    for name in names:
        save_photo(root / name)


# Maker of the layout, and for each archive the part that it becomes and where that part lies in it.
_SALICON = {"images.zip": ("images", "images/")}
FORMATS = {
    "salicon-2017": (
        "salicon",
        lambda root: make_salicon(root, "2017"),
        {
            "fixations-2017.zip": ("fixations-2017", ""),
            "maps-2017.zip": ("maps-2017", ""),
            **_SALICON,
        },
    ),
    "salicon-2015": (
        "salicon",
        lambda root: make_salicon(root, "2015"),
        {"fixations-2015.zip": ("fixations-2015", ""), **_SALICON},
    ),
    "osie": (
        "osie",
        make_osie,
        {"osie.zip": ("data", "predicting-human-gaze-beyond-pixels-master/data/")},
    ),
    "eyecrowd": (
        "eyecrowd",
        lambda root: make_osie(root, 1024, 768),
        {"eyecrowd.zip": ("data", "saliency-in-crowd-master/data/")},
    ),
    "mit1003": (
        "mit1003",
        make_mit1003,
        {f"{part}.zip": (part, f"{part}/") for part in ("ALLSTIMULI", "DATA", "ALLFIXATIONMAPS")},
    ),
    "cat2000": ("cat2000", make_cat2000, {"trainSet.zip": ("trainSet", "trainSet/")}),
    "mit300": (
        "mit300",
        lambda root: make_test_photos(root, "BenchmarkIMAGES/i1.jpg", "BenchmarkIMAGES/i2.jpg"),
        {"BenchmarkIMAGES.zip": ("BenchmarkIMAGES", "BenchmarkIMAGES/")},
    ),
    "cat2000-test": (
        "cat2000",
        lambda root: make_test_photos(root, "testSet/Stimuli/Action/001.jpg"),
        {"testSet.zip": ("testSet", "testSet/")},
    ),
}


def packed(folder, top):
    """A zip of a folder below ``top``, with what packers add: the Mac's twins, CAT2000's Output."""
    content = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = top + path.relative_to(folder).as_posix()
        parent, _, base = name.rpartition("/")
        content[name] = path.read_bytes()
        content[f"__MACOSX/{parent}/._{base}"] = b"junk"
        content[f"{parent}/Output/{path.stem}_SaliencyMap.jpg"] = b"junk"
    return zipped(content)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_no_source_is_left_out():
    assert set(FORMATS) == {name for name, spec in SOURCES.items() if spec.archives}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_acquired_and_read(name, tmp_path, monkeypatch):
    folder, make, archives = FORMATS[name]
    made = tmp_path / "made"
    make(made)
    with FaultyServer() as server:
        served = []
        for archive in SOURCES[name].archives:
            part, top = archives[archive.name]
            place = archive.drive or archive.name
            content = packed(made / part, top)
            server.files[place] = Served(content, cuts=[len(content) // 2])
            url = archive.url and server.url(place)
            served.append(replace(archive, url=url, md5="", known={}))  # those of the originals
        monkeypatch.setattr(
            download, "SOURCES", {name: replace(SOURCES[name], archives=tuple(served))}
        )
        monkeypatch.setattr(download, "DRIVE", server.url("{}"))
        monkeypatch.setattr("random.uniform", lambda *_: 0)  # how long gdown waits
        acquired = download.acquire(name, tmp_path / "data")
    assert acquired == tmp_path / "data" / folder
    parts = [part for part, _ in archives.values()]
    for part in parts:
        assert files(acquired / part) == sorted([".complete.json", *files(made / part)])
    assert sorted(p.name for p in acquired.iterdir()) == sorted(["archives", *parts])
    assert SOURCES[name].folder == folder
    if read := SOURCES[name].read:  # the others are photos for submissions
        photos, expected = read(acquired), read(made)
        assert [(p.image, p.density) for p in photos] == [(p.image, p.density) for p in expected]
        assert [p.fixations.tolist() for p in photos] == [p.fixations.tolist() for p in expected]
        assert any(len(photo.fixations) for photo in photos)
        assert any(photo.density for photo in photos) == (name == "salicon-2017")
