"""Weights and checkpoints on disk: hashes, keys and shapes checked, written whole or not at all, never unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from far_env.errors import WeightsError, first_line


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise WeightsError naming the first missing or unexpected key or wrong shape of a state dict read from ``path``."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} is no plain state dict of tensors")
    for key in sorted(expected.keys() | state.keys(), key=str):
        if key not in state:
            raise WeightsError(f"{path} lacks the key {key!r}; it was made for another configuration")
        if key not in expected:
            raise WeightsError(f"{path} has the unexpected key {key!r}; it was made for another configuration")
        if state[key].shape != expected[key].shape:
            found, wanted = tuple(state[key].shape), tuple(expected[key].shape)
            raise WeightsError(f"{path}: {key!r} has shape {found}, the configuration needs {wanted}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hex. Raises WeightsError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"the weight file {path} cannot be read: {error.strerror}; restore it or train it again") from error


def save_tensors(path: Path, content: object) -> None:
    """``torch.save`` under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".part")
    torch.save(content, temporary)
    temporary.replace(path)


def load_tensors(path: Path) -> dict:
    """``torch.load`` of tensors and plain values only. Raises ValueError if the file is damaged or holds anything else."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = first_line(error)
        raise ValueError(f"the checkpoint {path} cannot be read ({reason}); delete it to start this stage again") from error


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a safetensors file strictly into ``model``; returns it in eval mode, float32, without gradients.

    Raises:
        WeightsError: naming the first missing or unexpected key or wrong shape, or that the file is damaged.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}); restore it or train it again") from error
    expected = model.state_dict()
    check_state(state, expected, path)
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})
    return model.eval().requires_grad_(False)
