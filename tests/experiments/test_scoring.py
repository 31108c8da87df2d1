"""Saliency maps from files: they score as the network that made them, and each guard fires."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_checkpoint
from miniatures import save_mat, save_photo
from PIL import Image

from mlnet_utils.__main__ import main
from mlnet_utils.data.photos import Prepared
from mlnet_utils.experiments import evaluation, scoring
from mlnet_utils.metrics import METRICS
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.runtime import read_json


@pytest.fixture
def photos(run_folder):
    return Prepared.read(run_folder / "data").split("test")


@pytest.fixture
def maps(photos):
    """A smooth random map for each photo, by stem."""
    rng = np.random.default_rng(0)
    return {p.stem: rng.random((p.height, p.width)).cumsum(0) for p in photos}


def save(folder, maps, form=".npy"):
    """Write maps in one of the forms; returns what `score` takes."""
    folder.mkdir()
    if form == ".h5":
        folder = folder / "maps.h5"
        with pytest.importorskip("h5py").File(folder, "w") as file:
            for stem, values in maps.items():
                file[f"photos/{stem}.jpg"] = np.log(values / values.sum())
        return folder
    write = {
        ".npy": np.save,
        ".npz": lambda path, map_: np.savez(path, anything=map_),
        ".mat": lambda path, map_: save_mat(path, salmap=map_),
        ".png": lambda path, map_: Image.fromarray(np.uint8(map_ / map_.max() * 255)).save(path),
    }[form]
    for stem, values in maps.items():
        write(folder / f"{stem}{form}", values)
    return folder


def test_saved_maps_score_as_the_network_that_made_them(run_folder, tmp_path):
    checkpoint = tiny_checkpoint(run_folder / "checkpoints" / "best.pt")
    expected = evaluation.evaluate(run_folder)
    before = pd.read_csv(run_folder / "per_image.csv")
    root = Prepared.read(run_folder / "data").root
    predict_folder(checkpoint, [root], tmp_path / "maps", npy=True, batch_size=1)  # all splits
    report = scoring.score(tmp_path / "maps", run_folder, tmp_path / "scores")
    name = report["rows"][0]["model"]
    after = pd.read_csv(tmp_path / "scores" / "per_image.csv").replace(name, "ML-Net")
    pd.testing.assert_frame_equal(after, before)
    # Of the other splits are maps too; the .npy count, not the .png.
    assert report["maps"][name].startswith(f"4 maps; 15 {scoring.EXTRA} (")
    assert ";" not in report["maps"][name].removeprefix("4 maps; ")
    assert read_json(run_folder / "metrics.json", "evaluate") == expected  # left alone


@pytest.mark.parametrize("form", [".npy", ".npz", ".mat", ".h5"])
def test_every_form_is_read_exactly(form, photos, maps, tmp_path):
    place = save(tmp_path / "maps", maps, form)
    files = scoring.MapFiles(place, photos)
    logs = form == ".h5"
    assert len(files.notes[scoring.LOGS]) == (4 if logs else 0)
    for photo in photos:
        expected = maps[photo.stem] / (maps[photo.stem].sum() if logs else 1)
        np.testing.assert_allclose(files.read(photo).numpy(), expected, rtol=1e-12)


def test_pysaliency_files_are_read(photos, run_folder, maps, tmp_path):
    pytest.importorskip("pysaliency")
    from pysaliency import SaliencyMapModel
    from pysaliency.precomputed_models import export_model_to_hdf5

    from mlnet_utils.predict.pysaliency import to_pysaliency

    stimuli, _ = to_pysaliency(photos, Prepared.read(run_folder / "data").root)
    queue = iter(maps.values())

    class Model(SaliencyMapModel):
        def _saliency_map(self, stimulus):
            return next(queue)

    export_model_to_hdf5(Model(), stimuli, tmp_path / "maps.hdf5")
    files = scoring.MapFiles(tmp_path / "maps.hdf5", photos)
    for photo in photos:
        np.testing.assert_array_equal(files.read(photo).numpy(), maps[photo.stem])


@pytest.mark.parametrize("protocol", ["mit300", "salicon"])
def test_maps_of_half_the_size_are_resized_by_the_protocol(protocol, photos, maps, tmp_path):
    halves = {stem: values[::2, ::2] for stem, values in maps.items()}  # odd sides are rounded up
    files = scoring.MapFiles(save(tmp_path / "maps", halves), photos)
    assert len(files.notes[scoring.RESIZED]) == 4
    found = files.read(photos[0], protocol)
    assert found.shape == (photos[0].height, photos[0].width)
    corner = halves[photos[0].stem][0, 0]
    assert (found[0, 0] == corner) == (protocol == "mit300")  # which alone aligns corners


def test_bytes_constants_and_strays_are_counted_and_named(photos, maps, tmp_path, run_folder):
    place = save(tmp_path / "maps", maps, ".png")
    (place / "notes.txt").touch()
    Image.new("RGB", (4, 4), "red").save(place / "stray.png")  # not read: of no photo
    first = photos[0]
    Image.new("L", (first.width, first.height), 7).save(place / f"{first.stem}.png")
    report = scoring.score(place, run_folder, tmp_path / "scores")
    (found,) = report["maps"].values()
    assert f"1 {scoring.EXTRA} ('stray.png')" in found
    assert f"1 {scoring.CONSTANT} ({first.stem!r})" in found
    assert f"3 {scoring.BYTES}" in found
    assert "KL and IG say little" in found
    assert found in scoring.describe(report)
    assert "inter-observer" in scoring.describe(report)


def test_negative_maps_that_are_no_log_densities_are_named(photos, maps, tmp_path):
    lifted = {stem: np.log(values / values.sum()) + 0.5 for stem, values in maps.items()}
    files = scoring.MapFiles(save(tmp_path / "maps", lifted), photos)
    assert re.search("4 negative .*no log-densities", files.describe())


def test_folders_of_categories_pair_with_stems_that_begin_with_them(photos, maps, tmp_path):
    renamed = [type(p)(f"Action_{p.stem}", p.image, p.width, p.height) for p in photos]
    save(tmp_path / "maps", {})
    save(tmp_path / "maps" / "Action", maps)
    files = scoring.MapFiles(tmp_path / "maps", renamed)
    assert files.files[renamed[0].stem] == f"Action/{photos[0].stem}.npy"


def test_a_comparison_is_paired(photos, maps, tmp_path, run_folder, capsys):
    first = save(tmp_path / "first", maps)
    second = save(tmp_path / "second", {stem: values[::-1] for stem, values in maps.items()})
    command = ["score", str(first), "--data", str(run_folder / "data"), "--compare", str(second)]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    rows = pd.read_csv(tmp_path / "scores" / "per_image.csv").set_index("stem")
    ours, theirs = (rows[rows["model"] == row["model"]] for row in report["rows"][:2])
    for row in report["differences"]:
        difference = ours[row["metric"]] - theirs[row["metric"]]
        assert row["mean"] == pytest.approx(difference.mean())
        assert row["low"] <= row["mean"] <= row["high"]
    assert [row["metric"] for row in report["differences"]] == list(METRICS)
    assert "first minus" in capsys.readouterr().out


def replaced(values):
    return lambda place: np.save(place / "test1.npy", values)


def in_its_place(save, name, *values, **named):
    """Another file instead of a photo's map."""

    def change(place):
        (place / "test1.npy").unlink()
        save(place / name, *values, **named)

    return change


EYE = np.eye(60)
REFUSED = [
    (lambda place: (place / "test1.npy").unlink(), "1 photos have no map of their stem: 'test1'"),
    (replaced(np.eye(80)), "1 maps have another shape .*80x80 of 80x60"),
    (replaced(np.ones((80, 60))), "60x80 of 80x60"),  # turned
    (replaced(np.full((60, 80), np.nan)), r"test1.npy' .*NaN or infinity"),
    (replaced(np.ones((60, 80, 1, 2))), r"test1.npy' .*\(60, 80, 1, 2\).*matrix"),
    (lambda place: save_mat(place / "test1.mat", a=EYE), "1 photos have several maps"),
    (in_its_place(save_photo, "test1.png", 80, 60), "in colours"),
    (in_its_place(save_mat, "test1.mat", a=EYE, b=EYE), "one matrix"),
    (lambda place: (place / "test1.npy").write_bytes(b"no"), "test1.npy"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_maps_that_would_give_wrong_scores_are_refused(change, message, photos, maps, tmp_path):
    place = save(tmp_path / "maps", maps)
    change(place)
    with pytest.raises(ValueError, match=message):
        scoring.MapFiles(place, photos)


@pytest.mark.parametrize("values", ["text", np.zeros((9, 9), "f8,f8")])
def test_values_in_hdf5_that_are_no_numbers_are_named(photos, tmp_path, values):
    with pytest.importorskip("h5py").File(tmp_path / "maps.h5", "w") as file:
        for photo in photos:
            file[photo.stem] = values
    with pytest.raises(ValueError, match=r"maps\.h5' cannot be read .*'test0'"):
        scoring.MapFiles(tmp_path / "maps.h5", photos)


def test_places_that_are_none_are_named(photos, maps, tmp_path, run_folder):
    with pytest.raises(FileNotFoundError, match="absent"):
        scoring.MapFiles(tmp_path / "absent", photos)
    with pytest.raises(ValueError, match=r"conftest\.py"):
        scoring.MapFiles(Path(__file__).parents[1] / "conftest.py", photos)
    place = save(tmp_path / "maps", maps)
    with pytest.raises(ValueError, match=r"two .*/maps'"):
        scoring.score(place, run_folder, tmp_path, other=place)
    with pytest.raises(FileNotFoundError, match="01_data_preparation"):
        scoring.score(place, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="run' is a run"):
        scoring.score(place, run_folder, run_folder)
