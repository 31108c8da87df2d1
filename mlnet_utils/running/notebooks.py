"""A notebook: its parameters, its execution on this Python, an executed copy fit for readers."""

import ast
import contextlib
import hashlib
import json
import os
import posixpath
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from mlnet_utils.runtime import display_path, reading, write_text

INJECTED_TAG = "injected-parameters"  # papermill's tags
ERROR_TAG = "papermill-error-cell-tag"
KERNEL_START_SECONDS = 180  # a cold file system on a busy machine
COLAB_KEYS = ("accelerator", "colab")  # the machine that Colab gives a notebook
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(RuntimeError):
    """A notebook failed; the message names the notebook, the cell and the error."""


class ThisPython(AsyncKernelManager):
    """A kernel of the running interpreter; ``python3`` may be the user's of another environment."""

    def __init__(self, **options: Any):
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)


# ---- reading -----------------------------------------------------------------------------------
def _cells(path: Path) -> list[NotebookNode]:
    with reading(path, "a notebook of Jupyter", "get it again, e.g. from the repository"):
        cells = nbformat.read(path, as_version=4).cells
        if not all({"cell_type", "metadata", "source"} <= set(cell) for cell in cells):
            raise ValueError("a cell lacks its type, metadata or source")
    return cells


def parameters_of(path: Path) -> dict[str, Any]:
    """Name and value of every parameter of a notebook: the cell tagged ``parameters``.

    A ValueError where that is not one cell of lines ``NAME = literal``, or an earlier run has
    injected another.
    """
    cells = _cells(path)
    if any(INJECTED_TAG in cell.metadata.get("tags", ()) for cell in cells):
        raise ValueError(f"{path} holds parameters injected by an earlier run: delete that cell")
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"{path}: {len(tagged)} cells are tagged `parameters`; tag exactly 1")
    values = {}
    with reading(path, "parameters, each a line NAME = literal", "mend the cell"):
        statements = ast.parse(tagged[0]).body
    for statement in statements:
        try:
            (target,) = getattr(statement, "targets", None) or [statement.target]
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError):
            # A derived value would go stale when another value is injected.
            line = ast.unparse(statement)
            raise ValueError(f"{path}: `{line}` is not NAME = literal") from None
    return values


def converted(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the notebook's own value, ``default``, else a ValueError."""
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        wanted = f"{type(default).__name__} (like {default!r})"
        raise ValueError(f"parameter {name}={value!r} should be {wanted}")
    return value


def source_digest(path: Path) -> str:
    """SHA-256 of the cells and tags of a notebook, without outputs."""
    cells = _cells(path)
    content = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def machine_paths(path: Path) -> list[str]:
    """Folders of this machine that occur in a notebook's sources or text outputs."""
    texts = []
    for cell in _cells(path):
        texts.append(cell.source)
        for output in cell.get("outputs", ()):
            texts.append(output.get("text", ""))
            texts += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    folders = {Path.home(), Path.cwd(), Path(sys.prefix), Path(tempfile.gettempdir())}
    named = [str(folder) for folder in folders if len(folder.parts) > 1]
    return sorted(folder for folder in named if any(folder in text for text in texts))


def moved(path: Path, folder: str, data: str, names: Collection[str]) -> str:
    """The text of an executed notebook for another folder of the repository than ``notebooks``.

    Its title says that it was executed on ``data``. Links to the notebooks ``names``, absolute or
    relative, open those of the folder; other relative links lead where they led.
    """
    notebook, up = nbformat.read(path, as_version=4), "../" * len(Path(folder).parts)

    def led(link: re.Match) -> str:
        if PurePosixPath(link[1]).name.removesuffix(".ipynb") in names:
            return link[0]
        return f"]({posixpath.normpath(f'{up}notebooks/{link[1]}')}"

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)", led, cell.source)
            absolute = rf"/blob/main/notebooks/(?=({'|'.join(names)})\.ipynb)"
            cell.source = re.sub(absolute, f"/blob/main/{folder}/", text)
    title, *text = notebook.cells[0].source.split("\n")
    notebook.cells[0].source = "\n".join([f"{title}, executed on {data}", *text])
    return nbformat.writes(notebook) + "\n"


# ---- executing ---------------------------------------------------------------------------------
def run_notebook(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    check: Callable[[], str] = lambda: "",
) -> None:
    """Execute ``source``, which is not changed, in the current folder; pass on its printed lines.

    The executed copy, without machine paths, widgets and stderr, goes to ``target`` on success;
    otherwise to ``<name>.failed.ipynb`` beside it, and ``target`` is left alone. ``parameters`` are
    injected after the cell tagged ``parameters``. ``check``, called after the last cell, returns
    the fault of the results, or ``""``. Raises NotebookError: a cell failed, the kernel died, or
    ``check`` found a fault.
    """
    failed, error = target.with_suffix(".failed.ipynb"), None
    executed = target.with_suffix(".running.ipynb")  # of a killed run, the next run's place
    executed.parent.mkdir(parents=True, exist_ok=True)
    # Braces are placeholders of papermill.
    paths = (str(path).replace("{", "{{").replace("}", "}}") for path in (source, executed))
    try:
        papermill.execute_notebook(
            *paths,
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            kernel_manager_class=ThisPython,
            config=Config(ThisPython={"connection_file": _connection_file(executed)}),
            # At its usual level the kernel warns about sockets and about its own shutdown.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            progress_bar=False,
            start_timeout=KERNEL_START_SECONDS,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    # nbclient raises a plain RuntimeError for a kernel that does not start.
    except (PapermillExecutionError, RuntimeError) as found:
        error = found
    notebook = nbformat.read(executed, as_version=4)
    executed.unlink()
    problem = _describe(error, notebook) if error else check()
    _clean(notebook)
    write_text(failed if problem else target, nbformat.writes(notebook) + "\n")
    if problem:
        text = f"{source.name}: {problem}\nThe executed copy is {display_path(failed)}"
        raise NotebookError(text) from error
    failed.unlink(missing_ok=True)


def _connection_file(executed: Path) -> str:
    """The file that tells a kernel its ports: of a killed run, the next run's place as well.

    It lies in Jupyter's own folder; ``""``, a temporary file, where that cannot be written.
    """
    folder = Path(jupyter_runtime_dir())
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(executed.absolute())).hexdigest()[:16]
    return str(folder / f"kernel-mlnet-{name}.json") if os.access(folder, os.W_OK) else ""


def _describe(error: Exception, notebook: NotebookNode) -> str:
    """Cell, its first line, and the error, for a reader who has the source notebook."""
    cells = [c for c in notebook.cells if ERROR_TAG not in c.metadata.get("tags", ())]
    if isinstance(error, PapermillExecutionError):
        index, what = error.cell_index, f"{error.ename}: {error.evalue}"
    else:
        # papermill notes the start of a cell, but not the cell in which the kernel was lost.
        started = [i for i, c in enumerate(cells) if c.metadata.papermill.get("start_time")]
        index = started[-1] if started else None
        what = str(error)
        if isinstance(error, DeadKernelError):
            what = "the kernel died; most often it ran out of memory (try a smaller batch or photo)"
    if index is None:
        return f"the kernel did not start: {what}"
    cell = cells[index]
    injected = sum(INJECTED_TAG in c.metadata.get("tags", ()) for c in cells[:index])
    first_line = next((line for line in cell.source.splitlines() if line.strip()), "").strip()
    prompt = f" (In [{cell.execution_count}])" if cell.get("execution_count") else ""
    return f"cell {index + 1 - injected}{prompt}, `{first_line}`: {what}"


def _clean(notebook: NotebookNode) -> None:
    """Remove paths and times of this machine, widgets and stderr; join text that came in pieces."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "pygments_lexer": "ipython3"}
    machine = {key: notebook.metadata[key] for key in COLAB_KEYS if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(
        {**machine, "kernelspec": kernel, "language_info": language}
    )
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        kept: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
                continue
            if kept and output.output_type == kept[-1].output_type == "stream":
                kept[-1].text += output.text
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
