"""The package's structure: imports go one way between rooms, and the training path stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mlnet_utils"

# A room is a folder of the package, or a module at its top. Each may import from itself and from:
FOUNDATION = {"config", "runtime"}
MAY_IMPORT = {
    "__init__": set(),
    "runtime": set(),
    "plots": {"runtime"},
    "config": {"runtime"},
    "data": FOUNDATION,
    "model": FOUNDATION | {"data"},
    "metrics": FOUNDATION | {"data"},
    "training": FOUNDATION | {"data", "model", "metrics"},
    "predict": FOUNDATION | {"data", "model", "metrics", "plots"},
    "experiments": FOUNDATION | {"data", "model", "metrics", "training", "predict", "plots"},
    "running": FOUNDATION | {"__init__", "data", "model"},
}
NO_CODE = {"presets", "weights"}  # rooms of files
FEWEST = 14  # entries at the package's top

TRAINING_PATH = (
    *("config", "runtime", "data.geometry", "data.photos", "data.loading", "data.download"),
    *("model.tensorfiles", "model.backbones", "model.network", "model.losses"),
    *("model.checkpoints", "model.legacy", "training.trainer", "training.features", "metrics"),
    *("experiments.evaluation", "experiments.sweep"),
)
NOT_FOR_TRAINING = (
    *("papermill", "nbformat", "nbclient", "nbconvert", "jupyter", "jupyter_client"),
    *("gdown", "jupyter_core", "jupyterlab", "IPython", "ipykernel", "ipywidgets", "pydantic"),
)


def modules(folder=PACKAGE):
    """Dotted name below the package and source of every module, in all rooms."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def imported_rooms(source):
    """The rooms from which a module imports, anywhere in it (relative imports are refused)."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for top, room, *_ in (f"{name}.__init__".split(".") for name in names):
            if top == "mlnet_utils":
                rooms.add("__init__" if room.startswith("__") else room)
    return rooms


def direction_problems(sources):
    problems = []
    for module, source in sources.items():
        room = module.split(".")[0]
        if room in ("__init__", "__main__"):  # imports inside functions only; the command line
            continue
        if room not in MAY_IMPORT:
            problems.append(f"{module}: {room} is no room")
            continue
        for used in sorted(imported_rooms(source) - MAY_IMPORT[room] - {room}):
            problems.append(f"{module} imports from {used}")
    return problems


def test_imports_go_one_way():
    assert direction_problems(modules()) == []


def test_the_top_is_small_and_every_name_says_something():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= FEWEST
    assert {path.name for path in entries if path.is_dir()} - NO_CODE <= set(MAY_IMPORT)
    names = {module.split(".")[-1] for module in modules()}
    assert not names & {"utils", "helpers", "misc", "common"}


def test_every_room_says_what_lives_in_it_and_init_imports_nothing_at_import_time():
    rooms = {
        module: ast.parse(source) for module, source in modules().items() if "__init__" in module
    }
    assert len(rooms) == len({path.parent for path in PACKAGE.rglob("*.py")})
    assert all(ast.get_docstring(room) for room in rooms.values())
    assert not [n for n in rooms["__init__"].body if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
    ("module", "source", "used"),
    [
        ("config", "from mlnet_utils.training.trainer import fit", "training"),
        ("model.losses", "def f():\n    from mlnet_utils import experiments", "experiments"),
        ("model.network", "import mlnet_utils.running.pipeline", "running"),
        ("data.readers.osie", "from mlnet_utils.model.network import MLNet", "model"),
        ("plots", "from mlnet_utils.config import Config", "config"),
        ("training.trainer", "from mlnet_utils.predict import predictor", "predict"),
        ("data.photos", "from mlnet_utils import __version__", "__init__"),
    ],
)
def test_direction_check_fires(module, source, used):
    assert direction_problems({module: source}) == [f"{module} imports from {used}"]


def test_direction_check_knows_all_rooms():
    assert direction_problems({"newcomer": ""}) == ["newcomer: newcomer is no room"]
    with pytest.raises(ValueError, match="relative"):
        direction_problems({"data.photos": "from . import images"})


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)


def test_import_is_light():
    """No torch, and half a second of processor time at most (best of three)."""
    code = (
        "import sys, time; start = time.process_time(); import mlnet_utils, mlnet_utils.config; "
        "print(time.process_time() - start); assert 'torch' not in sys.modules"
    )
    runs = [run(code) for _ in range(3)]
    assert not any(ended.returncode for ended in runs)
    assert min(float(ended.stdout) for ended in runs) < 0.5


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
    return run(BLOCKED_IMPORT.format(blocked=set(blocked), names=list(names)))


@pytest.mark.slow
def test_training_path_needs_no_notebook_packages():
    result = import_without(NOT_FOR_TRAINING, [f"mlnet_utils.{name}" for name in TRAINING_PATH])
    assert result.returncode == 0, result.stderr


def test_import_check_fires():
    result = import_without(NOT_FOR_TRAINING, ["mlnet_utils.running.notebooks"])
    assert result.returncode == 1
    assert "mlnet-utils[notebooks]" in result.stderr
