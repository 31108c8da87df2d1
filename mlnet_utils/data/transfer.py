"""Fetch one file into a ``.part`` file: resumed where the server allows it, retried, complete.

Beside the part lies ``<part>.json``, which says of which version of the file on the server it is a
part. Whoever calls this verifies the part and only then gives it the file's name.
"""

import contextlib
import errno
import glob
import http.client
import inspect
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlnet_utils.data.archives import need_space
from mlnet_utils.runtime import progress, read_json, write_json

BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # errors that may pass: try again
DRIVE = "https://drive.google.com/uc?id={}"


class TransferError(RuntimeError):
    """A file could not be fetched."""


class WebPageError(TransferError):
    """A web page came in place of a file: a quota, a licence to accept, a dead link."""


class _CutOff(Exception):
    """The transfer ended early; another attempt may go on from there."""


@dataclass(frozen=True)
class Retries:
    """How often attempts that bring no byte are repeated, and how long to wait in between."""

    attempts: int = 6
    first_wait: float = 1.0  # seconds, doubled each time
    longest_wait: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, asked: float = 0.0) -> None:
        """Sleep before the next attempt; ``asked`` is what the server wants."""
        self.sleep(min(max(asked, self.first_wait * 2 ** (failures - 1)), self.longest_wait))


class _Patience:
    """Counts the attempts in a row that bring nothing.

    Against the most bytes there ever were, so that a file that always starts anew ends sometime.
    """

    def __init__(self, url: str, retries: Retries | None, bytes_here: Callable[[], int]):
        self.url, self.retries, self.bytes_here = url, retries or Retries(), bytes_here
        self.failures, self.most = 0, bytes_here()

    def failed(self, reason: str, asked: float = 0.0) -> None:
        """Wait before the next attempt, or give up."""
        here = self.bytes_here()
        self.failures = 1 if here > self.most else self.failures + 1
        self.most = max(self.most, here)
        if self.failures >= self.retries.attempts:
            raise TransferError(f"{self.url}: {reason}, after {self.failures} attempts")
        self.retries.wait(self.failures, asked)


def is_web_page(path: str | Path) -> bool:
    """Whether a file starts as HTML does."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))


def discard(part: Path) -> None:
    """Delete a part and what is known of it."""
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


# ---- HTTP --------------------------------------------------------------------------------------
def fetch(url: str, part: Path, size: int = 0, retries: Retries | None = None) -> None:
    """Fetch a URL, going on with what is in ``part`` already.

    Bytes are appended only if the server proves (206, Content-Range, same ETag or Last-Modified)
    that they continue the same file; otherwise the file starts anew.

    Args:
        url: http or https.
        part: the file to write; kept when the transfer fails, for the next call.
        size: bytes that are expected, 0 if unknown.
        retries: attempts and waiting.

    Raises:
        WebPageError: the server sends a web page.
        TransferError: it failed for good; says why.
        OSError: there is too little disk space.
    """
    patience = _Patience(url, retries, lambda: _bytes_in(part))
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        asked = 0.0
        try:
            _attempt(url, part, size)
            return
        except urllib.error.HTTPError as error:
            with error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code not in PASSING:
                    raise TransferError(f"{url}: {reason}") from None
                with contextlib.suppress(TypeError, ValueError):  # absent, or a date
                    asked = float(error.headers.get("Retry-After"))
        except _CutOff as error:
            reason = str(error)
        patience.failed(reason, asked)


def _attempt(url: str, part: Path, size: int) -> None:
    state = _state(url, part)
    offset = _bytes_in(part) if state else 0
    if state and offset == state["size"]:
        return  # a run that was killed between the last byte and its verification
    request = urllib.request.Request(
        url, headers={"User-Agent": "mlnet-utils", "Accept-Encoding": "identity"}
    )
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", state["validator"])
    with _open(request, part) as response:
        if response.headers.get_content_type() == "text/html":
            raise WebPageError(f"{url}: a web page came in place of the file")
        if response.status == 206:
            if not _continues(response, offset, state):
                discard(part)
                raise _CutOff("the server sent other bytes than asked for")
            total = state["size"]
        elif response.status == 200:  # also of a server that ignores ranges, or of a new version
            offset, total = 0, int(response.headers.get("Content-Length") or 0)
            if size and total and total != size:
                raise TransferError(
                    f"{url}: the server offers {total} bytes, but the file has {size}: it has "
                    "been replaced by another one"
                )
            _remember(url, part, _validator(response), total)
        else:
            raise TransferError(f"{url}: the server answers {response.status}")
        need_space(part.parent, total - offset, f"downloading {url}")
        with open(part, "ab" if offset else "wb") as file:
            blocks = -(-(total - offset) // BLOCK) or None
            for block in progress(_blocks(response), f"downloading {part.stem}", blocks, "MiB"):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    if total and _bytes_in(part) < total:
        raise _CutOff(f"the connection was cut after {_bytes_in(part)} of {total} bytes")


@contextlib.contextmanager
def _open(request: urllib.request.Request, part: Path) -> Iterator[http.client.HTTPResponse]:
    """Send a request; failures of the network, as opposed to the server's, become _CutOff."""
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is longer than the file: it belongs to another version
            raise
        error.close()
        discard(part)
        raise _CutOff("the server has fewer bytes than the part that is here") from None
    except (OSError, http.client.HTTPException) as error:
        raise _CutOff(str(getattr(error, "reason", "") or error) or repr(error)) from error
    with response:
        yield response


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _CutOff(f"the connection was cut ({error or repr(error)})") from error
        if not block:
            return
        yield block


def _continues(response: http.client.HTTPResponse, offset: int, state: dict) -> bool:
    """Whether a partial response is the rest of the very file that the part is of."""
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    asked = (offset, state["size"] - 1, state["size"])
    return (
        span is not None
        and tuple(map(int, span.groups())) == asked
        and _validator(response) in ("", state["validator"])
    )


def _validator(response: http.client.HTTPResponse) -> str:
    """A strong ETag, else the modification time: what If-Range accepts (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified", "")


def _state_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _state(url: str, part: Path) -> dict:
    """What is known of a part; empty where it cannot be gone on with."""
    if not (part.is_file() and _state_path(part).is_file()):
        return {}
    state = read_json(_state_path(part), "the download")
    if not isinstance(state, dict) or not {"url", "validator", "size"} <= state.keys():
        return {}
    return state if state["url"] == url and state["validator"] and state["size"] else {}


def _remember(url: str, part: Path, validator: str, total: int) -> None:
    part.unlink(missing_ok=True)
    write_json(_state_path(part), {"url": url, "validator": validator, "size": total})


def _bytes_in(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


# ---- Google Drive ------------------------------------------------------------------------------
def fetch_drive(file_id: str, part: Path, about: int = 0, retries: Retries | None = None) -> None:
    """Fetch a file from Google Drive with gdown, which knows Drive's confirmation pages.

    Args:
        file_id: Drive's.
        part: the file to write; gdown keeps what it has of it beside it, for the next call.
        about: roughly the file's bytes, 0 if unknown; Drive does not say before it sends.
        retries: attempts and waiting.

    Raises:
        ImportError: gdown is not installed.
        TransferError: Drive refuses (quota, permission), or the network failed for good.
        OSError: there is too little disk space.
    """
    try:
        import gdown
        from gdown import exceptions
    except ImportError:
        raise ImportError(
            "downloads from Google Drive need gdown: pip install 'mlnet-utils[download]'"
        ) from None
    passing = (OSError, getattr(exceptions, "DownloadError", OSError))  # gdown 5 has no such class
    url = DRIVE.format(file_id)
    patience = _Patience(url, retries, lambda: _bytes_of_gdown(part))
    part.parent.mkdir(parents=True, exist_ok=True)
    need_space(part.parent, about - patience.most, f"downloading {url} (a rough size)")
    options = {"quiet": not sys.stderr.isatty(), "use_cookies": False, "resume": True}
    if "timeout" in inspect.signature(gdown.download).parameters:  # gdown 5 has none
        options["timeout"] = TIMEOUT
    while True:
        try:
            if gdown.download(url, str(part), **options):
                return
            reason = "the transfer was cut"  # gdown 5 says no more
        except exceptions.FileURLRetrievalError as error:
            said = " ".join(str(error).split())
            raise WebPageError(f"{url}: Google Drive sends no file ({said})") from error
        except passing as error:  # the errors of requests, which gdown uses, are OSErrors
            response = getattr(error, "response", None)
            status = PASSING if response is None else {response.status_code}
            if getattr(error, "errno", None) == errno.ENOSPC or PASSING.isdisjoint(status):
                raise TransferError(f"{url}: {error}") from error
            reason = str(error)
        patience.failed(reason)


def _bytes_of_gdown(part: Path) -> int:
    """Bytes that are here of a file: gdown keeps a part of it under a name that starts with its."""
    return sum(map(_bytes_in, part.parent.glob(f"{glob.escape(part.name)}*")))
