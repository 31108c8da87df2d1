"""Notebook 01 on all kinds of photos: sizes that differ, no order, no observers, one split."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml
from miniatures import save_map, save_osie, save_photo, save_salicon_mat
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.running.notebooks import ThisPython

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_data_preparation.ipynb"
SIZES = ((64, 48), (48, 80), (37, 37))  # landscape, portrait, odd

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One kernel for all: starting one takes longer than the notebook does."""
    client = NotebookClient(
        nbformat.v4.new_notebook(), kernel_manager_class=ThisPython, timeout=300,
        startup_timeout=180, resources={"metadata": {"path": str(tmp_path_factory.mktemp("k"))}},
    )  # fmt: skip
    with client.setup_kernel():
        yield client


@pytest.fixture
def look(client, tmp_path):
    """Runs notebook 01 with a preset; returns the photos, the record and what was printed."""

    def run(root, limit=0, **preset):
        path = tmp_path / "preset.yaml"
        path.write_text(yaml.safe_dump({"preset": "tiny", "limit": 0, **preset}))
        parameters = {
            "PRESET": str(path), "RUN_DIR": str(tmp_path / "run"), "DATA_ROOT": str(root),
            "LIMIT": limit, "SHOW": 2,
        }  # fmt: skip
        notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOK)), parameters)
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
        client.nb = notebook
        client.execute(cleanup_kc=False)
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
        assert sum("image/jpeg" in out.get("data", {}) for out in outputs) == 6
        text = "".join(out.text for out in outputs if out.get("name") == "stdout")
        assert "photos in two splits: 0\nindex reads back: True" in text
        record = json.loads((tmp_path / "run/01_data_preparation.json").read_text())
        return Prepared.read(tmp_path / "run/data").photos, record, text

    return run


# ---- miniatures: who looked, in every form that a photo may have it -----------------------------
def osie(root):
    """Observers, order and durations; a fold."""
    looked = [([10.0, 700.5], [20.0, 500.5], [200, 300]), ([400.0], [300.0], [150])]
    save_osie(root / "osie", {f"{1001 + number}.jpg": looked for number in range(10)})
    return {"dataset": "osie", "fold": 0}


def salicon(root):
    """A secret test split, and an observer who saw nothing."""
    for number, split in enumerate(("train", "train", "val", "test")):
        save_photo(root / f"salicon/images/{split}/{number}.jpg", 640, 480)
        if split != "test":
            path = root / f"salicon/fixations-2017/{split}/{number}.mat"
            save_salicon_mat(path, [[(1, 1), (320, 240)], [(640, 480)], []], "2017")
    return {"dataset": "salicon-2017"}


def own_list(root):
    """No observers, sizes that differ."""
    lines = ["image,x,y"]
    for number in range(10):
        save_photo(root / f"folder/images/00{number}.png", *SIZES[number % 3], number)
        lines += [f"00{number},{number},5", f"00{number},20,{number}"]
    (root / "folder/fixations.csv").write_text("\n".join(lines))
    return {"dataset": "folder", "sigma": 4.0}


def own_densities(root):
    """Density maps alone, in a single split."""
    for number, size in enumerate(SIZES):
        save_photo(root / f"folder/images/test/{number}.png", *size, number)
        save_map(root / f"folder/density_maps/{number}.png", *size, number)
    return {"dataset": "folder", "sigma": 4.0}


FORMS = {  # photos per split, fixations, and the most observers of a photo
    osie: ([6, 2, 2], 30, 2),
    salicon: ([2, 1, 1], 9, 2),
    own_list: ([7, 1, 2], 20, 0),
    own_densities: ([0, 0, 3], 0, 0),
}


@pytest.mark.parametrize("make", FORMS)
def test_every_form_is_looked_at(look, tmp_path, make):
    photos, record, _ = look(tmp_path, **make(tmp_path))
    counts, fixations, observers = FORMS[make]
    assert record["photos"] == dict(zip(("train", "val", "test"), counts, strict=True))
    assert record["fixations"] == fixations
    assert max(len(photo.known_observers) for photo in photos) == observers
    if not observers:
        assert all((photo.observers == NOBODY).all() for photo in photos)


@pytest.mark.realdata
def test_salicons_example_is_looked_at(look, real_data):
    photos, record, text = look(real_data, dataset="salicon-json")
    assert (len(photos), record["photos"]["train"], record["fixations"]) == (10, 10, 73630)
    assert "SALICON 2014 (JSON, mouse samples): 10 train; 73630 fixations" in text


@pytest.mark.realdata
def test_osie_is_looked_at(look, real_data):
    photos, record, _ = look(real_data, limit=3, dataset="osie")
    assert record["photos"] == {"train": 3, "val": 3, "test": 3}
    assert {len(photo.known_observers) for photo in photos} == {15}
