"""The package's structure: imports go one way, the training path stays light, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlnet_utils"

# A module may import only modules that stand before it.
ORDER = (
    "__init__",
    *("runtime", "starting", "config"),
    "transforms",
    *("photos", "splits"),
    *("archives", "transfer", "sources", "download"),
    *("synthetic", "images", "truth"),
    *("layouts", "formats", "salicon", "mit1003", "own_photos", "pysaliency_bridge"),
    "datasets",
    *("model", "features", "losses", "checkpoints", "optimization", "memory", "validation"),
    "training",
    *("roc", "resize", "metric_inputs", "metric_formulas", "metrics"),
    *("bootstrap", "scores"),
    "plots",  # takes arrays: isolated below
    *("legacy", "prediction", "exported", "folders", "video", "baselines", "evaluation"),
    *("export", "submission"),
    *("execution", "pipeline", "dispatch", "sweep", "study"),
    "__main__",
)
METRICS = {"roc", "resize", "metric_inputs", "metric_formulas", "metrics"}
# Modules that could be copied into another project: they may import only these.
ISOLATED = {
    **{name: METRICS | {"runtime", "transforms"} for name in METRICS},
    "plots": {"runtime"},
    "execution": {"runtime"},
    "dispatch": {"runtime"},
    "pipeline": {"__init__", "config", "runtime", "execution"},
}
MAY_PRINT = {"__main__", "pipeline", "sweep", "memory", "training", "runtime"}
MAX_LINES = 400

TRAINING_PATH = (
    *("config", "runtime", "transforms", "photos", "formats", "datasets"),
    *("model", "features", "losses", "checkpoints", "optimization", "memory", "validation"),
    "training",
    *("metrics", "evaluation"),
)
NOT_FOR_TRAINING = (
    *("papermill", "nbformat", "nbclient", "nbconvert", "jupyter", "jupyter_client"),
    *("jupyter_core", "jupyterlab", "IPython", "ipykernel", "ipywidgets", "pydantic"),
)


def modules(folder=PACKAGE):
    """Name and syntax tree of every module."""
    return {path.stem: ast.parse(path.read_text("utf-8")) for path in folder.glob("*.py")}


def package_imports(tree, names):
    """The package's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlnet_utils"):
            inner = node.module.removeprefix("mlnet_utils").lstrip(".")
            if inner:
                found.add(inner)
            else:
                found |= {a.name if a.name in names else "__init__" for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add((node.module or "__init__").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("mlnet_utils").lstrip(".") or "__init__"
                for a in node.names
                if a.name.split(".")[0] == "mlnet_utils"
            }
    return found


def order_problems(trees):
    problems = [f"{name}: add it to ORDER" for name in trees if name not in ORDER]
    for name, tree in trees.items():
        if name not in ORDER or name == "__init__":  # which imports inside a function only
            continue
        for used in sorted(package_imports(tree, trees)):
            if used not in ORDER or ORDER.index(used) >= ORDER.index(name):
                problems.append(f"{name} imports {used}, which does not stand before it")
            elif used not in ISOLATED.get(name, ORDER):
                problems.append(f"{name} imports {used}, but may only use {ISOLATED[name]}")
    return problems


def style_problems(name, source):
    problems = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            problems.append(f"{name}:{node.lineno}: import *")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            problems.append(f"{name}:{node.lineno}: bare except")
        is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        if is_print and name not in MAY_PRINT:
            problems.append(f"{name}:{node.lineno}: print")
    if name in ("utils", "helpers", "misc", "common"):
        problems.append(f"{name}: a name that says nothing")
    if len(source.splitlines()) > MAX_LINES:
        problems.append(f"{name}: {len(source.splitlines())} lines, at most {MAX_LINES}")
    return problems


def test_imports_go_one_way():
    assert order_problems(modules()) == []


def test_init_imports_nothing_at_import_time():
    body = modules()["__init__"].body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_style(path):
    assert style_problems(path.stem, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("config", "from mlnet_utils.training.trainer import fit", "config imports training"),
        ("losses", "def f():\n    from mlnet_utils import evaluation", "losses imports evaluation"),
        ("model", "import mlnet_utils.running.pipeline", "model imports pipeline"),
        ("photos", "from . import datasets\nfrom .datasets import x", "photos imports datasets"),
        ("plots", "from mlnet_utils.config import Config", "plots imports config, but may only"),
        (
            "metrics",
            "from mlnet_utils.model.network import MLNet",
            "metrics imports model, but may only",
        ),
        ("newcomer", "", "newcomer: add it to ORDER"),
        ("transforms", "from mlnet_utils import transforms", "transforms imports transforms"),
    ],
)
def test_order_check_fires(name, source, message):
    trees = {known: ast.parse("") for known in ORDER} | {name: ast.parse(source)}
    problems = order_problems(trees)
    assert len(problems) == 1
    assert problems[0].startswith(message)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("model", "from math import *", "model:1: import *"),
        ("model", "try:\n    x\nexcept:\n    y", "model:3: bare except"),
        ("model", "def f():\n    print(1)", "model:2: print"),
        ("utils", "", "utils: a name that says nothing"),
        ("model", "x = 1\n" * 401, "model: 401 lines, at most 400"),
    ],
)
def test_style_check_fires(name, source, message):
    assert style_problems(name, source) == [message]


# A finder that stands first and refuses, as if the packages were not installed.
BLOCKED_IMPORT = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    importlib.import_module(name)
"""


def import_without(blocked, names):
    """Import modules in a fresh interpreter in which some packages cannot be imported."""
    code = BLOCKED_IMPORT.format(blocked=set(blocked), names=list(names))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )


def test_training_path_needs_no_notebook_packages():
    result = import_without(NOT_FOR_TRAINING, [f"mlnet_utils.{name}" for name in TRAINING_PATH])
    assert result.returncode == 0, result.stderr


def test_import_check_fires():
    result = import_without(NOT_FOR_TRAINING, ["mlnet_utils.running.notebooks"])
    assert result.returncode == 1
    assert "No module named 'nbformat'" in result.stderr
