"""Two hosts: a model of one's own, and the shipped one with half the ODE steps per frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from far_env.host.far_host import FARHost
from far_env.host.protocol import Conditions, Host
from far_env.host.weights import load_host


class NearestFrame(Host):
    """Copies the frame that came after the kept frame most like the newest one."""

    name = "nearest_frame"
    latent_shape = (192, 8, 8)
    frame_size = 64

    def encode(self, frames: Tensor) -> Tensor:
        """Each square of 8 × 8 pixels becomes one cell: (B, F, 192, 8, 8)."""
        return pixel_unshuffle(frames, 8)

    def decode(self, latents: Tensor) -> Tensor:
        """The squares side by side again: (B, F, 3, 64, 64)."""
        return pixel_shuffle(latents, 8)

    def generate(self, kept: Sequence[Tensor], noise: Tensor, conditions: Conditions) -> Tensor:
        """One new frame (192, 8, 8); the newest again where nothing else is kept."""
        *earlier, newest = kept
        distances = [(frame - newest).square().mean() for frame in earlier]
        return kept[int(torch.stack(distances).argmin()) + 1] if earlier else newest


def load_two_steps(device: torch.device, dtype: torch.dtype) -> FARHost:
    """The host on a device, computing in ``dtype``. It is called once per device and dtype."""
    return replace(load_host("embedded", str(device), dtype), name="embedded_two_steps", num_steps=2)
