"""A web server on this machine that serves bytes, with the faults of real ones on request."""

import contextlib
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html>\n<html><body>Too many users have viewed this file</body></html>"
STALL = 5  # seconds, for longer than which clients should not wait; then the file goes on


@dataclass
class Served:
    """A file and how it is served."""

    content: bytes
    ranges: bool = True  # answer Range with 206
    etag: str = '"1"'
    cuts: list[int] = field(default_factory=list)  # bytes after which each request is cut off
    stalls: int = 0  # requests that hang first
    chunked: bool = False  # no Content-Length at all
    requests: list[dict] = field(default_factory=list)  # headers of every request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        served = self.server.files.get(self.path.lstrip("/"))
        if served is None:
            self.send_error(404)
            return
        served.requests.append(dict(self.headers))
        if served.stalls:
            served.stalls -= 1
            self.server.closing.wait(STALL)
        start = self._start(served)
        if start > len(served.content) or (start and start == len(served.content)):
            self.send_error(416)
            return
        body = served.content[start:]
        self.send_response(206 if start else 200)
        if start:
            whole = f"bytes {start}-{len(served.content) - 1}/{len(served.content)}"
            self.send_header("Content-Range", whole)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", served.etag)
        if served.chunked:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = served.cuts.pop(0) if served.cuts else None
        with contextlib.suppress(ConnectionError):  # clients may refuse a file by its headers
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None or served.chunked:
            self.close_connection = True

    def _start(self, served) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", served.etag) == served.etag
        return int(asked[1]) if asked and served.ranges and unchanged else 0

    def log_message(self, *_):
        """Print nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Silence where a client that was treated badly hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FaultyServer:
    """Use as a context manager; set ``files[name] = Served(...)`` and fetch ``url(name)``."""

    def __init__(self):
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.files = self.files = {}
        self.server.closing = threading.Event()
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.server.closing.set()
            self.server.shutdown()
        self.server.server_close()
        self.thread.join()
