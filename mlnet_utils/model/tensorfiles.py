"""Files of tensors: read without running code from them, and compared with their digest.

Both kinds, ``.safetensors`` and those of ``torch.save``, hold weights of backbones or checkpoints;
checkpoints.py gives the tensors a meaning.
"""

import hashlib
import pickle
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mlnet_utils.runtime import reading


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth``/``.pt`` state dict; errors as :func:`reading`."""
    path = Path(path).expanduser()
    with reading(path, "weights: tensors by name", "get it again, or name another"):
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        state = read_torch(path)
        return named_tensors(state.get("state_dict", state))


def named_tensors(state: Any) -> dict[str, Tensor]:
    """The state dict; a ValueError for anything but tensors by name."""
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in items):
        raise ValueError("it holds something other than tensors by name")
    return state


def read_torch(path: Path) -> dict[str, Any]:
    """Read a dictionary that ``torch.save`` wrote, without running code from the file.

    Its :func:`content_digest` is compared, or without a digest the checksums of the zip: torch
    reads a file with flipped bits without a word. Call it in :func:`reading`: torch, zipfile
    and this function raise many types for a file that is damaged or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch advises to let the file run code
        raise ValueError("it holds something other than tensors and plain values") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no dictionary")
    digest = content.pop("digest", None)
    if digest:
        if digest != content_digest(content):
            raise ValueError("its content is not what was written")
    elif zipfile.is_zipfile(path):  # files before PyTorch 1.6 are none
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
    return content


def save_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and texts with the digest of both, which :func:`read_safetensors` compares."""
    digest = content_digest({**metadata, "tensors": tensors})
    safetensors.torch.save_file(tensors, path, {**metadata, "digest": digest})


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a file, compared with the digest that :func:`save_safetensors` wrote.

    Call it in :func:`reading`; a ValueError where the content has another digest.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    digest = metadata.pop("digest", "")
    if digest and digest != content_digest({**metadata, "tensors": tensors}):
        raise ValueError("its content is not what was written")
    return tensors, metadata


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 over nested tensors and plain values: names, types, shapes and numbers."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            numbers = value.detach().cpu().contiguous().flatten()
            digest.update(numbers.view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict; a ValueError lists the entries that do not fit, or are not finite."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problems = textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise ValueError(f"{source} does not match the network: {problems}") from error
    lost = [key for key, value in module.state_dict().items() if not value.isfinite().all()]
    if lost:
        problem = f"{lost[0]} and {len(lost) - 1} more hold values that are not finite numbers"
        raise ValueError(f"{source} cannot be used: {problem}; get it again, or train again")
