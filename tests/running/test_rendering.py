"""The notebooks rendered to HTML, in headless Chromium: nothing is wider than a phone or a page."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbconvert
import nbformat
import pytest
from nbformat import v4

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("results/*/notebooks/*.ipynb")])
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
WIDTHS = (390, 1280)  # a phone, a desktop
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=5000", "--dump-dom"),
)
# Chromium's window is never narrower than 500 pixels; a frame is what it is told to be.
FRAMES = """\
<!doctype html><pre id="measured"></pre>
<script>
const pages = PAGES;
const measured = [];
addEventListener("message", event => {
  measured.push(event.data);
  document.getElementById("measured").textContent = JSON.stringify(measured);
});
for (const [page, width] of pages) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.style.border = 0; frame.src = page;
  document.body.append(frame);
}
</script>
"""
# What sticks out to the right and cannot be scrolled into view within the page.
MEASURE = """\
<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const out = [...document.images].filter(i => i.getBoundingClientRect().right > width + 1);
  const page = location.pathname.split("/").pop();
  const scroll = document.documentElement.scrollWidth;
  const images = document.images.length;
  parent.postMessage({page, width, scroll, images, out: out.map(i => i.alt)}, "*");
});
</script>
"""


def render(notebook, path):
    """Write a notebook as HTML that measures itself, in the template on which nbviewer builds."""
    exporter = nbconvert.HTMLExporter(template_name="classic", mathjax_url="", require_js_url="")
    html, _ = exporter.from_notebook_node(notebook)
    path.write_text(re.sub(r"<script[^>]*src=[^>]*></script>", "", html) + MEASURE, "utf-8")
    return html


def measure(folder):
    """Load every page of a folder at every width: what each of them reports."""
    pages = [(path.name, width) for path in sorted(folder.glob("*.html")) for width in WIDTHS]
    frames = folder / "frames.htm"
    frames.write_text(FRAMES.replace("PAGES", json.dumps(pages)), "utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", frames.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    measured = json.loads(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1])
    assert len(measured) == len(pages)
    return measured


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the PATH")


@pytest.mark.slow
@needs_chromium
def test_no_picture_is_wider_than_the_page(tmp_path):
    for path in NOTEBOOKS:
        name = "_".join(path.relative_to(ROOT).with_suffix(".html").parts)
        render(nbformat.read(path, as_version=4), tmp_path / name)
    for page in measure(tmp_path):
        assert page["images"] > 0, page
        assert page["out"] == [], page
        assert page["scroll"] <= page["width"], page


@pytest.mark.slow
@needs_chromium
def test_a_picture_that_is_too_wide_is_noticed(tmp_path):
    wide = '<img src="" alt="wide" style="width: 700px; max-width: none">'
    render(v4.new_notebook(cells=[v4.new_markdown_cell(f"# Title\n\n{wide}")]), tmp_path / "a.html")
    assert {page["width"]: page["out"] for page in measure(tmp_path)} == {390: ["wide"], 1280: []}


def test_alternative_text_reaches_the_reader(tmp_path):
    shown = {"data": {"image/png": "iVBORw0KGgo="}, "metadata": {"alt": "A curve that falls"}}
    cell = v4.new_code_cell("show()", outputs=[v4.new_output("display_data", **shown)])
    html = render(v4.new_notebook(cells=[cell]), tmp_path / "a.html")
    assert 'alt="A curve that falls"' in html
