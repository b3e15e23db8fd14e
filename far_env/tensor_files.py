"""Weights and checkpoints on disk: hashes, keys, shapes and values are checked, nothing is unpickled.

Files are written under a temporary name and then renamed, so that a file is either complete or absent.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from far_env.errors import WeightsError, first_line
from far_env.io import replacing

CHECKSUM = "sha256"
"""Key of the checksum in the metadata of a safetensors file."""


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise WeightsError unless a state dict read from ``path`` has the keys, shapes and kinds of numbers of ``expected``.

    The message names the first missing or unexpected key, or the first tensor that has another shape, has integers where
    floating-point numbers are needed (or the reverse), or holds a NaN or an infinity.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is no plain state dict of tensors")
    for key in sorted(expected.keys() | state.keys(), key=str):
        if key not in state:
            raise WeightsError(f"{path} lacks the key {key!r}; it was made for another configuration")
        if key not in expected:
            raise WeightsError(f"{path} has the unexpected key {key!r}; it was made for another configuration")
        tensor, template = state[key], expected[key]
        if tensor.shape != template.shape:
            shapes = tuple(tensor.shape), tuple(template.shape)
            raise WeightsError(f"{path}: {key!r} has shape {shapes[0]}, the configuration needs {shapes[1]}")
        if tensor.is_floating_point() != template.is_floating_point() or tensor.is_complex():
            raise WeightsError(f"{path}: {key!r} has the type {tensor.dtype}, the configuration needs {template.dtype}")
        if not tensor.to(template.dtype).isfinite().all():
            raise WeightsError(f"{path}: {key!r} holds values that are not finite; restore the file or train it again")


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hex. Raises WeightsError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"the weight file {path} cannot be read: {error.strerror}; restore it or train it again") from error


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file with a checksum in its metadata. Raises ValueError if that cannot be done.

    The file's permissions follow the umask; ``safetensors.torch.save_file`` would make it readable for its owner alone.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    content = serialise(state, metadata={CHECKSUM: _state_hash(state)})
    with _replacing(path) as file:
        file.write(content)


def save_tensors(path: Path, content: object) -> None:
    """``torch.save`` of tensors and plain values. Raises ValueError if that cannot be done."""
    with _replacing(path) as file:
        torch.save(content, file)


def load_tensors(path: Path) -> dict:
    """``torch.load`` of a dict of tensors and plain values. Raises ValueError if the file is damaged or holds anything else."""
    try:
        check_archive(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"the checkpoint {path} cannot be read ({reason}); delete it to start this stage again") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"the checkpoint {path} holds no dict but {kind}; delete it to start this stage again")
    return content


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file strictly into ``model``; returns it in eval mode, float32, without gradients.

    Raises:
        WeightsError: if the file is damaged, or its tensors do not fit, see `check_state`.
    """
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise WeightsError(f"{path} is not a readable safetensors file ({reason}); restore it or train it again") from error
    if checksum is not None and checksum != _state_hash(state):
        raise WeightsError(f"{path} is damaged: its checksum does not match; restore it or train it again")
    expected = model.state_dict()
    check_state(state, expected, path)
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})
    return model.eval().requires_grad_(False)


def check_archive(path: Path) -> None:
    """Compare the checksums of a file of ``torch.save``, which ``torch.load`` does not do. Raises BadZipFile if one is wrong.

    Files in torch's format before version 1.6, which has no checksums, pass.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def _state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of contiguous tensors, in hex."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """The temporary file of `far_env.io.replacing`, opened. torch.save reports a full disk as RuntimeError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            yield file
        except RuntimeError as error:
            raise ValueError(f"cannot write {path}: {first_line(error)}") from error
