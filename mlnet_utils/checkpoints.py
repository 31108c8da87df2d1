"""Checkpoints: written atomically, read with ``weights_only=True``, never half-trusted."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mlnet_utils.config import ENGINE_FIELDS, Config, from_dict
from mlnet_utils.model import MLNet
from mlnet_utils.runtime import atomic_path, versions

FORMAT = "mlnet-checkpoint-1"


def save_checkpoint(path: str | Path, config: Config, model: dict, **state: Any) -> None:
    """Write a checkpoint atomically: configuration, weights, versions and any further state.

    Args:
        path: the file to (re)place.
        config: stored as a plain dictionary inside the file.
        model: the model's state dict.
        state: tensors and plain values only, so that the file loads with ``weights_only=True``.
    """
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "versions": versions(),
        "model": {key: value.detach().cpu() for key, value in model.items()},
        **state,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, truncated, or not one of this project's checkpoints.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; notebook 02_training makes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a truncated or foreign file
        raise ValueError(f"checkpoint {path} cannot be read ({error}); was it cut short?") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this project; weights of the earlier implementations "
            "are converted by `python -m mlnet_utils import-weights`"
        )
    return content


def load_model(path: str | Path) -> tuple[MLNet, Config, dict[str, Any]]:
    """The trained network (in eval mode), its configuration and the rest of the checkpoint.

    Nothing is downloaded: the checkpoint holds all the weights.
    """
    content = load_checkpoint(path)
    config = from_dict(content["config"])
    model = MLNet(from_dict({**content["config"], "backbone_weights": "none"}))
    if config.normalisation == "auto" and "normalisation" in content:
        model.swap_to_bgr = content["normalisation"] == "caffe"
    model.load_state_dict(content["model"])
    return model.eval(), config, content


def rotate_and_save(folder: Path, config: Config, model: dict, **state: Any) -> None:
    """Write ``last.pt`` and keep the one before it as ``previous.pt``."""
    last, previous = folder / "last.pt", folder / "previous.pt"
    staged = folder / "next.pt"
    save_checkpoint(staged, config, model, **state)
    if last.exists():
        os.replace(last, previous)
    os.replace(staged, last)


def load_latest(folder: Path, config: Config) -> dict[str, Any] | None:
    """The newest readable training checkpoint of this configuration, or None if there is none.

    Raises:
        ValueError: checkpoints exist but none is readable, or they come from another
            configuration; training never restarts silently.
    """
    existing = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
    errors = []
    for path in existing:
        try:
            content = load_checkpoint(path)
        except ValueError as error:
            errors.append(str(error))
            continue
        if errors:
            warnings.warn(f"{errors[0]}; continuing from {path.name}", stacklevel=2)
        _same_config(path, content["config"], config)
        return content
    if errors:
        raise ValueError(
            "; ".join(errors) + f"; delete the folder {folder} to train from the beginning"
        )
    return None


def _same_config(path: Path, stored: dict[str, Any], config: Config) -> None:
    wanted = config.to_dict()
    different = [
        f"{key}: {stored.get(key)!r} there, {wanted[key]!r} here"
        for key in wanted
        if key not in ENGINE_FIELDS and stored.get(key) != wanted[key]
    ]
    if different:
        raise ValueError(
            f"checkpoint {path} comes from another configuration ({'; '.join(different)}); "
            "choose another run folder, or delete its checkpoints"
        )
