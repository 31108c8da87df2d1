"""Unpacking: whole or not at all, inside the target only, and never beyond reason."""

import hashlib
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple

import numpy as np
import pytest

from mlnet_utils.data.archives import RECORD, ArchiveError, Limits, problems, unpack

FILES = {"top/train/a.bin": b"a" * 10, "top/train/b.bin": b"bb", "top/val/c.bin": b""}
JUNK = {"__MACOSX/top/train/._a.bin": b"x", "top/.DS_Store": b"x", "README": b"x"}


def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def make_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def left(folder):
    """Every path below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def target(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set" / "data"


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_the_folder_that_holds_the_parts_is_unpacked(tmp_path, target, make):
    archive = make(tmp_path / "whatever.bin", {**FILES, **JUNK})
    record = unpack(archive, target, ("train", "val"))
    assert left(target) == [RECORD, "train", "train/a.bin", "train/b.bin", "val", "val/c.bin"]
    assert (target / "train/a.bin").read_bytes() == b"a" * 10
    assert record["files"]["train/b.bin"] == [2, hashlib.sha256(b"bb").hexdigest()]
    assert problems(target) == []
    assert left(target.parent) == ["data", *(f"data/{name}" for name in left(target))]


def test_an_archive_without_a_top_folder(tmp_path, target):
    unpack(make_zip(tmp_path / "x.zip", {"a/1": b"1", "b/2": b"2"}), target, ("a", "b"))
    assert left(target) == [RECORD, "a", "a/1", "b", "b/2"]


@pytest.mark.parametrize(
    "junk", ["__MACOSX", ".svn", ".DS_Store", "Thumbs.db", "Output", ".complete.json"]
)
@pytest.mark.parametrize("place", ["{}", "{}/x", "train/{}", "train/{}/x"])
def test_what_packers_leave_behind_is_skipped(tmp_path, target, junk, place):
    files = {"train/1": b"1", place.format(junk): b"{}"}
    unpack(make_zip(tmp_path / "x.zip", files), target, ("train",))
    assert left(target) == [RECORD, "train", "train/1"]
    assert problems(target) == []


def test_files_that_change_later_are_named(tmp_path, target):
    unpack(make_zip(tmp_path / "x.zip", {**FILES, "top/train/c": b"c"}), target, ("train",))
    (target / "train/a.bin").unlink()
    (target / "train/b.bin").write_bytes(b"longer")
    (target / "train/c").write_bytes(b"C")
    assert problems(target) == [
        f"{target / 'train/a.bin'} is missing",
        f"{target / 'train/b.bin'} has 6 bytes instead of 2",
        f"{target / 'train/c'} has other content",
    ]
    (target / RECORD).unlink()
    with pytest.raises(FileNotFoundError, match=r"complete.json is missing"):
        problems(target)


@pytest.mark.parametrize(
    "record", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": [1]}}']
)
def test_records_that_are_none(target, record):
    target.mkdir()
    (target / RECORD).write_text(record)
    with pytest.raises(ValueError, match=r"complete.json is no record .*delete .*data and downl"):
        problems(target)


def test_content_that_is_known_is_verified(tmp_path, target):
    archive = make_zip(tmp_path / "x.zip", FILES)
    right = hashlib.sha256(b"bb").hexdigest()
    with pytest.raises(ArchiveError, match=r"train/b.bin has SHA-256 .*, not 0000"):
        unpack(archive, target, ("train",), known={"train/b.bin": "0000"})
    assert not target.exists()
    unpack(archive, target, ("train",), known={"train/b.bin": right})


def test_what_is_there_is_not_touched(tmp_path, target):
    target.mkdir(parents=True)
    (target / "mine").write_bytes(b"")
    with pytest.raises(FileExistsError, match="exists already"):
        unpack(make_zip(tmp_path / "x.zip", FILES), target, ("train",))
    assert left(target) == ["mine"]


# ---- attacks -----------------------------------------------------------------------------------
def symlink_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo("top/train/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/passwd")
    return path


def special_tar(path, kind):
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("top/train/x")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    return path


def encrypted_zip(path):
    make_zip(path, FILES, zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # flag in the central directory
    path.write_bytes(raw)
    return path


def twice_zip(path):
    return make_zip(path, {"top/train/A.bin": b"1", "top/train/a.bin": b"2"})


ATTACKS = {
    "climbing zip": (lambda p: make_zip(p, {"train/../../../x": b"1"}), "write outside"),
    "absolute zip": (lambda p: make_zip(p, {"/train/x": b"1"}), "write outside"),
    "windows zip": (lambda p: make_zip(p, {"train\\..\\x": b"1"}), "write outside"),
    "drive zip": (lambda p: make_zip(p, {"C:/train/x": b"1"}), "write outside"),
    "climbing tar": (lambda p: make_tar(p, {"train/../../x": b"1"}), "write outside"),
    "absolute tar": (lambda p: make_tar(p, {"/train/x": b"1"}), "write outside"),
    "link in a zip": (symlink_zip, "link or device"),
    "symbolic link": (lambda p: special_tar(p, tarfile.SYMTYPE), "link or device"),
    "hard link": (lambda p: special_tar(p, tarfile.LNKTYPE), "link or device"),
    "device": (lambda p: special_tar(p, tarfile.CHRTYPE), "link or device"),
    "pipe": (lambda p: special_tar(p, tarfile.FIFOTYPE), "link or device"),
    "encrypted": (encrypted_zip, "encrypted"),
    "same name twice": (twice_zip, "twice"),
    "file and folder": (
        lambda p: make_zip(p, {"train/1/x/y": b"1", "train/1": b"2"}),
        "holds train/1 as a file and a folder",
    ),
    "something else": (lambda p: make_zip(p, {"other/x": b"1"}), "no folder in it holds train"),
    "empty": (lambda p: make_zip(p, {}), "starts with nothing"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_right_is_refused_and_leaves_nothing(tmp_path, target, name):
    make, message = ATTACKS[name]
    archive = make(tmp_path / "bad.zip")
    with pytest.raises(ArchiveError, match=rf"bad\.zip.*{message}"):
        unpack(archive, target, ("train",))
    assert left(tmp_path) == ["bad.zip", "set"]


BOMB = {"train/zeros": bytes(4_000_000)}  # deflates 1000-fold


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(ratio=100, ratio_from=1_000_000), "more than 100-fold"),
        (Limits(bytes=3_000_000), "more than 200000 files or 0 GB"),
        (Limits(files=0), "more than 0 files"),
    ],
    ids=["ratio", "bytes", "files"],
)
def test_bombs_are_refused(tmp_path, target, make, limits, message):
    archive = make(tmp_path / "bomb.zip", BOMB)
    with pytest.raises(ArchiveError, match=f"{message}.*refused as a zip bomb"):
        unpack(archive, target, ("train",), limits=limits)
    assert left(tmp_path) == ["bomb.zip", "set"]


def test_a_zip_that_lies_about_sizes_is_stopped(tmp_path, target):
    path = make_zip(tmp_path / "bad.zip", BOMB)
    raw = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = (10).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(path, target, ("train",))
    assert left(tmp_path) == ["bad.zip", "set"]


# ---- damage ------------------------------------------------------------------------------------
RANDOM = {f"train/{i}": np.random.default_rng(i).bytes(5000) for i in range(5)}


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "nothing"])
def test_damaged_archives_leave_nothing(tmp_path, target, make, damage):
    path = make(tmp_path / "bad.zip", RANDOM)
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 0xFF
    raw = {"cut": raw[: len(raw) // 2], "garbage": b"\x00\x01" * 5000, "nothing": b""}.get(
        damage, raw
    )
    path.write_bytes(raw)
    with pytest.raises(ArchiveError, match=r"bad\.zip.*download it again"):
        unpack(path, target, ("train",))
    assert left(tmp_path) == ["bad.zip", "set"]


def test_a_full_disk_is_noticed_before_unpacking(tmp_path, target, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", RANDOM)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 24_999))
    with pytest.raises(OSError, match=r"unpacking .*x.zip needs 0.00 GB, but the disk of"):
        unpack(archive, target, ("train",))
    assert left(tmp_path) == ["set", "x.zip"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_extraction_never_looks_complete(tmp_path, target, monkeypatch, error):
    archive, calls = make_zip(tmp_path / "x.zip", RANDOM), []
    read = zipfile.ZipExtFile.read

    def stop_at_the_third(self, n=-1):
        calls.append(self)
        if len(set(map(id, calls))) == 3:
            raise error
        return read(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipExtFile, "read", stop_at_the_third)
        with pytest.raises(type(error)):
            unpack(archive, target, ("train",))
    assert left(tmp_path) == ["set", "x.zip"]
    unpack(archive, target, ("train",))
    assert problems(target) == []


def test_a_kill_between_files_and_rename_leaves_no_target(tmp_path, target, monkeypatch):
    archive = make_zip(tmp_path / "x.zip", RANDOM)
    with monkeypatch.context() as patch:  # nothing after the kill runs: neither rename nor cleaning
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            unpack(archive, target, ("train",))
    assert not target.exists()
    assert (target.parent / ".data.unpacking").exists()
    unpack(archive, target, ("train",))
    assert [path.name for path in target.parent.iterdir()] == ["data"]
