"""Encodes frames as latents and decodes them: diffusers' DCAE with FAR's scaling, for video tensors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

CHUNK_FRAMES = 32
"""Frames per pass: with more, activations exceed the CPU's caches and each frame takes up to four times as long."""


class Autoencoder(nn.Module):
    """A deep-compression autoencoder (arXiv 2410.10733) for frames in [0, 1]; deterministic, frame by frame.

    Args:
        config: arguments of ``diffusers.AutoencoderDC``; ``scaling_factor`` multiplies latents. Kept as ``settings``.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.settings = config
        self.dcae = AutoencoderDC(**config).to(memory_format=torch.channels_last)

    @property
    def scaling_factor(self) -> float:
        """Factor by which encoded latents are multiplied."""
        return self.dcae.config.scaling_factor

    @property
    def compression(self) -> int:
        """Pixels per latent pixel along each axis."""
        return self.dcae.spatial_compression_ratio

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [0, 1] to scaled latents (B, F, C, H/f, W/f)."""
        chunks = [self.dcae.encode(_image_batch(chunk) * 2 - 1).latent for chunk in frames.flatten(0, 1).split(CHUNK_FRAMES)]
        return torch.cat(chunks).contiguous().unflatten(0, frames.shape[:2]) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) to frames (B, F, 3, h·f, w·f), clamped to [0, 1]."""
        scaled = latents.flatten(0, 1) / self.scaling_factor
        frames = torch.cat([self.dcae.decode(_image_batch(chunk)).sample for chunk in scaled.split(CHUNK_FRAMES)])
        return (frames.contiguous() / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2])


def _image_batch(images: Tensor) -> Tensor:
    """The images in channels-last memory format, in which convolutions are fastest on CPUs."""
    return images.contiguous(memory_format=torch.channels_last)
