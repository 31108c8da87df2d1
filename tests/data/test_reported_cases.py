"""What people reported of the same job, made by generators that lie beside the real data.

Each row of their table gives its result. `test_cases.py` and `predict/test_folders.py` have the
same kinds in finer detail, and need no generator.
"""

import runpy
import sys
import warnings

import numpy as np
import pytest
from conftest import files, tiny_config

from mlnet_utils.__main__ import main
from mlnet_utils.data.images import stored_size
from mlnet_utils.data.photos import Prepared, StaleError
from mlnet_utils.data.preparation import ensure, prepare
from mlnet_utils.predict.folders import RECORD, predict_folder

pytestmark = pytest.mark.realdata
CONFIG = tiny_config(dataset="folder", sigma=5.0, loss="kl")


@pytest.fixture(scope="module")
def make(real_data):
    """Runs a generator with its arguments."""
    folder = real_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"needs the generators of the cases in {folder}")

    def run(name, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            runpy.run_path(str(folder / name), run_name="__main__")

    return run


@pytest.fixture
def prepared(make, tmp_path):
    """Makes a case of own photos, and returns it as it is prepared, without any warning."""

    def run(case):
        make("own_photos.py", tmp_path / "raw", case)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return prepare(CONFIG, tmp_path / "raw", tmp_path / "run/data")

    return run


# ---- own photos --------------------------------------------------------------------------------
READ = {  # with the number of fixations, and of those that are dropped
    **dict.fromkeys(("plain", "header_twice", "comment", "semicolon", "tab", "caps"), (360, 0)),
    **dict.fromkeys(("utf16", "latin1", "per_observer", "nfc", "upper_name", "exp"), (360, 0)),
    **{"blank_xy": (360, 1), "inf": (360, 1), "minus1": (360, 12)},
    **{"counts_npy": (360, 0), "counts_png": (360, 0), "counts_hot": (468, 0)},
}
REFUSED = {  # with what the error or the warning says
    "norm01": (ValueError, r"0\.\.1, .*`coordinates: {unit: normalised}`"),
    "screen": (ValueError, r"of 360 points lie outside .*offset: \["),
    "swapped": (ValueError, r"of 360 points lie outside .*exchanged"),
    "zeros": (UserWarning, r"pixel 0, 0 .* in 12 of 12"),
    "typo_opt": (UserWarning, r"'subject', 'fix_dur' are not used.*'observer'"),
    "noleading": (ValueError, r"'1', .*spreadsheet"),
    "noleading_noext": (ValueError, r"'1', .*spreadsheet"),
    "quoted_thousands": (ValueError, r"line 2: .*1,024\.5"),
    "heic_beside": (ValueError, r"013\.HEIC"),
    "densJet": (ValueError, r"001\.png.*in colours"),
}
DENSITIES = (
    *("densNpy", "densNpzArr0", "dens16", "densRGBA", "densLA", "densP", "densTif", "densHalf"),
    "densSuffix",
)


@pytest.mark.parametrize("case", READ)
def test_own_photos_that_are_read(prepared, case):
    meta = prepared(case).meta
    assert (meta["fixations"], meta["dropped_outside"]) == READ[case]


@pytest.mark.parametrize("case", REFUSED)
def test_own_photos_that_are_refused_or_warned_of(prepared, case):
    kind, said = REFUSED[case]
    with pytest.raises(kind, match=said):
        prepared(case)


@pytest.fixture(scope="module")
def truth(make, tmp_path_factory):
    """The density maps of the cases, as arrays by stem."""
    folder = tmp_path_factory.mktemp("densities")
    make("own_photos.py", folder, "densNpy")
    return {path.stem: np.load(path) for path in (folder / "folder/density_maps").iterdir()}


@pytest.mark.parametrize("case", DENSITIES)
def test_density_maps_that_are_read(prepared, truth, case):
    found = prepared(case)
    assert {photo.stem for photo in found.photos} == truth.keys()
    for photo in found.photos:
        read = found.density(photo).numpy()
        assert np.corrcoef(read.ravel(), truth[photo.stem].ravel())[0, 1] > 0.99


def test_derived_data_follow_the_content(prepared, make, tmp_path):
    with pytest.raises(ValueError, match="normalised"):
        prepared("norm01")
    assert prepared("minus1").meta["dropped_outside"] == 12
    make("own_photos.py", tmp_path / "raw", "plain")
    with pytest.raises(StaleError, match=r"fixations\.csv has changed"):
        Prepared.read(tmp_path / "run/data")
    with pytest.warns(UserWarning, match="preparing the data again"):
        again = ensure(CONFIG, tmp_path / "raw", tmp_path / "run/data")
    assert again.meta["dropped_outside"] == 0


# ---- photos of all kinds -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def kinds(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make("photo_kinds.py", folder)
    return folder


MIXED = {"a.png", "b.png", "c.png", "anim.png", "d.png"}
PREDICTED = {  # folder: the maps that are made, and the names of what fails
    "mixed": (MIXED, {"IMG_0001.HEIC"}),
    "only_other": ({"b.png"}, {"IMG_0001.HEIC"}),
    "loop": ({"ok.png"}, {"loop.jpg"}),
    "deadlink": ({"ok.png"}, {"dead.jpg"}),
    "dirs": ({"ok.png", "album.jpg/in.png"}, set()),
    "linkdir": ({"ok.png", *(f"other/{name}" for name in MIXED)}, {"IMG_0001.HEIC"}),
    "latin_broken": ({"ok.png"}, {"caf\udce9.jpg"}),
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names and links")
@pytest.mark.parametrize("folder", PREDICTED)
def test_every_picture_is_predicted_or_named(kinds, checkpoint, tmp_path, capsys, folder):
    made, failed = PREDICTED[folder]
    result = predict_folder(checkpoint, [kinds / folder], tmp_path)
    assert files(tmp_path) == {RECORD, *made}
    assert {path.name for path in result.failed} == failed
    call = ["predict", "--checkpoint", checkpoint, "--out", tmp_path, kinds / folder]
    assert main(list(map(str, call))) == bool(failed)
    said = capsys.readouterr().out  # no byte of a name gets in the way
    assert all(repr(name)[1:-1] in said for name in failed)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_photos_of_any_name_are_done(kinds, checkpoint, tmp_path):
    result = predict_folder(checkpoint, [kinds / "names"], tmp_path)
    assert (len(result.done), result.failed) == (13, {})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_photo_and_how_to_take_a_larger(kinds):
    assert stored_size(kinds / "huge/108mp.jpg") == (12000, 9000)  # its memory: test_folders.py
    with pytest.raises(ValueError, match=r"17\d megapixels, .*--megapixels"):
        stored_size(kinds / "huge/200mp.jpg")
