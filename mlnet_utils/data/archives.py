"""Unpack archives from the internet without trusting them.

Nothing is written outside the target, no link or device is ever created, and an archive that
would expand beyond reason is refused before (and stopped while) it is written. The target appears
by one rename, with a record of its files inside, so that it exists completely or not at all.
"""

import gzip
import hashlib
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from mlnet_utils.runtime import progress, read_json, sha256_file

RECORD = ".complete.json"  # written last; its presence means that a folder is whole
# What packers leave behind, CAT2000's folders of saliency maps among the stimuli, and the record in
# an archive that was packed from an unpacked folder, which is not the record of this unpacking.
SKIPPED = frozenset({"__MACOSX", ".svn", ".DS_Store", "Thumbs.db", "Output", RECORD})
BLOCK = 1 << 20
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile),
    *(EOFError, NotImplementedError),  # the second: an unknown method of compression
)


class ArchiveError(RuntimeError):
    """An archive that is damaged, unsafe, or not the expected one."""


@dataclass(frozen=True)
class Limits:
    """Beyond these an archive is taken for a bomb. Photos and maps hardly compress."""

    files: int = 200_000
    bytes: int = 64 << 30
    ratio: float = 100.0  # unpacked size over the archive's
    ratio_from: int = 64 << 20  # the ratio matters only above this unpacked size


class _Member(NamedTuple):
    path: PurePosixPath
    size: int
    open: Callable[[], BinaryIO]


def unpack(
    archive: str | Path,
    target: str | Path,
    holds: tuple[str, ...],
    known: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    accept: Callable[[], None] = lambda: None,
) -> dict:
    """Unpack a zip or tar file into a new folder.

    Args:
        archive: the file; its kind is told by its content, not by its name.
        target: the folder to make. What is in it is the content of that folder of the archive
            that directly holds everything in ``holds``, however deep it lies.
        holds: files or folders that prove that this is the right archive.
        known: SHA-256 of files whose content is known, by their path in the target.
        limits: what is refused as a bomb.
        accept: called when all is well, before the target appears, so that a kill in between
            never leaves a target without what this notes.

    Returns:
        The record that was written into the target: ``files``, path to [bytes, SHA-256].

    Raises:
        ArchiveError: damaged, unsafe, encrypted, a bomb, or without what it should hold.
        FileExistsError: the target exists; nothing was changed.
        OSError: there is too little disk space; nothing was left behind.
    """
    archive, target, limits = Path(archive), Path(target), limits or Limits()
    if target.exists():
        raise FileExistsError(f"{target} exists already: move it away or delete it first")
    temporary = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with _opened(archive, limits) as members:
            chosen = _below(members, holds, archive)
            need_space(target.parent, sum(member.size for member in chosen), f"unpacking {archive}")
            files = _write_all(chosen, temporary, archive)
        for name, sha256 in (known or {}).items():
            if files[name][1] != sha256:
                raise ArchiveError(f"{archive}: {name} has SHA-256 {files[name][1]}, not {sha256}")
        record = {"archive": archive.name, "files": files}
        (temporary / RECORD).write_text(json.dumps(record), encoding="utf-8")
        accept()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def problems(target: str | Path) -> list[str]:
    """What is missing or has other content than when the folder was unpacked, a sentence each.

    Raises:
        FileNotFoundError: the folder has no record: it was not unpacked by :func:`unpack`.
        ValueError: the record is damaged.
    """
    target = Path(target)
    record = read_json(target / RECORD, "`python -m mlnet_utils download`")
    try:
        files = [(target / name, size, sha256) for name, (size, sha256) in record["files"].items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{target / RECORD} is no record of unpacked files: expected `files` with bytes and "
            f"SHA-256 of each ({error!r}); delete {target} and download it again"
        ) from error
    found = []
    for path, size, sha256 in progress(files, f"verifying {target.name}", unit="file"):
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != size:
            found.append(f"{path} has {path.stat().st_size} bytes instead of {size}")
        elif sha256_file(path) != sha256:
            found.append(f"{path} has other content")
    return found


def need_space(folder: Path, needed: int, purpose: str) -> None:
    """Check the free space of a folder's disk.

    Raises:
        OSError: there is less than ``needed`` bytes.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{purpose} needs {needed / 1e9:.2f} GB, but the disk of {folder} has only "
            f"{free / 1e9:.2f} GB free: free some, or choose another place with --root"
        )


# ---- reading -----------------------------------------------------------------------------------
@contextmanager
def _opened(archive: Path, limits: Limits) -> Iterator[list[_Member]]:
    """The members of an archive, each checked; errors of the formats become ours."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _checked(_zip_members(file, archive), archive, limits)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                yield _checked(_tar_members(file, archive), archive, limits)
                while file.fileobj.read(BLOCK):  # gzip's checksum stands behind the last byte
                    pass
        else:
            raise ArchiveError(
                f"{archive} is neither a zip nor a tar file, or it is cut off: download it again"
            )
    except DAMAGE as error:
        raise ArchiveError(f"{archive} is damaged ({error}): download it again") from error


def _zip_members(file: zipfile.ZipFile, archive: Path) -> Iterator[_Member]:
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ArchiveError(f"{archive} holds a link or device ({info.filename}): refused")
        if info.flag_bits & 1:
            raise ArchiveError(f"{archive} is encrypted ({info.filename}): refused")
        if not info.is_dir():
            yield _Member(
                _safe_path(info.filename, archive),
                info.file_size,
                lambda info=info: file.open(info),
            )


def _tar_members(file: tarfile.TarFile, archive: Path) -> Iterator[_Member]:
    for info in file:  # headers one by one, so that a bomb is refused before it is expanded
        if info.isdir():
            continue
        if not info.isreg():
            raise ArchiveError(f"{archive} holds a link or device ({info.name}): refused")
        path = _safe_path(info.name, archive)
        yield _Member(path, info.size, lambda info=info: file.extractfile(info))


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise ArchiveError(f"{archive} would write outside its folder ({name!r}): refused")
    return path


def _checked(members: Iterator[_Member], archive: Path, limits: Limits) -> list[_Member]:
    """The members that are wanted; refuses bombs and names that would overwrite each other."""
    packed = archive.stat().st_size
    total, kept, names = 0, [], set()
    for count, member in enumerate(members, start=1):
        total += member.size
        if count > limits.files or total > limits.bytes:
            raise ArchiveError(
                f"{archive} holds more than {limits.files} files or {limits.bytes / 1e9:.0f} GB: "
                "refused as a zip bomb"
            )
        if total > limits.ratio_from and total > limits.ratio * packed:
            raise ArchiveError(
                f"{archive} would grow more than {limits.ratio:.0f}-fold: refused as a zip bomb"
            )
        if SKIPPED.isdisjoint(member.path.parts):
            name = str(member.path).casefold()  # as file systems of Windows and macOS compare
            if name in names:
                raise ArchiveError(f"{archive} holds {member.path} twice: refused")
            names.add(name)
            kept.append(member)
    folders = {str(parent).casefold() for member in kept for parent in member.path.parents}
    for member in kept:
        if str(member.path).casefold() in folders:
            raise ArchiveError(f"{archive} holds {member.path} as a file and a folder: refused")
    return kept


def _below(members: list[_Member], holds: tuple[str, ...], archive: Path) -> list[_Member]:
    """The members of the folder that directly holds all of ``holds``, relative to it."""
    known = {parent for member in members for parent in (member.path, *member.path.parents)}
    bases = sorted(
        (path for path in known if all(path / name in known for name in holds)),
        key=lambda path: (len(path.parts), str(path)),
    )
    if not bases:
        first = ", ".join(sorted({member.path.parts[0] for member in members})[:5])
        raise ArchiveError(
            f"{archive} is another archive: no folder in it holds {' and '.join(holds)} "
            f"(it starts with {first or 'nothing'}); check which file you downloaded"
        )
    base = bases[0]
    return [
        member._replace(path=member.path.relative_to(base))
        for member in members
        if member.path.is_relative_to(base)
    ]


# ---- writing -----------------------------------------------------------------------------------
def _write_all(members: list[_Member], folder: Path, archive: Path) -> dict[str, list]:
    files = {}
    for member in progress(members, f"unpacking {archive.name}", unit="file"):
        path = folder / member.path
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, written = hashlib.sha256(), 0
        with member.open() as source, open(path, "xb") as out:
            while block := source.read(BLOCK):
                written += len(block)
                if written > member.size:
                    break
                digest.update(block)
                out.write(block)
        if written != member.size:
            raise ArchiveError(
                f"{archive} is damaged: {member.path} is not the {member.size} bytes that it "
                "announces; download it again"
            )
        files[str(member.path)] = [written, digest.hexdigest()]
    return files
