"""Decoding: every kind of photo that people have, and every kind of broken file."""

import os
import struct
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from mlnet_utils.data import images
from mlnet_utils.data.images import photo_limit, read_density, read_image, visible_files
from mlnet_utils.data.readers.files import photo_size

ROTATION = 0x0112  # EXIF tag
RAMP = np.linspace(0, 65535, 40 * 50).reshape(40, 50)  # 16 bits


def colourful() -> Image.Image:
    """A smooth photo without two equal rows or columns; (40, 50)."""
    y, x = np.mgrid[:40, :50]
    pixels = np.stack([x * 5, y * 6, 255 - x * 2 - y * 3], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(tmp_path, image, name, **options) -> torch.Tensor:
    image.save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    return pixels


def difference(pixels):
    """From the colours that all photos show, in levels of 255."""
    assert pixels.shape == (3, 40, 50)
    return (pixels.int() - torch.from_numpy(np.array(colourful())).permute(2, 0, 1).int()).abs()


FORMATS = """
jpg RGB 12, jpe RGB 12, jfif RGB 12, jpeg CMYK 16, png RGB 0, png RGBA 0, png P 60, gif P 60,
webp RGB 24, webp RGBA 24, avif RGB 24, bmp RGB 0, tif RGB 0, tif CMYK 1, tif RGBA 0, tif YCbCr 4,
jp2 RGB 1, ppm RGB 0
"""  # suffix, mode, and by how many of 255 levels colours may differ


@pytest.mark.parametrize("case", [case.strip() for case in FORMATS.split(",")])
def test_every_format_and_mode_gives_the_same_colours(tmp_path, case):
    suffix, mode, tolerance = case.split()
    if mode == "YCbCr" and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("needs Pillow 13, which reads what it wrote")
    name, options = f"x.{suffix}", {"quality": 95} if suffix not in ("jp2", "ppm") else {}
    assert (tmp_path / name).suffix in images.PHOTO_SUFFIXES
    pixels = saved(tmp_path, colourful().convert(mode), name, **options)
    assert difference(pixels).max() <= int(tolerance)


@pytest.mark.parametrize(("name", "mode"), [("x.jpg", "L"), ("x.png", "LA"), ("x.png", "1")])
def test_greyscale_has_three_equal_channels(tmp_path, name, mode):
    pixels = saved(tmp_path, colourful().convert(mode), name)
    assert pixels.float().std() > 10
    assert (pixels == pixels[0]).all()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        *((RAMP.astype(kind), name) for kind in ("<u2", ">u2") for name in ("x.png", "x.tif")),
        ((RAMP / 257).astype(np.int32), "x.tif"),  # 32 bits that hold bytes
        *(((RAMP / 65535 * top).astype(np.float32), "x.tif") for top in (1, 255)),
    ],
)
def test_other_ranges_are_brought_to_bytes(tmp_path, values, name):
    pixels = saved(tmp_path, Image.fromarray(values), name)
    assert np.abs(pixels.numpy() - RAMP / 257).max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 300])
def test_float_values_that_are_no_pixels_are_errors(tmp_path, bad):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = bad
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif' .*0\.\.1 or 0\.\.255"):
        read_image(tmp_path / "x.tif")


TRANSPARENT = {
    "RGBA": (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), {}),
    "LA": (Image.new("LA", (8, 8), (10, 0)), {}),
    "RGB": (Image.new("RGB", (8, 8), (10, 20, 30)), {"transparency": (10, 20, 30)}),
    "L": (Image.new("L", (8, 8), 10), {"transparency": 10}),
    "P": (Image.new("P", (8, 8), 0), {"transparency": 0}),
    "16 bits": (Image.fromarray(np.full((8, 8), 7000, np.uint16)), {"transparency": 7000}),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparent_parts_are_white(tmp_path, mode):
    image, options = TRANSPARENT[mode]
    assert saved(tmp_path, image, "x.png", **options).min() == 255


def test_half_transparent_parts_are_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 100, 200, 128))
    pixels = saved(tmp_path, image, "x.png")
    assert pixels[:, 0, 0].tolist() == pytest.approx([127, 177, 227], abs=1)
    pixels = images.decode(image.convert("RGBa"))  # premultiplied
    assert pixels[:, 0, 0].tolist() == pytest.approx([127, 177, 227], abs=2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_all_eight_orientations(tmp_path, orientation, name):
    of = Image.Transpose  # how a camera that is held so stores the upright scene
    sides = (None, of.FLIP_LEFT_RIGHT, of.ROTATE_180, of.FLIP_TOP_BOTTOM)
    turned = (of.TRANSPOSE, of.ROTATE_90, of.TRANSVERSE, of.ROTATE_270)
    inverse = (*sides, *turned)[orientation - 1]
    stored = colourful() if inverse is None else colourful().transpose(inverse)
    exif = Image.Exif()
    exif[ROTATION] = orientation
    pixels = saved(tmp_path, stored, name, exif=exif, quality=98)
    assert difference(pixels).float().mean() < 4
    as_stored = read_image(tmp_path / name, upright=False)
    assert as_stored.shape[1:] == (stored.height, stored.width)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damage_in_the_exif_costs_neither_the_photo_nor_its_turn(tmp_path):
    colourful().save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*garbage that is no table")
    assert read_image(tmp_path / "x.jpg").shape == (3, 40, 50)
    # Pillow's own way to turn a photo rewrites its EXIF, and gives up on such an entry.
    held = struct.pack(">HHII", ROTATION, 3, 1, 6 << 16)
    text_for_a_number = struct.pack(">HHI4s", 0x0111, 2, 4, b"abc\0")
    table = struct.pack(">H", 2) + held + text_for_a_number + struct.pack(">I", 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + table
    colourful().save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert read_image(tmp_path / "x.jpg").shape == (3, 50, 40)


@pytest.mark.parametrize("error", [struct.error("not an integer"), MemoryError()])
def test_whatever_a_reader_raises_names_the_file(tmp_path, monkeypatch, error):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    colourful().save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match=rf"x\.png' .*\({type(error).__name__}"):
        read_image(tmp_path / "x.png")


def test_first_frame_of_an_animation(tmp_path):
    white, black = (Image.new("RGB", (40, 40), colour) for colour in ("white", "black"))
    pixels = saved(tmp_path, white, "x.webp", save_all=True, append_images=[black] * 2)
    assert pixels.shape == (3, 40, 40)
    assert pixels.min() > 240


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    colourful().save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(ValueError, match=r"x\.png' .*--megapixels"):
        read_image(tmp_path / "x.png")
    with photo_limit(0.0021):
        assert read_image(tmp_path / "x.png").shape == (3, 40, 50)
    with photo_limit(0.0019), pytest.raises(ValueError, match=r"x\.png' .* 0 megapixels"):
        read_image(tmp_path / "x.png")


def test_an_archive_that_unpacks_to_more_than_a_photo_is_refused(tmp_path):
    path = tmp_path / "map.npz"
    np.savez_compressed(path, density=np.eye(50))
    with photo_limit(0.003):
        assert read_density(path).shape == (50, 50)
    with photo_limit(0.002), pytest.raises(ValueError, match=r"map\.npz.*unpacks to"):
        read_density(path)


@pytest.mark.parametrize("read", [read_image, images.read_map])
def test_a_flipped_bit_of_a_png_is_noticed(tmp_path, read):
    path, rng = tmp_path / "x.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(path)
    content = path.read_bytes()
    for place in rng.integers(60, len(content), 40):  # of the pixels; the header has its own checks
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"x\.png"):
            read(path)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.mark.parametrize("name", ["x.HEIC", "x.jpg"])
def test_heic_without_its_extra_says_what_to_install(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (read_image, photo_size):
        with pytest.raises(ValueError, match=rf"{name}' .*mlnet-utils\[heic\]"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["x.HEIC", "x.jpg"])
def test_heic_is_read_with_its_extra(tmp_path, name):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra `heic`")
    heif.from_pillow(colourful()).save(tmp_path / "x.heic", quality=95)
    (tmp_path / "x.heic").rename(tmp_path / name)
    assert difference(read_image(tmp_path / name)).float().mean() < 4
    (tmp_path / name).write_bytes(HEIC)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
        read_image(tmp_path / name)


def test_what_is_no_file_is_an_error_and_not_a_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.symlink("nowhere.jpg", tmp_path / "dead.jpg")
    for path in visible_files(tmp_path):
        for read in (read_image, photo_size):
            with pytest.raises((FileNotFoundError, ValueError), match=f"{path.name}' "):
                read(path)
    assert len(visible_files(tmp_path)) == 3
    with pytest.raises(ValueError, match="folder"):
        read_image(tmp_path)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_linked_folders_are_followed_once(tmp_path):
    """Whatever circles they make; real folders come first, however links are called."""
    touch(tmp_path, "album/real/x.jpg", "album/album.jpg/y.jpg", "elsewhere/z.jpg", "out/map.png")
    links = {"again": "real", "up": "..", "linked": "../elsewhere", "real/round": "../real"}
    links |= {".hidden": "../elsewhere", "out": "../out"}
    for name, target in links.items():
        os.symlink(target, tmp_path / "album" / name)
    found = visible_files(tmp_path / "album", out=tmp_path / "out")
    names = [path.relative_to(tmp_path / "album").as_posix() for path in found]
    assert names == ["album.jpg/y.jpg", "linked/z.jpg", "real/x.jpg"]


def test_files_are_found_in_order_without_hidden_ones_and_results(tmp_path):
    touch(tmp_path, "b.PNG", "a/x.jpg", "._b.png", ".cache/x.png", "notes.txt", "maps/b.png")
    found = visible_files(tmp_path, out=tmp_path / "maps")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/x.jpg", "b.PNG"]
    assert visible_files(tmp_path, (".txt",)) == [tmp_path / "notes.txt"]


def test_files_made_of_photos_have_names_of_their_own():
    names = ("a/x.jpg", "a/x.png", "a/y.v2.jpg", "b/x.JPG", "z.jpg", "Z.webp", "z_o.jpg")
    stems = images.output_stems({Path(name): Path(name) for name in names}, [".png", "_o.png"])
    expected = ["a/x.jpg", "a/x.png", "a/y.v2", "b/x", "z.jpg", "Z.webp", "z_o.jpg"]
    assert [stem.as_posix() for stem in stems.values()] == expected
