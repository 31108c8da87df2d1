"""Own photos in the forms that people have them: what each must give, from prepare on.

Every case changes one thing of a study with twelve photos of 160x120 and three observers who
looked ten times each; each stands for a kind of mistake that was reported in public.
"""

import re
import unicodedata
import warnings

import matplotlib
import numpy as np
import pytest
from conftest import tiny_config
from miniatures import save_photo
from PIL import Image

from mlnet_utils.__main__ import main
from mlnet_utils.data.geometry import density_from_points
from mlnet_utils.data.photos import NOBODY, Prepared
from mlnet_utils.data.preparation import prepare
from mlnet_utils.running import pipeline

SIZE = np.array((160, 120))
STEMS = [f"{number:03d}" for number in range(1, 13)]
HEAD = "image,x,y,observer,duration"


def gaze(stem):
    """(30, 2) x, y: most near a place, some anywhere."""
    rng = np.random.default_rng(int(stem))
    near = rng.normal(rng.uniform(40, SIZE - 40), 6, (24, 2))
    return np.concatenate([near, rng.uniform(0, SIZE - 1, (6, 2))]).clip(0, SIZE - 1)


def rows(change=lambda xy: xy, name="{}.jpg".format):
    """Lines of a list; ``change`` takes and returns (30, 2) x, y."""
    return [
        f"{name(stem)},{x:.4f},{y:.4f},P{1 + number // 10},{200 + number}"
        for stem in STEMS
        for number, (x, y) in enumerate(change(gaze(stem)))
    ]


def table(lines, head=HEAD):
    return "\n".join([head, *lines]) + "\n"


@pytest.fixture
def study(tmp_path):
    """The folder of a study without fixations."""
    for stem in STEMS:
        save_photo(tmp_path / "folder/images" / f"{stem}.jpg", 160, 120, int(stem))
    return tmp_path / "folder"


def prepared(study, **options):
    """The study as it is prepared, without any warning."""
    config = tiny_config(dataset="folder", **{"sigma": 5.0, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prepare(config, study.parent, study.parent / "run/data")


def listed(study, content, **options):
    content = content.encode() if isinstance(content, str) else content
    (study / "fixations.csv").write_bytes(content)
    return prepared(study, **options)


def assert_as_looked(found, atol=1e-3):
    assert [photo.stem for photo in found.photos] == STEMS
    for photo in found.photos:
        np.testing.assert_allclose(photo.fixations, gaze(photo.stem), atol=atol)


# ---- lists -------------------------------------------------------------------------------------
READ = {
    "plain": table(rows()),
    "semicolons and decimal commas": table(rows(name=str)).replace(",", ";").replace(".", ","),
    "tabs": table(rows()).replace(",", "\t"),
    "capitals": table(rows(), "Image,X,Y,Observer,Duration"),
    "names in capitals": table(rows(name="{}.JPG".format)),
    "with folders": table(rows(name="C:\\study\\{}.jpg".format)),
    "Excel's Unicode text": table(rows()).replace(",", "\t").encode("utf-16"),
    "with a mark": table(rows()).encode("utf-8-sig"),
    "Latin-1": table(rows()).replace("P1", "Zoë").encode("latin-1"),
    "two files in one": table([*rows()[:99], HEAD, *rows()[99:]]),
    "comments": "# of 12 March\n" + table(["# P1", *rows(), ""]),
    "carriage returns": table(rows()).replace("\n", "\r\n"),
    "exponents": re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):e}", table(rows())),
}


@pytest.mark.parametrize("case", READ)
def test_lists_that_are_read(study, case):
    found = listed(study, READ[case])
    assert_as_looked(found)
    photo = found.photos[4]
    assert (photo.observers == np.repeat([0, 1, 2], 10)).all()
    assert (photo.durations == np.arange(200, 230)).all()


def test_lost_gaze_is_dropped_and_counted(study):
    spelled = ("", "-1", "nan", "inf", "NA", ".", "None")
    lost = [f"{stem}.jpg,{text},{text},P1," for stem in STEMS for text in spelled]
    found = listed(study, table([*rows()[:200], *lost, *rows()[200:]]))
    assert_as_looked(found)
    assert found.meta["dropped_outside"] == 84
    assert re.search("360 fixations, 84 ", found.describe())


CONVERTED = {
    "normalised": (lambda xy: (xy + 0.5) / SIZE, {"unit": "normalised"}),
    "percent": (lambda xy: (xy + 0.5) / SIZE * 100, {"unit": "percent"}),
    "from 1": (lambda xy: xy + 1, {"origin": 1}),
    "screen": (lambda xy: xy + np.array((80, 60)), {"offset": [80, 60]}),
    "screen from 1": (lambda xy: xy + np.array((81, 61)), {"offset": [80, 60], "origin": 1}),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_coordinates_that_the_preset_describes(study, case):
    change, coordinates = CONVERTED[case]
    found = listed(study, table(rows(change)), coordinates=coordinates)
    assert_as_looked(found, atol=0.02)
    assert found.meta["coordinates"] == coordinates


REFUSED = {
    "shares": (table(rows(CONVERTED["normalised"][0])), r"0\.\.1, .*`coordinates: {unit: normal"),
    "screen": (table(rows(CONVERTED["screen"][0])), r"of 360 points lie outside .*offset: \["),
    "exchanged": (table(rows(lambda xy: xy[:, ::-1])), "exchanged"),
    "no leading zeros": (table(rows(name=lambda s: s.lstrip("0"))), "'1', .*spreadsheet"),
    "near names": (
        table(rows(), "file,x_pos,y_pos,subject,fix_dur"),
        "is 'file' the 'image'.*'x_pos' the 'x'.*'y_pos' the 'y'",
    ),
    "thousands": (table(['001.jpg,"1,024.5",3,P1,9', *rows()]), r"csv, line 2: .*1,024\.5"),
    "a word": (table([*rows()[:5], "001.jpg,left,3,P1,9"]), "csv, line 7: .*'left'"),
}
WARNED_OF = {
    "columns that are not used": (
        table(rows(), "image,x,y,subject,fix_dur"),
        r"'subject', 'fix_dur' are not used.*'observer'.*'durat",
    ),
    "the same pixel in every photo": (
        table([*rows(), *(f"{stem}.jpg,0,0,P1,100" for stem in STEMS for _ in range(20))]),
        r"pixel 0, 0 .* in 12 of 12",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED, *WARNED_OF])
def test_lists_that_are_refused_or_warned_of(study, case):
    content, said = {**REFUSED, **WARNED_OF}[case]
    with pytest.raises(UserWarning if case in WARNED_OF else ValueError, match=said):
        listed(study, content)


def test_a_wrong_conversion_is_mended_and_not_added_to(study):
    content = table(rows(CONVERTED["screen"][0]))
    with pytest.raises(ValueError, match=r"of 360 .*not percent") as caught:
        listed(study, content, coordinates={"unit": "percent"})
    assert "offset: [" not in str(caught.value)
    with pytest.raises(ValueError, match=r"of 360 .*offset: \[") as caught:
        listed(study, content, coordinates={"offset": [200, 0]})
    # Near the offset that there is, from which the points' median differs a little.
    said = re.search(r"offset: \[(-?\d+), (-?\d+)\]", str(caught.value))
    assert [int(part) for part in said.groups()] == pytest.approx([80, 60], abs=30)


def test_a_list_of_each_observer(study):
    (study / "fixations").mkdir()
    for observer in ("P1", "P2", "P3"):
        lines = [line.rsplit(",", 2)[0] for line in rows() if f",{observer}," in line]
        (study / "fixations" / f"{observer}.csv").write_text(table(lines, "image,x,y"))
    found = prepared(study)
    assert_as_looked(found)
    assert len(found.photos[0].known_observers) == 3
    with pytest.raises(UserWarning, match=r"fixations\.csv.* fixations/"):
        listed(study, table(rows()))
    (study / "fixations.csv").unlink()
    (study / "fixations").rename(study / "gaze")
    with pytest.raises(ValueError, match=r"fixations\.csv.* fixations/.* 'gaze', 'images'"):
        prepared(study)


def test_accents_that_macos_takes_apart(study):
    name = "café_4"
    (study / "images/004.jpg").rename(study / f"images/{unicodedata.normalize('NFD', name)}.jpg")
    found = listed(study, table(line.replace("004.jpg", name) for line in rows()))
    assert [len(photo.fixations) for photo in found.photos if photo.stem == name] == [30]


def test_photos_of_other_kinds_are_named(study):
    kinds = {"013.CR2": r"'013'.* '013\.CR2': .*JPEG", "014.HEIC": "014.HEIC' cannot be read"}
    for name, said in kinds.items():
        (study / "images" / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=said):
            listed(study, table([*rows(), f"{name},4,4,P1,100"]))


def test_a_blur_for_photos_of_many_sizes(study):
    Image.new("RGB", (320, 120)).save(study / "images/002.jpg")
    found = listed(study, table(rows()), sigma=0.0, sigma_share=0.05)
    assert (found.photos[0].sigma, found.photos[1].sigma, found.sigma) == (8, 16, 8)


def test_a_missing_split_is_named_at_once(study):
    for part, stems in (("train", STEMS[:8]), ("val", STEMS[8:])):
        (study / "images" / part).mkdir()
        for stem in stems:
            (study / f"images/{stem}.jpg").rename(study / f"images/{part}/{stem}.jpg")
    with pytest.raises(UserWarning, match="no test photos"):
        listed(study, table(rows()))


# ---- maps --------------------------------------------------------------------------------------
def density(stem):
    values = density_from_points(gaze(stem).astype(np.float32), 120, 160, 8.0).numpy()
    return values / values.max()


def greys(values):
    return (255 * values).round().astype(np.uint8)


def painted(path, values):
    Image.fromarray(greys(matplotlib.colormaps["jet"](values))).save(path)


def rgba(grey, alpha):
    """Writes a picture of which grey or alpha are the values, and the other is constant."""
    return lambda path, v: Image.fromarray(greys(np.dstack([*[grey(v)] * 3, alpha(v)]))).save(path)


def drawn(mode):
    return lambda path, values: Image.fromarray(greys(values)).convert(mode).save(path)


FINE = {
    "grey.png": drawn("L"),
    "palette.png": drawn("P"),
    "grey and alpha.png": drawn("LA"),
    "colour.jpg": drawn("RGB"),
    "opaque.png": rgba(np.asarray, np.ones_like),
    "16 bits.png": lambda path, v: Image.fromarray((65535 * v).astype(np.uint16)).save(path),
    "float.tif": lambda path, v: Image.fromarray(v.astype(np.float32)).save(path),
    "array.npy": np.save,
    "unnamed.npz": np.savez,
    "named.npz": lambda path, v: np.savez(path, density=v, other=1),
    "half.png": lambda path, v: drawn("L")(path, v.reshape(60, 2, 80, 2).mean((1, 3))),
}
NO_DENSITY = {
    "painted.png": (painted, "in colours"),
    "alpha.png": (rgba(np.ones_like, np.asarray), "transparent"),
    "constant.png": (lambda path, v: drawn("L")(path, np.ones_like(v)), "the same everywhere"),
    "part.png": (lambda path, v: drawn("L")(path, v[:80]), "160x80, but its photo is 160x120"),
    "nothing.npy": (lambda path, v: np.save(path, 0 * v), "sum 0"),
    "negative.npy": (lambda path, v: np.save(path, -v), "not negative"),
}


def draw(study, name, write):
    (study / "density_maps").mkdir()
    for stem in STEMS:
        write(study / "density_maps" / f"{stem}.{name.rpartition('.')[2]}", density(stem))


@pytest.mark.parametrize("name", FINE)
def test_density_maps_that_are_read(study, name):
    draw(study, name, FINE[name])
    found = prepared(study, loss="kl")
    read = found.density(found.photos[3]).numpy()
    assert np.corrcoef(read.ravel(), density("004").ravel())[0, 1] > 0.999


@pytest.mark.parametrize("ending", ["_density", "-map"])
def test_maps_that_are_named_after_their_kind(study, ending):
    draw(study, "grey.png", drawn("L"))
    for path in sorted((study / "density_maps").iterdir()):
        path.rename(path.with_stem(f"{path.stem}{ending}"))
    found = prepared(study, loss="kl")
    assert found.photos[3].density == f"density_maps/{found.photos[3].stem}{ending}.png"
    (study / found.photos[3].density).unlink()
    with pytest.raises(ValueError, match=r"12 photos .*density maps: '001'"):
        prepared(study, loss="kl")


@pytest.mark.parametrize("name", NO_DENSITY)
def test_density_maps_that_are_none(study, name):
    write, said = NO_DENSITY[name]
    draw(study, name, write)
    with pytest.raises(ValueError, match=rf"001\..*{said}"):
        prepared(study, loss="kl")


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "png"])
def test_maps_that_count_are_read_as_counts(study, suffix, hot):
    (study / "fixation_maps").mkdir()
    for stem in STEMS:
        counts = np.zeros((120, 160), np.uint8)
        np.add.at(counts, tuple(gaze(stem).round().astype(int).T[::-1]), 1)
        counts[5, 5] = 9 * hot
        path = study / "fixation_maps" / f"{stem}.{suffix}"
        np.save(path, counts) if suffix == "npy" else Image.fromarray(counts).save(path)
    found = prepared(study)
    assert found.meta["fixations"] == 12 * (30 + 9 * hot)
    assert (found.photos[0].observers == NOBODY).all()


# ---- the way through the verbs -----------------------------------------------------------------
def test_reproduce_looks_at_the_sources(study):
    listed(study, table(rows()))
    assert pipeline.STAGES[0].stale(study.parent / "run") == ""
    Image.new("RGB", (160, 120)).save(study / "images/007.jpg")
    assert "007.jpg has changed" in pipeline.STAGES[0].stale(study.parent / "run")


@pytest.mark.slow
def test_a_repaired_list_is_never_finished_before(study, capsys):
    """First with x and y exchanged in too few rows to be noticed, then repaired."""
    preset, run = study.parent / "my.yaml", study.parent / "run"
    small = "height: 32, width: 40, prior_cells: [2, 2]"
    preset.write_text(f"{{preset: tiny, dataset: folder, sigma: 5, epochs: 1, {small}}}")
    where = ["--preset", preset, "--run-dir", run, "--data-root", study.parent]

    def call(verb, *more):
        code = main(list(map(str, (verb, *where, *more))))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    worse = [*rows(), *(f"{stem}.jpg,-3,5,P1,100" for stem in STEMS)]
    (study / "fixations.csv").write_text(table(worse))
    code, said = call("train")
    assert (code, "12 more dropped" in said) == (0, True)
    assert call("evaluate")[0] == 0
    (study / "fixations.csv").write_text(table(rows()))
    for call_again in (("train",), ("evaluate",), ("prepare", "--check")):
        code, said = call(*call_again)
        assert (code, "fixations.csv has changed" in said) == (1, True), call_again
    assert call("prepare")[0] == 0
    for verb in ("train", "evaluate"):
        code, said = call(verb)
        assert (code, f"other prepared data than {run / 'data'}" in said) == (1, True), verb
    assert Prepared.read(run / "data").meta["dropped_outside"] == 0
