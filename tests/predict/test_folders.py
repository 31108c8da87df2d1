"""Folders of photos: what is written, what is skipped, and what can go wrong."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import files, tiny_checkpoint
from miniatures import TURNED
from PIL import Image
from test_runtime import abandon

from mlnet_utils.__main__ import main
from mlnet_utils.data.images import read_image
from mlnet_utils.plots import overlay
from mlnet_utils.predict import folders
from mlnet_utils.predict.folders import begin, list_targets, predict_folder, to_8_bits
from mlnet_utils.predict.predictor import load
from mlnet_utils.runtime import sha256_file

ROOT = Path(__file__).resolve().parents[2]


def photo(path: Path, size=(80, 60), mode="RGB", **options) -> Path:
    """A photo with (width, height) ``size``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x % 256, y * 3 % 256, (x + 2 * y) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def album(tmp_path) -> Path:
    """Seven good photos of all kinds."""
    folder = photo(tmp_path / "album" / "plain.jpg").parent
    photo(folder / "grey.jpeg", (50, 90), "L")
    photo(folder / "alpha.png", (33, 200), "RGBA")
    photo(folder / "print.JPG", (64, 64), "CMYK")
    photo(folder / "sub" / "plain.webp", (90, 50))
    photo(folder / "sub" / "turned.v2.jpg", (100, 40), exif=TURNED)
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save(folder / "small.png")
    return folder


SIZES = {"plain": (80, 60), "grey": (50, 90), "alpha": (33, 200), "print": (64, 64),
         "sub/plain": (90, 50), "sub/turned.v2": (40, 100), "small": (32, 32)}  # fmt: skip


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def stamps(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


# ---- what is written ---------------------------------------------------------------------------
def test_every_photo_gets_its_maps_at_its_own_size(album, checkpoint, out):
    result = predict_folder(checkpoint, [album], out, overlay=True, npy=True, batch_size=3)
    assert (len(result.done), result.skipped, result.failed) == (7, [], {})
    expected = {f"{stem}{suffix}" for stem in SIZES for suffix in (".png", "_overlay.png", ".npy")}
    assert files(out) == expected | {"prediction.json"}
    predictor = load(checkpoint)
    for path in result.done:
        stem = path.relative_to(album).with_name(path.stem).as_posix()
        density = np.load(out / f"{stem}.npy")
        assert density.dtype == np.float32
        assert density.shape[::-1] == SIZES[stem]
        assert density.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(density, predictor.predict(path), rtol=1e-4)
        with Image.open(out / f"{stem}.png") as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), to_8_bits(density))
            assert np.asarray(image).max() == 255
        with Image.open(out / f"{stem}_overlay.png") as image:
            pixels = read_image(path).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(np.asarray(image), overlay(pixels, density))


def test_maps_alone_by_default_and_from_single_files(album, checkpoint, out):
    paths = [album / "plain.jpg", album / "sub" / "turned.v2.jpg"]
    predict_folder(checkpoint, paths, out, upright=False)
    assert files(out) == {"plain.png", "turned.v2.png", "prediction.json"}
    assert size(out / "turned.v2.png") == (100, 40)  # the orientation as it is stored, on request
    record = json.loads((out / "prediction.json").read_text())
    assert record["sha256"] == sha256_file(checkpoint)
    assert predict_folder(checkpoint, paths, out).done == paths  # those were of photos as stored
    assert predict_folder(checkpoint, paths, out).skipped == paths


# ---- resuming ----------------------------------------------------------------------------------
def test_maps_of_changed_photos_of_early_versions_and_damaged_ones_are_made_again(
    checkpoint, tmp_path, out
):
    """Whatever the clock says."""
    changed, same, early, damaged = (photo(tmp_path / f"album/{name}.jpg") for name in "abcd")
    predict_folder(checkpoint, [tmp_path / "album"], out)
    before, whole = stamps(out), (out / "d.png").read_bytes()
    photo(changed, (90, 60))
    os.utime(changed, (0, 0))
    os.utime(same)
    with Image.open(out / "c.png") as image:
        Image.fromarray(np.asarray(image)).save(out / "c.png")
    (out / "d.png").write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    result = predict_folder(checkpoint, [tmp_path / "album"], out)
    assert (result.done, result.skipped) == ([changed, early, damaged], [same])
    assert size(out / "a.png") == (90, 60)
    assert stamps(out)["b.png"] == before["b.png"]
    assert (out / "d.png").read_bytes() == whole


def test_a_second_call_does_only_what_is_missing(album, checkpoint, out):
    predict_folder(checkpoint, [album], out, overlay=True)
    before = stamps(out)
    (out / "sub" / "plain.png").unlink()
    (out / "grey_overlay.png").unlink()
    photo(album / "new.jpg")
    result, after = predict_folder(checkpoint, [album], out, overlay=True), stamps(out)
    assert [path.name for path in result.done] == ["grey.jpeg", "new.jpg", "plain.webp"]
    assert len(result.skipped) == 5
    changed = {name for name in before if after[name] != before[name]}
    redone = {f"{s}{x}" for s in ("sub/plain", "grey") for x in (".png", "_overlay.png")}
    assert changed == redone | {"prediction.json"}
    assert predict_folder(checkpoint, [album], out, overlay=True).done == []
    assert len(predict_folder(checkpoint, [album], out, overlay=True, force=True).done) == 8
    assert not [name for name, stamp in stamps(out).items() if stamp == after.get(name)]


@pytest.mark.slow
def test_a_killed_call_is_completed_and_leaves_nothing(checkpoint, tmp_path, out):
    album = tmp_path / "album"
    for number in range(30):
        photo(album / f"{number:02}.v2.jpg", (400, 300))
    call = ["predict", "--checkpoint", checkpoint, "--out", out, "--npy", album]
    process = subprocess.Popen([sys.executable, "-m", "mlnet_utils", *call], cwd=ROOT)
    while process.poll() is None and len(list(out.glob("*.v2.png"))) < 3:
        time.sleep(0.001)
    process.kill()
    assert process.wait() != 0, "it was done before it could be killed"
    for name in ("29.v2.png", "prediction.json"):
        abandon(out / name)
    other = abandon(out / "other.png")  # nothing of this call: its writer may live
    whole = stamps(out)
    result = predict_folder(checkpoint, [album], out, npy=True)
    assert len(result.done) + len(result.skipped) == 30
    assert len(result.skipped) >= 3
    expected = {f"{n:02}.v2{suffix}" for n in range(30) for suffix in (".png", ".npy")}
    assert files(out) == expected | {"prediction.json", other.name}
    kept = {f"{path.stem}.png" for path in result.skipped}
    assert kept <= {name for name, stamp in stamps(out).items() if stamp == whole.get(name)}


def test_maps_of_two_checkpoints_are_not_mixed(album, checkpoint, tmp_path, out):
    """Not by force either, where the call that makes them again is interrupted."""
    other = tiny_checkpoint(tmp_path / "other.pt", seed=1)
    predict_folder(checkpoint, [album], out, npy=True)
    with pytest.raises(ValueError, match=r"best\.pt"):
        predict_folder(other, [album], out, npy=True)
    bystanders = [photo(out / "mine.png"), photo(out / "sub" / "mine_overlay.png")]
    real, batches = folders.predict_maps, itertools.count()

    def interrupted(*arguments):
        if next(batches) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    patch = mock.patch.object(folders, "predict_maps", interrupted)
    with patch, pytest.raises(KeyboardInterrupt):
        predict_folder(other, [album], out, npy=True, force=True, batch_size=1)
    assert len(list(out.rglob("*.npy"))) == 2
    result = predict_folder(other, [album], out, npy=True, batch_size=1)
    assert (len(result.done), len(result.skipped)) == (5, 2)
    for path in [*result.done, *result.skipped]:
        density = np.load(out / path.relative_to(album).with_name(f"{path.stem}.npy"))
        np.testing.assert_array_equal(density, load(other).predict(path))
    assert all(path.is_file() for path in bystanders)


def test_files_that_earlier_calls_left_are_not_taken_for_done(checkpoint, tmp_path, out):
    """Calls that did not write them, for a photo that had changed, or did not force all photos."""
    album, other = tmp_path / "album", tiny_checkpoint(tmp_path / "other.pt", seed=1)
    first, second = (photo(album / f"{name}.jpg") for name in "ab")
    predict_folder(checkpoint, [album], out, npy=True)
    photo(first, (90, 60))
    assert predict_folder(checkpoint, [album], out).done == [first]
    assert predict_folder(checkpoint, [album], out, npy=True).done == [first]
    assert np.load(out / "a.npy").shape == (60, 90)
    predict_folder(other, [first], out, force=True)
    assert predict_folder(other, [album], out, npy=True).done == [first, second]
    for path in (first, second):
        found = np.load(out / f"{path.stem}.npy")
        np.testing.assert_array_equal(found, load(other).predict(path))
    assert predict_folder(other, [album], out).done == []


def test_maps_that_were_made_fast_are_not_mixed_with_others(album, checkpoint, out):
    call = ["predict", "--checkpoint", str(checkpoint), "--out", str(out), str(album), "--fast"]
    assert main(call) == 0
    with pytest.raises(ValueError, match="of another `fast`"):
        predict_folder(checkpoint, [album], out)
    assert main(call) == 0


@pytest.mark.parametrize("record", ["", "{}", None])
def test_force_takes_maps_of_an_unknown_checkpoint_for_those_of_another(
    record, checkpoint, tmp_path, out
):
    album, made = photo(tmp_path / "album" / "x.jpg").parent, photo(out / "x.png")
    if record is not None:
        (out / "prediction.json").write_text(record)
        with pytest.raises(ValueError, match=out.name):
            predict_folder(checkpoint, [album], out)
    assert made.is_file()
    with begin(checkpoint, [album], out, [".png"], True, 1, "cpu", False):
        assert files(out) == {"prediction.json"}
    made.touch()
    with begin(checkpoint, [album], out, [".png"], True, 1, "cpu", False):
        assert made.is_file()  # the same network's: an interrupted call mixes nothing


# ---- what fails --------------------------------------------------------------------------------
def test_photos_that_cannot_be_read_or_written_stop_nothing(
    album, checkpoint, tmp_path, monkeypatch
):
    (album / "broken.jpg").write_bytes((album / "plain.jpg").read_bytes()[:300])
    (album / "empty.png").touch()
    photo(album / "icon.png", (31, 80))
    (tmp_path / "out1" / "plain.png").mkdir(parents=True)  # where a map cannot be written
    real = folders.to_8_bits

    def fails(density):
        if density.shape[::-1] == SIZES["grey"]:
            raise MemoryError
        return real(density)

    monkeypatch.setattr(folders, "to_8_bits", fails)
    for batch_size, more in ((1, {"plain.jpg"}), (4, set())):
        out = tmp_path / f"out{batch_size}"
        result = predict_folder(checkpoint, [album], out, batch_size=batch_size)
        failed = {"broken.jpg", "empty.png", "icon.png", "grey.jpeg"} | more
        assert {path.name for path in result.failed} == failed
        assert len(result.done) == 6 - len(more)
        assert "31x80" in result.failed[album / "icon.png"]
        assert "MemoryError" in result.failed[album / "grey.jpeg"]
        assert "broken.jpg' cannot be read" in result.summary()
        assert result.summary().count("failed: ") == len(failed)
        assert not [name for name in files(out) if "broken" in name or name.endswith(".tmp.png")]
    result = predict_folder(checkpoint, [album], out)
    assert result.summary().startswith("0 done, 6 ")


# ---- names -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("photos", "paths", "made", "failed"), [
    # Neither is done, so that no map is another photo's.
    ("1/x.jpg 2/x.jpg 2/y.jpg", "1 2", {"2/y.jpg": "y.png"},
     {"1/x.jpg": "2/x.jpg", "2/x.jpg": "1/x.jpg"}),
    # Only the suffix tells them apart, or capitals, which some file systems take for equal.
    *((f"1/x.jpg 1/{x}", "1", {"1/x.jpg": "x.jpg.png", f"1/{x}": f"{x}.png"}, {})
      for x in ("x.png", "X.jpeg", "x_overlay.jpg")),
    # A photo would be overwritten.
    ("out/x.png y.png", "out/x.png y.png", {"y.png": "y.png"}, {"out/x.png": "x"}),
])  # fmt: skip
def test_photos_of_one_name_keep_their_maps_apart(tmp_path, out, photos, paths, made, failed):
    for name in photos.split():
        photo(tmp_path / name)
    paths = [tmp_path / path for path in paths.split()]
    targets, result = list_targets(paths, out, ["_overlay.png", ".png"])
    found = {file: paths[-1] for file, paths in targets.items()}
    assert found == {tmp_path / name: out / path for name, path in made.items()}
    assert {path.relative_to(tmp_path).as_posix() for path in result.failed} == set(failed)
    assert all(other in result.failed[tmp_path / name] for name, other in failed.items())


def test_photos_of_sub_folders_and_photos_given_twice(tmp_path, out):
    names = ("1/x", "1/x_overlay", "2/x")  # without overlays, no collision
    expected = {photo(tmp_path / f"{name}.jpg"): [out / f"{name}.png"] for name in names}
    photo(out / "1" / "x.png")  # a map of an earlier call is no photo
    assert list_targets([tmp_path], out, [".png"])[0] == expected
    b = tmp_path / "2" / "x.jpg"
    assert list(list_targets([tmp_path / "2", b, b], out, [".png"])[0]) == [b]


def test_nothing_to_do_is_an_error(tmp_path, checkpoint, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    maps = photo(Path("maps/x.jpg")).parent
    for call, options, error, message in (
        ((checkpoint, ["empty"], out), {}, ValueError, r"\.jpg, .*empty"),
        ((checkpoint, ["gone.jpg"], out), {}, FileNotFoundError, r"gone\.jpg"),
        (("no.pt", ["maps"], out), {}, FileNotFoundError, r"no\.pt"),
        ((checkpoint, ["maps"], out), {"batch_size": 0}, ValueError, "batch_size"),
        ((checkpoint, [maps.resolve()], maps), {}, ValueError, "next call's input"),
    ):
        with pytest.raises(error, match=message):
            predict_folder(*call, **options)
    assert not out.exists()


def test_files_that_were_there_before_the_first_call_are_not_overwritten(checkpoint, tmp_path):
    """However often it is repeated; by force they are."""
    taken, own = photo(tmp_path / "x.jpg"), photo(tmp_path / "x.png")
    content = own.read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"x\.png' exists"):
            predict_folder(checkpoint, [taken], tmp_path)
    assert own.read_bytes() == content
    assert predict_folder(checkpoint, [taken], tmp_path, force=True).done == [taken]


def test_to_8_bits_spans_the_range():
    density = np.array([[0, 1e-9], [5e-10, 2e-10]], np.float32)
    np.testing.assert_array_equal(to_8_bits(density), [[0, 255], [128, 51]])


# ---- what people have in their folders ---------------------------------------------------------
def test_every_picture_is_predicted_or_named(checkpoint, tmp_path, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = tmp_path / "mixed"
    for name, kind in (("a.jpg", "JPEG"), ("b.jfif", "JPEG"), ("c.jpe", "JPEG"), ("d.gif", "GIF")):
        photo(folder / name, format=kind)
    photo(folder / "e.avif")
    (folder / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    for name in ("raw.CR2", ".DS_Store", "Thumbs.db", "a.xmp"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    result = predict_folder(checkpoint, [folder], out)
    assert [path.stem for path in result.done] == list("abcde")
    assert "mlnet-utils[heic]" in result.failed.pop(folder / "IMG_0001.HEIC")
    assert result.failed == {}
    assert result.left_out == [folder / "raw.CR2"]
    assert "raw.CR2" in result.summary()


NAMES = (
    *("with space.jpg", "hash#1.jpg", "100%.jpg", "{lr}.jpg", "n\u00e9 e\u0301.jpg", "日本語.JPEG"),
    *("tab\tline\nx.jpg", "-rf.jpg", "a" * 251 + ".jpg", "é" * 120 + ".jpg", " lead.jpg"),
    *("trail .jpg", "dot..jpg", os.fsdecode(b"caf\xe9.jpg")),
)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_any_name_is_done(checkpoint, tmp_path, out):
    for name in NAMES:
        photo(tmp_path / "names" / name, (40, 32), format="JPEG")
    assert predict_folder(checkpoint, [tmp_path / "names"], out).failed == {}
    assert files(out) == {Path(n).stem + ".png" for n in NAMES} | {"prediction.json"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_bad_entries_stop_nothing_and_are_named(checkpoint, tmp_path, out):
    folder, linked = photo(tmp_path / "folder/ok.jpg").parent, photo(tmp_path / "linked/far.jpg")
    photo(folder / "album.jpg" / "in.jpg")
    links = {"dead.jpg": "nowhere.jpg", "loop.jpg": "loop.jpg", "other": linked.parent, "up": "."}
    for name, target in links.items():
        os.symlink(target, folder / name)
    os.mkfifo(folder / "pipe.jpg")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(b"nothing")
    call = ["predict", "--checkpoint", checkpoint, "--out", out, folder, folder / "dead.jpg"]
    # Only the command line prints names as the terminal can show them.
    process = subprocess.run(
        [sys.executable, "-m", "mlnet_utils", *call],
        cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    report = process.stdout.decode()
    assert (process.returncode, process.stderr) == (1, b"")
    assert "3 done, 0 " in report
    for name in ("dead.jpg", "loop.jpg", "pipe.jpg", r"caf\udce9.jpg"):
        assert report.count(f"failed: '{folder}/{name}': ") == 1
    assert files(out) == {"ok.png", "album.jpg/in.png", "other/far.png", "prediction.json"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux reports it")
def test_memory_of_a_large_photo(checkpoint, tmp_path, out):
    """20 megapixels; 26 bytes per pixel above what a small photo takes would be 3 GB for 100."""
    code = "import resource, sys; from mlnet_utils.__main__ import main; "
    code += "code = main(sys.argv[1:]); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    call = ["predict", "--checkpoint", checkpoint, "--out", out, "--overlay", "--npy"]
    peaks = []
    for size in ((64, 64), (5000, 4000)):
        path = tmp_path / f"{size[0]}.jpg"
        Image.new("RGB", size, "grey").save(path)
        command = [sys.executable, "-c", code, *call, path]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(process.stdout.splitlines()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 26 * 5000 * 4000


# ---- several processes -------------------------------------------------------------------------
SHARE = """
import os, sys
from pathlib import Path
from mlnet_utils.predict.folders import predict_folder
from mlnet_utils.runtime import end_process, leave_processes
checkpoint, album, out = sys.argv[1:]
result = predict_folder(checkpoint, [album], out, batch_size=2)
names = [path.name for path in [*result.done, *result.failed]]
Path(out + os.environ["RANK"]).write_text(" ".join(names))
leave_processes()
end_process(0)  # as the command line does
"""


@pytest.mark.slow
def test_two_processes_share_the_photos(album, checkpoint, tmp_path, out):
    (album / "broken.jpg").write_text("not a photo")
    (tmp_path / "launch.py").write_text(SHARE)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         tmp_path / "launch.py", checkpoint, album, out],
        check=True, capture_output=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    reports = [Path(f"{out}{rank}").read_text() for rank in (0, 1)]
    assert reports[0] == reports[1]
    assert len(reports[0].split()) == 8
    assert len(files(out)) == 8  # seven maps and the record
