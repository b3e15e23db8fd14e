"""Weight files before they become models: hashes, keys, shapes, and the error that names what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class WeightsError(ValueError):
    """A weight file is missing, damaged, or does not fit its configuration; the message says which and what to do."""


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
