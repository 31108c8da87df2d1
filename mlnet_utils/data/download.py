"""Acquire a dataset: fetch its archives or take the user's own, verify, unpack and record them.

``python -m mlnet_utils download NAME`` calls :func:`acquire`. Each archive becomes one folder of
the dataset. The folder appears by one rename, with a list of its files inside, so that it exists
completely or not at all. Addresses and checksums stand in ``data.readers``, one file per dataset.
"""

import hashlib
import inspect
import itertools
import json
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from mlnet_utils import runtime
from mlnet_utils.data.readers import DATASETS, TEST_PHOTOS
from mlnet_utils.data.readers.spec import Archive
from mlnet_utils.runtime import locked, progress, read_json, reading, sha256_file, writing

SOURCES = {**DATASETS, **TEST_PHOTOS}
ARCHIVES = "archives"  # folder of a dataset that keeps its downloaded archives
RECORD = ".complete.json"  # written last; its presence means that a folder is whole
DRIVE = "https://drive.google.com/uc?id={}"
RETRIES = 5  # of a connection that fails or is cut; another run goes on with the bytes that came
TIMEOUT = (10.0, 60.0)  # seconds to connect, and without a byte
BLOCK = 1 << 20
REMEDY = "choose another place with --root"  # for a full disk
# Leftovers of packers, CAT2000's folders of saliency maps among the stimuli, and the record in an
# archive that was packed from an unpacked folder.
SKIPPED = frozenset({"__MACOSX", ".svn", ".DS_Store", "Thumbs.db", "Output", RECORD})
FILE_KINDS = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: packed where files have no kinds
# The last: an unknown method of compression.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class TransferError(RuntimeError):
    """A file could not be fetched."""


class ArchiveError(RuntimeError):
    """An archive that is damaged, unsafe, or another than its source published."""


def acquire(name: str, root: str | Path, archives: Iterable[str | Path] = ()) -> Path:
    """Complete a dataset below ``root``: fetch, verify and unpack missing parts; return its folder.

    Complete parts are only compared with their record, by the files' SHA-256. Archives that lie in
    ``<folder>/archives`` under their names are used without a download. So are the user's own
    ``archives``, called as here or as at the source, wherever they lie. A second process that wants
    the same archive waits for the first. ``name`` is that of a dataset of
    :mod:`~mlnet_utils.data.readers`, or of a benchmark's test photos.

    Raises:
        ValueError: unknown name, or an archive that is none of this dataset's.
        FileNotFoundError: an archive that was handed over does not exist.
        TransferError: a download failed; names the steps by hand.
        ArchiveError, FileExistsError, OSError: see :func:`check_unpacked` and :func:`unpack`.
    """
    if name not in SOURCES:
        raise ValueError(f"no source for dataset {name!r}: use one of {', '.join(SOURCES)}")
    spec = SOURCES[name]
    folder = Path(root) / spec.folder
    if not spec.archives:
        raise ValueError(f"{name} is not downloaded: {spec.by_hand} in {folder}")
    names = {archive.published or archive.name: archive.name for archive in spec.archives}
    names |= {archive.name: archive.name for archive in spec.archives}
    given = {}
    for path in map(Path, archives):
        if not path.is_file():
            raise FileNotFoundError(f"archive {path} does not exist")
        if path.name not in names:
            expected = ", ".join(sorted(names))
            raise ValueError(f"{path.name} is none of {name}'s archives: {expected}")
        given[names[path.name]] = path
    for archive in spec.archives:
        target, fetched = folder / archive.into, None
        path = given.get(archive.name, folder / ARCHIVES / archive.name)
        with locked(target):
            if target.exists():
                check_unpacked(target)
                continue
            try:
                fetched = None if path.is_file() else _fetch(name, archive, path)
                _check_archive(fetched or path, archive)
                unpack(fetched or path, target, archive.holds, archive.known)
            except ArchiveError as error:
                if fetched is None:  # it is the user's
                    raise
                fetched.unlink()
                raise ArchiveError(f"{error}; deleted. {_by_hand(name, archive, path)}") from error
            if fetched:
                fetched.replace(path)
    return folder


# ---- fetching ----------------------------------------------------------------------------------
def _fetch(name: str, archive: Archive, path: Path) -> Path:
    """Fetch an archive, from Google Drive or any other server, into a ``.part`` of its file.

    gdown 6.3 retries, and keeps the bytes that came beside the file: the next run goes on with
    them. gdown 5, which Colab has, fetches the whole file or fails.
    """
    import gdown

    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    url = archive.url or DRIVE.format(archive.drive)
    bar = sys.stderr.isatty()
    lines = progress(itertools.count(), f"downloading {path.name}", unit="blocks of 0.5 MB")

    def watch(here: int, total: int | None) -> None:
        runtime.need_space(part.parent, (total or here) - here, f"downloading {url}", REMEDY)
        if not bar:
            next(lines)

    options = {"use_cookies": False}
    if "retries" in inspect.signature(gdown.download).parameters:
        options |= {"quiet": not bar, "progress": watch}
        options |= {"resume": True, "retries": RETRIES, "timeout": TIMEOUT}
    refusal = getattr(gdown.exceptions, "DownloadError", gdown.exceptions.FileURLRetrievalError)
    for attempt in (1, 2):
        try:
            gdown.download(url, str(part), **options)
            break
        except (refusal, OSError) as error:
            if isinstance(error, OSError) and not hasattr(error, "response"):
                raise  # the disk's; those of the network are requests', which have a response
            if attempt == 1 and "byte range" in str(error):
                # The server cannot continue this part, or has another version of the file.
                for begun in part.parent.glob(f"{part.name}?*.part"):
                    begun.unlink()
                continue
            said = " ".join(str(error).split())
            raise TransferError(f"{url}: {said}. {_by_hand(name, archive, path)}") from error
    return part


def _by_hand(name: str, archive: Archive, path: Path) -> str:
    """The remedy that needs a person: a browser, or a file in its place."""
    quota = " (a quota of Google Drive passes within a day)" if archive.drive else ""
    file = archive.published or archive.name
    return (
        f"Try again later{quota}, or open {archive.page} in a browser, and place the file at "
        f"{path} or run: python -m mlnet_utils download {name} --from {file}"
    )


# ---- verifying ---------------------------------------------------------------------------------
def _check_archive(path: Path, archive: Archive) -> None:
    """Raise an ArchiveError for a web page, or for another MD5 than the source published."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if start.startswith((b"<!doctype html", b"<html", b"<head")):
            raise ArchiveError(f"{path} is a web page, not {archive.name}")
        file.seek(0)
        md5 = hashlib.md5(usedforsecurity=False)
        while archive.md5 and (block := file.read(BLOCK)):
            md5.update(block)
    found = md5.hexdigest()
    if archive.md5 and found != archive.md5:
        other = [spec.name for spec in SOURCES.values() if found in [a.md5 for a in spec.archives]]
        what = f"a file of {other[0]}" if other else "damaged, or was replaced by another"
        said = f"its MD5 is {found}, not {archive.md5}; it is {what}"
        raise ArchiveError(f"{path} is not {archive.name}: {said}")


def check_unpacked(target: str | Path) -> None:
    """Compare a folder with the record of its files that :func:`unpack` wrote.

    Raises:
        FileExistsError: the folder has no record: it was not unpacked by :func:`unpack`.
        ArchiveError: files are missing or have other content; counts and names them.
    """
    target = Path(target)
    record = target / RECORD
    if not record.is_file():
        raise FileExistsError(f"{target} was not unpacked by this command: move it away")
    made_by, changed = "`python -m mlnet_utils download`", []
    with reading(record, f"the record of {made_by}", f"delete {target} and try again"):
        files = read_json(record, made_by, "files")["files"]
        known = {name: sha256 for name, (_, sha256) in files.items()}
    for name, sha256 in progress(known.items(), f"verifying {target.name}", unit="file"):
        if not (target / name).is_file():
            changed.append(f"{target / name} is missing")
        elif sha256_file(target / name) != sha256:
            changed.append(f"{target / name} has other content")
    if changed:
        said = f"{len(changed)} files have changed since they were unpacked"
        raise ArchiveError(f"{said} ({'; '.join(changed[:3])}): delete {target} and try again")


# ---- unpacking ---------------------------------------------------------------------------------
def unpack(
    archive: str | Path,
    target: str | Path,
    holds: Iterable[str],
    known: Mapping[str, str] | None = None,
) -> None:
    """Unpack a zip from the internet into a new folder, without trusting it.

    The target gets the content of that folder of the archive that directly holds everything in
    ``holds``, however deep it lies. Files in ``known`` must have that SHA-256. Nothing is written
    outside the target, and no link is created. An archive that does not fit the disk is refused
    before it is written, or stopped where it lied about sizes.

    Raises:
        ArchiveError: damaged, unsafe, encrypted, or without its expected content.
        FileExistsError: the target exists; nothing was changed.
        OSError: there is too little disk space; nothing was left behind.
    """
    archive, target = Path(archive), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: move it away or delete it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(archive) as file, writing(target):
            members = _below(_members(file, archive), tuple(holds), archive)
            size = sum(info.file_size for info in members.values())
            runtime.need_space(target.parent, size, f"unpacking {archive}", REMEDY)
            entries = progress(members.items(), f"unpacking {archive.name}", unit="file")
            files = {str(path): _extract(file, info, temporary / path) for path, info in entries}
        for name, sha256 in (known or {}).items():
            if files[name][1] != sha256:
                raise ArchiveError(f"{archive}: {name} has SHA-256 {files[name][1]}, not {sha256}")
        (temporary / RECORD).write_text(json.dumps({"files": files}), encoding="utf-8")
        os.replace(temporary, target)
    except DAMAGE as error:
        raise ArchiveError(f"{archive} is no zip or damaged ({error}): get it again") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise ArchiveError(f"{archive} holds {error.filename} twice: refused") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _members(file: zipfile.ZipFile, archive: Path) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The wanted files of an archive by their path; an ArchiveError for an unsafe file."""
    kept = {}
    for info in file.infolist():
        path = PurePosixPath(info.filename)
        if info.header_offset < 0:
            raise zipfile.BadZipFile(f"{info.filename} begins before the file")
        outside = path.is_absolute() or ".." in path.parts or {"\\", ":"} & set(info.filename)
        special = stat.S_IFMT(info.external_attr >> 16) not in FILE_KINDS or info.flag_bits & 1
        if outside or special or path in kept:
            faults = "a path out of its folder, a link, a device, encrypted, or there twice"
            raise ArchiveError(f"{archive}: {info.filename} is {faults}: refused")
        if not info.is_dir() and path.parts and SKIPPED.isdisjoint(path.parts):
            kept[path] = info
    return kept


def _below(
    members: dict[PurePosixPath, zipfile.ZipInfo], holds: tuple[str, ...], archive: Path
) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The members of the folder that directly holds all of ``holds``, relative to it."""
    known = {place for path in members for place in (path, *path.parents)}
    bases = [path for path in known if all(path / name in known for name in holds)]
    if not bases:
        first = ", ".join(sorted({path.parts[0] for path in members})[:5]) or "nothing"
        said = f"no folder in it holds {' and '.join(holds)} (it starts with {first})"
        raise ArchiveError(f"{archive} is another archive: {said}")
    base = min(bases, key=lambda path: (len(path.parts), str(path)))
    return {path.relative_to(base): members[path] for path in members if path.is_relative_to(base)}


def _extract(file: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> list:
    """Write one member; returns its size and SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open(info) as source, open(path, "xb") as out:
        shutil.copyfileobj(source, out, BLOCK)  # no more than the archive announces
    written = path.stat().st_size
    if written != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} has {written} bytes, not {info.file_size}")
    return [written, sha256_file(path)]
