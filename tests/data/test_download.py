"""Acquiring a dataset: from servers that cut, lie, forget and refuse, or from the user's files."""

import hashlib
import inspect
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gdown
import numpy as np
import pytest
import requests
from conftest import files
from faulty_server import PAGE, FaultyServer, Served
from miniatures import zipped

from mlnet_utils.data import download
from mlnet_utils.data.download import SOURCES, ArchiveError, TransferError, acquire
from mlnet_utils.data.readers.spec import Archive, DatasetSpec
from mlnet_utils.runtime import sha256_file

# Random bytes, so that the archive is some blocks of 1 MiB long.
PHOTOS = zipped(
    {"top/train/1.jpg": np.random.default_rng(0).bytes(3_000_000), "top/val/2.jpg": b"2"}
)
POINTS = zipped({"train/1.mat": b"one", "val/2.mat": b"two"})
BOTH = ("train", "val")
KEPT = {"photos.zip", "points-1.zip"}
RETRIES = "retries" in inspect.signature(gdown.download).parameters
retries = pytest.mark.skipif(not RETRIES, reason="needs gdown 6.3, which retries")


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda *_: 0)  # how long gdown waits
    monkeypatch.setattr(download, "RETRIES", 2)
    with FaultyServer() as running:
        running.files["points.zip"] = Served(POINTS, False, 'W/"x"', chunked=True)  # as GitHub
        running.files["photos"] = Served(PHOTOS)
        yield running


@pytest.fixture
def sources(server, monkeypatch):
    """Two editions of a dataset ``tiny``: points over HTTP, photos of both from a "Drive"."""
    photos = Archive("photos.zip", "images", BOTH, drive="photos", md5=md5(PHOTOS))
    place = {"url": server.url("points.zip"), "published": "points.zip"}
    points = Archive("points-1.zip", "points", BOTH, **place)
    other = Archive("p.zip", "p", ("train",), md5=md5(b"other"))
    made = {
        "tiny": DatasetSpec("tiny", "", "tiny", archives=(points, photos)),
        "other": DatasetSpec("other", "", "tiny", archives=(other, photos)),
        "own": DatasetSpec("own", "", "tiny", by_hand="place everything"),
    }
    monkeypatch.setattr(download, "SOURCES", made)
    monkeypatch.setattr(download, "DRIVE", server.url("{}"))
    return made


def change(sources, number, **changes):
    archives = list(sources["tiny"].archives)
    archives[number] = replace(archives[number], **changes)
    sources["tiny"] = replace(sources["tiny"], archives=archives)


# ---- what is here ------------------------------------------------------------------------------
def test_what_is_complete_is_compared_with_its_record(server, sources, tmp_path):
    folder = acquire("tiny", tmp_path)
    assert folder == acquire("tiny", tmp_path) == tmp_path / "tiny"
    (folder / "points/train/1.mat").write_bytes(b"two")  # of the same size
    with pytest.raises(ArchiveError, match=r"1 files .*1\.mat .*content"):
        acquire("tiny", tmp_path)
    (folder / "points/train/1.mat").unlink()
    with pytest.raises(ArchiveError, match=r"1 files .*1\.mat .*missing"):
        acquire("tiny", tmp_path)
    shutil.rmtree(folder / "points")
    acquire("tiny", tmp_path)  # from the archive that was kept
    assert (folder / "points/train/1.mat").read_bytes() == b"one"
    assert len(server.files["points.zip"].requests) == 1  # in all


def test_the_users_archives_are_used_where_they_are(server, sources, tmp_path):
    given = [tmp_path / "points.zip", tmp_path / "photos.zip"]
    for path, content in zip(given, (POINTS, PHOTOS), strict=True):
        path.write_bytes(content)
    folder = acquire("tiny", tmp_path / "data", given)
    assert {path.name for path in folder.iterdir()} == {"images", "points"}
    assert not server.files["points.zip"].requests


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"other", "MD5 .*of other"), (PAGE, "web page"), (b"x", "MD5")],
    ids=["other edition", "web page", "damaged"],
)
def test_the_users_wrong_archive_is_recognised_and_kept(sources, tmp_path, content, said):
    change(sources, 0, md5=md5(POINTS))
    (tmp_path / "points.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"points\.zip is .*{said}"):
        acquire("tiny", tmp_path, [tmp_path / "points.zip"])
    assert (tmp_path / "points.zip").exists()


def test_wrong_arguments(sources, tmp_path):
    with pytest.raises(ValueError, match=r"'tinny': .* tiny, other, own"):
        acquire("tinny", tmp_path)
    with pytest.raises(ValueError, match=r"own .*: place everything in .*tiny"):
        acquire("own", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"x\.zip"):
        acquire("tiny", tmp_path, [tmp_path / "x.zip"])
    (tmp_path / "x.zip").write_bytes(POINTS)
    with pytest.raises(ValueError, match=r"x\.zip .*tiny.*: photos\.zip, points-1\.zip, "):
        acquire("tiny", tmp_path, [tmp_path / "x.zip"])
    (tmp_path / "tiny/points").mkdir(parents=True)  # the user's own
    with pytest.raises(FileExistsError, match=r"tiny/points"):
        acquire("tiny", tmp_path)


# ---- transfers that go on ----------------------------------------------------------------------
@retries
def test_a_second_run_goes_on_where_the_first_gave_up(server, sources, tmp_path, monkeypatch):
    served = server.files["photos"]
    served.cuts = [2_000_000]
    monkeypatch.setattr(download, "RETRIES", 0)
    with pytest.raises(TransferError, match=r"received \d{7} bytes"):
        acquire("tiny", tmp_path)
    assert not (tmp_path / "tiny/archives/photos.zip").exists()
    acquire("tiny", tmp_path)
    assert served.requests[-1]["Range"] > "bytes=1"


@retries
@pytest.mark.parametrize("fault", ["no ranges", "shorter", "changed"])
def test_a_server_that_cannot_go_on_starts_anew(server, sources, tmp_path, monkeypatch, fault):
    served = server.files["photos"]
    served.cuts = [2_000_000]
    if fault == "no ranges":  # as GitHub
        served.ranges = False
    else:
        other = POINTS  # the part is longer than the file now
        if fault == "changed":  # what came is not spliced with what comes
            other = zipped({"train/1": np.random.default_rng(1).bytes(3_000_000), "val/2": b""})
        monkeypatch.setattr(download, "RETRIES", 0)
        with pytest.raises(TransferError):
            acquire("tiny", tmp_path)
        server.files["photos"] = Served(other, etag='"2"')
        change(sources, 1, md5=md5(other))
        if fault == "changed":
            with pytest.raises(ArchiveError, match="its MD5"):
                acquire("tiny", tmp_path)
    acquire("tiny", tmp_path)
    assert files(tmp_path / "tiny/archives") == KEPT


# ---- faults: an error that names the file and the remedy, and nothing looks complete -------------
FAULTS = {
    "404": (None, "404"),
    "cut": ({"cuts": [10, 0, 0, 0]}, "received"),
    "stalls": ({"stalls": 4}, "timed out"),
    "web page": ({"content": PAGE}, "web page"),
    "damaged": ({"content": POINTS[:100]}, "points-1.zip"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=retries if f in ("cut", "stalls") else ()) for f in FAULTS]
)
def test_faults(server, sources, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    spoiled, said = FAULTS[fault]
    server.files["points.zip"] = spoiled and Served(**{"content": POINTS, **spoiled})
    with pytest.raises((TransferError, ArchiveError)) as caught:
        acquire("tiny", tmp_path)
    for words in (said, "points.zip in", "archives/points-1.zip", "tiny --from points.zip"):
        assert words in str(caught.value)
    folder = tmp_path / "tiny"
    assert not (folder / "points").exists()
    assert not (folder / "archives/points-1.zip").exists()
    server.files["points.zip"] = Served(POINTS)
    acquire("tiny", tmp_path)
    assert files(folder / "archives") == KEPT


def test_refusals_of_google_drive(server, sources, tmp_path, monkeypatch):
    server.files["photos"] = Served(PAGE)
    with pytest.raises(ArchiveError, match=r"https://drive.google.com/file/d/photos/view"):
        acquire("tiny", tmp_path)

    def refuse(*_, **__):
        raise gdown.exceptions.FileURLRetrievalError("Too many users\n\thave viewed the file")

    monkeypatch.setattr(gdown, "download", refuse)
    with pytest.raises(TransferError, match=r"Too many users have .*quota.*archives/photos\.zip"):
        acquire("tiny", tmp_path)
    assert (tmp_path / "tiny/points").exists()  # what is done stays done


@pytest.mark.parametrize("fault", [None, "cut", "web page"])
def test_an_early_gdown_fetches_too(server, sources, tmp_path, monkeypatch, fault):
    """Colab has gdown 5.2, which cannot retry; a file that was cut is fetched anew."""

    def early(url=None, output=None, quiet=False, use_cookies=True, resume=False):
        assert not resume  # it appends a whole file to the part of one
        response = requests.get(url, stream=True)
        Path(output).write_bytes(response.content)

    monkeypatch.setattr(gdown, "download", early)
    monkeypatch.delattr(gdown.exceptions, "DownloadError", raising=False)
    if fault:
        server.files["points.zip"] = Served(**{"content": POINTS, **FAULTS[fault][0]})
        with pytest.raises((TransferError, ArchiveError), match=r"--from points\.zip"):
            acquire("tiny", tmp_path)
        server.files["points.zip"] = Served(POINTS)
    assert files(acquire("tiny", tmp_path) / "archives") == KEPT


@retries
def test_a_full_disk_is_noticed_before_the_transfer(server, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match=r"photos needs 0\.00 GB"):
        acquire("tiny", tmp_path)


@retries
def test_the_transfer_is_reported(server, sources, tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("mlnet_utils.runtime.time.monotonic", lambda: next(clock))
    acquire("tiny", tmp_path)
    assert re.search(r"photos\.zip: 3 .*0\.5 MB", capsys.readouterr().out)


# ---- the table of sources ----------------------------------------------------------------------
README = (Path(__file__).parents[2] / "data/README.md").read_text("utf-8")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_complete_and_documented(name):
    for archive in SOURCES[name].archives:
        assert bool(archive.url) != bool(archive.drive)
        assert archive.page.startswith(("https://", "http://saliency.mit.edu/"))
        assert len(archive.md5) in (0, 32)
        assert archive.holds
        assert set(archive.known) <= set(archive.holds)
        assert all(len(sha256) == 64 for sha256 in archive.known.values())
        assert SOURCES[name].citation
    assert f"`{name}`" in README
    citation = SOURCES[name].citation
    # The title, between full stops, is the longest part.
    facts = [max(citation.split(". "), key=len), *re.findall(r"[A-Z]\. (\w+)", citation)]
    facts += re.findall(r"\d{4}", citation)
    paragraphs = re.sub(r"\n(?!\n)", " ", README).split("\n")
    assert any(all(fact in paragraph for fact in facts) for paragraph in paragraphs)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["osie", "eyecrowd"])
def test_the_fixations_are_those_published(real_data, name):
    (archive,) = SOURCES[name].archives
    for path, sha256 in archive.known.items():
        assert sha256_file(real_data / name / archive.into / path) == sha256
