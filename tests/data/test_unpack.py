"""Unpacking: whole or not at all, and inside the target only."""

import hashlib
import json
import os
import shutil
import stat
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from miniatures import zipped

from mlnet_utils.data.download import RECORD, ArchiveError, check_unpacked, unpack

FILES = {"top/train/a.bin": b"a" * 10, "top/train/b.bin": b"bb", "top/val/c.bin": b""}
RANDOM = {f"train/{i}": np.random.default_rng(i).bytes(5000) for i in range(5)}


def make_zip(path, content):
    path.write_bytes(zipped(content) if isinstance(content, dict) else content)
    return path


def left(folder):
    """Every path below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "set" / "data"


def test_the_folder_that_holds_the_parts_is_unpacked(tmp_path, target):
    unpack(make_zip(tmp_path / "whatever.bin", {**FILES, "README": b"x"}), target, ("train", "val"))
    assert left(target) == [RECORD, "train", "train/a.bin", "train/b.bin", "val", "val/c.bin"]
    assert (target / "train/a.bin").read_bytes() == b"a" * 10
    record = json.loads((target / RECORD).read_text())
    assert record["files"]["train/b.bin"] == [2, hashlib.sha256(b"bb").hexdigest()]
    check_unpacked(target)
    assert left(target.parent) == ["data", *(f"data/{name}" for name in left(target))]


@pytest.mark.parametrize("place", ["{}", "{}/x", "train/{}", "train/{}/x"])
def test_what_packers_leave_behind_is_skipped(tmp_path, target, place):
    junk = ("__MACOSX", ".svn", ".DS_Store", "Thumbs.db", "Output", ".complete.json")
    files = {"train/1": b"1", **{place.format(name): b"{}" for name in junk}}
    unpack(make_zip(tmp_path / "x.zip", files), target, ("train",))
    assert left(target) == [RECORD, "train", "train/1"]
    check_unpacked(target)


def test_content_that_is_known_is_verified(tmp_path, target):
    archive = make_zip(tmp_path / "x.zip", FILES)
    with pytest.raises(ArchiveError, match=r"train/b\.bin .*SHA-256 .* 0000"):
        unpack(archive, target, ("train",), known={"train/b.bin": "0000"})
    assert not target.exists()
    unpack(archive, target, ("train",), known={"train/b.bin": hashlib.sha256(b"bb").hexdigest()})


def test_what_is_there_is_not_touched(tmp_path, target):
    target.mkdir(parents=True)
    (target / "mine").touch()
    with pytest.raises(FileExistsError, match=r"set/data"):
        unpack(make_zip(tmp_path / "x.zip", FILES), target, ("train",))
    assert left(target) == ["mine"]


# ---- attacks and damage ------------------------------------------------------------------------
def special_zip(kind):
    info = zipfile.ZipInfo("top/train/x")
    info.external_attr = (kind | 0o777) << 16
    return zipped({info: "/etc/passwd"})


def lying_zip(size):
    raw = bytearray(zipped({"train/zeros": bytes(4_000_000)}))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = raw.index(signature) + offset
        raw[at : at + 4] = size.to_bytes(4, "little")
    return raw


ENCRYPTED, FLIPPED = bytearray(zipped(FILES)), bytearray(zipped(RANDOM))
ENCRYPTED[ENCRYPTED.index(b"PK\x01\x02") + 8] |= 1  # flag in the central directory
FLIPPED[len(FLIPPED) // 2] ^= 0xFF
TWICE = zipped({"train/aa": b"1", "train/bb": b"2"}).replace(b"train/bb", b"train/aa")
ATTACKS = {  # the content, and words of the error
    "climbing": ({"train/../../../x": b"1"}, "refused"),
    "absolute": ({"/train/x": b"1"}, "refused"),
    "windows": ({"train\\..\\x": b"1"}, "refused"),
    "drive": ({"C:/train/x": b"1"}, "refused"),
    "link": (special_zip(stat.S_IFLNK), "refused"),
    "device": (special_zip(stat.S_IFCHR), "refused"),
    "encrypted": (ENCRYPTED, "refused"),
    "same name twice": (TWICE, "train/aa"),
    "file in a file": ({"train/1": b"2", "train/1/x/y": b"1"}, "twice"),
    "file and folder": ({"train/1/x/y": b"1", "train/1": b"2"}, "twice"),
    "something else": ({"other/x": b"1"}, "holds train .*other"),
    "empty": ({}, "holds train .*nothing"),
    "bigger than it says": (lying_zip(10), "damaged"),
    "smaller than it says": (lying_zip(5_000_000), "damaged .*4000000"),
    "cut": (zipped(RANDOM)[:10_000], "damaged"),
    "flipped": (FLIPPED, "damaged"),
    "garbage": (b"\x00\x01" * 5000, "damaged"),
    "nothing": (b"", "damaged"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_right_is_refused_and_leaves_nothing(tmp_path, target, name):
    content, said = ATTACKS[name]
    archive = make_zip(tmp_path / "bad.zip", content)
    with pytest.raises(ArchiveError, match=rf"bad\.zip.*{said}"):
        unpack(archive, target, ("train",))
    assert left(tmp_path) == ["bad.zip", "set"]


# ---- interruptions -----------------------------------------------------------------------------
@pytest.fixture
def archive(tmp_path):
    return make_zip(tmp_path / "x.zip", RANDOM)


def test_a_full_disk_is_noticed_before_unpacking(archive, target, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=24_999))
    with pytest.raises(OSError, match=r"x\.zip needs 0\.00 GB"):
        unpack(archive, target, ("train",))
    assert left(archive.parent) == ["set", "x.zip"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_extraction_never_looks_complete(archive, target, monkeypatch, error):
    read, calls = zipfile.ZipExtFile.read, []

    def stop_at_the_third(self, n=-1):
        calls.append(self)
        if len(set(map(id, calls))) == 3:
            raise error
        return read(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", stop_at_the_third)
    with pytest.raises(type(error)):
        unpack(archive, target, ("train",))
    assert left(archive.parent) == ["set", "x.zip"]
    monkeypatch.undo()
    unpack(archive, target, ("train",))
    check_unpacked(target)


def test_a_kill_between_files_and_rename_leaves_no_target(archive, target, monkeypatch):
    # Nothing after the kill runs: neither rename nor cleaning.
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        unpack(archive, target, ("train",))
    assert left(target.parent)[0] == ".data.unpacking"
    assert not target.exists()
    monkeypatch.undo()
    unpack(archive, target, ("train",))
    assert [path.name for path in target.parent.iterdir()] == ["data"]
