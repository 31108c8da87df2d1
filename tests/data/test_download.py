"""Acquiring a dataset from a server with faults, and from the user's own archives."""

import hashlib
import io
import json
import shutil
import zipfile

import pytest
from faulty_server import PAGE, FaultyServer, Served

from mlnet_utils.data import download, transfer
from mlnet_utils.data.archives import ArchiveError
from mlnet_utils.data.download import acquire
from mlnet_utils.data.sources import SOURCES, Archive, Source
from mlnet_utils.data.transfer import Retries, TransferError, WebPageError

FAST = Retries(attempts=2, sleep=lambda _: None)


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


PHOTOS = zipped({"top/train/1.jpg": b"photo one", "top/val/2.jpg": b"photo two"})
POINTS = zipped({"train/1.mat": b"one", "val/2.mat": b"two"})


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def server():
    with FaultyServer() as running:
        running.files["points.zip"] = Served(POINTS)
        running.files["photos"] = Served(PHOTOS)
        yield running


@pytest.fixture
def sources(server, monkeypatch):
    """Two editions of a dataset ``tiny``: points over HTTP, photos of both from a "Drive"."""
    photos = Archive("photos.zip", "images", ("train", "val"), drive="photos", md5=md5(PHOTOS))
    points = Archive("points-1.zip", "points", ("train", "val"), published="points.zip")
    made = {
        "tiny": Source(
            "tiny", (Archive(**{**vars(points), "url": server.url("points.zip")}), photos)
        ),
        "other": Source("tiny", (Archive("p.zip", "p", ("train",), md5=md5(b"other")), photos)),
        "own": Source("own", instructions="place everything"),
    }
    monkeypatch.setattr(download, "SOURCES", made)
    monkeypatch.setattr(transfer, "DRIVE", server.url("{}"))
    return made


def change(sources, number, **changes):
    archives = list(sources["tiny"].archives)
    archives[number] = Archive(**{**vars(archives[number]), **changes})
    sources["tiny"] = Source("tiny", tuple(archives))


def test_everything_is_fetched_verified_unpacked_and_recorded(server, sources, tmp_path):
    folder = acquire("tiny", tmp_path, retries=FAST)
    assert folder == tmp_path / "tiny"
    assert (folder / "images/train/1.jpg").read_bytes() == b"photo one"
    assert (folder / "points/val/2.mat").read_bytes() == b"two"
    assert sorted(path.name for path in (folder / "archives").iterdir()) == [
        "photos.zip",
        "points-1.zip",
    ]
    assert json.loads((folder / "checksums.json").read_text()) == {
        "points-1.zip": {"sha256": hashlib.sha256(POINTS).hexdigest()},
        "photos.zip": {"sha256": hashlib.sha256(PHOTOS).hexdigest()},
    }


def test_what_is_complete_is_not_fetched_again(server, sources, tmp_path):
    acquire("tiny", tmp_path)
    acquire("tiny", tmp_path)
    assert len(server.files["points.zip"].requests) == 1


def test_what_is_complete_is_compared_with_its_record(sources, tmp_path):
    folder = acquire("tiny", tmp_path)
    (folder / "points/train/1.mat").write_bytes(b"two")  # of the same size
    with pytest.raises(ArchiveError, match=r"1 files have changed .*1.mat has other content\)"):
        acquire("tiny", tmp_path)
    (folder / "points/.complete.json").write_text("[]")
    with pytest.raises(ValueError, match=r"points/.complete.json is no record of unpacked files"):
        acquire("tiny", tmp_path)


def test_a_kill_never_leaves_a_folder_whose_archive_is_not_recorded(sources, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_record", killed)
        with pytest.raises(KeyboardInterrupt):
            acquire("tiny", tmp_path)
    assert not (tmp_path / "tiny/points").exists()
    folder = acquire("tiny", tmp_path)
    assert set(json.loads((folder / "checksums.json").read_text())) == {
        "points-1.zip",
        "photos.zip",
    }


@pytest.mark.parametrize("content", ["[]", '{"points-1.zip": "12"}', '{"points-1.zip": {}}'])
def test_checksums_that_are_none(sources, tmp_path, content):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/checksums.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"tiny/checksums.json is no record of archives.*delete it"
    ):
        acquire("tiny", tmp_path)


def test_a_drive_file_that_does_not_fit_is_not_fetched(server, sources, tmp_path):
    change(sources, 1, about=10**18)
    with pytest.raises(OSError, match=r"photos \(a rough size\) needs 1000000000.00 GB"):
        acquire("tiny", tmp_path)
    assert not server.files["photos"].requests


def test_an_archive_that_is_kept_saves_a_download(server, sources, tmp_path):
    acquire("tiny", tmp_path)
    (tmp_path / "tiny/points/train/1.mat").unlink()
    with pytest.raises(ArchiveError, match=r"1 files have changed .*1.mat is missing.*delete"):
        acquire("tiny", tmp_path)
    shutil.rmtree(tmp_path / "tiny/points")
    acquire("tiny", tmp_path)
    assert (tmp_path / "tiny/points/train/1.mat").read_bytes() == b"one"
    assert len(server.files["points.zip"].requests) == 1


def test_the_users_archives_are_used_where_they_are(server, sources, tmp_path):
    for name, content in (("points.zip", POINTS), ("photos.zip", PHOTOS)):
        (tmp_path / name).write_bytes(content)
    folder = acquire("tiny", tmp_path / "data", [tmp_path / "points.zip", tmp_path / "photos.zip"])
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "images", "points"]
    assert not server.files["points.zip"].requests


def test_a_folder_of_the_users_own_is_left_alone(sources, tmp_path):
    (tmp_path / "tiny/points").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"points was not unpacked by this command.*move it"):
        acquire("tiny", tmp_path)


def test_the_first_checksum_is_held_against_every_later_file(server, sources, tmp_path):
    acquire("tiny", tmp_path)
    other = zipped({"train/1.mat": b"changed", "val/2.mat": b"two"})
    (tmp_path / "points.zip").write_bytes(other)
    shutil.rmtree(tmp_path / "tiny/points")
    with pytest.raises(
        ArchiveError, match=r"points.zip has SHA-256 .*checksums.json says .*delete"
    ):
        acquire("tiny", tmp_path, [tmp_path / "points.zip"])
    assert (tmp_path / "points.zip").exists()
    assert not (tmp_path / "tiny/points").exists()


# ---- faults: one clear error that names the file and the remedy, and nothing looks complete ------
def fails(sources, tmp_path, error, *words):
    with pytest.raises(error) as caught:
        acquire("tiny", tmp_path, retries=FAST)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not (tmp_path / "tiny/points").exists()
    assert not (tmp_path / "tiny/archives/points-1.zip").exists()
    return message


BY_HAND = (
    "points.zip in a browser, and place the file at ",
    "tiny/archives/points-1.zip or run: python -m mlnet_utils download tiny --from points.zip",
)


def test_cut_connection(server, sources, tmp_path):
    server.files["points.zip"].cuts = [10, 0, 0]
    fails(sources, tmp_path, TransferError, "cut after 10 of", "after 2 attempts", *BY_HAND)
    server.files["points.zip"].cuts = []
    acquire("tiny", tmp_path, retries=FAST)  # goes on with the part
    assert server.files["points.zip"].requests[-1]["Range"] == "bytes=10-"
    assert not list((tmp_path / "tiny/archives").glob("*.part*"))


def test_wrong_length(server, sources, tmp_path):
    server.files["points.zip"].announce = len(POINTS) + 5
    fails(sources, tmp_path, TransferError, "after 2 attempts", *BY_HAND)


def test_wrong_size(server, sources, tmp_path):
    change(sources, 0, size=5)
    fails(sources, tmp_path, TransferError, "but the file has 5: it has been replaced", *BY_HAND)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_checksum(server, sources, tmp_path, kind):
    change(sources, 0, **{kind: "0" * 32})
    fails(sources, tmp_path, ArchiveError, "points-1.zip", "0" * 32, "was deleted", *BY_HAND)
    assert not list((tmp_path / "tiny/archives").iterdir())


def test_missing_file(server, sources, tmp_path):
    del server.files["points.zip"]
    fails(sources, tmp_path, TransferError, "404", *BY_HAND)


@pytest.mark.parametrize("kind", ["text/html", "application/zip"])
def test_a_web_page_instead_of_a_file(server, sources, tmp_path, kind):
    server.files["points.zip"] = Served(PAGE, kind=kind)
    fails(sources, tmp_path, WebPageError, "a web page came in place of the file", *BY_HAND)
    assert not list((tmp_path / "tiny/archives").glob("*.part"))


def test_a_quota_page_of_the_drive(server, sources, tmp_path):
    server.files["photos"] = Served(PAGE)
    with pytest.raises(WebPageError) as caught:
        acquire("tiny", tmp_path, retries=FAST)
    message = str(caught.value)
    assert "a quota of Google Drive passes within a day" in message
    assert "open https://drive.google.com/file/d/photos/view in a browser" in message
    assert str(tmp_path / "tiny/archives/photos.zip") in message
    assert not (tmp_path / "tiny/images").exists()
    assert (tmp_path / "tiny/points").exists()  # what is done stays done


def test_a_damaged_zip_without_a_known_checksum(server, sources, tmp_path):
    server.files["points.zip"] = Served(POINTS[: len(POINTS) // 2])
    fails(sources, tmp_path, ArchiveError, "points-1.zip", "download it again")
    server.files["points.zip"] = Served(POINTS)
    acquire("tiny", tmp_path)  # neither the file nor its checksum was kept


def test_the_wrong_edition_is_recognised(server, sources, tmp_path):
    change(sources, 0, md5=md5(POINTS))
    (tmp_path / "points.zip").write_bytes(b"other")
    with pytest.raises(
        ArchiveError, match=r"points.zip is not points-1.zip.*it is a file of other"
    ):
        acquire("tiny", tmp_path, [tmp_path / "points.zip"])
    assert (tmp_path / "points.zip").exists()


def test_the_users_web_page_is_recognised(sources, tmp_path):
    (tmp_path / "points.zip").write_bytes(PAGE)
    with pytest.raises(ArchiveError, match=r"points.zip is a web page, not points-1.zip"):
        acquire("tiny", tmp_path, [tmp_path / "points.zip"])


def test_wrong_arguments(sources, tmp_path):
    with pytest.raises(ValueError, match="no source for dataset 'tinny': use one of tiny, other"):
        acquire("tinny", tmp_path)
    with pytest.raises(ValueError, match=r"own is not downloaded: place everything in .*own"):
        acquire("own", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"archive .*x.zip does not exist"):
        acquire("tiny", tmp_path, [tmp_path / "x.zip"])
    (tmp_path / "x.zip").write_bytes(POINTS)
    with pytest.raises(ValueError, match=r"x.zip is none of tiny's archives: photos.zip, points"):
        acquire("tiny", tmp_path, [tmp_path / "x.zip"])


# ---- the table of sources ----------------------------------------------------------------------
ALL = [(name, archive) for name, source in SOURCES.items() for archive in source.archives]


@pytest.mark.parametrize(("name", "archive"), ALL, ids=[f"{n}-{a.name}" for n, a in ALL])
def test_every_source_is_complete(name, archive):
    assert bool(archive.url) != bool(archive.drive)
    assert archive.page.startswith(("https://", "http://saliency.mit.edu/"))
    assert len(archive.md5) in (0, 32)
    assert not archive.about or (archive.drive and archive.about % 10**8 == 0)  # one digit or so
    assert archive.holds
    assert all(len(sha256) == 64 for sha256 in archive.known.values())


def test_the_editions_of_salicon_share_only_the_photos():
    new, old = ({a.into: a for a in SOURCES[f"salicon-{y}"].archives} for y in (2017, 2015))
    assert set(new) & set(old) == {"images"}
    assert new["images"] == old["images"]
    assert new["fixations-2017"].md5 != old["fixations-2015"].md5


@pytest.mark.realdata
def test_osie_as_github_packs_it(server, tmp_path, real_data, monkeypatch):
    """The real fixations in an archive as GitHub makes it; the photos stand for themselves."""
    top = "predicting-human-gaze-beyond-pixels-master"
    fixations = (real_data / "osie/data/eye/fixations.mat").read_bytes()
    photo = (real_data / "osie/data/stimuli/1001.jpg").read_bytes()
    server.files["master.zip"] = Served(
        zipped(
            {
                f"{top}/README.md": b"",
                f"{top}/data/eye/fixations.mat": fixations,
                f"{top}/data/stimuli/1001.jpg": photo,
            }
        ),
        ranges=False,
        etag='W/"x"',
        chunked=True,
    )
    (archive,) = SOURCES["osie"].archives
    source = Source("osie", (Archive(**{**vars(archive), "url": server.url("master.zip")}),))
    monkeypatch.setattr(download, "SOURCES", {"osie": source})
    folder = acquire("osie", tmp_path)
    assert (folder / "data/stimuli/1001.jpg").read_bytes() == photo
    server.files["master.zip"].content = zipped(
        {f"{top}/data/eye/fixations.mat": fixations[:-1], f"{top}/data/stimuli/1001.jpg": photo}
    )
    with pytest.raises(ArchiveError, match=r"eye/fixations.mat has SHA-256"):
        acquire("osie", tmp_path / "second")
