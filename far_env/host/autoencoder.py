"""Frames to latents and back: diffusers' DCAE with FAR's scaling, over video tensors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """A deep-compression autoencoder (arXiv 2410.10733) for frames in [0, 1]; deterministic, frame by frame.

    Args:
        config: arguments of ``diffusers.AutoencoderDC``; ``scaling_factor`` multiplies latents.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.dcae = AutoencoderDC(**config)

    @property
    def scaling_factor(self) -> float:
        """What encoded latents are multiplied by."""
        return self.dcae.config.scaling_factor

    @property
    def compression(self) -> int:
        """Side of the image region that one latent pixel stands for."""
        return self.dcae.spatial_compression_ratio

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [0, 1] to scaled latents (B, F, C, H/f, W/f)."""
        latents = self.dcae.encode(frames.flatten(0, 1) * 2 - 1).latent
        return latents.unflatten(0, frames.shape[:2]) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) to frames (B, F, 3, h·f, w·f), clamped to [0, 1]."""
        frames = self.dcae.decode(latents.flatten(0, 1) / self.scaling_factor).sample
        return (frames / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2])
