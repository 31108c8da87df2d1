"""Find photos in folders, and read those of any kind: colour modes, 16 bits, rotation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlnet_utils.runtime import reading

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Formats that Pillow decodes itself (JPEG reads MPO too); others, e.g. EPS, start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
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
    folder: Path, suffixes: Sequence[str] = PHOTO_SUFFIXES, out: Path | None = None
) -> list[Path]:
    """Files of these kinds in a folder and its sub-folders, in alphabetical order.

    ``suffixes`` are in lower case, those of files may be in capitals. Left out are hidden files
    (programs make ``._a.jpg`` and ``.ipynb_checkpoints/``) and the folder ``out`` of results.
    """
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not (out and path.resolve().is_relative_to(out.resolve()))
    ]


def orientation(image: Image.Image) -> int:
    """Orientation of the camera by a photo's EXIF, 1 to 8; 1, upright, where it is unknown."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF, which must not cost the pixels
        return 1


def to_upright(image: Image.Image) -> Image.Transpose | None:
    """Decode a photo; the turn that makes it upright, None = it is.

    Pillow's ``exif_transpose`` would also write the EXIF anew, which fails where any other of its
    entries is damaged.
    """
    image.load()  # which turns a TIFF, and then there is no orientation any more
    return _UPRIGHT.get(orientation(image))


def read_image(path: str | Path, upright: bool = True) -> Tensor:
    """Decode a photo: (3, H, W) uint8 RGB, alpha over white.

    ``upright`` applies the rotation that the camera noted (EXIF); False keeps the pixels as they
    are stored, as the evaluators of benchmarks read them.

    Raises:
        ValueError: the file is not a readable image.
        FileNotFoundError: there is no such file.
    """
    with reading(path, "a photo"), Image.open(path, formats=FORMATS) as image:
        return decode(image, upright)


def decode(image: Image.Image, upright: bool = True) -> Tensor:
    """A PIL image of any mode as (3, H, W) uint8 RGB, see :func:`read_image`."""
    if upright and (turn := to_upright(image)) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit greyscale, which convert("RGB") would clip
        values = np.asarray(image)
        pixels = (values / 256).clip(0, 255).astype(np.uint8)
        if "transparency" in image.info:  # one grey level
            pixels[values == image.info["transparency"]] = 255
        image = Image.fromarray(pixels)
    elif image.mode == "F":
        image = Image.fromarray(to_bytes(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Float pixels in 0..1 or 0..255 as uint8.

    Raises:
        ValueError: values that are in neither range.
    """
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
        raise ValueError("float pixels must be finite and in 0..1 or 0..255")
    return np.round(values * (255 if values.max() <= 1 else 1)).astype(np.uint8)


def read_density(path: str | Path) -> Tensor:
    """A density map of a dataset: ``.npz`` (array ``density``) or a greyscale picture.

    Returns:
        (H, W) float64 that sums to 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, negative, or zero everywhere.
    """
    path = Path(path)
    with reading(path, "a density map: 2-D, finite, not negative, not zero everywhere"):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                values = arrays["density"].astype(np.float64)
        else:
            with Image.open(path, formats=FORMATS) as image:
                values = np.asarray(image.convert("F"), dtype=np.float64)
        total = values.sum()
        if values.ndim != 2 or not 0 < total < np.inf or values.min() < 0:  # NaN makes it NaN
            raise ValueError(f"shape {values.shape}, sum {total:g}")
    return torch.from_numpy(values / total)
