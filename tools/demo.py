"""Place onnxruntime-web beside the page in docs/demo, and serve the page on this machine only.

    python tools/demo.py [--port 8000]

The runtime comes from npm's package, of one version and with one checksum; it is fetched once. The
network, docs/demo/network.onnx, is written by `python -m mlnet_utils export`. Needs nothing but
Python and, the first time, npm.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

PAGE = Path(__file__).resolve().parents[1] / "docs" / "demo"
VERSION = "1.30.0"
FILES = {  # of the package, with their SHA-256
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
}


def place_runtime(folder: Path) -> Path:
    """Fetch what the page needs of onnxruntime-web, unless it is there, undamaged.

    Args:
        folder: of the page.

    Returns:
        ``folder/runtime``, complete.

    Raises:
        FileNotFoundError: npm is not installed.
        subprocess.CalledProcessError: npm cannot reach its registry.
        ValueError: the package does not hold the files that were pinned.
    """
    runtime = folder / "runtime"
    if not changed_files(runtime):
        return runtime
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is needed to fetch onnxruntime-web: https://nodejs.org")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".runtime-") as temporary:
        pack = [npm, "pack", "--silent", f"onnxruntime-web@{VERSION}"]
        subprocess.run(pack, cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(temporary).glob("*.tgz")
        complete = Path(temporary) / "runtime"
        complete.mkdir()
        with tarfile.open(package) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/dist/{name}").read()
                (complete / name).write_bytes(content)
        if changed := changed_files(complete):
            found = f"npm's onnxruntime-web {VERSION} has another {', '.join(changed)}"
            raise ValueError(f"{found} than tools/demo.py knows: is npm's registry the right one?")
        shutil.rmtree(runtime, ignore_errors=True)
        complete.replace(runtime)
    return runtime


def changed_files(folder: Path) -> list[str]:
    """Names of the :data:`FILES` that a folder lacks, or has with another SHA-256."""
    files = {name: folder / name for name in FILES}
    contents = {name: file.read_bytes() if file.is_file() else b"" for name, file in files.items()}
    return [n for n in FILES if hashlib.sha256(contents[n]).hexdigest() != FILES[n]]


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with the headers without which browsers grant no threads to a page."""

    extensions_map: ClassVar = {  # some systems know the last two by another name, or not at all
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments):
        """Nothing: the terminal shows the address alone."""


# ---- a visitor without hands: the test and benchmarks/in_a_browser.py ----------------------------
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",  # the pages' consoles too
)
# Chromium's window is never narrower than 500 pixels; a frame is what it is told to be.
VISIT = """\
<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script>
const post = (path, body) => fetch(path, { method: "POST", body });
const until = async (holds) => { while (!holds()) await new Promise((go) => setTimeout(go, 20)); };
/** Open the page in `folder`, `width` pixels wide, with its network loaded or refused. */
async function open(folder, width) {
  const frame = Object.assign(document.createElement("iframe"), { width, height: 900 });
  frame.style.border = 0;
  frame.src = `${folder}/index.html`;
  document.body.replaceChildren(frame);
  await new Promise((go) => (frame.onload = go));
  const page = frame.contentDocument;
  const [status, problem] = ["status", "problem"].map((id) => page.getElementById(id));
  await until(() => status.textContent === "The network is ready." || !problem.hidden);
  return page;
}
const parcel = async (path) => {
  const content = new DataTransfer();
  content.items.add(new File([await (await fetch(path)).blob()], path.split("/").pop()));
  return content;
};
/** Drop a file onto the page. */
async function drop(page, path) {
  const dataTransfer = await parcel(path);
  page.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}
/** Drop a photo onto the page: {density, height, width, seconds}. */
async function predict(page, path) {
  const found = new Promise((go) =>
    page.addEventListener("prediction", ({ detail }) => go(detail), { once: true }));
  await drop(page, path);
  return found;
}
(async () => { SCRIPT })().then(() => post("done"), (error) => post("failed", error.stack));
</script></body>
"""


def link_page(folder: Path, runtime: Path) -> Path:
    """A folder in which the page finds a network of its own; returned for its ``network.onnx``."""
    folder.mkdir()
    for name in ("index.html", "demo.js", "style.css"):
        (folder / name).symlink_to(PAGE / name)
    (folder / "runtime").symlink_to(runtime)
    return folder


@dataclass
class Visit:
    """What a visit left: bodies of POST requests by path, all requests, lines of the console."""

    posts: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, status
    console: list[str] = field(default_factory=list)


def visit(folder: Path, script: str, isolated: bool = True, timeout: float = 300) -> Visit:
    """Let headless Chromium run a script beside the pages of a folder.

    Args:
        folder: what is served; each page lies in a folder of its own.
        script: JavaScript, which may ``await`` and use the functions in :data:`VISIT`.
        isolated: send the headers that allow threads.
        timeout: in seconds.

    Raises:
        RuntimeError: the script failed.
        TimeoutError: it did not end in time.
    """
    found, ended = Visit(), threading.Event()

    class Recorder(Handler):
        def do_GET(self):
            if self.path != "/visit.html":
                return super().do_GET()
            self.answer(VISIT.replace("SCRIPT", script).encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.posts[self.path.lstrip("/")] = body
            self.answer(b"")
            if self.path in ("/done", "/failed"):
                ended.set()

        def answer(self, content: bytes):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def send_header(self, name, value):
            if isolated or not name.startswith("Cross-Origin-"):
                super().send_header(name, value)

        def log_request(self, code="-", size="-"):
            found.requests.append((self.command, self.path, int(code)))

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Recorder, directory=folder)) as server,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/visit.html"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        try:
            if not ended.wait(timeout):
                raise TimeoutError(f"Chromium did not end the script within {timeout:g} s")
        finally:
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
            server.shutdown()
        log.seek(0)
        found.console = [line for line in log if ":CONSOLE" in line]
    if "failed" in found.posts:
        raise RuntimeError(found.posts["failed"].decode())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    options = parser.parse_args()
    try:
        place_runtime(PAGE)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError:
        sys.exit(f"npm could not fetch onnxruntime-web {VERSION}: is its registry within reach?")
    address = ("127.0.0.1", options.port)
    with ThreadingHTTPServer(address, partial(Handler, directory=PAGE)) as server:
        print(f"http://127.0.0.1:{server.server_port} shows the page; Ctrl+C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
