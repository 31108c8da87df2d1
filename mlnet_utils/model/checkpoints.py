"""Checkpoints: written atomically, read with ``weights_only=True``, never half-trusted."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mlnet_utils.config import ENGINE_FIELDS, Config, from_dict
from mlnet_utils.model.network import MLNet
from mlnet_utils.model.starting import (
    ARCHITECTURE,
    FORMAT,
    PIN,
    USUAL,
    check_architecture,
    load_checkpoint,
    locate,
    read_start,
)
from mlnet_utils.runtime import atomic_path, display_path, versions

OTHER_RUN = (
    "choose another run folder, delete its checkpoints, or set them aside and train anew with "
    "`reproduce --force`"
)


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
    if (folder / "best.pt").is_file():
        _check_first_epoch(folder / "best.pt", config)
    return None


def _check_same_run(path: Path, content: dict[str, Any], config: Config, data: str) -> None:
    _check_same_config(path, content, config)
    if content.get("data") != data:
        raise ValueError(
            f"checkpoint {path} was trained on other prepared data than {path.parents[1] / 'data'}"
            f" holds now; {OTHER_RUN}"
        )


def _check_same_config(path: Path, content: dict[str, Any], config: Config) -> None:
    stored, wanted = _complete(content["config"]), config.to_dict()
    different = [
        f"{key}: {stored[key]!r} there, {wanted[key]!r} here"
        for key in wanted
        if key not in ENGINE_FIELDS and stored[key] != wanted[key]
    ]
    if different:
        raise ValueError(
            f"checkpoint {path} comes from another configuration ({'; '.join(different)}); "
            f"{OTHER_RUN}"
        )


def _check_first_epoch(best: Path, config: Config) -> None:
    """A best epoch without step checkpoints: a run killed in its first epoch, or deleted files.

    Only in the first case may training begin again, and overwrite what is there.
    """
    content = load_checkpoint(best)
    _check_same_config(best, content, config)
    if content.get("scores", {}).get("epoch", 2) > 1:
        raise ValueError(
            f"{best} is there, but not {best.with_name('last.pt')} to continue from: put it back, "
            "or move best.pt away to train from the beginning"
        )


def _complete(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that are newer than it, at their defaults."""
    return {**Config().to_dict(), **stored}


# ---- starting from another training's weights --------------------------------------------------
def resolve_start(config: Config, folder: Path) -> Config:
    """The configuration of a run whose start checkpoint may be gone by now.

    Args:
        config: as ``load_config`` gave it; without the file it knows no architecture.
        folder: the run's checkpoints; once there is one, it knows.

    Raises:
        FileNotFoundError: the file to start from is missing, and the training has not begun.
    """
    if not config.start_from or locate(config.start_from)[0].is_file():
        return config
    path, digest = locate(config.start_from)
    wanted = f"{display_path(path)}{PIN}{digest}"
    existing = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
    for checkpoint in existing:
        try:
            stored = _complete(load_checkpoint(checkpoint)["config"])
        except ValueError:
            continue
        # Without a checksum, the path has to do.
        if wanted in (stored["start_from"], stored["start_from"].partition(PIN)[0] + PIN):
            unset, default = config.to_dict(), Config().to_dict()
            known = {k: stored[k] for k in (*ARCHITECTURE, *USUAL) if unset[k] == default[k]}
            return dataclasses.replace(config, **known, start_from=stored["start_from"])
        break
    else:
        if existing:
            return config  # none can be read: load_latest says so
    raise FileNotFoundError(
        f"config: start_from={config.start_from} does not exist: name the checkpoint to start "
        "from, e.g. checkpoints/best.pt of another run"
    )


def load_start(model: MLNet, config: Config) -> None:
    """Give a network the weights that its training starts from, if any are named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has changed since, or is of another architecture.
    """
    if not config.start_from:
        return
    content, start_from = read_start(config.start_from)
    check_architecture(config.to_dict(), _complete(content["config"]), start_from)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"config: start_from={start_from.partition(PIN)[0]}: {error}") from error
