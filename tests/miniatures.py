"""Miniature datasets in the layouts and MATLAB structures of the originals."""

import io
import zipfile

import numpy as np
from PIL import Image
from scipy.io import savemat

TURNED = Image.Exif()
TURNED[0x0112] = 6  # the camera was held upright


def save_photo(path, width=64, height=48, seed=0):
    """A photo of noise, which JPEG cannot shorten to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_map(path, width=64, height=48, seed=0):
    """A density map of noise, as a grey picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_mat(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, values, do_compression=True)
    return path


def cells(values):
    """A MATLAB cell array, 1 x N."""
    array = np.empty((1, len(values)), object)
    for place, value in enumerate(values):
        array[0, place] = value
    return array


def save_osie(root, records, width=800, height=600):
    """``records``: photo name to a list of subjects, each (x, y, duration) in 1-based pixels."""
    for name in records:
        save_photo(root / "data/stimuli" / name, width, height)
    content = [
        {
            "img": name,
            "subjects": cells(
                [
                    {"fix_x": np.array([x]), "fix_y": np.array([y]), "fix_duration": np.array([d])}
                    for x, y, d in subjects
                ]
            ),
        }
        for name, subjects in records.items()
    ]
    return save_mat(root / "data/eye/fixations.mat", fixations=cells(content))


def save_salicon_mat(path, workers, edition, resolution=(480, 640)):
    """``workers``: (N, 2) 1-based x, y of each; workers lie along the edition's axis."""
    gaze = np.empty(len(workers), [(n, object) for n in ("location", "timestamp", "fixations")])
    for place, points in enumerate(workers):
        points = np.asarray(points, np.uint16).reshape(-1, 2)
        samples = np.repeat(points, 3, axis=0)
        gaze[place] = (samples, np.arange(len(samples))[:, None], points)
    return save_mat(
        path,
        image=path.stem,
        resolution=np.array([resolution]),
        gaze=gaze[:, None] if edition == "2017" else gaze[None],
    )


def save_recording(path, positions):
    """A recording of MIT1003; the variable's name is cut as MATLAB cuts it."""
    record = {"imgName": path.stem, "DATA": {"eyeData": positions}}
    return save_mat(path, **{path.stem[:31]: record})


def truncate(path, share=0.5):
    """Cut a file off, as an interrupted copy does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def zipped(files):
    """The bytes of a zip of ``files``, content by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def save_salicon(root, edition, workers, maps=False):
    """Two photos to train on, and one each of ``val`` and ``test``, whose fixations are secret."""
    for number, split in enumerate(("train", "train", "val", "test"), start=1):
        stem = f"COCO_{split}2014_{number:012d}"
        save_photo(root / f"images/{split}/{stem}.jpg", 640, 480)
        if split != "test":
            save_salicon_mat(root / f"fixations-{edition}/{split}/{stem}.mat", workers, edition)
        if maps and split != "test":
            save_map(root / f"maps-{edition}/{split}/{stem}.png", 640, 480)
    return root
