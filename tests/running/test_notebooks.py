"""Every saved notebook is fit for readers, and every rule of that fires on a bad notebook."""

import configparser
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")

import notebook_checks as checks  # noqa: E402

from mlnet_utils.running.pipeline import STAGES, STUDY  # noqa: E402

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
def text_output(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def code(source, count, outputs=(), **metadata):
    return nbformat.v4.new_code_cell(
        source, execution_count=count, outputs=list(outputs), metadata=metadata
    )


@pytest.fixture
def good(tmp_path):
    """A notebook that passes every check, with a successor, in a folder of its own."""
    (tmp_path / "02_next.ipynb").write_text("{}")
    (tmp_path / "02_next.md").write_text("# What: a *page*!\n\n```\n# Else\n```\n")
    path = tmp_path / "01_first.ipynb"
    place = f"github/{checks.repository_name()}/blob/main/notebooks/01_first.ipynb"
    title = nbformat.v4.new_markdown_cell(
        "# 01 · First\n\nNeeds nothing.\n\n"
        f"[![Colab](https://example.org/badge.svg)](https://colab.research.google.com/{place}) "
        f"[nbviewer](https://nbviewer.org/{place})"
    )
    end = nbformat.v4.new_markdown_cell(
        "## The end\n\nOn to [the next](02_next.ipynb), or [back](#The-end).\n\n"
        "![curve](02_next.ipynb)"
    )
    notebook = nbformat.v4.new_notebook(
        cells=[
            title,
            code(COLAB_CELL, 1),
            code(PARAMETERS, 2, tags=["parameters"]),
            code("def double(x):\n    return 2 * x", 3, [text_output("runs/sample/metrics.json")]),
            code("double(2)", 4, [text_output("4")]),
            end,
        ],
        metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}},
    )
    return notebook, path


def problems_of(notebook, path):
    """Save the notebook and apply every check to it: name of the check -> problems."""
    path.write_text(nbformat.writes(notebook), "utf-8")
    found = {check.__name__: check(notebook, path) for check in checks.CHECKS}
    return {name: problems for name, problems in found.items() if problems}


def test_good_notebook_passes_every_check(good):
    assert problems_of(*good) == {}


def set_count(notebook, path):
    notebook.cells[4].execution_count = 7


def never_run(notebook, path):
    notebook.cells[4].execution_count = None


def strip_outputs(notebook, path):
    for cell in checks.code_cells(notebook):
        cell.outputs = []


def add_error(notebook, path):
    notebook.cells[4].outputs.append(
        nbformat.v4.new_output("error", ename="KeyError", evalue="'x'", traceback=[])
    )


def add_stderr(notebook, path):
    notebook.cells[4].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="hm"))


def other_kernel(notebook, path):
    notebook.metadata.kernelspec.name = "my-env"


def widget_state(notebook, path):
    notebook.metadata["widgets"] = {}


def papermill_metadata(notebook, path):
    notebook.cells[4].metadata["papermill"] = {"duration": 1}


def widget_output(notebook, path):
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    notebook.cells[4].outputs.append(nbformat.v4.new_output("display_data", data=data))


def printed(text):
    def change(notebook, path):
        notebook.cells[4].outputs[0].text = text

    return change


def html(text):
    def change(notebook, path):
        output = nbformat.v4.new_output("display_data", data={"text/html": text})
        notebook.cells[4].outputs.append(output)

    return change


def source(index, text):
    def change(notebook, path):
        notebook.cells[index].source = text

    return change


def extend(index, text):
    def change(notebook, path):
        notebook.cells[index].source += text

    return change


def replace(index, old, new):
    def change(notebook, path):
        assert old in notebook.cells[index].source
        notebook.cells[index].source = notebook.cells[index].source.replace(old, new)

    return change


def untag(notebook, path):
    del notebook.cells[2].metadata["tags"]


def inject(notebook, path):
    notebook.cells[3].metadata["tags"] = ["injected-parameters"]


def same_id(notebook, path):
    notebook.cells[3]["outputs"][0]["output_type"] = "scroll"


def figure(notebook, path):
    output = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="})
    notebook.cells[4].outputs.append(output)


BAD = [
    (set_count, "executed_in_order", "not run once, top to bottom"),
    (never_run, "executed_in_order", "None"),
    (strip_outputs, "has_outputs", "only 0 of 4 code cells"),
    (add_error, "no_errors_or_stderr", "`double(2)` has KeyError"),
    (add_stderr, "no_errors_or_stderr", "`double(2)` has stderr"),
    (other_kernel, "plain_metadata", "my-env"),
    (widget_state, "plain_metadata", "notebook metadata holds widgets"),
    (papermill_metadata, "plain_metadata", "`double(2)` holds papermill"),
    (widget_output, "no_widgets", "application/vnd.jupyter.widget-view+json"),
    (printed("wrote /home/ann/runs/x.png"), "no_machine_paths", "/home/ann"),
    (printed("'/Users/ann/x'"), "no_machine_paths", "/Users/ann"),
    (printed("in ~/projects/x"), "no_machine_paths", "~/p"),
    (printed("file:///etc"), "no_machine_paths", "file://"),
    (html("<td>/tmp/tmpab12/x.pt</td>"), "no_machine_paths", "/tmp/tmpab12"),
    (source(4, "open('C:\\\\Users')"), "no_machine_paths", "C:"),
    (printed("x" * 1_000_001), "small_file", "at most 1,000,000"),
    (untag, "literal_parameters", "0 cells are tagged"),
    (inject, "literal_parameters", "injected"),
    (extend(2, "LIMIT = len(PRESET)  # int: photos\n"), "literal_parameters", "len(PRESET)"),
    (replace(2, "sample", "tiny"), "literal_parameters", "PRESET should be 'sample'"),
    (replace(2, "RUN_DIR", "RUNS"), "literal_parameters", "RUN_DIR should be ''"),
    (source(4, "class Model:\n    pass"), "no_machinery", "defines class Model"),
    (source(4, "from math import *"), "no_machinery", "imports *"),
    (source(4, "try:\n    x\nexcept:\n    y"), "no_machinery", "a bare except"),
    (source(4, "!ls"), "shell_only_in_colab", "`!ls` runs !ls"),
    (source(4, "if True:\n    %pip install x"), "shell_only_in_colab", "runs %pip install x"),
    (source(1, "IS_COLAB = 1\n%pip install x"), "shell_only_in_colab", "runs %pip install x"),
    (source(4, "%%bash\nls"), "shell_only_in_colab", "runs %%bash"),
    (source(4, "import sys\nsys.path.append('..')"), "no_path_tricks", "sys.path"),
    (source(4, "import os\nos.chdir('..')"), "no_path_tricks", "os.chdir"),
    (replace(0, "github/", "github/someone-"), "badges_carry_the_address", "no link to"),
    (replace(0, "01_first.ipynb", "02_next.ipynb"), "badges_carry_the_address", "no link to"),
    (replace(5, "#The-end", "#Nowhere"), "links_are_valid", "link to #Nowhere"),
    (extend(5, " [x](../figures/none.png)"), "links_are_valid", "link to ../figures/none.png"),
    (extend(5, " [x](02_next.md#Else)"), "links_are_valid", "link to 02_next.md#Else, which is no"),
    (replace(5, "![curve]", "![]"), "images_have_alt_text", "image without alternative text"),
    (extend(5, ' <img src="https://x/y.png">'), "images_have_alt_text", "<img src="),
    (figure, "figures_have_alt_text", "a figure of `double(2)` has no alternative text"),
    (same_id, "valid_file", "scroll"),
]


@pytest.mark.parametrize(("spoil", "check", "message"), BAD)
def test_check_fires(good, spoil, check, message):
    notebook, path = good
    spoil(notebook, path)
    found = problems_of(notebook, path)
    assert any(message in problem for problem in found[check]), found


def test_every_check_is_seen_to_fire():
    assert {check for _, check, _ in BAD} == {check.__name__ for check in checks.CHECKS}


# ---- the pages beside them ---------------------------------------------------------------------
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "data/*.md", "results/**/*.md")
    for path in checks.ROOT.glob(pattern)
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(checks.ROOT).as_posix())
def test_page_links_to_what_exists_and_describes_its_images(path):
    text = path.read_text("utf-8")
    assert checks.broken_links(text, path) == []
    assert checks.bare_images(text) == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("[a](other.md) [b](other.md#a-page-of-c) [c](#here) `x[y](z)`\n\n## Here", []),
        ("[a](none.md)", ["link to none.md, which does not exist"]),
        ("[a](other.md#b)", ["link to other.md#b, which is no heading there"]),
        ("[a](#here)\n\n```\n# Here\n```", ["link to #here, which is no heading there"]),
        ("[a](book.ipynb#In-a-book) [b](book.ipynb#in-a-book)",
         ["link to book.ipynb#in-a-book, which is no heading there"]),
    ],
)  # fmt: skip
def test_links_of_pages_are_checked(tmp_path, text, problems):
    (tmp_path / "other.md").write_text("# A page: of `C`!")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# In a book")])
    nbformat.write(book, tmp_path / "book.ipynb")
    assert checks.broken_links(text, tmp_path / "page.md") == problems


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
