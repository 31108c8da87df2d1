"""CAT2000: categories that repeat numbers, and fixated pixels marked in MATLAB's matrices."""

import numpy as np
import pytest
from miniatures import save_mat, save_photo
from scipy.io import loadmat
from scipy.sparse import csc_matrix

from mlnet_utils.data.photos import NOBODY
from mlnet_utils.data.readers.cat2000 import read_cat2000


@pytest.fixture
def cat2000(tmp_path):
    """Two categories with a photo of the same number; saliency maps lie among the stimuli."""
    for category, seed in (("Action", 0), ("Art", 1)):
        save_photo(tmp_path / f"trainSet/Stimuli/{category}/001.jpg", seed=seed)
        save_photo(tmp_path / f"trainSet/Stimuli/{category}/Output/001_SaliencyMap.jpg")
        marks = np.zeros((48, 64), np.uint8)
        marks[10 + seed, [0, 20, 63]] = 1
        save_mat(tmp_path / f"trainSet/FIXATIONLOCS/{category}/001.mat", fixLocs=marks, more=1)
    return tmp_path


@pytest.mark.parametrize("kind", [csc_matrix, lambda marks: marks == 1], ids=["sparse", "logical"])
def test_cat2000_is_read_as_published(cat2000, kind):
    path = cat2000 / "trainSet/FIXATIONLOCS/Art/001.mat"
    save_mat(path, fixLocs=kind(loadmat(path)["fixLocs"].astype(float)))
    action, art = read_cat2000(cat2000)
    assert (action.stem, action.image) == ("Action_001", "trainSet/Stimuli/Action/001.jpg")
    assert (art.width, art.height) == (64, 48)
    assert action.fixations.tolist() == [[0, 10], [20, 10], [63, 10]]
    assert art.fixations.tolist() == [[0, 11], [20, 11], [63, 11]]
    assert set(action.observers) == {NOBODY}


FAULTS = {
    "variable": ({"other": 1}, r"Art/001\.mat holds other instead of fixLocs"),
    "size": ({"fixLocs": np.ones((64, 48))}, r"Art/001\.mat is 48x64, .* 64x48"),
    "nobody looked": ({"fixLocs": np.zeros((48, 64))}, r"1 photos .*: 'Art_001'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_matrices(cat2000, fault):
    content, said = FAULTS[fault]
    save_mat(cat2000 / "trainSet/FIXATIONLOCS/Art/001.mat", **content)
    with pytest.raises(ValueError, match=said):
        read_cat2000(cat2000)


def test_missing_parts(cat2000):
    category = cat2000 / "trainSet/FIXATIONLOCS/Art"
    (category / "001.mat").unlink()
    with pytest.raises(ValueError, match=r"Art: 1 photos .*fixation files: '001'"):
        read_cat2000(cat2000)
    category.rmdir()
    with pytest.raises(ValueError, match=r"1 categories .*FIXATIONLOCS: 'Art'"):
        read_cat2000(cat2000)


def test_suffixes_in_capitals_and_linked_folders_are_read(cat2000, tmp_path):
    stimuli = cat2000 / "trainSet/Stimuli"
    (stimuli / "Action/001.jpg").rename(stimuli / "Action/001.JPG")
    (stimuli / "Art").rename(tmp_path / "elsewhere")
    (stimuli / "Art").symlink_to(tmp_path / "elsewhere")
    assert [photo.stem for photo in read_cat2000(cat2000)] == ["Action_001", "Art_001"]
