"""Pre-encoded latents, the form in which FAR offers some data: one tensor (T, C, h, w) per file, not scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.errors import VideoError, first_line
from far_env.tensor_files import check_archive


class LatentAutoencoder(Protocol):
    """The part of an autoencoder that decodes stored latents."""

    @property
    def scaling_factor(self) -> float:
        """Factor between stored latents and those that the host computes with."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) to frames (B, F, 3, H, W) in [0, 1]."""


class LatentHost(Protocol):
    """A video model whose autoencoder produced stored latents; `far_env.host.far_host.FARHost` is one."""

    @property
    def name(self) -> str:
        """For error messages."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame."""

    @property
    def autoencoder(self) -> LatentAutoencoder:
        """Decodes the latents."""

    @property
    def device(self) -> torch.device:
        """The device on which the autoencoder computes."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which it computes."""


def count_latents(path: Path) -> int:
    """Frames of a file, without reading them. Raises VideoError unless it holds exactly one tensor of floats (T, C, h, w)."""
    return len(_mapped(path))


def check_latents(path: Path) -> None:
    """Read a whole file. Raises VideoError as `read_latents` does."""
    read_latents(path, 0, count_latents(path))


def read_latents(path: Path, start: int, count: int) -> Tensor:
    """Latents start … start+count-1, float32 (count, C, h, w), not scaled.

    Raises:
        VideoError: as `count_latents` does, if the file's checksum does not match, or if there are too few latents, or some
            that are not finite.
    """
    latents = _mapped(path, verify=True)
    if start + count > len(latents):
        last = start + count - 1
        raise VideoError(f"{path} ends early: latents {start} to {last} were requested, {len(latents)} are there")
    latents = latents[start : start + count].float().clone()
    if not latents.isfinite().all():
        raise VideoError(f"{path} holds latents that are not finite")
    return latents


def decode_latents(latents: Tensor, host: LatentHost) -> tuple[np.ndarray, np.ndarray]:
    """Decode stored latents (T, C, h, w) with a host's autoencoder.

    Returns:
        Frames (T, 3, H, W) in [0, 1] and the scaled latents, both float32.
    """
    scaled = latents * host.autoencoder.scaling_factor
    frames = host.autoencoder.decode(scaled[None].to(host.device, host.dtype))[0]
    return frames.float().cpu().numpy(), scaled.numpy()


def _mapped(path: Path, *, verify: bool = False) -> Tensor:
    """The file's tensor, mapped from the disk; ``verify`` reads all of it first, to compare its checksum."""
    try:
        if verify:
            check_archive(path)
        latents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise VideoError(f"{path} cannot be read as a tensor of latents: {first_line(error)}") from error
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
        actual = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise VideoError(f"{path} must hold one tensor of floats (T, C, h, w), got {actual}")
    return latents
