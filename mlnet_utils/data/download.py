"""Acquire a dataset: fetch its archives (or take the user's own), verify, unpack, record.

``python -m mlnet_utils download NAME`` calls :func:`acquire`. Each archive becomes one folder of
the dataset, which appears only when it is whole. Layouts are described in ``data/README.md``.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from mlnet_utils.data.archives import BLOCK, RECORD, ArchiveError, problems, unpack
from mlnet_utils.data.sources import SOURCES, Archive, Source
from mlnet_utils.data.transfer import (
    Retries,
    TransferError,
    WebPageError,
    discard,
    fetch,
    fetch_drive,
    is_web_page,
)
from mlnet_utils.runtime import progress, read_json, write_json

ARCHIVES = "archives"  # folder of a dataset that keeps what was downloaded
CHECKSUMS = "checksums.json"  # SHA-256 of every archive that was ever accepted


def acquire(
    name: str,
    root: str | Path,
    archives: Iterable[str | Path] = (),
    retries: Retries | None = None,
) -> Path:
    """Make a dataset complete: fetch what is missing, verify, unpack.

    What is complete already is only compared with its record, by the files' SHA-256. Archives that
    lie in ``<folder>/archives`` under their names are used without a download; those handed over
    are used where they are.

    Args:
        name: a key of :data:`SOURCES`.
        root: folder of the raw datasets.
        archives: archives that the user has already, by file name.
        retries: attempts and waiting of downloads.

    Returns:
        The dataset's folder.

    Raises:
        ValueError: unknown name, an archive that is none of this dataset's, a damaged record.
        FileNotFoundError: an archive that was handed over does not exist.
        FileExistsError: a folder is there that this program did not unpack.
        TransferError: a download failed; says what to do by hand.
        ArchiveError: an archive is not what its source published, damaged or unsafe.
        OSError: there is too little disk space.
    """
    if name not in SOURCES:
        raise ValueError(f"no source for dataset {name!r}: use one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    folder = Path(root) / source.folder
    if not source.archives:
        raise ValueError(f"{name} is not downloaded: {source.instructions} in {folder}")
    given = _match(name, source, [Path(path) for path in archives])
    for archive in source.archives:
        target = folder / archive.into
        if target.exists():
            _check_complete(target)
            continue
        path = given.get(archive.name) or folder / ARCHIVES / archive.name
        downloaded = not path.is_file()
        if downloaded:
            digest = _download(name, archive, path, folder, retries)
        else:
            digest = _verified(path, archive, folder)
        try:
            accept = partial(_record, folder, archive.name, digest)
            unpack(path, target, archive.holds, archive.known, source.limits, accept)
        except ArchiveError:
            if downloaded:  # without a known checksum the damage shows only now
                path.unlink()
            raise
    return folder


def _match(name: str, source: Source, paths: list[Path]) -> dict[str, Path]:
    """The user's archives by the name of ours."""
    given = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"archive {path} does not exist")
        fitting = [archive for archive in source.archives if path.name in archive.names]
        if not fitting:
            names = sorted(set().union(*(archive.names for archive in source.archives)))
            raise ValueError(f"{path.name} is none of {name}'s archives: {', '.join(names)}")
        given[fitting[0].name] = path
    return given


def _check_complete(target: Path) -> None:
    if not (target / RECORD).is_file():
        raise FileExistsError(
            f"{target} was not unpacked by this command. If you placed it yourself and it is "
            "complete, nothing needs to be downloaded; otherwise move it away and try again"
        )
    found = problems(target)
    if found:
        raise ArchiveError(
            f"{len(found)} files have changed since they were unpacked ({'; '.join(found[:3])}): "
            f"delete {target} and try again"
        )


def _download(
    name: str, archive: Archive, path: Path, folder: Path, retries: Retries | None
) -> str:
    """Fetch one archive to ``path``; returns its SHA-256."""
    part = path.with_name(f"{path.name}.part")
    try:
        if archive.drive:
            fetch_drive(archive.drive, part, archive.about, retries)
        else:
            fetch(archive.url, part, archive.size, retries)
        if is_web_page(part):
            raise WebPageError(f"{archive.page}: a web page came in place of the file")
    except TransferError as error:
        if part.is_file() and is_web_page(part):
            discard(part)
        raise type(error)(f"{error}. {_by_hand(name, archive, path)}") from error
    try:
        digest = _verified(part, archive, folder)
    except ArchiveError as error:
        discard(part)
        raise ArchiveError(f"{error}; it was deleted. {_by_hand(name, archive, path)}") from error
    part.replace(path)
    discard(part)
    return digest


def _by_hand(name: str, archive: Archive, path: Path) -> str:
    """What a person can do where a program cannot."""
    quota = " (a quota of Google Drive passes within a day)" if archive.drive else ""
    file = archive.published or archive.name
    return (
        f"Try again later{quota}, or open {archive.page} in a browser, and place the file at "
        f"{path} or run: python -m mlnet_utils download {name} --from {file}"
    )


def _verified(path: Path, archive: Archive, folder: Path) -> str:
    """Compare an archive's size and checksums with all that is known; returns its SHA-256."""
    size = path.stat().st_size
    if is_web_page(path):
        raise ArchiveError(f"{path} is a web page, not {archive.name}")
    if archive.size and size != archive.size:
        raise ArchiveError(f"{path} has {size} bytes, but {archive.name} has {archive.size}")
    md5, sha256 = _digests(path)
    if archive.md5 and md5 != archive.md5:
        other = next((n for n, a in _all_archives() if a.md5 == md5), "")
        what = f"it is a file of {other}" if other else "it is damaged or was replaced by another"
        raise ArchiveError(
            f"{path} is not {archive.name}: its MD5 is {md5}, not {archive.md5}; {what}"
        )
    recorded = _recorded(folder).get(archive.name, "")
    for expected, where in ((archive.sha256, "the source"), (recorded, folder / CHECKSUMS)):
        if expected and sha256 != expected:
            raise ArchiveError(
                f"{path} has SHA-256 {sha256}, but {where} says {expected}: it is damaged, or the "
                f"source has replaced it; in that case delete its entry in {folder / CHECKSUMS}"
            )
    return sha256


def _digests(path: Path) -> tuple[str, str]:
    """MD5 (which is what most of these sources publish) and SHA-256, reading the file once."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    blocks = -(-path.stat().st_size // BLOCK)
    with open(path, "rb") as file:
        reading = iter(lambda: file.read(BLOCK), b"")
        for block in progress(reading, f"verifying {path.name}", blocks, "MiB"):
            md5.update(block)
            sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()


def _all_archives() -> list[tuple[str, Archive]]:
    return [(name, archive) for name, source in SOURCES.items() for archive in source.archives]


def _recorded(folder: Path) -> dict[str, str]:
    """SHA-256 of every archive that was accepted, by name."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    content = read_json(path, "the first download")
    try:
        return {name: str(entry["sha256"]) for name, entry in content.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of archives: expected `sha256` for each name ({error!r}); "
            "delete it, and what is downloaded next is recorded anew"
        ) from error


def _record(folder: Path, name: str, sha256: str) -> None:
    recorded = {**_recorded(folder), name: sha256}
    write_json(folder / CHECKSUMS, {key: {"sha256": recorded[key]} for key in recorded})
