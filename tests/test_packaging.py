"""What is installed: pyproject.toml, constraints.txt and environment.yml agree with the code."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlnet_utils

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_EXTRAS = ("notebooks", "backbone", "test")  # what environment.yml installs
# Names under which distributions are imported, where they differ.
IMPORT_NAMES = {
    **{"opencv-contrib-python-headless": "cv2", "scikit-image": "skimage", "pot": "ot"},
    **{"pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"},
}


def requirement_lines(path):
    """The lines of a requirements file without comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def name_of(requirement):
    return canonicalize_name(Requirement(requirement).name)


def import_names(requirements):
    names = map(name_of, requirements)
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def for_python(requirements, python):
    """The requirements of one version of Python."""
    for requirement in map(Requirement, requirements):
        if not requirement.marker or requirement.marker.evaluate({"python_version": python}):
            yield requirement


def pins(lines, python):
    """name -> exact version, for one version of Python."""
    found = {}
    for requirement in for_python(lines, python):
        name, specifiers = canonicalize_name(requirement.name), list(requirement.specifier)
        exact = [s.version for s in specifiers if s.operator == "==" and "*" not in s.version]
        assert len(exact) == len(specifiers) == 1, f"{requirement} is not an exact version"
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = exact[0]
    return found


def pin_problems(requirements, lines, python):
    """Requirements without a pin, or with one that they do not allow."""
    pinned, problems = pins(lines, python), []
    for requirement in for_python(requirements, python):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            problems.append(f"{requirement} has no exact version")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement} does not allow the tested {version}")
    return problems


def addresses(text):
    """Anything in a file that names a package registry, or any other address."""
    anything = r"(?i)(?:https?|file|git|ssh)(?:\+\w+)?://\S+|(?:extra-)?index-url|pypi"
    return re.findall(anything, text)


# ---- the three agree ---------------------------------------------------------------------------
@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_tested_version_that_it_allows(python):
    everything = PROJECT["dependencies"] + [text for extra in EXTRAS.values() for text in extra]
    assert pin_problems(everything, requirement_lines(ROOT / "constraints.txt"), python) == []


def test_environment_lists_exactly_what_pyproject_requires():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip[:2] == ["--constraint constraints.txt", "--editable ."]
    expected = PROJECT["dependencies"] + [text for name in CONDA_EXTRAS for text in EXTRAS[name]]
    assert set(map(Requirement, pip[2:])) == set(map(Requirement, expected))
    assert len(pip[2:]) == len(expected)
    python = next(item for item in conda if item.startswith("python="))
    assert python.removeprefix("python=") in PYTHONS


@pytest.mark.parametrize(
    ("requirement", "lines", "problem"),
    [
        ("numpy>=1.26", [], "has no exact version"),
        ("numpy<2.4", ["numpy==2.4.1"], "does not allow the tested 2.4.1"),
        ("PyYAML>=6", ["pyyaml==6.0; python_version < '3.11'"], "has no exact version"),
    ],
)
def test_agreement_check_fires(requirement, lines, problem):
    assert pin_problems([requirement], lines, "3.12") == [f"{requirement} {problem}"]


@pytest.mark.parametrize("lines", [["numpy>=2"], ["numpy==2.*"], ["numpy==2.0", "numpy==2.1"]])
def test_pins_must_be_exact_and_unique(lines):
    with pytest.raises(AssertionError, match=r"not an exact version|pinned twice"):
        pins(lines, "3.12")


# ---- Colab -------------------------------------------------------------------------------------
COLAB = pins(requirement_lines(ROOT / "tests/vectors/colab.txt"), "3.13")


def added_to_colab(requirements):
    """The packages that Colab lacks of these and theirs; an error where a version would change."""
    added, pending = set(), list(requirements)
    for requirement in for_python(pending, "3.13"):  # grows
        name = canonicalize_name(requirement.name)
        if name in COLAB:
            fits = requirement.specifier.contains(COLAB[name], prereleases=True)
            assert fits, f"{requirement} would change Colab's {COLAB[name]}"
        elif name not in added:
            added.add(name)
            pending += importlib.metadata.requires(name) or []
    return added


def test_colab_keeps_its_versions():
    """Resolved here by the requirements and, of what is added, those of the installed packages."""
    for name in map(name_of, EXTRAS["colab"]):
        pytest.importorskip(name.replace("-", "_"), reason="needs the extra `colab`")
    assert added_to_colab(PROJECT["dependencies"] + EXTRAS["colab"]) == set(
        map(name_of, EXTRAS["colab"])
    )


def test_colab_check_fires():
    with pytest.raises(AssertionError, match=r"ipykernel>=6\.29 would change Colab's 6\.17\.1"):
        added_to_colab(EXTRAS["notebooks"])
    with pytest.raises(AssertionError, match=r"numpy>2\.2 would change"):
        added_to_colab(["numpy>2.2"])


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_colab_has_what_a_notebook_imports(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    used = {top for text in code for top, _ in third_party_imports(text.replace("%pip", "pass #"))}
    assert used - import_names(COLAB) == set()


# ---- no registry address -----------------------------------------------------------------------
FILES = ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run")


@pytest.mark.parametrize("name", FILES)
def test_no_registry_address(name):
    own = PROJECT["urls"]["Repository"]
    found = addresses((ROOT / name).read_text("utf-8"))
    assert [address for address in found if address.strip('"') != own] == []


@pytest.mark.parametrize("line", ["--extra-index-url x", "git+https://x.org/x", "- file:///x"])
def test_registry_check_fires(line):
    assert addresses(line)


# ---- declared = imported -----------------------------------------------------------------------
MODULES = sorted((ROOT / "mlnet_utils").rglob("*.py"))


def dotted(path):
    """Name of a module below the package: ``data.photos``."""
    return ".".join(path.relative_to(ROOT / "mlnet_utils").with_suffix("").parts)


def third_party_imports(source):
    """(top-level name, whether it is imported when the module is) of every foreign import."""
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        else:
            continue
        tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"mlnet_utils"}
        found |= {(top, node in tree.body) for top in tops}
    return found


def undeclared(module, source):
    """Imports that `pip install` would not provide.

    An import inside a function may come from any extra, or from Colab: it is a feature that says
    what it needs.
    """
    required = import_names(PROJECT["dependencies"])
    if module.startswith("running."):
        required |= import_names(EXTRAS["notebooks"])
    optional = required.union({"google"}, *(import_names(extra) for extra in EXTRAS.values()))
    used = third_party_imports(source)
    return sorted(top for top, early in used if top not in (required if early else optional))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_import_is_a_declared_dependency(path):
    assert undeclared(dotted(path), path.read_text("utf-8")) == []


def test_every_dependency_is_imported():
    used = {top for path in MODULES for top, _ in third_party_imports(path.read_text("utf-8"))}
    assert import_names(PROJECT["dependencies"]) - used == set()


def test_declaration_check_fires():
    assert undeclared("model.network", "import numpy, cv2") == ["cv2"]
    assert undeclared("model.network", "import h5py") == ["h5py"]
    assert undeclared("model.network", "def f():\n    import h5py") == []
    assert undeclared("model.network", "import papermill") == ["papermill"]
    assert undeclared("running.pipeline", "import papermill") == []


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_one_extra_brings_what_a_module_requires(path):
    """`make demo` and a verb's error name one extra: no part of it may wait in another."""
    wanted = re.findall(r'require\("([\w.]+)", "(\w+)"\)', path.read_text("utf-8"))
    extras = {extra for _, extra in wanted}
    assert len(extras) <= 1
    assert all(module.split(".")[0] in import_names(EXTRAS[extra]) for module, extra in wanted)


# ---- light import, one version -----------------------------------------------------------------
def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    found = [mlnet_utils.__version__, PROJECT["version"], str(citation["version"]), newest[1]]
    assert len(set(found)) == 1, found


def test_every_module_is_installed():
    settings = PYPROJECT["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["mlnet_utils*"]
    assert "presets/*.yaml" in settings["package-data"]["mlnet_utils"]
    assert all((path.parent / "__init__.py").is_file() for path in MODULES)


# ---- the verbs ---------------------------------------------------------------------------------
def test_makefile_installs_extras_that_exist():
    text = (ROOT / "Makefile").read_text("utf-8")
    default = re.search(r"^TEST_EXTRAS \?= (\S+)$", text, re.MULTILINE)[1].split(",")
    assert set(default) == set(EXTRAS)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_makefile_deletes_no_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    python = tmp_path / "python"  # one that can make no environments, as Debian's
    python.write_text('#!/bin/sh\ntest "$1" = -c\n')
    python.chmod(0o755)
    for place in (tmp_path / "mine", tmp_path / "new"):
        command = ["make", "-C", ROOT, f"PYTHON={python}", f"VENV={place}", f"{place}/bin/python"]
        assert subprocess.run(command, capture_output=True).returncode
    assert (tmp_path / "mine/notes.txt").is_file()
    assert not (tmp_path / "new").exists()


def test_continuous_integration_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text("utf-8").splitlines() if "make test" in line]
    assert commands[-1] == "exec make test"


# ---- the repository's address ------------------------------------------------------------------
ADDRESS = runpy.run_path(str(ROOT / "tools" / "address.py"))  # a script, not in the package
LINKS = """\
[![Colab](badge)](https://colab.research.google.com/github/{0}/blob/main/notebooks/a.ipynb)
[nbviewer](https://nbviewer.org/github/{0}/blob/main/notebooks/a.ipynb)
%pip install -q "mlnet-utils[notebooks] @ git+https://github.com/{0}"
%pip install -q "mlnet-utils @ git+https://github.com/{0}.git@main"
git clone https://github.com/{0}
git clone https://github.com/{0}.git
[keys](https://github.com/{0}/blob/main/docs/a.md), "https://raw.githubusercontent.com/{0}/main"
[theirs](https://github.com/matthias-k/DeepGaze/blob/main/experiments/README.md)
The authors' code: https://github.com/marcellacornia/mlnet
"""


def test_address_is_the_same_everywhere():
    assert ADDRESS["main"](ROOT, check=True) == 0


def test_address_is_written_into_our_links_only(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text('Repository = "https://github.com/new.org/new_name"\n')
    notebook = tmp_path / "notebooks" / "a.ipynb"
    notebook.write_text(LINKS.format("old-org/old.name"))
    assert [ADDRESS["main"](tmp_path, check=check) for check in (True, False, True)] == [1, 0, 0]
    assert "differs from new.org/new_name" in capsys.readouterr().out
    assert notebook.read_text() == LINKS.format("new.org/new_name")


def test_address_that_colab_cannot_open_is_an_error(tmp_path):
    (tmp_path / "pyproject.toml").write_text('Repository = "https://example.org/x"\n')
    with pytest.raises(ValueError, match="OWNER/NAME"):
        ADDRESS["repository_name"](tmp_path)
