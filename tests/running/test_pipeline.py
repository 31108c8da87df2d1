"""The pipeline on toy notebooks: real papermill and real kernels, no saliency."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import nbformat
import papermill
import pytest
from conftest import files, prepare_run, unseen
from test_runtime import abandon

from mlnet_utils import runtime
from mlnet_utils.config import load_config
from mlnet_utils.running import pipeline
from mlnet_utils.running.notebooks import NotebookError, ThisPython
from mlnet_utils.running.pipeline import PublishError, Stage, reproduce
from mlnet_utils.runtime import sha256_file

FIRST = Stage("01_first", ("data/meta.json",), resumes="data")
SECOND = Stage("02_second", ("figures/*.png",))
STAGES = (FIRST, SECOND)

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
PARAMETERS = """\
PRESET = "tiny"  # str: configuration
RUN_DIR = ""  # str: folder of the run
DATA_ROOT = ""  # str: folder of the data
"""
SETUP = """\
import json, os, sys, time
from pathlib import Path
folder = Path(RUN_DIR or os.environ["MLNET_RUNS"] + "/" + PRESET)
for name in ("data", "figures"):
    (folder / name).mkdir(parents=True, exist_ok=True)
"""
FIRST_CELLS = (
    PARAMETERS + "EPOCHS = 0  # int: 0 for the preset's\n",
    SETUP,
    "print('epoch 1')\nprint('a warning', file=sys.stderr)\nprint('epoch 2')",
    "(folder / 'data/meta.json').write_text('{}')",
    "(folder / '01_first.json').write_text(json.dumps("
    "{'python': sys.executable, 'epochs': EPOCHS, 'at': time.time_ns()}))",
)
SECOND_CELLS = (
    PARAMETERS,
    SETUP,
    "assert (folder / '01_first.json').is_file()",
    "(folder / 'figures/one.png').write_bytes(b'picture')",
    "(folder / '02_second.json').write_text(str(time.time_ns()))",
)


def write_book(path, cells):
    """A notebook of code cells, the first of which holds the parameters, under a heading."""
    v4 = nbformat.v4
    book = v4.new_notebook(
        cells=[v4.new_markdown_cell("# Toy"), *(v4.new_code_cell(source) for source in cells)],
        metadata={"kernelspec": KERNEL, "accelerator": "GPU", "widgets": {}},
    )
    book.cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def use(root, monkeypatch):
    """Let the toy project be the checkout, with folders for runs and data beside it."""
    monkeypatch.setattr(runtime, "checkout_root", lambda: root / "repository")
    monkeypatch.setenv("MLNET_RUNS", str(root / "runs"))
    monkeypatch.setenv("MLNET_DATA", str(root / "raw"))
    return root


def make_project(root, monkeypatch, first=FIRST_CELLS):
    """A repository with two toy notebooks."""
    write_book(root / "repository/notebooks/01_first.ipynb", first)
    write_book(root / "repository/notebooks/02_second.ipynb", SECOND_CELLS)
    return use(root, monkeypatch)


def run(**arguments):
    return reproduce(**{"preset": "tiny", "stages": STAGES, **arguments})


def publish(root):
    return pipeline.publish(root / "runs/tiny", STAGES)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The toy project before its first run, in ``tmp_path`` itself."""
    return make_project(tmp_path, monkeypatch)


def read_book(path):
    return nbformat.read(path, as_version=4)


def edit_state(root, change):
    """Change what the finished pipeline noted."""
    path = root / "runs/tiny/pipeline.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A project after a successful run, made while `python3` is somebody else's broken kernel."""
    root = tmp_path_factory.mktemp("project")
    kernel = root / "foreign/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({**KERNEL, "argv": ["/nonexistent/python"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root / "foreign"))
        make_project(root, patch)
        run()
    return root


@pytest.fixture
def finished(finished_once, tmp_path, monkeypatch):
    """A private copy of the finished project, in the place that its state file speaks of."""
    root = use(shutil.copytree(finished_once, tmp_path / "project"), monkeypatch)
    monkeypatch.setenv("MLNET_DATA", str(finished_once / "raw"))
    return root


@pytest.fixture
def nothing_runs(monkeypatch):
    """Stop the pipeline where it would start a kernel, to see what it decided, quickly."""

    def stop(source, *_, **__):
        raise NotebookError(f"would run {source.stem}")

    monkeypatch.setattr(pipeline.notebooks, "run_notebook", stop)


@pytest.fixture
def would_run(finished, nothing_runs, capsys):
    """Runs the finished project as far as a kernel would start; returns what it printed."""

    def run_again(**named):
        with pytest.raises(NotebookError, match="would run"):
            run(**named)
        return capsys.readouterr().out

    return run_again


def configure(monkeypatch, **changes):
    """Let every preset be ``tiny`` with changes."""
    monkeypatch.setattr(pipeline, "load_config", lambda _: load_config("tiny", **changes))


# ---- success -----------------------------------------------------------------------------------
def test_success_leaves_results_executed_copies_and_untouched_sources(finished):
    folder = finished / "runs/tiny"
    assert json.loads((folder / "01_first.json").read_text())["python"] == sys.executable
    assert (folder / "figures/one.png").read_bytes() == b"picture"
    assert sorted(os.listdir(folder / "notebooks")) == ["01_first.ipynb", "02_second.ipynb"]
    for name, cells in (("01_first", FIRST_CELLS), ("02_second", SECOND_CELLS)):
        executed = read_book(folder / f"notebooks/{name}.ipynb").cells[1:]
        assert [cell.execution_count for cell in executed] == list(range(1, len(cells) + 1))
        source = read_book(finished / f"repository/notebooks/{name}.ipynb")
        assert [cell.source for cell in source.cells[1:]] == list(cells)
        assert not any(cell.get("outputs") for cell in source.cells)


def test_executed_copy_holds_nothing_of_this_machine(finished):
    path = finished / "runs/tiny/notebooks/01_first.ipynb"
    executed = read_book(path)
    language = {"name": "python", "pygments_lexer": "ipython3"}
    expected = {"kernelspec": KERNEL, "language_info": language, "accelerator": "GPU"}
    assert executed.metadata == expected
    tags = [dict(cell.metadata) for cell in executed.cells]
    assert tags == [{}, {"tags": ["parameters"]}, {}, {}, {}, {}]
    (printed,) = executed.cells[3].outputs
    assert (printed.name, printed.text) == ("stdout", "epoch 1\nepoch 2\n")
    assert "papermill" not in path.read_text()


@pytest.mark.slow
def test_parameters_are_injected_and_progress_is_printed(tmp_path, monkeypatch, capfd):
    root = make_project(tmp_path / "a {brace}", monkeypatch)
    run(run_dir=root / "elsewhere", parameters={"EPOCHS": "3"})
    out, err = capfd.readouterr()
    assert json.loads((root / "elsewhere/01_first.json").read_text())["epochs"] == 3
    assert not (root / "runs").exists()
    assert "[1/2] 01_first: running (not done yet)\nepoch 1\nepoch 2\n[1/2] 01_first: done" in out
    assert "a warning" in err
    injected = read_book(root / "elsewhere/notebooks/01_first.ipynb").cells[2]
    assert injected.metadata["tags"] == ["injected-parameters"]
    assert "EPOCHS = 3" in injected.source
    assert "PRESET" not in injected.source  # the notebook's own value


# ---- skipping ----------------------------------------------------------------------------------
def change_notebook(root, monkeypatch):
    write_book(root / "repository/notebooks/02_second.ipynb", [*SECOND_CELLS, "1 + 1"])


def change_record(root, monkeypatch):
    (root / "runs/tiny/01_first.json").write_text("{}")


def change_version(root, monkeypatch):
    monkeypatch.setattr(runtime, "package_digest", lambda: "0.0.0")


def lose(name):
    return lambda root, monkeypatch: (root / "runs/tiny" / name).unlink()


def given(**arguments):
    return lambda root, monkeypatch: arguments


# Outside the run folder.
STALE = replace(FIRST, stale=lambda folder: f"{folder.name}.csv has changed")
RERUNS = [  # a change, which may return arguments of the next call, and the reason to run
    (change_notebook, "02_second: running (changed: notebook)"),
    (change_record, "01_first: running (changed or missing since: 01_first.json)"),
    (lambda _, patch: configure(patch, epochs=3), "01_first: running (changed: preset)"),
    (change_version, "01_first: running (changed: package)"),
    (lambda root, patch: patch.setenv("MLNET_DATA", str(root)), "running (changed: data folder)"),
    (lose("figures/one.png"), "02_second: running (changed or missing since: figures/one.png)"),
    (lose("notebooks/02_second.ipynb"), "02_second: running (changed or missing since: note"),
    (lose("pipeline.json"), "01_first: running (not done yet)"),
    (given(stages=(STALE, SECOND)), "01_first: running (tiny.csv has changed)"),
    (given(parameters={"EPOCHS": 1}), "01_first: running (changed: parameters)"),
]


@pytest.mark.parametrize(("change", "reason"), RERUNS)
def test_a_change_reruns_from_the_first_stage_it_concerns(
    finished, would_run, monkeypatch, change, reason
):
    assert reason in would_run(**change(finished, monkeypatch) or {})
    assert (finished / "runs/tiny/data/meta.json").is_file()  # not set aside


@pytest.mark.parametrize("room", ["data/geometry.py", "model/network.py", "config.py"])
def test_a_changed_line_in_any_room_reruns_the_stages(
    finished, would_run, monkeypatch, tmp_path, capsys, room
):
    package = Path(runtime.__file__).parent
    other = shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("weights"))
    monkeypatch.setattr(runtime, "__file__", str(other / "runtime.py"))
    for unused in ("running/notebooks.py", "__main__.py"):
        (other / unused).write_text("changed = True\n")
    run()
    said = capsys.readouterr().out
    assert "01_first: unchanged" in said
    assert "02_second: unchanged" in said
    with open(other / room, "a", encoding="utf-8") as file:
        file.write("changed = True\n")
    assert "01_first: running (changed: package)" in would_run()


@pytest.mark.slow
def test_a_new_record_reruns_what_follows(finished, capfd):
    folder = finished / "runs/tiny"
    before = (folder / "01_first.json").read_text()
    write_book(finished / "repository/notebooks/01_first.ipynb", [*FIRST_CELLS, "1 + 1"])
    run()
    assert (folder / "01_first.json").read_text() != before
    assert "02_second: running (changed: earlier records)" in capfd.readouterr().out


def test_force_sets_aside_what_a_stage_would_go_on_with(finished, would_run):
    folder = finished / "runs/tiny"
    (folder / "data/half.txt").write_text("first")
    assert "01_first: running (forced)" in would_run(force=True)
    assert (folder / "data.before/half.txt").read_text() == "first"
    assert not (folder / "data").exists()
    for number in ("1", "2"):  # interrupted, and repeated
        (folder / "data").mkdir()
        would_run()
        would_run(force=True)
        assert (folder / "data.before/half.txt").read_text() == "first"
        assert not list((folder / f"data.before{number}").iterdir())


def test_a_second_call_waits_for_the_first(finished, monkeypatch):
    order, begun = [], Barrier(2)

    def run_notebook(source, *_, **__):
        order.append(f"begin {source.stem}")
        with suppress(BrokenBarrierError):
            begun.wait(timeout=0.3)  # where two run at a time, they meet
        (finished / f"runs/tiny/{source.stem}.json").write_text("{}")
        order.append(f"end {source.stem}")

    monkeypatch.setattr(pipeline.notebooks, "run_notebook", run_notebook)
    change_record(finished, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run) for _ in range(2)]
    assert [call.result() for call in calls] == [finished / "runs/tiny"] * 2
    assert order == ["begin 01_first", "end 01_first", "begin 02_second", "end 02_second"]


def test_a_killed_run_leaves_nothing_for_long(finished, monkeypatch):
    """The next run takes the place of its unfinished copy and of its kernel's file."""
    root, real, copies = finished / "runs/tiny/notebooks", papermill.execute_notebook, []
    connections = finished / "jupyter"
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(connections))

    def killed(source, executed, config, **_):
        copies.append(Path(executed))
        copies[0].write_text("half")
        ThisPython(config=config).write_connection_file()
        raise SystemExit

    change_notebook(finished, monkeypatch)
    made = files(root.parent)
    for name in ("pipeline.json", "02_second.json", "notebooks/02_second.ipynb", "figures/one.png"):
        abandon(root.parent / name)
    monkeypatch.setattr(papermill, "execute_notebook", killed)
    with pytest.raises(SystemExit):
        run()
    assert copies[0].parent == root
    assert len(os.listdir(connections)) == 1
    monkeypatch.setattr(papermill, "execute_notebook", real)
    run()
    assert files(root.parent) == made
    assert os.listdir(connections) == []


def test_other_backbone_weights_train_anew(finished, would_run, monkeypatch, tmp_path):
    folder, weights = finished / "runs/tiny", tmp_path / "weights.pth"
    configure(monkeypatch, backbone_weights="imagenet")
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(weights))
    weights.write_bytes(b"one")
    noted = (folder / "pipeline.json").read_text()
    edit_state(finished, lambda state: state["01_first"]["inputs"].pop("backbone weights"))
    for aside in (False, True):  # what was not noted is not known to have changed
        assert "(changed: preset, backbone weights)" in would_run()
        assert (folder / "data.before").exists() is aside
        (folder / "pipeline.json").write_text(noted)


# ---- failure -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_failing_cell_is_named_and_published_copy_stays(finished, capfd):
    kept = finished / "runs/tiny/notebooks/02_second.ipynb"
    before, notebook = kept.read_bytes(), finished / "repository/notebooks/02_second.ipynb"
    bad = "\n# why\nnumbers = [1, 2]\nnumbers[5]"
    write_book(notebook, [*SECOND_CELLS[:3], bad, *SECOND_CELLS[3:]])
    place = r"02_second\.ipynb: cell 5 .*In \[4\].*# why.*IndexError: list index out of range"
    with pytest.raises(NotebookError, match=place) as failure:
        run()
    failed = kept.with_name("02_second.failed.ipynb")
    assert failed.name in str(failure.value)
    assert kept.read_bytes() == before
    assert "IndexError" in failed.read_text()
    with pytest.raises(PublishError, match="02_second"):
        publish(finished)

    write_book(notebook, SECOND_CELLS)
    run()
    out = capfd.readouterr().out
    assert "01_first: unchanged" in out
    assert "02_second: running (not done yet)" in out
    assert not failed.exists()


# The injected cell is not counted: the reader has the source notebook.
FAILING = [
    ("1 / 0", r"01_first.ipynb: cell 4 \(In \[4\]\), `1 / 0`: ZeroDivisionError"),
    ("print(1)\nos._exit(137)", r"01_first.ipynb: cell 4.*`print\(1\)`: .*memory"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "message"), FAILING)
def test_the_failed_cell_is_named_in_the_source_s_numbers(tmp_path, monkeypatch, cell, message):
    make_project(tmp_path, monkeypatch, first=(*FIRST_CELLS[:2], cell))
    with pytest.raises(NotebookError, match=message):
        run(run_dir=tmp_path / "elsewhere")
    assert os.listdir(tmp_path / "elsewhere/notebooks") == ["01_first.failed.ipynb"]


@pytest.mark.slow
def test_broken_promises_are_errors(finished):
    kept = [cell for cell in FIRST_CELLS if ".json" not in cell]
    write_book(finished / "repository/notebooks/01_first.ipynb", kept)
    (finished / "runs/tiny/data/meta.json").unlink()
    # The record of the earlier run is still there: an old record is no record.
    with pytest.raises(NotebookError, match=r"01_first.ipynb.* data/meta.json, 01_first.json"):
        run()


def test_kernel_that_does_not_start_is_reported(project, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(NotebookError, match=r"01_first\.ipynb: .*kernel did not start"):
        run()


# ---- errors before anything runs ---------------------------------------------------------------
def parameters_cell(source):
    path, cells = "repository/notebooks/01_first.ipynb", (source, *FIRST_CELLS[1:])
    return lambda root, monkeypatch: write_book(root / path, cells)


MISTAKES = [  # a change, which may return arguments of the call, and the error
    (given(parameters={"EPOCH": 3}), ValueError, "EPOCH: the notebooks have EPOCHS"),
    (given(parameters={"EPOCHS": "many"}), ValueError, r"EPOCHS='many'.* int \(like 0\)"),
    (given(parameters={"EPOCHS": 1.5}), ValueError, "EPOCHS=1.5"),
    (given(parameters={"RUN_DIR": "x"}), ValueError, "RUN_DIR"),
    (given(preset="smaple"), ValueError, "'smaple'"),
    (parameters_cell('PRESET = "tiny"\nRUN_DIR = ""\n'), ValueError, "DATA_ROOT"),
    # Others: test_notebooks.BAD.
    (parameters_cell(PARAMETERS + "LIMIT = STOP = 0\n"), ValueError, "`LIMIT = STOP = 0`"),
    (parameters_cell(PARAMETERS + "print(PRESET)\n"), ValueError, r"`print\(PRESET\)`"),
    (lambda root, _: (root / "repository/notebooks/02_second.ipynb").unlink(), FileNotFoundError,
     r"02_second\.ipynb"),
    (lambda _, patch: configure(patch, start_from="gone/best.pt"), FileNotFoundError,
     r"start_from=gone/best\.pt"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES)
def test_mistakes_are_errors(project, monkeypatch, nothing_runs, change, error, message):
    named = change(project, monkeypatch) or {}
    with pytest.raises(error, match=message):
        run(**named)
    assert not (project / "runs").exists()


def test_a_split_without_truth_is_refused_before_training(tmp_path, tiny_photos, monkeypatch):
    secret = [unseen(p) if p.split == "test" else p for p in tiny_photos[0]]
    ran, folder = [], prepare_run(tmp_path / "run", secret, tiny_photos[1])

    def run_stage(folder, stage, source, inputs, state, force):
        ran.append(stage.name)
        state[stage.name] = {"seconds": 0}
        (folder / stage.record).write_text("{}")

    monkeypatch.setattr(pipeline, "_run_stage", run_stage)
    with pytest.raises(ValueError, match=r"4 of the 4 test photos .* 'val'"):
        reproduce("tiny", folder, parameters={"SPLIT": "test"})
    assert ran == ["01_data_preparation"]
    reproduce("tiny", folder, parameters={"SPLIT": "val"})
    assert len(ran) == 1 + len(pipeline.STAGES)


def test_an_unknown_protocol_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="protocol='mit301'"):
        reproduce("tiny", tmp_path / "run", parameters={"PROTOCOL": "mit301"})
    assert not (tmp_path / "run").exists()


# ---- publishing --------------------------------------------------------------------------------
def test_publish_copies_notebooks_and_figures(finished):
    written = publish(finished)
    repository = finished / "repository"
    names = ["notebooks/01_first.ipynb", "notebooks/02_second.ipynb", "figures/one.png"]
    assert written == [repository / name for name in names]
    assert "epoch 1" in (repository / "notebooks/01_first.ipynb").read_text()
    assert (repository / "figures/one.png").read_bytes() == b"picture"
    # Publishing is not a change of the notebooks.
    publish(finished)


LINKS = (
    "# Toy\n\n[Colab](https://colab.research.google.com/github/a/b/blob/main/notebooks/01_first.ipynb)"
    " [next](02_second.ipynb#End) [before](00_zero.ipynb) [page](../docs/page.md#x) [here](#End)"
)


def test_publish_of_another_preset_says_so_and_links_to_the_copies(finished):
    rewrite(finished, "01_first", "# Toy", LINKS)
    with_parameters(finished, PRESET="osie", STUDY="results/osie/study")
    written = publish(finished)
    folder = finished / "repository/results/osie/notebooks"
    assert written == [folder / "01_first.ipynb", folder / "02_second.ipynb"]
    expected = LINKS.replace("# Toy", "# Toy, executed on OSIE")
    expected = expected.replace("main/notebooks", "main/results/osie/notebooks")
    expected = expected.replace("(00_", "(../../../notebooks/00_").replace("(../d", "(../../../d")
    title, *cells = read_book(written[0]).cells
    assert title.source == expected
    assert cells == read_book(finished / "runs/tiny/notebooks/01_first.ipynb").cells[1:]


def with_parameters(root, stages=("01_first", "02_second"), **parameters):
    """As if these stages had run with other parameters."""
    edit_state(root, lambda s: [s[n]["inputs"].update(parameters=parameters) for n in stages])


def spoil_photos(root, monkeypatch):
    """Both notebooks have the parameter, which nobody has set to False."""
    monkeypatch.setattr(pipeline.notebooks, "parameters_of", lambda path: {"SHOW_PHOTOS": True})
    with_parameters(root, PRESET="osie")


def rewrite(root, name, old, new):
    """Change the text of an executed notebook, as if the run had left it so."""
    path, state = root / f"runs/tiny/notebooks/{name}.ipynb", root / "runs/tiny/pipeline.json"
    before = sha256_file(path)
    path.write_text(path.read_text().replace(old, json.dumps(new)[1:-1]))
    state.write_text(state.read_text().replace(before, sha256_file(path)))


SPOILT = [
    (lose("pipeline.json"), "01_first has no finished run"),
    (change_record, r"out of date: 01_first\.json"),
    (lose("figures/one.png"), r"out of date: figures/one\.png"),
    (change_notebook, "02_second was executed from another version"),
    (change_version, "01_first was executed with other code .* run `reproduce` again"),
    (lambda root, _: with_parameters(root, EPOCHS=3), "{'EPOCHS': 3}"),
    (lambda root, _: with_parameters(root, ["01_first"], PRESET="osie"), r"presets \['', 'osie'\]"),
    (spoil_photos, "01_first shows the photos of its dataset: .*-p SHOW_PHOTOS False"),
    (lambda root, _: rewrite(root, "02_second", "# Toy", f"# {Path.cwd()}"), f"path {Path.cwd()}"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_publish_refuses_and_copies_nothing(finished, monkeypatch, spoil, message):
    spoil(finished, monkeypatch)
    source = finished / "repository/notebooks/01_first.ipynb"
    before = source.read_bytes()
    with pytest.raises(PublishError, match=message):
        publish(finished)
    assert source.read_bytes() == before
    assert os.listdir(finished / "repository") == ["notebooks"]
