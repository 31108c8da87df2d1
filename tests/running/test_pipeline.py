"""The pipeline on toy notebooks: real papermill and real kernels, no saliency."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
pytest.importorskip("papermill", reason="needs the extra `notebooks`")

from mlnet_utils.running import pipeline  # noqa: E402
from mlnet_utils.running.notebooks import NotebookError  # noqa: E402
from mlnet_utils.running.pipeline import PublishError, Stage, publish, reproduce, score_table  # noqa: E402

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
METRICS = {
    "dataset": "toy",
    "protocol": "mit300",
    "rows": [
        {"model": "ML-Net", "metrics": {"CC": {"mean": 0.8125, "n": 3}, "KL": {"mean": None}}}
    ],
}
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
    f"(folder / 'metrics.json').write_text({json.dumps(METRICS)!r})",
    "(folder / 'figures/one.png').write_bytes(b'picture')",
    "(folder / '02_second.json').write_text(str(time.time_ns()))",
)


def write_book(path, cells):
    """A notebook of code cells, the first of which holds the parameters, under a heading."""
    v4 = nbformat.v4
    book = v4.new_notebook(
        cells=[v4.new_markdown_cell("# Toy"), *(v4.new_code_cell(source) for source in cells)],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )
    book.cells[1].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def make_project(root, first=FIRST_CELLS, second=SECOND_CELLS):
    """A repository with two toy notebooks, and a folder for runs."""
    write_book(root / "repository/notebooks/01_first.ipynb", first)
    write_book(root / "repository/notebooks/02_second.ipynb", second)
    return root


def use_project(root, monkeypatch):
    """Point the environment at a project."""
    monkeypatch.setenv("MLNET_RUNS", str(root / "runs"))
    monkeypatch.setenv("MLNET_DATA", str(root / "raw"))
    return root


def run(root, **arguments):
    """Run the toy pipeline of a project with its default run folder."""
    notebooks = root / "repository/notebooks"
    return reproduce("tiny", notebooks_dir=notebooks, stages=STAGES, **arguments)


def sources(book):
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A project whose run succeeded, made while `python3` is somebody else's broken kernel."""
    root = make_project(tmp_path_factory.mktemp("project"))
    spec = {"argv": ["/nonexistent/python"], "display_name": "Python 3", "language": "python"}
    kernel = root / "foreign/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root / "foreign"))
        use_project(root, patch)
        run(root)
        assert os.environ["JUPYTER_PATH"] == str(root / "foreign")
    return root


@pytest.fixture
def finished(finished_once, tmp_path, monkeypatch):
    """A private copy of the finished project, in the place that its state file speaks of."""
    root = tmp_path / "project"
    shutil.copytree(finished_once, root)
    use_project(root, monkeypatch)
    monkeypatch.setenv("MLNET_DATA", str(finished_once / "raw"))
    return root


@pytest.fixture
def nothing_runs(monkeypatch):
    """Stop the pipeline where it would start a kernel, to see what it decided, quickly."""

    def stop(source, *_, **__):
        raise NotebookError(f"would run {source.stem}")

    monkeypatch.setattr(pipeline, "run_notebook", stop)


# ---- success -----------------------------------------------------------------------------------
def test_success_leaves_results_executed_copies_and_untouched_sources(finished):
    folder = finished / "runs/tiny"
    record = json.loads((folder / "01_first.json").read_text())
    assert record["python"] == sys.executable
    assert (folder / "figures/one.png").read_bytes() == b"picture"
    assert sorted(p.name for p in (folder / "notebooks").iterdir()) == [
        "01_first.ipynb",
        "02_second.ipynb",
    ]
    for name, cells in (("01_first", FIRST_CELLS), ("02_second", SECOND_CELLS)):
        executed = nbformat.read(folder / f"notebooks/{name}.ipynb", as_version=4)
        counts = [c.execution_count for c in executed.cells if c.cell_type == "code"]
        assert counts == list(range(1, len(cells) + 1))
        source = nbformat.read(finished / f"repository/notebooks/{name}.ipynb", as_version=4)
        assert sources(source) == list(cells)
        assert not any(cell.get("outputs") for cell in source.cells)


def test_executed_copy_holds_nothing_of_this_machine(finished):
    path = finished / "runs/tiny/notebooks/01_first.ipynb"
    executed = nbformat.read(path, as_version=4)
    assert executed.metadata == {
        "kernelspec": KERNEL,
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    tags = [dict(cell.metadata) for cell in executed.cells]
    assert tags == [{}, {"tags": ["parameters"]}, {}, {}, {}, {}]
    printed = executed.cells[3].outputs
    assert [(o.name, o.text) for o in printed] == [("stdout", "epoch 1\nepoch 2\n")]
    assert "papermill" not in path.read_text()


def test_parameters_are_injected_and_progress_is_printed(tmp_path, monkeypatch, capfd):
    root = use_project(make_project(tmp_path / "a {brace}"), monkeypatch)
    run(root, run_dir=root / "elsewhere", parameters={"EPOCHS": "3"})
    out, err = capfd.readouterr()
    assert json.loads((root / "elsewhere/01_first.json").read_text())["epochs"] == 3
    assert not (root / "runs").exists()
    assert "[1/2] 01_first: running (not done yet)\nepoch 1\nepoch 2\n[1/2] 01_first: done" in out
    assert "a warning" in err
    assert "figures" in out
    assert out.endswith(score_table(METRICS) + "\n")
    executed = nbformat.read(root / "elsewhere/notebooks/01_first.ipynb", as_version=4)
    injected = [c for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "EPOCHS = 3" in injected[0].source
    assert "PRESET" not in injected[0].source  # the notebook's own value


def test_score_table_aligns_and_marks_what_is_undefined():
    assert score_table(METRICS).splitlines() == [
        "toy, mean per photo        CC        KL",
        "ML-Net                  0.812         -",
    ]


# ---- skipping ----------------------------------------------------------------------------------
def test_second_run_skips_everything(finished, nothing_runs, capsys):
    run(finished)
    out = capsys.readouterr().out
    assert "[1/2] 01_first: unchanged, skipped" in out
    assert "[2/2] 02_second: unchanged, skipped" in out
    assert "0.812" in out


def change_notebook(root, monkeypatch):
    write_book(root / "repository/notebooks/02_second.ipynb", [*SECOND_CELLS, "1 + 1"])


def change_record(root, monkeypatch):
    (root / "runs/tiny/01_first.json").write_text("{}")


def change_preset(root, monkeypatch):
    monkeypatch.setitem(pipeline.load_config.__globals__["PRESETS"]["tiny"], "epochs", 3)


def change_package(root, monkeypatch):
    monkeypatch.setattr(pipeline, "__version__", "0.0.0")


def change_data_folder(root, monkeypatch):
    monkeypatch.setenv("MLNET_DATA", str(root))


def lose_figure(root, monkeypatch):
    (root / "runs/tiny/figures/one.png").unlink()


def lose_executed_copy(root, monkeypatch):
    (root / "runs/tiny/notebooks/02_second.ipynb").unlink()


def lose_state(root, monkeypatch):
    (root / "runs/tiny/pipeline.json").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_notebook, "02_second: running (changed: notebook)"),
        (change_record, "01_first: running (changed or missing since: 01_first.json)"),
        (change_preset, "01_first: running (changed: preset)"),
        (change_package, "01_first: running (changed: package)"),
        (change_data_folder, "01_first: running (changed: data folder)"),
        (lose_figure, "02_second: running (changed or missing since: figures/one.png)"),
        (
            lose_executed_copy,
            "02_second: running (changed or missing since: notebooks/02_second.ipynb)",
        ),
        (lose_state, "01_first: running (not done yet)"),
    ],
)
def test_a_change_reruns_from_the_first_stage_it_concerns(
    finished, nothing_runs, monkeypatch, capsys, change, reason
):
    change(finished, monkeypatch)
    with pytest.raises(NotebookError, match="would run"):
        run(finished)
    assert reason in capsys.readouterr().out


def test_changed_parameter_reruns_the_notebook_that_has_it(finished, nothing_runs, capsys):
    with pytest.raises(NotebookError, match="would run 01_first"):
        run(finished, parameters={"EPOCHS": 1})
    assert "(changed: parameters)" in capsys.readouterr().out


def test_force_reruns_and_a_new_record_reruns_what_follows(finished, capfd):
    folder = finished / "runs/tiny"
    before = (folder / "01_first.json").read_text()
    run(finished, force=True)
    assert (folder / "01_first.json").read_text() != before
    assert "[2/2] 02_second: running (forced)" in capfd.readouterr().out
    (folder / "01_first.json").write_text(before)
    record = (folder / "02_second.json").read_text()
    run(finished)
    assert "[2/2] 02_second: running (changed: earlier records)" in capfd.readouterr().out
    assert (folder / "02_second.json").read_text() != record


def resuming(root, **arguments):
    """The first toy stage alone, as one that goes on with what is in ``data``."""
    stages, notebooks = (Stage(FIRST.name, FIRST.outputs, resumes="data"),), "repository/notebooks"
    return reproduce("tiny", notebooks_dir=root / notebooks, stages=stages, **arguments)


def test_force_sets_aside_what_a_stage_would_go_on_with(finished, nothing_runs, capsys):
    folder = finished / "runs/tiny"
    (folder / "data/half.txt").write_text("first")
    with pytest.raises(NotebookError, match="would run"):
        resuming(finished, force=True)
    assert (folder / "data.before/half.txt").read_text() == "first"
    assert not (folder / "data").exists()
    assert "is now in data.before" in capsys.readouterr().out
    (folder / "data").mkdir()
    with pytest.raises(NotebookError, match="would run"):  # interrupted: it goes on
        resuming(finished)
    assert (folder / "data.before/half.txt").is_file()
    with pytest.raises(NotebookError, match="would run"):
        resuming(finished, force=True)
    assert not list((folder / "data.before").iterdir())


def test_other_backbone_weights_train_anew(finished, nothing_runs, monkeypatch, tmp_path, capsys):
    folder, weights = finished / "runs/tiny", tmp_path / "weights.pth"
    presets = pipeline.load_config.__globals__["PRESETS"]
    monkeypatch.setitem(presets["tiny"], "backbone_weights", "imagenet")
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(weights))
    weights.write_bytes(b"one")
    state = json.loads((folder / "pipeline.json").read_text())
    unknown = json.loads((folder / "pipeline.json").read_text())
    del unknown["01_first"]["inputs"]["backbone weights"]
    for noted, aside in ((unknown, False), (state, True)):
        (folder / "pipeline.json").write_text(json.dumps(noted))
        with pytest.raises(NotebookError, match="would run"):
            resuming(finished)
        assert "(changed: preset, backbone weights)" in capsys.readouterr().out
        assert (folder / "data.before").exists() is aside


def test_a_changed_package_does_not_set_anything_aside(finished, nothing_runs, monkeypatch):
    change_package(finished, monkeypatch)
    with pytest.raises(NotebookError, match="would run"):
        resuming(finished)
    assert (finished / "runs/tiny/data/meta.json").is_file()


# ---- failure -----------------------------------------------------------------------------------
def test_failing_cell_is_named_and_published_copy_stays(finished, capfd):
    copy = finished / "runs/tiny/notebooks/02_second.ipynb"
    before = copy.read_bytes()
    bad = "\n# why\nnumbers = [1, 2]\nnumbers[5]"
    notebook = finished / "repository/notebooks/02_second.ipynb"
    write_book(notebook, [*SECOND_CELLS[:3], bad, *SECOND_CELLS[3:]])
    with pytest.raises(NotebookError) as failure:
        run(finished)
    message = str(failure.value)
    assert message.startswith(
        "02_second.ipynb: cell 5 (In [4]), `# why`: IndexError: list index out of range"
    )
    assert "02_second.failed.ipynb" in message
    assert copy.read_bytes() == before
    failed = copy.with_name("02_second.failed.ipynb")
    assert "IndexError" in failed.read_text()
    with pytest.raises(PublishError, match="02_second has not succeeded"):
        publish(finished / "runs/tiny", finished / "repository", STAGES)

    write_book(notebook, SECOND_CELLS)
    run(finished)
    out = capfd.readouterr().out
    assert "01_first: unchanged, skipped" in out
    assert "02_second: running (not done yet)" in out
    assert not failed.exists()


def test_cell_number_does_not_count_the_injected_cell(tmp_path, monkeypatch):
    root = use_project(make_project(tmp_path, first=(*FIRST_CELLS[:2], "1 / 0")), monkeypatch)
    with pytest.raises(NotebookError, match=r"01_first.ipynb: cell 4 \(In \[4\]\), `1 / 0`: Zero"):
        run(root, run_dir=tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("data/meta.json", "without writing data/meta.json"),
        ("01_first.json", "without writing its record"),
    ],
)
def test_broken_promise_is_an_error(finished, left_out, message):
    kept = [cell for cell in FIRST_CELLS if left_out not in cell]
    write_book(finished / "repository/notebooks/01_first.ipynb", kept)
    (finished / "runs/tiny/data/meta.json").unlink()
    # The record of the earlier run is still there: an old record is no record.
    with pytest.raises(NotebookError, match=f"01_first.ipynb: ran to its end {message}"):
        run(finished)


def test_dead_kernel_is_reported_with_its_cell(tmp_path, monkeypatch):
    cells = (*FIRST_CELLS[:2], "print('allocating')\nos._exit(137)", *FIRST_CELLS[2:])
    root = use_project(make_project(tmp_path, first=cells), monkeypatch)
    with pytest.raises(
        NotebookError, match=r"cell 4.*`print\('allocating'\)`: the kernel died.*memory"
    ):
        run(root)
    assert (tmp_path / "runs/tiny/notebooks/01_first.failed.ipynb").is_file()
    assert not (tmp_path / "runs/tiny/notebooks/01_first.ipynb").exists()


def test_kernel_that_does_not_start_is_reported(tmp_path, monkeypatch):
    root = use_project(make_project(tmp_path), monkeypatch)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(NotebookError, match="the kernel did not start"):
        run(root)


# ---- errors before anything runs ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"EPOCH": 3}, "no notebook has a parameter EPOCH; there are: EPOCHS"),
        ({"EPOCHS": "many"}, r"parameter EPOCHS='many' should be int \(like 0\)"),
        ({"EPOCHS": 1.5}, "should be int"),
        ({"RUN_DIR": "x"}, "set RUN_DIR through"),
    ],
)
def test_bad_parameters_are_errors(tmp_path, monkeypatch, nothing_runs, parameters, message):
    root = use_project(make_project(tmp_path), monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(root, parameters=parameters)
    assert not (root / "runs").exists()


def test_unknown_preset_is_an_error(tmp_path, monkeypatch, nothing_runs):
    root = use_project(make_project(tmp_path), monkeypatch)
    with pytest.raises(ValueError, match="unknown preset 'smaple'"):
        reproduce("smaple", notebooks_dir=root / "repository/notebooks", stages=STAGES)
    assert not (root / "runs").exists()


def test_missing_notebook_is_an_error(tmp_path, monkeypatch, nothing_runs):
    root = use_project(make_project(tmp_path), monkeypatch)
    (root / "repository/notebooks/02_second.ipynb").unlink()
    with pytest.raises(FileNotFoundError, match=r"02_second\.ipynb is missing"):
        run(root)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('PRESET = "tiny"\nRUN_DIR = ""\n', "no parameter DATA_ROOT"),
        (PARAMETERS + "LIMIT = len(PRESET)\n", r"LIMIT = len\(PRESET\) is not a literal"),
        (PARAMETERS + "LIMIT = 0  # int: 0 = all\n", "papermill cannot read the parameter LIMIT"),
    ],
)
def test_bad_parameters_cell_is_an_error(tmp_path, monkeypatch, nothing_runs, cell, message):
    root = use_project(make_project(tmp_path, first=(cell, *FIRST_CELLS[1:])), monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(root)


def test_cell_injected_by_an_earlier_run_is_an_error(tmp_path, monkeypatch, nothing_runs):
    root = use_project(make_project(tmp_path), monkeypatch)
    path = root / "repository/notebooks/01_first.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[2].metadata["tags"] = ["injected-parameters"]
    nbformat.write(book, path)
    with pytest.raises(ValueError, match="injected by an earlier run"):
        run(root)


# ---- publishing --------------------------------------------------------------------------------
def test_publish_copies_notebooks_and_figures(finished):
    written = publish(finished / "runs/tiny", finished / "repository", STAGES)
    repository = finished / "repository"
    assert [path.relative_to(repository).as_posix() for path in written] == [
        "notebooks/01_first.ipynb",
        "notebooks/02_second.ipynb",
        "figures/one.png",
    ]
    assert "epoch 1" in (repository / "notebooks/01_first.ipynb").read_text()
    assert (repository / "figures/one.png").read_bytes() == b"picture"
    # Publishing is not a change of the notebooks.
    publish(finished / "runs/tiny", repository, STAGES)


def spoil_parameters(root):
    path = root / "runs/tiny/pipeline.json"
    state = json.loads(path.read_text())
    state["01_first"]["inputs"]["parameters"] = {"EPOCHS": 3}
    path.write_text(json.dumps(state))


def spoil_path(root):
    path = root / "runs/tiny/notebooks/02_second.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[0].source = f"# {Path.cwd()}"
    nbformat.write(book, path)
    state = json.loads((root / "runs/tiny/pipeline.json").read_text())
    state["02_second"]["outputs"] = pipeline._output_digests(root / "runs/tiny", SECOND)
    (root / "runs/tiny/pipeline.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: lose_state(root, None), "01_first has not succeeded"),
        (lambda root: change_record(root, None), r"out of date: 01_first\.json"),
        (lambda root: lose_figure(root, None), r"out of date: figures/one\.png"),
        (lambda root: change_notebook(root, None), "02_second was executed from another version"),
        (spoil_parameters, "instead of the notebook's own values"),
        (spoil_path, "shows this machine's path"),
    ],
)
def test_publish_refuses_and_copies_nothing(finished, spoil, message):
    spoil(finished)
    before = (finished / "repository/notebooks/01_first.ipynb").read_bytes()
    with pytest.raises(PublishError, match=message):
        publish(finished / "runs/tiny", finished / "repository", STAGES)
    assert (finished / "repository/notebooks/01_first.ipynb").read_bytes() == before
    assert not (finished / "repository/figures").exists()
