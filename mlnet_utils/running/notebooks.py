"""One notebook: its parameters, its execution on this Python, a copy that is fit for readers."""

import ast
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from mlnet_utils.runtime import display_path, write_text

INJECTED_TAG = "injected-parameters"  # papermill's tags
ERROR_TAG = "papermill-error-cell-tag"
KERNEL_NAME = "mlnet-this-python"
KERNEL_START_SECONDS = 180  # a cold file system on a busy machine
WIDGET = "application/vnd.jupyter.widget-view+json"


class NotebookError(RuntimeError):
    """A notebook failed; the message names it, the cell and the error."""


# ---- reading -----------------------------------------------------------------------------------
def parameters_of(path: Path) -> dict[str, Any]:
    """Name and value of every parameter of a notebook.

    Raises:
        ValueError: a value is not a literal, papermill cannot read a line, or the notebook holds
            a cell of injected parameters.
    """
    notebook = nbformat.read(path, as_version=4)
    if any(INJECTED_TAG in cell.metadata.get("tags", ()) for cell in notebook.cells):
        raise ValueError(f"{path} holds parameters injected by an earlier run: delete that cell")
    values = {}
    for name, found in papermill.inspect_notebook(_as_template(path)).items():
        try:
            values[name] = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError):
            raise ValueError(
                f"{path}: parameter {name} = {found['default']} is not a literal; a derived value "
                "would go stale when another one is injected"
            ) from None
    assigned = {
        node.id
        for cell in notebook.cells
        if "parameters" in cell.metadata.get("tags", ())
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    unread = sorted(assigned - set(values))
    if unread:
        raise ValueError(
            f"{path}: papermill cannot read the parameter {', '.join(unread)}; write one literal "
            "per line, without another '=' in its comment"
        )
    return values


def _as_template(path: Path) -> str:
    """papermill takes braces in a path for placeholders."""
    return str(path).replace("{", "{{").replace("}", "}}")


def converted(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the notebook's own value."""
    if isinstance(value, str) and not isinstance(default, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"parameter {name}={value!r} should be {type(default).__name__} (like {default!r})"
        )
    return value


def source_digest(path: Path) -> str:
    """Digest of what a notebook says, whatever outputs it was saved with."""
    cells = nbformat.read(path, as_version=4).cells
    said = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def machine_paths(path: Path) -> list[str]:
    """Folders of this machine that occur in a notebook's sources or text outputs."""
    text = "\n".join(_texts(path))
    folders = {Path.home(), Path.cwd(), Path(sys.prefix), Path(tempfile.gettempdir())}
    return sorted(str(f) for f in folders if len(f.parts) > 1 and str(f) in text)


def _texts(path: Path) -> Iterator[str]:
    for cell in nbformat.read(path, as_version=4).cells:
        yield cell.source
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))


# ---- executing ---------------------------------------------------------------------------------
def run_notebook(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    check: Callable[[], str] = lambda: "",
) -> None:
    """Execute ``source`` in the current folder and write the executed copy to ``target``.

    What the notebook prints is passed on while it runs. ``target`` is written only on success;
    otherwise the copy goes to ``<name>.failed.ipynb`` beside it and ``target`` is left alone.

    Args:
        source: the notebook; it is not changed.
        target: where the executed copy goes, without machine paths, widgets and stderr.
        parameters: values that papermill injects after the cell tagged ``parameters``.
        check: called after the last cell; returns what is wrong with the results, or ``""``.

    Raises:
        NotebookError: a cell failed, the kernel died, or ``check`` found a fault.
    """
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    with tempfile.TemporaryDirectory(prefix="mlnet-") as scratch:
        executed = Path(scratch) / "executed.ipynb"
        error = _execute(source, executed, parameters, Path(scratch))
        notebook = nbformat.read(executed, as_version=4)
    problem = _describe(error, notebook) if error else check()
    _clean(notebook)
    write_text(failed if problem else target, nbformat.writes(notebook) + "\n")
    if problem:
        raise NotebookError(
            f"{source.name}: {problem}\nThe executed copy is {display_path(failed)}"
        ) from error
    failed.unlink(missing_ok=True)


def _execute(
    source: Path, executed: Path, parameters: Mapping[str, Any], scratch: Path
) -> Exception | None:
    """Run the notebook; return what stopped it, or None."""
    with _kernel_of_this_python(scratch) as kernel:
        try:
            papermill.execute_notebook(
                _as_template(source),
                _as_template(executed),
                parameters=dict(parameters),
                kernel_name=kernel,
                language="python",
                progress_bar=False,
                start_timeout=KERNEL_START_SECONDS,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        # nbclient raises a plain RuntimeError for a kernel that does not start.
        except (PapermillExecutionError, RuntimeError) as error:
            return error
    return None


@contextlib.contextmanager
def _kernel_of_this_python(scratch: Path) -> Iterator[str]:
    """Register a kernel for the running interpreter, under a name that nobody else uses.

    The name ``python3`` may belong to another environment: a user's own kernels are searched
    before those of the interpreter.
    """
    # At its usual level the kernel warns about local sockets and about its own shutdown.
    write_kernel_spec(
        scratch / "kernels" / KERNEL_NAME, extra_arguments=["--IPKernelApp.log_level=CRITICAL"]
    )
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(scratch), before]))
    try:
        yield KERNEL_NAME
    finally:
        if before is None:
            del os.environ["JUPYTER_PATH"]
        else:
            os.environ["JUPYTER_PATH"] = before


def _describe(error: Exception, notebook: NotebookNode) -> str:
    """Cell, its first line, and what went wrong, for a reader who has the source notebook."""
    cells = [c for c in notebook.cells if ERROR_TAG not in c.metadata.get("tags", ())]
    if isinstance(error, PapermillExecutionError):
        index, what = error.cell_index, f"{error.ename}: {error.evalue}"
    else:
        # papermill notes when it starts a cell, but not in which one the kernel was lost.
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
    """Keep what a reader needs: no paths and times of this machine, no widgets, no stderr."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = _readable(cell.outputs)


def _readable(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs without stderr and widgets; text that arrived in pieces is joined."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept
