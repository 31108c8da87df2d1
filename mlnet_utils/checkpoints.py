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

    Raises:
        OSError: the file could not be written; what was there before is still there.
    """
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "versions": versions(),
        "model": {key: value.detach().cpu() for key, value in model.items()},
        **state,
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(
            f"checkpoint {path} could not be written ({error}); is the disk full? The one "
            "before it is intact: make room and run the same command again"
        ) from error


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
        raise ValueError(
            f"checkpoint {path} cannot be read ({error}); was it cut short?"
        ) from error
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
    model.load_state_dict(content["model"])
    return model.eval(), config, content


def rotate_and_save(folder: Path, config: Config, model: dict, **state: Any) -> None:
    """Write ``last.pt`` and keep the one before it as ``previous.pt``.

    At every moment in between, one of the two is a complete checkpoint.
    """
    last, staged = folder / "last.pt", folder / "next.pt"
    save_checkpoint(staged, config, model, **state)
    if last.exists():
        os.replace(last, folder / "previous.pt")
    os.replace(staged, last)


def load_latest(folder: Path, config: Config, data: str) -> dict[str, Any] | None:
    """The newest readable training checkpoint of this run, or None if there is none.

    Args:
        folder: the run's checkpoints.
        config: what the run is configured to do now.
        data: digest of the prepared data, as stored by ``rotate_and_save(..., data=digest)``.

    Raises:
        ValueError: checkpoints exist but none is readable, or they come from another
            configuration or other data; training never restarts silently.
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
        _check_same_run(path, content, config, data)
        return content
    if errors:
        raise ValueError(
            "; ".join(errors) + f"; delete the folder {folder} to train from the beginning"
        )
    return None


def _check_same_run(path: Path, content: dict[str, Any], config: Config, data: str) -> None:
    stored, wanted = content["config"], config.to_dict()
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
    if content.get("data") != data:
        raise ValueError(
            f"checkpoint {path} was trained on other prepared data than {path.parents[1] / 'data'}"
            " holds now; choose another run folder, or delete its checkpoints"
        )
