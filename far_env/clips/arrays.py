"""Arrays in .npz files: shape and type from the header, values with their checksum; nothing in a file is executed."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from far_env.errors import VideoError, first_line

VIDEO = "video"
ACTIONS = "actions"
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def video_shape(path: Path) -> tuple[int, int, int, int]:
    """(T, H, W, 3) of an episode. Raises VideoError if the file is damaged or its ``video`` is not uint8 (T, H, W, 3)."""
    shape, dtype = _header(path, VIDEO)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise VideoError(f"{path}: {VIDEO!r} must be uint8 (T, H, W, 3), got {dtype} {shape}")
    return shape


def episode_length(path: Path) -> int:
    """Frames of an episode. Raises VideoError as `video_shape` does."""
    return video_shape(path)[0]


def num_actions(path: Path) -> int:
    """Length of a file's ``actions``. Raises VideoError if the file is damaged or they are not integers (T,)."""
    shape, dtype = _header(path, ACTIONS)
    if dtype.kind not in "iu" or len(shape) != 1:
        raise VideoError(f"{path}: {ACTIONS!r} must be integers (T,), got {dtype} {shape}")
    return shape[0]


def holds_actions(path: Path) -> bool:
    """Return whether an .npz file has an array ``actions``. Raises VideoError if it is damaged."""
    with _opened(path) as file:
        return f"{ACTIONS}.npy" in file.namelist()


def read_episode(path: Path) -> np.ndarray:
    """All frames of an episode, uint8 (T, H, W, 3). Raises VideoError as `episode_length` does."""
    episode_length(path)
    return _read(path, VIDEO)


def read_actions(path: Path, num_classes: int | None = None) -> np.ndarray:
    """All actions of a file, int64 (T,). Raises VideoError as `num_actions` does, or if one is not in 0 … num_classes-1."""
    num_actions(path)
    actions = _read(path, ACTIONS).astype(np.int64)
    if num_classes is not None and len(actions) and not 0 <= actions.min() <= actions.max() < num_classes:
        raise VideoError(f"{path} holds actions from {actions.min()} to {actions.max()}, valid are 0 to {num_classes - 1}")
    return actions


def read_number(path: Path, name: str) -> int:
    """A single integer of a file. Raises VideoError if the file is damaged or ``name`` is something else."""
    shape, dtype = _header(path, name)
    if shape or dtype.kind not in "iu":
        raise VideoError(f"{path}: {name!r} must be one integer, got {dtype} {shape}")
    return int(_read(path, name))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; errors while it is read become VideoErrors."""
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except VideoError:
        raise
    except Exception as error:  # zipfile and NumPy raise many kinds of them on damaged files
        raise VideoError(f"{path} cannot be read as an .npz file: {first_line(error)}") from error


def _header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, from its header."""
    with _opened(path) as file:
        if f"{name}.npy" not in file.namelist():
            raise VideoError(f"{path} holds no array {name!r}")
        with file.open(f"{name}.npy") as array:
            version = np.lib.format.read_magic(array)
            if version not in _READ_HEADER:
                raise VideoError(f"{path}: {name!r} is stored in the unknown version {version} of NumPy's format")
            shape, _, dtype = _READ_HEADER[version](array)
            stored = file.getinfo(f"{name}.npy").file_size - array.tell()
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize != stored:
                raise VideoError(f"{path}: {name!r} has a header for {dtype} {shape}, which does not match its {stored} bytes")
            return shape, dtype


def _read(path: Path, name: str) -> np.ndarray:
    """The array, with its checksum compared."""
    with _opened(path) as file, file.open(f"{name}.npy") as array:
        return np.lib.format.read_array(array, allow_pickle=False)
