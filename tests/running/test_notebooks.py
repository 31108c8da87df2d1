"""Every saved notebook is fit for readers, and every rule of that fires on a bad notebook."""

import configparser
import re

import nbformat
import notebook_checks as checks
import pytest
from nbformat import v4

from mlnet_utils.running.pipeline import STAGES, STUDY

NOTEBOOKS = sorted((checks.ROOT / "notebooks").glob("*.ipynb"))
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = """\
PRESET = "sample"  # str: which configuration
RUN_DIR = ""  # str: folder of the run
DATA_ROOT: str = ""  # folder of the datasets
"""
COLAB_CELL = "if IS_COLAB:\n    %pip install -q mlnet"


def test_the_notebooks_of_the_pipeline_are_there():
    assert {stage.name for stage in (*STAGES, STUDY)} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, check):
    assert check(nbformat.read(path, as_version=4), path) == []


# ---- every check fires -------------------------------------------------------------------------
def code(source, count, printed=None, **metadata):
    outputs = [v4.new_output("stream", text=printed)] if printed else []
    return v4.new_code_cell(source, execution_count=count, outputs=outputs, metadata=metadata)


@pytest.fixture
def good(tmp_path):
    """A notebook that passes every check, with a successor, in a folder of its own."""
    (tmp_path / "02_next.ipynb").write_text("{}")
    (tmp_path / "02_next.md").write_text("# What: a *page*!\n\n```\n# Else\n```\n")
    path = tmp_path / "01_first.ipynb"
    place = f"github/{checks.repository_name()}/blob/main/notebooks/01_first.ipynb"
    cells = [
        v4.new_markdown_cell(
            f"# 01 · First\n\n[nbviewer](https://nbviewer.org/{place}) [![Colab]"
            f"(https://example.org/badge.svg)](https://colab.research.google.com/{place})"
        ),
        code(COLAB_CELL, 1),
        code(PARAMETERS, 2, tags=["parameters"]),
        code("def double(x):\n    return 2 * x", 3, "runs/sample/metrics.json"),
        code("double(2)", 4, "4"),
        v4.new_markdown_cell(
            "## End\n\n[next](02_next.ipynb) or [back](#End)\n\n![curve](02_next.ipynb)"
        ),
    ]
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return v4.new_notebook(cells=cells, metadata=metadata), path


def problems_of(notebook, path):
    """Save the notebook and apply every check to it: name of the check -> problems."""
    path.write_text(nbformat.writes(notebook), "utf-8")
    found = {check.__name__: check(notebook, path) for check in checks.CHECKS}
    return {name: problems for name, problems in found.items() if problems}


def test_good_notebook_passes_every_check(good):
    assert problems_of(*good) == {}


# Spoilers: each takes the good notebook and changes it.
def cell(index, **changes):
    return lambda notebook: notebook.cells[index].update(changes)


def stripped(notebook):
    for cell in checks.code_cells(notebook):
        cell.outputs = []


def shown(kind="display_data", **content):
    """One more output; a media type stands for its data."""
    output = v4.new_output(kind, **content)
    return lambda notebook: notebook.cells[4].outputs.append(output)


def printed(text):
    return lambda notebook: notebook.cells[4].outputs[0].update(text=text)


def extend(index, text):
    return lambda notebook: notebook.cells[index].update(source=notebook.cells[index].source + text)


def replace(index, old, new):
    def change(notebook):
        assert old in notebook.cells[index].source
        notebook.cells[index].source = notebook.cells[index].source.replace(old, new)

    return change


BAD = [
    (cell(4, execution_count=7), "executed_in_order", "not run once, top to bottom"),
    (cell(4, execution_count=None), "executed_in_order", "None"),
    (stripped, "has_outputs", "only 0 of 4 code cells"),
    (shown("error", ename="KeyError"), "no_errors_or_stderr", "`double(2)` has KeyError"),
    (shown("stream", name="stderr"), "no_errors_or_stderr", "`double(2)` has stderr"),
    (lambda notebook: notebook.metadata.kernelspec.update(name="my-env"),
     "plain_metadata", "my-env"),
    (lambda notebook: notebook.metadata.update(widgets={}), "plain_metadata", "holds widgets"),
    (lambda notebook: notebook.metadata.update(checks.GPU), "plain_metadata", "left to the user"),
    (cell(4, metadata={"papermill": {}}), "plain_metadata", "`double(2)` holds papermill"),
    (shown(data={checks.WIDGETS + "-view+json": {}}), "no_widgets", checks.WIDGETS),
    (printed("wrote /home/ann/runs/x.png"), "no_machine_paths", "/home/ann"),
    (printed("'/Users/ann/x'"), "no_machine_paths", "/Users/ann"),
    (printed("in ~/projects/x"), "no_machine_paths", "~/p"),
    (printed("file:///etc"), "no_machine_paths", "file://"),
    (shown(data={"text/html": "<td>/tmp/tmpab12/x</td>"}), "no_machine_paths", "/tmp/tmpab12"),
    (cell(4, source="open('C:\\\\Users')"), "no_machine_paths", "C:"),
    (printed("x" * 1_000_001), "small_file", "at most 1,000,000"),
    (cell(2, metadata={}), "literal_parameters", "0 cells are tagged"),
    (cell(3, metadata={"tags": ["parameters"]}), "literal_parameters", "2 cells are tagged"),
    (cell(3, metadata={"tags": ["injected-parameters"]}), "literal_parameters", "injected"),
    (extend(2, "LIMIT = len(PRESET)  # int: photos\n"), "literal_parameters", "len(PRESET)"),
    (replace(2, "sample", "tiny"), "literal_parameters", "PRESET should be 'sample'"),
    (replace(2, "RUN_DIR", "RUNS"), "literal_parameters", "RUN_DIR should be ''"),
    (cell(4, source="class Model:\n    pass"), "no_machinery", "defines class Model"),
    (cell(4, source="from math import *"), "no_machinery", "imports *"),
    (cell(4, source="try:\n    x\nexcept:\n    y"), "no_machinery", "a bare except"),
    (cell(4, source="!ls"), "shell_only_in_colab", "`!ls` runs !ls"),
    (cell(4, source="if True:\n    %pip install x"), "shell_only_in_colab", "runs %pip install x"),
    (cell(1, source="IS_COLAB = 1\n%pip install x"), "shell_only_in_colab", "runs %pip install x"),
    (cell(4, source="%%bash\nls"), "shell_only_in_colab", "runs %%bash"),
    (cell(4, source="import sys\nsys.path.append('..')"), "no_path_tricks", "sys.path"),
    (cell(4, source="import os\nos.chdir('..')"), "no_path_tricks", "os.chdir"),
    (replace(0, "github/", "github/someone-"), "badges_carry_the_address", "no link to"),
    (replace(0, "01_first.ipynb", "02_next.ipynb"), "badges_carry_the_address", "no link to"),
    (replace(5, "#End", "#Nowhere"), "links_are_valid", "link to #Nowhere"),
    (extend(5, " [x](../figures/none.png)"), "links_are_valid", "link to ../figures/none.png"),
    (extend(5, " [x](02_next.md#Else)"), "links_are_valid", "link to 02_next.md#Else, which is no"),
    (replace(5, "![curve]", "![]"), "images_have_alt_text", "image without alternative text"),
    (extend(5, ' <img src="https://x/y.png">'), "images_have_alt_text", "<img src="),
    (shown(data={"image/png": "iVBORw0KGgo="}), "figures_have_alt_text", "figure of `double(2)`"),
    (lambda notebook: notebook.cells[3].outputs[0].update(output_type="scroll"),
     "valid_file", "scroll"),
]  # fmt: skip


def test_a_notebook_that_trains_asks_for_a_gpu(good):
    notebook, path = good[0], checks.ROOT / "notebooks" / "02_training.ipynb"
    assert checks.plain_metadata(notebook, path) == [f"Colab's machine is not {checks.GPU}"]
    notebook.metadata.update(checks.GPU)
    assert checks.plain_metadata(notebook, path) == []


def test_setup_cells_are_the_same_and_install_what_colab_lacks():
    books = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    (setup,) = {cell.source for book in books for cell in book.cells if "%pip" in cell.source}
    assert '    %pip install -q "mlnet-utils[colab] @ {SOURCE}"' in setup


@pytest.mark.parametrize(("spoil", "check", "message"), BAD)
def test_check_fires(good, spoil, check, message):
    notebook, path = good
    spoil(notebook)
    found = problems_of(notebook, path)
    assert any(message in problem for problem in found[check]), found


def test_every_check_is_seen_to_fire():
    assert {check for _, check, _ in BAD} == {check.__name__ for check in checks.CHECKS}


# ---- the pages beside them ---------------------------------------------------------------------
PATTERNS = ("*.md", "docs/*.md", "data/*.md", "results/**/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in checks.ROOT.glob(pattern))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(checks.ROOT).as_posix())
def test_page_links_to_what_exists_and_describes_its_images(path):
    text = path.read_text("utf-8")
    assert checks.broken_links(text, path) == []
    assert checks.bare_images(text) == []


def test_links_to_headings_of_pages_and_notebooks(tmp_path):
    (tmp_path / "other.md").write_text("# A page: of `C`!")
    book = v4.new_notebook(cells=[v4.new_markdown_cell("# In a book")])
    nbformat.write(book, tmp_path / "book.ipynb")
    good = "[a](other.md#a-page-of-c) [b](#here) [c](book.ipynb#In-a-book) `x[y](z)`\n\n## Here"
    assert checks.broken_links(good, tmp_path / "page.md") == []
    bad = "[a](#here) [b](book.ipynb#in-a-book)\n\n```\n# Here\n```"
    assert len(checks.broken_links(bad, tmp_path / "page.md")) == 2


def test_executed_copies_are_fit_for_readers_too():
    """What `results/` holds for nbviewer may hold injected parameters, but no fault to look at."""
    copies = sorted(checks.ROOT.glob("results/*/notebooks/*.ipynb"))
    assert copies
    for path in copies:
        notebook = nbformat.read(path, as_version=4)
        for check in (checks.no_errors_or_stderr, checks.no_machine_paths, checks.links_are_valid):
            assert check(notebook, path) == [], path


# ---- what nbval may ignore ---------------------------------------------------------------------
SANITIZED = [
    ("epoch 3: 12.4 s", "epoch 3: DURATION"),
    ("<Axes at 0x7f3c5a1b2d90>", "<Axes at ADDRESS>"),
    ("made 2026-11-23T08:12:24.123Z", "made DATE"),
    ("torch 2.14.1+cu130", "torch VERSION"),
    ("sha256 " + "0f" * 32, "sha256 DIGEST"),
    ("CC 0.821, 700 photos, (16, 20)", "CC 0.821, 700 photos, (16, 20)"),
]


@pytest.mark.parametrize(("text", "expected"), SANITIZED)
def test_sanitizing_removes_only_what_may_differ(text, expected):
    rules = configparser.RawConfigParser()
    rules.read(checks.ROOT / "tests" / "nbval_sanitize.cfg")
    for name in rules.sections():
        text = re.sub(rules.get(name, "regex"), rules.get(name, "replace"), text)
    assert text == expected
