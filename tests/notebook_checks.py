"""Hygiene of a saved notebook, one function per rule: facts, no taste.

Each takes the notebook and its path and returns the problems, in words; [] where all is well.
`test_notebooks.py` applies them to every notebook of the repository, and to bad ones.
"""

import ast
import json
import re
import runpy
from pathlib import Path

from mlnet_utils.running.notebooks import parameters_of
from mlnet_utils.running.pipeline import STAGES, STUDY

ROOT = Path(__file__).resolve().parent.parent

MAX_BYTES = 1_000_000
MIN_SHARE_WITH_OUTPUT = 0.4
CELL_METADATA = {"tags", "nbval-check-output"}
GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4"}}  # as Colab writes it
TRAINS = {stage.name for stage in (*STAGES, STUDY) if stage.resumes}
WIDGETS = "application/vnd.jupyter.widget"
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:home|Users|root|tmp|var|private|mnt|opt|srv|workspace|work|content|"
    r"kaggle|data|scratch)/[\w.-]+|file://|\b[A-Z]:\\+\w|~/\w|site-packages"
)
MAGIC = re.compile(r"^([ \t]*)[!%]", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)  # its comments look like headings
HTML_IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def label(cell):
    """How a problem names a cell: by its first line."""
    return f"`{cell.source.strip().splitlines()[0] if cell.source.strip() else 'empty cell'}`"


def python(cell):
    """A code cell's syntax tree; lines that only IPython understands count as `pass`."""
    return ast.parse(MAGIC.sub(r"\1pass  # ", cell.source))


def readable_text(notebook):
    """Sources and text outputs: what a reader, or a search, sees."""
    texts = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        texts.append(output.get("text", ""))
        data = output.get("data", {})
        texts += [str(value) for kind, value in data.items() if kind.startswith("text/")]
    return "\n".join(texts)


def repository_name():
    """`owner/name`, from the one place where it is written."""
    return runpy.run_path(str(ROOT / "tools" / "address.py"))["repository_name"](ROOT)


# ---- saved by the pipeline, executed from a clean kernel ---------------------------------------
def executed_in_order(notebook, path):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    problem = f"execution counts {counts}: not run once, top to bottom, from a clean kernel"
    return [problem] if counts != list(range(1, len(counts) + 1)) else []


def has_outputs(notebook, path):
    shown = [bool(cell.outputs) for cell in code_cells(notebook)]
    problem = f"only {sum(shown)} of {len(shown)} code cells show something"
    return [] if shown and sum(shown) >= MIN_SHARE_WITH_OUTPUT * len(shown) else [problem]


def no_errors_or_stderr(notebook, path):
    return [
        f"{label(cell)} has {output.get('ename') or 'stderr'} among its outputs"
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def plain_metadata(notebook, path):
    """The kernel's name, tags, and the GPU that Colab is asked for where something is trained."""
    problems, kernel = [], notebook.metadata.get("kernelspec", {})
    if kernel != {"name": "python3", "display_name": "Python 3", "language": "python"}:
        problems.append(f"kernelspec is {kernel}")
    machine = GPU if path.stem in TRAINS else {}
    if {key: notebook.metadata[key] for key in GPU if key in notebook.metadata} != machine:
        problems.append(f"Colab's machine is not {machine or 'left to the user'}")
    if extra := sorted(set(notebook.metadata) - {"kernelspec", "language_info", *GPU}):
        problems.append(f"notebook metadata holds {', '.join(extra)}")
    for cell in notebook.cells:
        if strange := sorted(set(cell.metadata) - CELL_METADATA):
            problems.append(f"metadata of {label(cell)} holds {', '.join(strange)}")
    return problems


def no_widgets(notebook, path):
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    return [f"output of the kind {kind}" for kind in sorted(kinds) if kind.startswith(WIDGETS)]


def no_machine_paths(notebook, path):
    found = sorted({match[0] for match in MACHINE_PATH.finditer(readable_text(notebook))})
    return [f"shows a path of one machine: {text}" for text in found]


def small_file(notebook, path):
    size = path.stat().st_size
    return [f"{size:,} bytes, at most {MAX_BYTES:,}"] if size > MAX_BYTES else []


# ---- parameters --------------------------------------------------------------------------------
def literal_parameters(notebook, path):
    """One cell of `NAME = literal`, with the three names and values that the pipeline relies on."""
    try:
        values = parameters_of(path)
    except ValueError as error:
        return [str(error)]
    quickstart = path.stem.startswith("00")  # it is no stage of the pipeline
    names = ["RUN_DIR"] if quickstart else ["PRESET", "RUN_DIR", "DATA_ROOT"]
    wanted = {name: "sample" if name == "PRESET" else "" for name in names}
    return [f"parameter {n} should be {v!r}" for n, v in wanted.items() if values.get(n) != v]


# ---- plain code ------------------------------------------------------------------------------
def no_machinery(notebook, path):
    """The package is the mechanism: no classes, no star imports, no bare excepts."""
    problems = []
    for cell in code_cells(notebook):
        for node in ast.walk(python(cell)):
            if isinstance(node, ast.ClassDef):
                problems.append(f"defines class {node.name}")
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                problems.append(f"{label(cell)} imports *")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                problems.append(f"{label(cell)} has a bare except")
    return problems


def shell_only_in_colab(notebook, path):
    """`!` and `%pip` stand under an explicit condition in the one cell that is about Colab."""
    return [
        f"{label(cell)} runs {line.strip()}"
        for cell in code_cells(notebook)
        for line in cell.source.splitlines()
        if re.match(r"\s*(!|%%|%(?:pip|conda|sx|system)\b)", line)
        and not (line[0].isspace() and re.search(r"^if .*colab", cell.source, re.I | re.M))
    ]


def no_path_tricks(notebook, path):
    tricks = re.compile(r"\b(?:sys\.path|os\.chdir|PYTHONPATH)\b")
    cells = code_cells(notebook)
    return [f"{label(cell)} uses {used}" for cell in cells for used in tricks.findall(cell.source)]


# ---- links and pictures --------------------------------------------------------------------------
def badges_carry_the_address(notebook, path):
    """Colab and nbviewer open this notebook of this repository, whose name pyproject.toml holds."""
    place = f"github/{repository_name()}/blob/main/notebooks/{path.name}"
    badges = [f"{s}/{place}" for s in ("https://colab.research.google.com", "https://nbviewer.org")]
    return [f"no link to {badge}" for badge in badges if f"({badge})" not in markdown(notebook)]


def links_are_valid(notebook, path):
    return broken_links(markdown(notebook), path)


def broken_links(text, path):
    """Relative links of a page (its Markdown, its path) to files or headings that do not exist."""
    problems = []
    for _, _, target in LINK.findall(without_code(text)):
        if re.match(r"(https?|mailto|attachment|data):", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if name and not file.exists():
            problems.append(f"link to {name}, which does not exist")
        elif anchor and anchor not in anchors(text if file == path else page(file), file):
            problems.append(f"link to {target}, which is no heading there")
    return problems


def without_code(text):
    """Markdown without its code: Python's `terms[name](x)` is no link."""
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


def page(file):
    """The Markdown of a page or of a notebook."""
    text = file.read_text("utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(text, file):
    """What `#...` may name: headings, as nbconvert writes them, and as GitHub does in pages."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCED.sub("", text), re.MULTILINE)
    if file.suffix == ".ipynb":
        names = {heading.replace(" ", "-") for heading in headings}
    else:
        names = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
    return names | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def figures_have_alt_text(notebook, path):
    """Pictures that cells show say what they show (`plots.show`)."""
    return [
        f"a figure of {label(cell)} has no alternative text"
        for cell in code_cells(notebook)
        for output in cell.outputs
        if any(kind.startswith("image/") for kind in output.get("data", {}))
        and not output.metadata.get("alt", "").strip()
    ]


def images_have_alt_text(notebook, path):
    return bare_images(markdown(notebook))


def bare_images(text):
    """Images of a page that have no alternative text."""
    bare = [target for image, alt, target in LINK.findall(text) if image and not alt.strip()]
    tags = HTML_IMAGE.findall(text)
    bare += [tag for tag in tags if not re.search(r"alt=[\"'][^\"']+[\"']", tag)]
    return [f"image without alternative text: {target}" for target in bare]


def valid_file(notebook, path):
    """Valid notebook format, with the identifiers of cells that make diffs readable."""
    import nbformat

    try:
        nbformat.validate(json.loads(path.read_text("utf-8")))
    except nbformat.ValidationError as error:
        return [str(error).splitlines()[0]]
    return []


CHECKS = (
    *(executed_in_order, has_outputs, no_errors_or_stderr, plain_metadata, no_widgets),
    *(no_machine_paths, small_file, literal_parameters, no_machinery, shell_only_in_colab),
    *(no_path_tricks, badges_carry_the_address, links_are_valid, images_have_alt_text),
    *(figures_have_alt_text, valid_file),
)
