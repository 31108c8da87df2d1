"""Checkpoints: written atomically, read without running code, and taken over by a new training."""

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mlnet_utils import runtime
from mlnet_utils.config import ENGINE_FIELDS, RETIRED, Config, from_dict
from mlnet_utils.model import tensorfiles
from mlnet_utils.model.network import MLNet

FORMAT = "mlnet-checkpoint-1"
PIN = "#sha256="  # between a path and the checksum of the file that is meant

# Keys that decide the weights and their meaning: always those of the start.
ARCHITECTURE = (
    *("backbone", "backbone_args", "backbone_drop", "normalisation", "levels", "channels"),
    *("head", "prior_cells", "compat", "output_stride", "rectify", "standardise", "centre"),
)
# Taken from the start unless they are set: the network works at any size.
USUAL = ("height", "width", "channels_last")

REMEDY = "get it again, or train again (notebook 02_training, `reproduce --force` if it ran before)"
OTHER_RUN = "choose another run folder, or train anew with `reproduce --force`"


def save_checkpoint(path: str | Path, config: Config, model: dict, **state: Any) -> None:
    """Write a checkpoint atomically: configuration, weights, versions and any further state.

    The state holds tensors and plain values only: the file loads with ``weights_only=True``. Raises
    OSError: the file could not be written; an earlier file stays.
    """
    content = {
        "format": FORMAT,
        "config": config.to_dict(),
        "versions": runtime.versions(),
        "model": {key: value.detach().cpu() for key, value in model.items()},
        **state,
    }
    content["digest"] = tensorfiles.content_digest(content)
    with runtime.atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # from a path, its name would enter the file
                torch.save(content, file)
        except RuntimeError as error:  # as torch reports a full disk
            raise OSError(str(error)) from error


def save_published(path: str | Path, checkpoint: str | Path, card: dict[str, Any]) -> None:
    """Write a checkpoint's network for others to use, ``.safetensors``, matrices in float16.

    Vectors stay as they are: batch norm's statistics would leave float16's range. The ``card`` has
    plain values for readers, e.g. data, command and scores.
    """
    content = load_checkpoint(checkpoint)
    weights = {
        key: (value.half() if value.is_floating_point() and value.ndim > 1 else value).contiguous()
        for key, value in content["model"].items()
    }
    texts = {"config": json.dumps(content["config"]), "card": json.dumps(card)}
    with runtime.atomic_path(path) as temporary:
        tensorfiles.save_safetensors(temporary, weights, {"format": FORMAT, **texts})


def _load_published(path: Path) -> dict[str, Any]:
    weights, texts = tensorfiles.read_safetensors(path)
    weights = {k: v.float() if v.dtype == torch.half else v for k, v in weights.items()}
    texts = {k: json.loads(v) if k in ("config", "card") else v for k, v in texts.items()}
    return {"model": weights, **texts}


def load_checkpoint(path: str | Path = "") -> dict[str, Any]:
    """Read a checkpoint of a training, or a published network; by default this package's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, damaged, or no checkpoint of this project.
    """
    path = Path(path).expanduser() if str(path) else runtime.SHIPPED
    with runtime.reading(path, "a checkpoint of this project", REMEDY):
        published = path.suffix == ".safetensors"
        content = _load_published(path) if published else tensorfiles.read_torch(path)
        if content.get("format") != FORMAT:
            earlier = "`python -m mlnet_utils import-weights` converts weights of earlier ML-Nets"
            raise ValueError(f"its format is not {FORMAT}; {earlier}")
        from_dict(content["config"])
        tensorfiles.named_tensors(content["model"])
    return content


def load_model(path: str | Path = "") -> tuple[MLNet, Config, dict[str, Any]]:
    """The trained network (in eval mode), its configuration and the rest of the checkpoint.

    Nothing is downloaded: the checkpoint holds all the weights. Errors as of load_checkpoint().
    """
    content = load_checkpoint(path)
    path, config = path if str(path) else runtime.SHIPPED, from_dict(content["config"])
    with runtime.reading(path, "a checkpoint of this project", REMEDY):
        model = MLNet(from_dict({**content["config"], "backbone_weights": "none"}))
        tensorfiles.load_strictly(model, content["model"], "it")
    return model.eval(), config, content


def rotate_and_save(folder: Path, config: Config, model: dict, **state: Any) -> None:
    """Write ``last.pt`` and keep the file before it as ``previous.pt``.

    At every moment in between, one of the two files is a complete checkpoint.
    """
    last, staged = folder / "last.pt", folder / "next.pt"
    save_checkpoint(staged, config, model, **state)
    if last.exists():
        os.replace(last, folder / "previous.pt")
    os.replace(staged, last)


def load_latest(folder: Path, config: Config, data: str) -> dict[str, Any] | None:
    """The newest readable training checkpoint of this run, or None if there is none.

    ``data`` is the digest of the prepared data, as stored by ``rotate_and_save(..., data=digest)``.
    Raises ValueError: checkpoints exist but none is readable, or they come from another
    configuration or other data; training never restarts silently.
    """
    path, content, errors = _newest(folder)
    best = folder / "best.pt"
    if path:
        if errors:
            warnings.warn(f"{errors[0]}; continuing from {path.name}", stacklevel=2)
        _check_same_config(path, content, config)
        if content.get("data") != data:
            other = f"was trained on other prepared data than {folder.parent / 'data'} holds now"
            raise ValueError(f"checkpoint {path} {other}; {OTHER_RUN}")
        return content
    if errors:
        raise ValueError(f"{'; '.join(errors)}; delete the folder {folder} to train anew")
    if best.is_file():
        # A run that was killed in its first epoch may begin again and overwrite this file; where
        # step checkpoints were deleted, it may not.
        content = load_checkpoint(best)
        _check_same_config(best, content, config)
        if content.get("scores", {}).get("epoch", 2) > 1:
            missing = f"{best} is there, but not {folder / 'last.pt'} to continue from"
            raise ValueError(f"{missing}: put it back, or move best.pt away to train anew")
    return None


def _newest(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest readable step checkpoint with its path, and the errors of newer files."""
    errors = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if path.exists():
            try:
                return path, load_checkpoint(path), errors
            except ValueError as error:
                errors.append(str(error))
    return None, {}, errors


def _check_same_config(path: Path, content: dict[str, Any], config: Config) -> None:
    stored, wanted = _complete(content["config"]), {**RETIRED, **config.to_dict()}
    different = [
        f"{key}: {stored[key]!r} there, {wanted[key]!r} here"
        for key in wanted
        if key not in ENGINE_FIELDS and stored[key] != wanted[key]
    ]
    if different:
        other = f"comes from another configuration ({'; '.join(different)})"
        raise ValueError(f"checkpoint {path} {other}; {OTHER_RUN}")


def _complete(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the keys that are newer than it, at their defaults."""
    return {**RETIRED, **Config().to_dict(), **stored}


# ---- starting from another training's weights --------------------------------------------------
def with_start(config: Config, folder: Path | None = None) -> Config:
    """The configuration with the architecture of the checkpoint that it starts from, if any.

    Call it where a run begins: ``load_config`` opens no file. The input size is the start's too,
    unless it is set; ``start_from`` becomes the path as readers should see it, with the file's
    SHA-256. A training that has begun does not need the file: the run's checkpoints in ``folder``
    know the architecture.

    Raises:
        FileNotFoundError: the file is missing, and no training has begun.
        ValueError: no checkpoint, another file than the checksum names, or a key of the
            architecture that is set to another value than the start's.
    """
    if not config.start_from:
        return config
    path, digest = locate(config.start_from)
    if path.is_file():
        content, start_from = read_start(config.start_from)
    else:
        _, content, errors = _newest(folder) if folder else (None, {}, [])
        if errors and not content:
            return config  # load_latest says so
        start_from = content.get("config", {}).get("start_from", "")
        # Without a checksum, the path has to do.
        known = start_from if digest else start_from.partition(PIN)[0] + PIN
        if known != f"{runtime.display_path(path)}{PIN}{digest}":
            missing = f"config: start_from={config.start_from} does not exist"
            raise FileNotFoundError(f"{missing}: name one, e.g. checkpoints/best.pt of a run")
    stored = _complete(content["config"])
    default, wanted = Config().to_dict(), config.to_dict()
    chosen = {key for key in wanted if key in config.given or wanted[key] != default[key]}
    different = [
        f"{key}={wanted[key]!r} where the checkpoint has {stored[key]!r}"
        for key in ARCHITECTURE
        if key in chosen and wanted[key] != stored[key]
    ]
    if different:
        problem = f"{'; '.join(different)} (start_from={start_from.partition(PIN)[0]})"
        raise ValueError(f"config: {problem}; leave these keys out to take the checkpoint's")
    warn_of_other_fold(stored, config.dataset, config.fold)
    taken = {key: stored[key] for key in (*ARCHITECTURE, *(k for k in USUAL if k not in chosen))}
    taken["adapt"] = stored["adapt"] or config.adapt  # an adaptation stays
    given = config.given.union(ARCHITECTURE, USUAL)
    return dataclasses.replace(config, **taken, start_from=start_from, given=given)


def warn_of_other_fold(trained: dict[str, Any], dataset: str, fold: int) -> None:
    """Warn where a network that was ``trained`` so may know the test photos of another fold."""
    shared = {*trained["dataset"].split("+")} & {*dataset.split("+")}
    if shared and trained["fold"] != fold:
        folds = f"fold {trained['fold']} of {trained['dataset']!r}, and here is fold {fold}"
        said = "test photos may be among those that it learned from, which flatters its scores"
        warnings.warn(f"the network was trained on {folds}: {said}", stacklevel=3)


def locate(start_from: str) -> tuple[Path, str]:
    """The file that ``start_from`` names, and its checksum if given, else ``""``.

    ``package`` is the network that comes with the package. A relative path is looked for in the
    working folder, then in the checkout.
    """
    name, _, digest = start_from.partition(PIN)
    path = runtime.SHIPPED if name == "package" else Path(name).expanduser()
    root = runtime.checkout_root()
    if root and not path.is_file():
        path = root / path  # an absolute path stays as it is
    return path, digest


def read_start(start_from: str) -> tuple[dict[str, Any], str]:
    """The checkpoint to start from, and ``start_from`` with the file's checksum.

    Raises FileNotFoundError, ValueError: see :func:`load_checkpoint`; or not the file that the
    checksum names.
    """
    path, wanted = locate(start_from)
    content = load_checkpoint(path)
    digest = runtime.sha256_file(path)
    if wanted not in ("", digest):
        problem = f"start_from asks for {path} with SHA-256 {wanted}, but the file has {digest}"
        raise ValueError(f"config: {problem}: leave {PIN}... out to start from this file")
    return content, f"{runtime.display_path(path)}{PIN}{digest}"


def load_start(model: MLNet, config: Config) -> None:
    """Give a network the weights that its training starts from, if any are named.

    The checksum of the backbone's ImageNet weights comes along. Raises FileNotFoundError,
    ValueError: it is gone, cannot be read, has changed since, or lacks weights of the network.
    """
    if not config.start_from:
        return
    content, start_from = read_start(config.start_from)
    weights = content["model"]
    if config.adapt and not content["config"].get("adapt"):  # an adaptation begins here
        own = model.state_dict()
        weights = weights | {key: own[key] for key in own if key.startswith("adaptation.")}
    tensorfiles.load_strictly(model, weights, f"config: start_from={start_from.partition(PIN)[0]}")
    model.backbone.sha256 = content.get("backbone_sha256", "")
