"""The notebooks as Colab runs them: alone on a new machine, with nothing of ours installed."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import nbclient
import nbformat
import pytest

from mlnet_utils.running.pipeline import STAGES

# Looked for, not imported: setuptools replaces parts of Python when it is.
installs = find_spec("pip") is not None and find_spec("setuptools") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installs, reason="needs pip and setuptools, to install offline"),
]

ROOT = Path(__file__).resolve().parents[2]
RUN = "drive:mlnet/tiny"
# The package comes from a copy of this repository, and nothing from the internet.
SETTINGS = {
    **dict.fromkeys(("PIP_NO_INDEX", "PIP_NO_DEPS", "PIP_DISABLE_PIP_VERSION_CHECK"), "1"),
    "PIP_NO_BUILD_ISOLATION": "0",  # pip's spelling of --no-build-isolation
}
DRIVE_STUB = "import os\n\ndef mount(folder):\n    os.symlink({drive!r}, folder)\n"
# The kernel dies in the second epoch, as when Colab takes the machine back.
DISCONNECT = """\
import os, signal
losses_before = trainer.Trainer.losses
def losses_until(self, batch):
    if self.updates == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses_before(self, batch)
trainer.Trainer.losses = losses_until
"""


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """An interpreter with what Colab has (torch, `google.colab`), a Drive, and no mlnet_utils."""
    root = tmp_path_factory.mktemp("colab")
    (root / "drive" / "MyDrive").mkdir(parents=True)
    venv.create(root / "env", symlinks=True)
    python = root / "env" / "bin" / "python"
    (site,) = (root / "env" / "lib").glob("python*/site-packages")
    # Paths in a .pth file: the packages of this interpreter, without its editable installs.
    ours = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (site / "preinstalled.pth").write_text("\n".join(ours) + "\n")
    google = site / "google" / "colab"
    google.mkdir(parents=True)
    (google / "__init__.py").touch()
    (google / "drive.py").write_text(DRIVE_STUB.format(drive=str(root / "drive")))
    source, ignored = root / "source", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mlnet_utils", source / "mlnet_utils", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = {**SETTINGS, "MLNET_SOURCE": source.as_uri()}
    spec = {"argv": argv, "display_name": "Colab", "language": "python", "env": env}
    kernel = root / "jupyter" / "kernels" / "colab" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root / "jupyter"))
        for name in ("PYTHONPATH", "MLNET_RUNS", "MLNET_DATA"):
            patch.delenv(name, raising=False)
        find = "from importlib.util import find_spec; print(find_spec('mlnet_utils'))"
        found = subprocess.check_output([python, "-c", find], text=True, cwd=root)
        assert found == "None\n", "the notebooks are to install the package themselves"
        yield root


def run(stage, machine, inserted="", before="", **parameters):
    """Execute a notebook that is alone in the folder ``machine``; return its printed text.

    ``inserted`` is a cell of code in front of the one that contains ``before``.
    """
    machine.mkdir()
    path = Path(shutil.copy(ROOT / "notebooks" / f"{stage.name}.ipynb", machine))
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for name, value in {"PRESET": "tiny", "RUN_DIR": RUN, **parameters}.items():
        cell.source, changed = re.subn(
            rf"^({name}: \w+) = .*?(?=  #)", rf"\1 = {value!r}", cell.source, flags=re.MULTILINE
        )
        assert changed == 1, name
    if inserted:
        (place,) = (i for i, c in enumerate(notebook.cells) if before in c.source)
        notebook.cells.insert(place, nbformat.v4.new_code_cell(inserted))
    options = {"kernel_name": "colab", "startup_timeout": 180}
    place = {"metadata": {"path": str(machine)}}
    nbclient.NotebookClient(notebook, resources=place, **options).execute()
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))


def test_run_on_drive_goes_from_machine_to_machine_and_survives_a_disconnection(colab, tmp_path):
    folder = colab / "drive" / "MyDrive" / "mlnet" / "tiny"
    prepare, train, evaluate = STAGES[:3]
    run(prepare, tmp_path / "first machine")
    with pytest.raises(nbclient.exceptions.DeadKernelError):
        run(train, tmp_path / "lost machine", DISCONNECT, before="result = trainer.fit(")
    assert (folder / "checkpoints" / "last.pt").is_file()
    printed = run(train, tmp_path / "new machine")
    assert "resuming at epoch 2" in printed
    assert "epoch   1/2" not in printed
    run(evaluate, tmp_path / "last machine")  # the others find their inputs in the same way
    for stage in STAGES[:3]:
        assert (folder / f"{stage.name}.json").is_file()
        for pattern in stage.outputs:
            assert list(folder.glob(pattern)), pattern
    assert not list(tmp_path.glob("*/runs"))  # all on Drive


def test_notebook_without_its_input_names_the_one_that_makes_it(colab, tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="notebook 02_training"):
        run(STAGES[3], tmp_path / "machine", RUN_DIR="")
    assert os.listdir(tmp_path / "machine") == [f"{STAGES[3].name}.ipynb"]
