"""Find photos in folders, and read photos of any kind: colour modes, 16 bits, rotation."""

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlnet_utils.runtime import reading, require

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    *(".avif", ".jp2", ".j2k", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif", ".hif"),
)
# Pictures that are named where they are left out: raw photos of cameras, drawings, other formats.
OTHER_PICTURES = (
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2", ".raw", ".srw"),
    *(".jxl", ".psd", ".svg", ".eps", ".xcf", ".tga", ".ico", ".exr", ".hdr"),
)
# Formats that Pillow decodes itself (JPEG reads MPO too); others, e.g. EPS, start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "AVIF")
MEGAPIXELS = 178  # of a photo, unless more is asked for: a small file may hold any number of them
SMALLEST_SIDE = 32  # pixels; anything smaller is an icon, not a photo
GREY = 8  # levels of 255 by which JPEG may let the channels of a grey picture differ
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def visible_files(
    folder: Path,
    suffixes: Sequence[str] = PHOTO_SUFFIXES,
    out: Path | None = None,
    nested: bool = True,
) -> list[Path]:
    """The sorted files of these kinds in a folder and, if ``nested``, in its sub-folders.

    ``suffixes`` are in lower case, those of files may be in capitals. Left out are hidden files
    (programs make ``._a.jpg`` and ``.ipynb_checkpoints/``) and the folder ``out`` of results.
    Linked folders are followed, but no folder is read twice. Unreadable files, such as dead links,
    are listed too: their reader raises the error.
    """
    found, seen, pending = [], set(), [folder]
    for start in pending:  # linked folders are appended: real ones come first
        for place, folders, names in os.walk(start):
            real = Path(os.path.realpath(place))
            if real in seen or (out and real.is_relative_to(os.path.realpath(out))):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(n for n in folders if nested and not n.startswith("."))
            pending += [path for name in folders if (path := Path(place, name)).is_symlink()]
            found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


def output_stems(places: Mapping[Path, Path], endings: Sequence[str] = ("",)) -> dict[Path, Path]:
    """Name the files that are made of each photo: its own name, without the suffix.

    The suffix is kept where another photo's files would have the same names, in capitals or not.
    ``places`` are photos with their paths below the folder of results, ``endings`` those of files.
    """
    stems = {file: place.with_name(place.stem) for file, place in places.items()}
    made = {file: [f"{stem}{end}".lower() for end in endings] for file, stem in stems.items()}
    count = Counter(itertools.chain(*made.values()))
    return {f: places[f] if any(count[n] > 1 for n in made[f]) else stems[f] for f in stems}


def open_checked(path: str | Path, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Open a picture; an error for PNG with other checksums: Pillow skips those of the pixels."""
    image = Image.open(path, formats=formats)
    if image.format == "PNG":
        image.verify()
        image = Image.open(path, formats=formats)
    return image


def open_image(path: str | Path) -> Image.Image:
    """Open a photo of any of Pillow's own formats, or HEIC (the extra ``heic``).

    Call it in ``runtime.reading``: Pillow raises many types for a file that is no photo. Raises a
    ValueError with file and remedy: HEIC without the extra, or more pixels than
    :func:`photo_limit` allows.
    """
    with open(path, "rb") as file:
        head = file.read(32)  # of HEIC as phones write it, whatever its name
        heif = head[4:12] in (b"ftypmif1", b"ftypmsf1") and b"avif" not in head
        heic = head[4:10] == b"ftyphe" or heif
    try:
        if heic:
            require("pillow_heif", "heic").register_heif_opener()
        return open_checked(path, ("HEIF",) if heic else FORMATS)
    except ImportError as error:
        raise ValueError(f"'{path}' is HEIC: {error}") from error
    except Image.DecompressionBombError as error:
        limit = f"over {2e-6 * Image.MAX_IMAGE_PIXELS:.0f} megapixels, the limit"
        raise ValueError(f"'{path}' has {limit}; --megapixels of `predict` raises it") from error


@contextmanager
def photo_limit(megapixels: float) -> Iterator[None]:
    """Open photos of up to so many million pixels, instead of :data:`MEGAPIXELS`."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = int(megapixels * 1e6 / 2)  # Pillow warns from here, refuses the double
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def stored_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a photo as it is stored, without decoding it; errors of read_image."""
    with reading(path, "a photo"), open_image(path) as image:
        return image.size


def orientation(image: Image.Image) -> int:
    """Orientation of the camera by a photo's EXIF, 1 to 8; 1, upright, where it is unknown."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which must not cost the pixels
        return 1


def read_image(path: str | Path, upright: bool = True) -> Tensor:
    """Decode a photo: (3, H, W) uint8 RGB, alpha over white.

    ``upright`` applies the rotation that the camera noted (EXIF); False keeps the pixels as they
    are stored, as the evaluators of benchmarks read them. A FileNotFoundError, or a ValueError for
    a file that is not a readable image.
    """
    with reading(path, "a photo"), open_image(path) as image:
        return decode(image, upright)


def decode(image: Image.Image, upright: bool = True) -> Tensor:
    """A PIL image of any mode as (3, H, W) uint8 RGB, see :func:`read_image`."""
    if upright:
        image.load()  # this turns a TIFF, and removes its orientation
        # Pillow's exif_transpose would write the EXIF anew, and fail for damage anywhere in it.
        turn = _UPRIGHT.get(orientation(image))
        image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip
        values = np.asarray(image)
        bytes_in_32_bits = image.mode == "I" and values.max() < 256  # as NumPy saves integers
        pixels = (values // (1 if bytes_in_32_bits else 256)).clip(0, 255).astype(np.uint8)
        if "transparency" in image.info:  # one grey level
            pixels[values == image.info["transparency"]] = 255
        image = Image.fromarray(pixels)
    elif image.mode == "F":
        image = Image.fromarray(to_bytes(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Float pixels in 0..1 or 0..255 as uint8; a ValueError for values in neither range."""
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise ValueError("float pixels must be finite and in 0..1 or 0..255")
    return np.round(values * (255 if values.max() <= 1 else 1)).astype(np.uint8)


def read_map(path: str | Path) -> np.ndarray:
    """A map as it is stored, float64: a grey picture, ``.npy``, or ``.npz``.

    Of ``.npz`` it is ``density``, or the only array. Raises a FileNotFoundError, or a ValueError
    for a map that is unreadable, in colours, or with a transparency that varies.
    """
    path, alpha = Path(path), np.zeros(1)
    with reading(path, "a map: 2-D, grey", "make it again from the numbers"):
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                (name,) = ["density"] if "density" in arrays else arrays
                size = sum(part.file_size for part in arrays.zip.infolist())
                most = Image.MAX_IMAGE_PIXELS  # half of photo_limit's pixels; None: no limit
                if most and size > 2 * most * 8:  # float64
                    raise ValueError(f"it unpacks to {size / 1e9:.1f} GB, more than any photo has")
                values = arrays[name]
        else:
            with open_checked(path) as image:
                if image.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
                    image = image.convert("RGBA" if "transparency" in image.info else "RGB")
                values = np.asarray(image)
                if image.mode in ("RGBA", "LA"):
                    values, alpha = values[..., :-1], values[..., -1]
                if values.ndim == 3:
                    values = values if np.ptp(values, axis=2).max() > GREY else values.mean(axis=2)
        if values.ndim == 3 or alpha.min() < alpha.max():
            raise ValueError("it is in colours or partly transparent, as plots are")
        return values.astype(np.float64)


def read_density(path: str | Path) -> Tensor:
    """A density map, (H, W) float64 that sums to 1, in a file for :func:`read_map`.

    Raises its errors, and a ValueError for a map that is negative, or the same everywhere.
    """
    expected = "a density map: 2-D, grey, finite, not negative, not the same everywhere"
    with reading(path, expected, "make it again from the numbers"):
        values = read_map(path)
        total = values.sum()
        if values.ndim != 2 or not 0 < total < np.inf or values.min() < 0:  # NaN makes it NaN
            raise ValueError(f"shape {values.shape}, sum {total:g}")
        if values.min() == values.max():
            raise ValueError("it is the same everywhere")
    return torch.from_numpy(values / total)
