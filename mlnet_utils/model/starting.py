"""What a training starts from: a checkpoint, whose architecture the configuration takes over.

Stands before ``config``, which asks while it resolves a preset; torch is imported only then.
"""

import os
import pickle
from pathlib import Path
from typing import Any

from mlnet_utils.runtime import checkout_root, display_path, sha256_file

FORMAT = "mlnet-checkpoint-1"
PIN = "#sha256="  # between a path and the checksum of the file that is meant

# What the weights are made for: never another value than the checkpoint's.
ARCHITECTURE = (
    *("backbone", "backbone_args", "backbone_drop", "normalisation", "levels", "channels"),
    *("head", "prior_cells", "compat"),
)
# Taken from the checkpoint unless they are set: the network works at any size.
USUAL = ("height", "width", "channels_last")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, truncated, or not one of this project's checkpoints.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; notebook 02_training makes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a truncated or foreign file
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason(error)}); was it cut short?"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this project; weights of the earlier implementations "
            "are converted by `python -m mlnet_utils import-weights`"
        )
    return content


def reason(error: Exception) -> str:
    """Why torch cannot read a file, without its advice to allow the file to run code."""
    unsafe = isinstance(error, pickle.UnpicklingError)
    return "it holds something other than tensors and plain values" if unsafe else str(error)


def locate(start_from: str | os.PathLike) -> tuple[Path, str]:
    """The file that ``start_from`` names, and its checksum if one is given, else ``""``.

    A relative path is one of the working folder, if it is there, else one of the checkout.
    """
    name, _, digest = str(start_from).partition(PIN)
    path = Path(name).expanduser()
    root = checkout_root()
    if root and not path.is_file():
        path = root / path  # an absolute path stays as it is
    return path, digest


def read_start(start_from: str | os.PathLike) -> tuple[dict[str, Any], str]:
    """The checkpoint to start from, and ``start_from`` with the file's checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this project, or not the one that the checksum names.
    """
    path, wanted = locate(start_from)
    content = load_checkpoint(path)
    digest = sha256_file(path)
    if wanted not in ("", digest):
        raise ValueError(
            f"config: start_from asks for {path} with SHA-256 {wanted}, but the file has {digest}: "
            f"leave {PIN}... out to start from the file as it is now"
        )
    return content, f"{display_path(path)}{PIN}{digest}"


def inherit(values: dict[str, Any]) -> dict[str, Any]:
    """Complete a configuration with the architecture of the checkpoint that it starts from.

    A missing file changes nothing here: it is reported when the training starts, because a
    training that continues does not need it.

    Args:
        values: keys that were set, ``start_from`` among them.

    Returns:
        The same with the checkpoint's architecture, and its input size unless one is set;
        ``start_from`` names the file as readers should see it, with its checksum.

    Raises:
        ValueError: no checkpoint, or a key that is set to another value than the checkpoint's.
    """
    if values.get("backbone_weights", "none") != "none":
        raise ValueError(
            f"config: backbone_weights={values['backbone_weights']!r} and start_from exclude each "
            "other: a checkpoint holds all weights, the backbone's too; set one of them"
        )
    values = {**values, "start_from": str(values["start_from"]), "backbone_weights": "none"}
    if not locate(values["start_from"])[0].is_file():
        return values
    content, start_from = read_start(values["start_from"])
    stored = content["config"]
    check_architecture(values, stored, start_from)
    usual = {key: stored[key] for key in USUAL if key in stored}
    fixed = {key: stored[key] for key in ARCHITECTURE if key in stored}
    return {**usual, **values, **fixed, "start_from": start_from}


def check_architecture(values: dict[str, Any], stored: dict[str, Any], start_from: str) -> None:
    """Compare the keys that decide which weights there are, and what they mean.

    Raises:
        ValueError: some differ; names each with both values.
    """
    different = [
        f"{key}={values[key]!r} where the checkpoint has {stored[key]!r}"
        for key in ARCHITECTURE
        if key in values and key in stored and _plain(values[key]) != _plain(stored[key])
    ]
    if different:
        raise ValueError(
            f"config: {'; '.join(different)} (start_from={start_from.partition(PIN)[0]}): weights "
            "fit only the network they were trained in; leave these keys out, and they are taken "
            "from the checkpoint"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
