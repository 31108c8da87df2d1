"""The pipeline on toy notebooks: real papermill and real kernels, no saliency."""

import copy
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

FIRST = Stage("01_first", ("data/meta.json",))
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


def make_project(root, monkeypatch, first=FIRST_CELLS, second=SECOND_CELLS):
    """A repository with two toy notebooks, and folders for runs and data that $MLNET_* name."""
    write_book(root / "repository/notebooks/01_first.ipynb", first)
    write_book(root / "repository/notebooks/02_second.ipynb", second)
    monkeypatch.setenv("MLNET_RUNS", str(root / "runs"))
    monkeypatch.setenv("MLNET_DATA", str(root / "raw"))
    return root


def within(root, function, *arguments, **named):
    """Call a function whose checkout is the toy project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "checkout_root", lambda: root / "repository")
        return function(*arguments, **named)


def run(root, preset="tiny", stages=STAGES, **arguments):
    return within(root, reproduce, preset, stages=stages, **arguments)


def publish(root):
    return within(root, pipeline.publish, root / "runs/tiny", STAGES)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A project after a successful run, made while `python3` is somebody else's broken kernel."""
    root = tmp_path_factory.mktemp("project")
    spec = {"argv": ["/nonexistent/python"], "display_name": "Python 3", "language": "python"}
    kernel = root / "foreign/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root / "foreign"))
        run(make_project(root, patch))
    return root


@pytest.fixture
def finished(finished_once, tmp_path, monkeypatch):
    """A private copy of the finished project, in the place that its state file speaks of."""
    root = tmp_path / "project"
    shutil.copytree(finished_once, root)
    monkeypatch.setenv("MLNET_RUNS", str(root / "runs"))
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
            run(finished, **named)
        return capsys.readouterr().out

    return run_again


def configure(monkeypatch, **changes):
    """Let every preset be ``tiny`` with changes."""
    changed = replace(load_config("tiny"), **changes)
    monkeypatch.setattr(pipeline, "load_config", lambda preset: changed)


# ---- success -----------------------------------------------------------------------------------
def test_success_leaves_results_executed_copies_and_untouched_sources(finished):
    folder = finished / "runs/tiny"
    assert json.loads((folder / "01_first.json").read_text())["python"] == sys.executable
    assert (folder / "figures/one.png").read_bytes() == b"picture"
    assert sorted(os.listdir(folder / "notebooks")) == ["01_first.ipynb", "02_second.ipynb"]
    for name, cells in (("01_first", FIRST_CELLS), ("02_second", SECOND_CELLS)):
        executed = nbformat.read(folder / f"notebooks/{name}.ipynb", as_version=4)
        counts = [c.execution_count for c in executed.cells if c.cell_type == "code"]
        assert counts == list(range(1, len(cells) + 1))
        source = nbformat.read(finished / f"repository/notebooks/{name}.ipynb", as_version=4)
        assert [cell.source for cell in source.cells[1:]] == list(cells)
        assert not any(cell.get("outputs") for cell in source.cells)


def test_executed_copy_holds_nothing_of_this_machine(finished):
    path = finished / "runs/tiny/notebooks/01_first.ipynb"
    executed = nbformat.read(path, as_version=4)
    language = {"name": "python", "pygments_lexer": "ipython3"}
    expected = {"kernelspec": KERNEL, "language_info": language, "accelerator": "GPU"}
    assert executed.metadata == expected
    tags = [dict(cell.metadata) for cell in executed.cells]
    assert tags == [{}, {"tags": ["parameters"]}, {}, {}, {}, {}]
    printed = executed.cells[3].outputs
    assert [(o.name, o.text) for o in printed] == [("stdout", "epoch 1\nepoch 2\n")]
    assert "papermill" not in path.read_text()


@pytest.mark.slow
def test_parameters_are_injected_and_progress_is_printed(tmp_path, monkeypatch, capfd):
    root = make_project(tmp_path / "a {brace}", monkeypatch)
    run(root, run_dir=root / "elsewhere", parameters={"EPOCHS": "3"})
    out, err = capfd.readouterr()
    assert json.loads((root / "elsewhere/01_first.json").read_text())["epochs"] == 3
    assert not (root / "runs").exists()
    assert "[1/2] 01_first: running (not done yet)\nepoch 1\nepoch 2\n[1/2] 01_first: done" in out
    assert "a warning" in err
    executed = nbformat.read(root / "elsewhere/notebooks/01_first.ipynb", as_version=4)
    injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "EPOCHS = 3" in injected[0].source
    assert "PRESET" not in injected[0].source  # the notebook's own value


# ---- skipping ----------------------------------------------------------------------------------
def test_second_run_skips_everything(finished, nothing_runs, capsys):
    run(finished)
    out = capsys.readouterr().out
    assert "[1/2] 01_first: unchanged, skipped" in out
    assert "[2/2] 02_second: unchanged, skipped" in out


def change_notebook(root, monkeypatch):
    write_book(root / "repository/notebooks/02_second.ipynb", [*SECOND_CELLS, "1 + 1"])


def change_record(root, monkeypatch):
    (root / "runs/tiny/01_first.json").write_text("{}")


def change_version(root, monkeypatch):
    monkeypatch.setattr(runtime, "package_digest", lambda: "0.0.0")


def lose(name):
    return lambda root, monkeypatch: (root / "runs/tiny" / name).unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_notebook, "02_second: running (changed: notebook)"),
        (change_record, "01_first: running (changed or missing since: 01_first.json)"),
        (lambda _, patch: configure(patch, epochs=3), "01_first: running (changed: preset)"),
        (change_version, "01_first: running (changed: package)"),
        (
            lambda root, patch: patch.setenv("MLNET_DATA", str(root)),
            "running (changed: data folder)",
        ),
        (lose("figures/one.png"), "02_second: running (changed or missing since: figures/one.png)"),
        (lose("notebooks/02_second.ipynb"), "02_second: running (changed or missing since: note"),
        (lose("pipeline.json"), "01_first: running (not done yet)"),
    ],
)
def test_a_change_reruns_from_the_first_stage_it_concerns(
    finished, would_run, monkeypatch, change, reason
):
    change(finished, monkeypatch)
    assert reason in would_run()


@pytest.mark.parametrize("room", ["data/geometry.py", "model/network.py", "config.py"])
def test_a_changed_line_in_any_room_reruns_the_stages(
    finished, would_run, monkeypatch, tmp_path, capsys, room
):
    package = Path(runtime.__file__).parent
    other = shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("weights"))
    monkeypatch.setattr(runtime, "__file__", str(other / "runtime.py"))
    for unused in ("running/notebooks.py", "__main__.py"):
        (other / unused).write_text("changed = True\n")
    run(finished)
    assert "02_second: unchanged, skipped" in capsys.readouterr().out
    with open(other / room, "a", encoding="utf-8") as file:
        file.write("changed = True\n")
    assert "01_first: running (changed: package)" in would_run()


def test_changed_sources_outside_the_run_folder_rerun_the_stage(would_run):
    stale = replace(FIRST, stale=lambda folder: f"{folder.name}.csv has changed")
    said = would_run(stages=(stale, SECOND))
    assert "01_first: running (tiny.csv has changed)" in said


def test_other_parameters_rerun_the_stages(would_run):
    assert "01_first: running (changed: parameters)" in would_run(parameters={"EPOCHS": 1})


@pytest.mark.slow
def test_a_new_record_reruns_what_follows(finished, capfd):
    folder = finished / "runs/tiny"
    before = (folder / "01_first.json").read_text()
    write_book(finished / "repository/notebooks/01_first.ipynb", [*FIRST_CELLS, "1 + 1"])
    run(finished)
    assert (folder / "01_first.json").read_text() != before
    assert "[2/2] 02_second: running (changed: earlier records)" in capfd.readouterr().out


# The first toy stage alone, as one that goes on with what is in ``data``.
RESUMING = (Stage(FIRST.name, FIRST.outputs, resumes="data"),)


def test_force_sets_aside_what_a_stage_would_go_on_with(finished, would_run):
    folder = finished / "runs/tiny"
    (folder / "data/half.txt").write_text("first")
    assert "01_first: running (forced)" in would_run(stages=RESUMING, force=True)
    assert (folder / "data.before/half.txt").read_text() == "first"
    assert not (folder / "data").exists()
    for number in ("1", "2"):  # interrupted, and repeated
        (folder / "data").mkdir()
        would_run(stages=RESUMING)
        would_run(stages=RESUMING, force=True)
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
    monkeypatch.setattr(runtime, "checkout_root", lambda: finished / "repository")
    change_record(finished, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(reproduce, "tiny", stages=STAGES) for _ in range(2)]
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
        run(finished)
    assert copies[0].parent == root
    assert len(os.listdir(connections)) == 1
    monkeypatch.setattr(papermill, "execute_notebook", real)
    run(finished)
    assert files(root.parent) == made
    assert os.listdir(connections) == []


def test_other_backbone_weights_train_anew(finished, would_run, monkeypatch, tmp_path):
    folder, weights = finished / "runs/tiny", tmp_path / "weights.pth"
    configure(monkeypatch, backbone_weights="imagenet")
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(weights))
    weights.write_bytes(b"one")
    state = json.loads((folder / "pipeline.json").read_text())
    unknown = copy.deepcopy(state)
    del unknown["01_first"]["inputs"]["backbone weights"]
    for noted, aside in ((unknown, False), (state, True)):
        (folder / "pipeline.json").write_text(json.dumps(noted))
        assert "(changed: preset, backbone weights)" in would_run(stages=RESUMING)
        assert (folder / "data.before").exists() is aside


def test_a_missing_start_is_reported_before_anything_runs(finished, nothing_runs, monkeypatch):
    configure(monkeypatch, start_from="gone/best.pt")
    with pytest.raises(FileNotFoundError, match=r"start_from=gone/best\.pt"):
        run(finished, stages=RESUMING)


def test_a_changed_package_does_not_set_anything_aside(finished, would_run, monkeypatch):
    change_version(finished, monkeypatch)
    would_run(stages=RESUMING)
    assert (finished / "runs/tiny/data/meta.json").is_file()


# ---- failure -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_failing_cell_is_named_and_published_copy_stays(finished, capfd):
    kept = finished / "runs/tiny/notebooks/02_second.ipynb"
    before = kept.read_bytes()
    bad = "\n# why\nnumbers = [1, 2]\nnumbers[5]"
    notebook = finished / "repository/notebooks/02_second.ipynb"
    write_book(notebook, [*SECOND_CELLS[:3], bad, *SECOND_CELLS[3:]])
    place = r"02_second.ipynb: cell 5 \(In \[4\]\), `# why`: IndexError: list index out of range"
    with pytest.raises(NotebookError, match=place) as failure:
        run(finished)
    failed = kept.with_name("02_second.failed.ipynb")
    assert failed.name in str(failure.value)
    assert kept.read_bytes() == before
    assert "IndexError" in failed.read_text()
    with pytest.raises(PublishError, match="02_second"):
        publish(finished)

    write_book(notebook, SECOND_CELLS)
    run(finished)
    out = capfd.readouterr().out
    assert "01_first: unchanged, skipped" in out
    assert "02_second: running (not done yet)" in out
    assert not failed.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        # The injected cell is not counted: the reader has the source notebook.
        ("1 / 0", r"01_first.ipynb: cell 4 \(In \[4\]\), `1 / 0`: ZeroDivisionError"),
        ("print(1)\nos._exit(137)", r"01_first.ipynb: cell 4.*`print\(1\)`: .*memory"),
    ],
)
def test_the_failed_cell_is_named_in_the_source_s_numbers(tmp_path, monkeypatch, cell, message):
    root = make_project(tmp_path, monkeypatch, first=(*FIRST_CELLS[:2], cell))
    with pytest.raises(NotebookError, match=message):
        run(root, run_dir=tmp_path / "elsewhere")
    assert os.listdir(tmp_path / "elsewhere/notebooks") == ["01_first.failed.ipynb"]


@pytest.mark.slow
def test_broken_promises_are_errors(finished):
    kept = [cell for cell in FIRST_CELLS if ".json" not in cell]
    write_book(finished / "repository/notebooks/01_first.ipynb", kept)
    (finished / "runs/tiny/data/meta.json").unlink()
    # The record of the earlier run is still there: an old record is no record.
    with pytest.raises(NotebookError, match=r"01_first.ipynb.* data/meta.json, 01_first.json"):
        run(finished)


def test_kernel_that_does_not_start_is_reported(tmp_path, monkeypatch):
    root = make_project(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(NotebookError, match=r"01_first.ipynb: the kernel did not"):
        run(root)


# ---- errors before anything runs ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"EPOCH": 3}, "EPOCH: the notebooks have EPOCHS"),
        ({"EPOCHS": "many"}, r"EPOCHS='many'.* int \(like 0\)"),
        ({"EPOCHS": 1.5}, "EPOCHS=1.5"),
        ({"RUN_DIR": "x"}, "RUN_DIR"),
    ],
)
def test_bad_parameters_are_errors(tmp_path, monkeypatch, nothing_runs, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(make_project(tmp_path, monkeypatch), parameters=parameters)
    assert not (tmp_path / "runs").exists()


def test_unknown_presets_and_missing_notebooks_are_errors(tmp_path, monkeypatch, nothing_runs):
    root = make_project(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="'smaple'"):
        run(root, preset="smaple")
    (root / "repository/notebooks/02_second.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match=r"02_second\.ipynb"):
        run(root)
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('PRESET = "tiny"\nRUN_DIR = ""\n', "DATA_ROOT"),
        (PARAMETERS + "LIMIT = len(PRESET)\n", r"`LIMIT = len\(PRESET\)`"),
        (PARAMETERS + "LIMIT = STOP = 0\n", "`LIMIT = STOP = 0`"),
        (PARAMETERS + "print(PRESET)\n", r"`print\(PRESET\)`"),
    ],
)
def test_bad_parameters_cell_is_an_error(tmp_path, monkeypatch, nothing_runs, cell, message):
    root = make_project(tmp_path, monkeypatch, first=(cell, *FIRST_CELLS[1:]))
    with pytest.raises(ValueError, match=message):
        run(root)


@pytest.mark.parametrize(
    ("tag", "message"), [("injected-parameters", "injected"), ("parameters", "2 cells")]
)
def test_a_second_cell_of_parameters_is_an_error(tmp_path, monkeypatch, tag, message):
    root = make_project(tmp_path, monkeypatch)
    path = root / "repository/notebooks/01_first.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[2].metadata["tags"] = [tag]
    nbformat.write(book, path)
    with pytest.raises(ValueError, match=message):
        run(root)


def test_a_split_without_truth_is_refused_before_training(tmp_path, tiny_photos, monkeypatch):
    photos, root = tiny_photos
    secret = [unseen(p) if p.split == "test" else p for p in photos]
    ran, folder = [], prepare_run(tmp_path / "run", secret, root)

    def run_stage(folder, stage, source, inputs, state, force):
        ran.append(stage.name)
        state[stage.name] = {"seconds": 0}
        (folder / stage.record).write_text("{}")

    monkeypatch.setattr(pipeline, "_run_stage", run_stage)
    with pytest.raises(ValueError, match=r"4 of the 4 test photos .* evaluate the split 'val'"):
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
    executed = finished / "runs/tiny/notebooks/01_first.ipynb"
    rewrite(finished, "01_first", "# Toy", LINKS)
    with_parameters(finished, PRESET="osie", STUDY="results/osie/study")
    written = publish(finished)
    folder = finished / "repository/results/osie/notebooks"
    assert written == [folder / "01_first.ipynb", folder / "02_second.ipynb"]
    expected = LINKS.replace("# Toy", "# Toy, executed on OSIE")
    expected = expected.replace("main/notebooks", "main/results/osie/notebooks")
    expected = expected.replace("(00_", "(../../../notebooks/00_").replace("(../d", "(../../../d")
    copy, book = (nbformat.read(path, as_version=4) for path in (written[0], executed))
    assert copy.cells[0].source == expected
    assert copy.cells[1:] == book.cells[1:]


def with_parameters(root, stages=("01_first", "02_second"), **parameters):
    path = root / "runs/tiny/pipeline.json"
    state = json.loads(path.read_text())
    for name in stages:
        state[name]["inputs"]["parameters"] = parameters
    path.write_text(json.dumps(state))


def spoil_parameters(root, monkeypatch):
    with_parameters(root, EPOCHS=3)


def spoil_preset(root, monkeypatch):
    with_parameters(root, ["01_first"], PRESET="osie")


def spoil_photos(root, monkeypatch):
    """Both notebooks have the parameter, which nobody has set to False."""
    monkeypatch.setattr(pipeline.notebooks, "parameters_of", lambda path: {"SHOW_PHOTOS": True})
    with_parameters(root, PRESET="osie")


def spoil_path(root, monkeypatch):
    """An executed copy that shows a path of this machine."""
    rewrite(root, "02_second", "# Toy", f"# {Path.cwd()}")


def rewrite(root, name, old, new):
    """Change the text of an executed notebook, as if the run had left it so."""
    path, state = root / f"runs/tiny/notebooks/{name}.ipynb", root / "runs/tiny/pipeline.json"
    before = sha256_file(path)
    path.write_text(path.read_text().replace(old, json.dumps(new)[1:-1]))
    state.write_text(state.read_text().replace(before, sha256_file(path)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose("pipeline.json"), "01_first has not succeeded"),
        (change_record, r"out of date: 01_first\.json"),
        (lose("figures/one.png"), r"out of date: figures/one\.png"),
        (change_notebook, "02_second was executed from another version"),
        (change_version, "01_first was executed with other code .* run `reproduce` again"),
        (spoil_parameters, "{'EPOCHS': 3}"),
        (spoil_preset, r"presets \['', 'osie'\]"),
        (spoil_photos, "01_first shows the photos of its dataset: .*-p SHOW_PHOTOS False"),
        (spoil_path, f"path {Path.cwd()}"),
    ],
)
def test_publish_refuses_and_copies_nothing(finished, monkeypatch, spoil, message):
    spoil(finished, monkeypatch)
    before = (finished / "repository/notebooks/01_first.ipynb").read_bytes()
    with pytest.raises(PublishError, match=message):
        publish(finished)
    assert (finished / "repository/notebooks/01_first.ipynb").read_bytes() == before
    assert not (finished / "repository/figures").exists()
    assert not (finished / "repository/results").exists()
