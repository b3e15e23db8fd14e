"""Damages files as disks, interrupted copies and strangers do, reproducibly."""

from __future__ import annotations

import os
import pickle

import numpy as np
import torch


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with flipped bits, a part overwritten, missing or inserted, or without its end."""
    data = bytearray(content)
    kind, at = rng.integers(6), int(rng.integers(len(data)))
    length = int(rng.integers(1, 64))
    if kind == 0:
        for place in rng.integers(0, len(data), size=rng.integers(1, 9)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 2:
        data[at : at + length] = rng.bytes(len(data[at : at + length]))
    elif kind == 3:
        del data[at : at + length]
    elif kind == 4:
        data[at:at] = rng.bytes(length)
    else:
        del data[at:]
    # Headers are a small part of a file, but break in more ways than the rest.
    if kind < 3 and rng.random() < 0.5:
        data[: min(256, len(data))] = damaged(content[: min(256, len(content))], rng)[: min(256, len(data))]
    return bytes(data)


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, path: os.PathLike) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def write_code(path: os.PathLike, executed: os.PathLike, kind: int) -> None:
    """A file whose unpickling makes the folder ``executed``: a plain pickle, or one of torch, alone or beside tensors."""
    if kind == 0:
        with open(path, "wb") as file:
            pickle.dump(Code(executed), file)
    else:
        torch.save(Code(executed) if kind == 1 else {"a": torch.zeros(2), "b": Code(executed)}, path)


def assert_sentence(error: BaseException, path: os.PathLike) -> None:
    """A refusal is one line that names the file."""
    message = str(error)
    assert str(path) in message and "\n" not in message and len(message) < 600 + 2 * len(str(path)), message
